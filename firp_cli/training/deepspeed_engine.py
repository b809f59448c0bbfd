"""DeepSpeed around the predictor: ZeRO 0-3, gradient accumulation, clipping, fp32 or bf16, warm-up and cosine.

The frozen teacher stays outside. AdamW is torch's: DeepSpeed's own compiles an extension on first use.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from firp_cli.config import TrainingConfig
from firp_cli.distributed.launch import load_deepspeed, start
from firp_cli.predictors.base import Predictor
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.objective import ObjectiveModule
from firp_cli.training.pace import Pace

ADAM_BETAS = (0.9, 0.95)
FINAL_RATE = 0.1  # of the peak learning rate, where the cosine ends
MMAP_THRESHOLD, GIVEN_BACK = -3, 4 << 20  # mallopt's parameter; bytes of a block from which on it is given back


def learning_rate_factor(step: int, total: int, warmup_ratio: float) -> float:
    """Share of the peak rate at optimizer step `step` (from 0): linear warm-up, then a cosine to FINAL_RATE."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def deepspeed_config(settings: TrainingConfig, accumulation: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a training section, with `accumulation` micro-batches per rank and step."""
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


def build_engine(
    predictor: Predictor, teacher: Teacher, settings: TrainingConfig, pace: Pace, accumulation: int
) -> Any:
    """A DeepSpeed engine over the objective; joins the ranks first. `engine(batch, anchors)` gives loss and sums.

    Args:
        pace: the learning rate follows it; it is moved before each optimizer step.
    """
    start()
    deepspeed = load_deepspeed()
    module = ObjectiveModule(predictor, teacher, settings)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=ADAM_BETAS, weight_decay=settings.weight_decay
    )

    def factor(step: int) -> float:
        return learning_rate_factor(max(step, pace.place), pace.total, settings.warmup_ratio)

    scheduler = LambdaLR(optimizer, factor)
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=parameters,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=deepspeed_config(settings, accumulation),
    )
    return engine


def give_back_freed_memory() -> None:
    """Have the C library give large freed blocks of a CPU run back at once, where it is glibc.

    Its own threshold rises to the largest block freed so far; pieces of logits then come from the heap and leave holes
    in it, and a run with a large vocabulary holds more than it uses (`scripts/memory_growth.py`).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, GIVEN_BACK)


def optimizer_step(engine: Any, settings: TrainingConfig) -> float | None:
    """Take the optimizer step at the end of an accumulation; returns the L2 norm of the averaged gradient before
    clipping, or None where DeepSpeed does not tell.
    """
    if settings.zero_stage == 0 and settings.precision == "fp32":  # here it keeps the norm to itself
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        engine.step()
    else:
        engine.step()
        norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


@contextlib.contextmanager
def gathered(predictor: Predictor, stage: int) -> Iterator[None]:
    """Whole parameters on every rank, also under ZeRO-3, for reading."""
    if stage < 3:
        yield
        return
    with load_deepspeed().zero.GatheredParameters(list(predictor.parameters()), modifier_rank=None):
        yield


def predictor_weights(engine: Any, settings: TrainingConfig) -> dict[str, Tensor]:
    """The predictor's weights on the CPU, as trained. A collective under ZeRO-3: every rank calls it."""
    predictor = engine.module.predictor
    with gathered(predictor, settings.zero_stage):
        return {
            name: value.detach().to("cpu", copy=True).contiguous() for name, value in predictor.state_dict().items()
        }
