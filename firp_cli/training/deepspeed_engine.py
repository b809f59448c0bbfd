"""DeepSpeed as the optimizer backend: ZeRO 0-3, gradient accumulation, clipping, fp32 or bf16.

The engine does not contain the frozen teacher. AdamW is torch's: DeepSpeed's own compiles an extension on first use.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import torch
from torch import Tensor

from firp_cli.config import TrainingConfig
from firp_cli.distributed.launch import load_deepspeed, start
from firp_cli.predictors.base import Predictor
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.batches import MicroBatch
from firp_cli.training.objective import ObjectiveModule
from firp_cli.training.pace import Pace, make_optimizer

MMAP_THRESHOLD, GIVEN_BACK = -3, 4 << 20  # mallopt's parameter; bytes from which on a freed block is given back


def deepspeed_config(settings: TrainingConfig, accumulation: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a training section, with `accumulation` micro-batches per rank and step."""
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.max_grad_norm,
        "steps_per_print": 1 << 30,
        "bf16": {"enabled": settings.precision == "bf16"},
        "zero_optimization": {"stage": settings.zero_stage},
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
    }


class DeepSpeedBackend:
    """DeepSpeed engine over the objective; building it joins the ranks."""

    def __init__(
        self,
        predictor: Predictor,
        teacher: Teacher,
        settings: TrainingConfig,
        pace: Pace,
        accumulation: int,
        frozen: bool = False,
        frequent: Tensor | None = None,
    ) -> None:
        start()
        module = ObjectiveModule(predictor, teacher, settings, frozen, frequent)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer, scheduler = make_optimizer(parameters, settings, pace)
        self.settings = settings
        self.engine, *_ = load_deepspeed().initialize(
            model=module,
            model_parameters=parameters,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(settings, accumulation),
        )

    @property
    def learning_rate(self) -> float:
        return float(self.engine.get_lr()[0])

    def backward(self, item: MicroBatch, last: bool) -> tuple[Tensor, Tensor]:
        loss, sums, item.states = self.engine(item.batch, item.anchors, item.states)
        self.engine.backward(loss)
        if not last:
            self.engine.step()  # counts the micro-batch; the call after the last one takes the optimizer step
        return loss, sums

    def step(self) -> float | None:
        if self.settings.zero_stage == 0 and self.settings.precision == "fp32":  # here DeepSpeed returns no norm
            gradients = [item.grad for item in self.engine.module.parameters() if item.grad is not None]
            norm: Any = torch.nn.utils.get_total_norm(gradients)
            self.engine.step()
        else:
            self.engine.step()
            norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def evaluate(self, item: MicroBatch) -> Tensor:
        self.engine.eval()
        with torch.no_grad():
            _, sums, item.states = self.engine(item.batch, item.anchors, item.states)
        self.engine.train()
        return sums

    def weights(self) -> dict[str, Tensor]:
        """Return the predictor's whole weights, on the CPU. Every rank calls it: a collective under ZeRO-3."""
        predictor = self.engine.module.predictor
        gathered: Any = contextlib.nullcontext()
        if self.settings.zero_stage == 3:
            gathered = load_deepspeed().zero.GatheredParameters(list(predictor.parameters()), modifier_rank=None)
        with gathered:
            return {
                name: value.detach().to("cpu", copy=True).contiguous() for name, value in predictor.state_dict().items()
            }


def give_back_freed_memory() -> None:
    """Make the C library return large freed blocks of a CPU run at once, where it is glibc.

    Its own threshold rises to the largest block freed so far; chunks of logits then come from the heap and leave holes
    in it, and a run with a large vocabulary holds more than it uses (`scripts/memory_growth.py`).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, GIVEN_BACK)
