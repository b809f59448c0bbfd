"""Training in one process without DeepSpeed: the trainer's objective, data order, optimizer and schedule, a plain loop.

For machines that have no DeepSpeed, and for measurements that train a predictor in seconds. Nothing is written: the
predictor that is handed over is trained in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from firp_cli.config import TrainingConfig
from firp_cli.errors import NumericsError, StoreError, UsageError
from firp_cli.predictors.anchors import Sequenced
from firp_cli.predictors.base import Predictor
from firp_cli.results import Progress
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.batches import VALIDATION_EPOCH, Order, Prefetcher, Reader, split_validation
from firp_cli.training.deepspeed_engine import ADAM_BETAS, learning_rate_factor
from firp_cli.training.objective import ObjectiveModule, StepRecord
from firp_cli.training.pace import Pace
from firp_cli.training.ridge import ridge_start
from firp_cli.training.trainer import data_order, make_pace, planned_steps, sequence_lengths, usual_interval

Row = dict[str, Any]


def train_plain(
    predictor: Predictor,
    teacher: Teacher,
    sequences: Sequence[Sequenced],
    settings: TrainingConfig,
    seconds: float | None = None,
    progress: Progress = lambda done, total: None,
    ridge_sequences: int | None = None,
) -> list[Row]:
    """Train a predictor in place and leave it with the weights that did best on the held-out sequences.

    Args:
        seconds: ends the run, the ridge start included; the schedule then follows whichever is further, the steps or
            the time. None: as training.max_minutes says; without a limit the losses are those of the trainer with one
            rank.
        ridge_sequences: training sequences that the ridge start is solved on, the first ones; None: all.

    Returns a row for each optimizer step and validation, as the trainer's metrics.jsonl has them. Raises UsageError on
    settings that need DeepSpeed, StoreError without sequences, NumericsError naming the step.
    """
    if settings.precision != "fp32" or settings.zero_stage:
        raise UsageError("plain training keeps whole fp32 weights: set training.precision=fp32 and zero_stage=0")
    if not len(sequences):
        raise StoreError("there is no conversation to train on")
    training, validation = split_validation(len(sequences), settings.validation_fraction, settings.seed)
    order = data_order(settings, training, 1, sequence_lengths(sequences))
    total = planned_steps(settings, order)
    pace = make_pace(settings, total) if seconds is None else Pace(total, seconds)
    pace.start()
    torch.manual_seed(settings.seed)
    predictor.initialise(settings.init, teacher)
    if settings.init == "ridge":
        chosen = training[:ridge_sequences]
        ridge_start(predictor, teacher, sequences, chosen, settings.ridge_lambda, settings.micro_batch_size)
    return _Run(predictor, teacher, sequences, settings, order, pace, validation).loop(progress)


class _Run:
    """One run: what the trainer's is to a rank, without files."""

    def __init__(
        self,
        predictor: Predictor,
        teacher: Teacher,
        sequences: Sequence[Sequenced],
        settings: TrainingConfig,
        order: Order,
        pace: Pace,
        validation: Sequence[int],
    ) -> None:
        self.predictor, self.teacher, self.settings = predictor, teacher, settings
        self.order, self.pace, self.validation = order, pace, validation
        self.module = ObjectiveModule(predictor.requires_grad_(True), teacher, settings)
        self.optimizer = torch.optim.AdamW(
            predictor.parameters(), lr=settings.learning_rate, betas=ADAM_BETAS, weight_decay=settings.weight_decay
        )
        self.reader = Reader(
            sequences,
            predictor.offsets,
            settings.anchors_per_sequence,
            settings.seed,
            teacher.device,
            teacher.dtype,
        )
        self.history: list[Row] = []
        self.best: tuple[float, dict[str, Tensor]] | None = None

    def loop(self, progress: Progress) -> list[Row]:
        """All steps, with validations between them."""
        pace = self.pace
        every = self.settings.validate_every or usual_interval(self.settings, pace.total)
        prefetcher = Prefetcher(self.reader, self._wanted(), self.settings.readers)
        step, validated = 0, -1
        try:
            while (place := pace.move(step, pace.clock())) < pace.total:
                if place // every > validated:
                    self._validate(step)
                    validated = place // every
                self._step(step, prefetcher)
                step += 1
                progress(step, pace.expected)
            self._validate(step)
        finally:
            prefetcher.close()
        if self.best is not None:
            self.predictor.load_state_dict(self.best[1])
        self.predictor.eval().requires_grad_(False)
        return self.history

    def _wanted(self) -> Iterator[tuple[list[int], int]]:
        for step in range(self.pace.total):
            for micro in range(self.settings.gradient_accumulation):
                yield self.order.conversations(step, micro)

    def _step(self, step: int, prefetcher: Prefetcher) -> None:
        """Optimizer step `step` (from 0) at the rate of the run's place."""
        settings, accumulation = self.settings, self.settings.gradient_accumulation
        rate = settings.learning_rate * learning_rate_factor(self.pace.place, self.pace.total, settings.warmup_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        sums = StepRecord.empty(self.predictor.steps, self.teacher.device).sums
        losses = []
        for _ in range(accumulation):
            item = next(prefetcher)
            loss, micro_sums = self.module(item.batch, item.anchors)
            (loss / accumulation).backward()
            losses.append(loss.detach())
            sums += micro_sums
        norm = torch.nn.utils.clip_grad_norm_(self.predictor.parameters(), settings.max_grad_norm or math.inf)
        loss, norm = torch.stack([torch.stack(losses).double().mean(), norm.double()]).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericsError(
                f"the loss or its gradient is NaN or infinite at optimizer step {step + 1}; "
                "lower training.learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        row: Row = {"split": "train", "step": step + 1, "loss": loss, "learning_rate": rate, "gradient_norm": norm}
        self.history.append(row | StepRecord(sums).averages(self.predictor.pipeline) | {"seconds": self.pace.clock()})

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """Measure the held-out sequences, and keep the weights if they are the best so far."""
        if not self.validation:
            return
        size = self.settings.micro_batch_size
        sums = StepRecord.empty(self.predictor.steps, self.teacher.device).sums
        for first in range(0, len(self.validation), size):
            item = self.reader.read(list(self.validation[first : first + size]), VALIDATION_EPOCH)
            sums += self.module(item.batch, item.anchors)[1]
        averages = StepRecord(sums).averages(self.predictor.pipeline)
        length = averages["expected_accepted_length"]
        assert isinstance(length, float)
        if self.best is None or length > self.best[0]:
            self.best = (length, {name: value.clone() for name, value in self.predictor.state_dict().items()})
        self.history.append({"split": "validation", "step": step, **averages, "seconds": self.pace.clock()})
