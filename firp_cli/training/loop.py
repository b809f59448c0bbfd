"""Training loop, the same for every predictor kind, number of ranks and optimizer backend.

A run is a function of its recipe, store and teacher: data order, anchors and the schedule depend on the number of the
optimizer step alone. A run with a time limit is not: its number of steps and its learning rates depend on the speed of
the machine as well.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from firp_cli.config import TrainingConfig
from firp_cli.errors import NumericsError, PredictorError
from firp_cli.predictors.anchors import Sequenced
from firp_cli.predictors.base import Predictor, TreePredictor
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.batches import (
    VALIDATION_EPOCH,
    MicroBatch,
    Prefetcher,
    Reader,
    data_order,
    frequent_tokens,
    planned_steps,
    sequence_lengths,
    split_validation,
)
from firp_cli.training.metrics_log import Listener
from firp_cli.training.objective import FIELDS, StepRecord
from firp_cli.training.pace import EVENTS_OF_FIRST_STAGE, EVENTS_PER_RUN, make_pace, usual_interval
from firp_cli.training.ridge import ridge_start

Row = dict[str, Any]


@dataclass
class RunProgress:
    """Progress of a run, as a checkpoint stores it.

    Attributes:
        step: optimizer steps taken.
        first, best, last: rows of the first validation (start values), the best and the latest.
        kept: (accepted length, step) of the weights that are kept, the best first.
        stale: validations since the last improvement.
        seconds, tokens: of all training steps. waited: seconds that a rank waited for data, the mean over ranks.
        spent: seconds by the clock of rank 0, in a run with a time limit.
    """

    step: int = 0
    first: Row | None = None
    best: Row | None = None
    last: Row | None = None
    kept: list[tuple[float, int]] = field(default_factory=list)
    stale: int = 0
    seconds: float = 0.0
    spent: float = 0.0
    waited: float = 0.0
    tokens: int = 0


class Backend(Protocol):
    """Optimizer of the predictor's parameters. Every rank calls every method."""

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next optimizer step."""
        ...

    def backward(self, item: MicroBatch, last: bool) -> tuple[Tensor, Tensor]:
        """Add the gradient of a micro-batch; return its loss and record sums. `last`: an optimizer step follows."""
        ...

    def step(self) -> float | None:
        """Take an optimizer step; return the L2 norm of the averaged gradient before clipping, None if unknown."""
        ...

    def evaluate(self, item: MicroBatch) -> Tensor:
        """Return the record sums of a micro-batch, without gradients."""
        ...


class TrainingLoop:
    """Optimizer steps and validations of a run on one rank.

    A subclass sets `backend` and overrides `record`, `keep_weights` and `save` to store the results.
    """

    backend: Backend

    def __init__(
        self,
        predictor: Predictor,
        teacher: Teacher,
        store: Sequence[Sequenced],
        settings: TrainingConfig,
        listener: Listener,
        rank: int = 0,
        ranks: int = 1,
        per_step: int | None = None,
        frozen: bool = False,
    ) -> None:
        """Split the conversations of `store` and order them.

        Args:
            per_step: micro-batches of an optimizer step, over all ranks; None: as the settings define it.
            frozen: a first stage, where only the predictor's coupling learns; `reader.kept` may keep its draft states.
        """
        self.predictor, self.teacher, self.store, self.settings = predictor, teacher, store, settings
        self.listener, self.rank, self.ranks = listener, rank, ranks
        self.training, self.validation = split_validation(len(store), settings.validation_fraction, settings.seed)
        self.lengths = sequence_lengths(store)
        self.order = data_order(settings, self.training, ranks, self.lengths, per_step)
        self.accumulation = self.order.per_step // ranks
        self.total = planned_steps(settings, self.order)
        self.pace = make_pace(settings, self.total)
        self.frozen, self.frequent = frozen, self._frequent(settings.vocabulary)
        if isinstance(predictor, TreePredictor):
            chosen = self._frequent(getattr(predictor.config, "draft_vocabulary", None))
            predictor.draft_tokens = None if chosen is None else chosen.sort().values
        events = EVENTS_OF_FIRST_STAGE if frozen else EVENTS_PER_RUN
        self.usual = usual_interval(settings, self.total, events)
        self.steps, self.pipeline = predictor.steps, predictor.pipeline
        self.weights = predictor.loss_weights(settings.step_decay)
        self.reader = Reader(
            store, predictor.offsets, settings.anchors_per_sequence, settings.seed, teacher.device, teacher.dtype
        )
        self.progress = RunProgress()
        self.interrupted = False

    def _frequent(self, size: int | None) -> Tensor | None:
        """Return the `size` most frequent tokens (S,), None where these are all. Raises PredictorError."""
        vocabulary = self.teacher.vocab_size
        if size is None or size >= vocabulary:
            return None
        if self.predictor.own_vocabulary:
            raise PredictorError("training.vocabulary needs the teacher's head: set predictor.own_head=false")
        return frequent_tokens(self.store, self.training, size, vocabulary).to(self.teacher.device)

    def record(self, row: Row) -> None:
        """Store the row of an optimizer step or of a validation."""

    def keep_weights(self) -> None:
        """Store the present weights: those of one of the best validations so far."""

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one."""

    def saved(self) -> str:
        """Return the part of an error message about what is saved."""
        return "nothing was saved"

    def initialise(self, conversations: int | None = None) -> None:
        """Set the start values; the ridge start reads the first `conversations` training ones (None: all)."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        self.predictor.initialise(settings.init, self.teacher)
        if settings.init == "ridge":
            ridge_start(
                self.predictor,
                self.teacher,
                self.store,
                self.training[:conversations],
                settings.ridge_lambda,
                settings.micro_batch_size,
                self.listener.ridge,
            )

    def run(self) -> bool:
        """Train to the end and return True, or until the run is stopped and return False."""
        progress, settings = self.progress, self.settings
        wanted = self.order.of_rank(progress.step, self.total, self.rank, self.ranks)
        prefetcher = Prefetcher(self.reader, wanted, settings.readers)
        try:
            while True:
                validated = (progress.last or {}).get("step") == progress.step
                if self.validation and self._due(settings.validate_every) and not validated:
                    self._validate()
                ended = self.pace.ended or (settings.patience is not None and progress.stale >= settings.patience)
                if ended or self._due(settings.save_every or settings.validate_every):
                    self.save()
                if ended:
                    return True
                if self._step(prefetcher) and not self.pace.ended:
                    self.save()
                    return False
        finally:
            prefetcher.close()

    def _due(self, every: int | None) -> bool:
        """Return True at each multiple of `every` optimizer steps, at the usual interval if None, and at the end."""
        due = self.pace.passed(self.usual) if every is None else self.progress.step % every == 0
        return due or self.pace.ended

    def _step(self, prefetcher: Prefetcher) -> bool:
        """Take one optimizer step over all micro-batches of all ranks; return True if the run is to stop."""
        progress = self.progress
        self.pace.start()
        began, waited = time.perf_counter(), prefetcher.waited
        losses, sums, items = self._accumulate(prefetcher)
        loss = torch.stack(losses).double().sum().item()
        stop = self.interrupted or self.listener.stop(progress.step + 1)
        tokens = sum(int(item.batch.lengths.sum()) for item in items)
        scalars = [loss, float(tokens), prefetcher.waited - waited, float(stop)]
        if self.pace.seconds is not None:
            scalars.append(self.pace.clock() if self.rank == 0 else 0.0)  # all ranks go by the clock of rank 0
        (loss, all_tokens, wait, stops, *spent), sums = self._reduce(scalars, sums)
        if not math.isfinite(loss):
            self._refuse(losses, items)
        progress.spent = sum(spent)
        self.pace.move(progress.step + 1, progress.spent)
        rate, norm = self.backend.learning_rate, self.backend.step()
        if norm is not None and not math.isfinite(norm):
            raise NumericsError(self._not_finite("the gradient"))
        seconds = time.perf_counter() - began
        progress.step += 1
        progress.seconds += seconds
        progress.waited += wait / self.ranks
        progress.tokens += int(all_tokens)
        row = {
            "split": "train",
            "step": progress.step,
            "epoch": (progress.step - 1) // self.order.steps_per_epoch,
            "loss": loss / self.order.per_step,
            **StepRecord(sums).averages(self.pipeline),
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": all_tokens / seconds,
            "step_seconds": seconds,
            "data_wait": wait / self.ranks / seconds,
            "memory_bytes": peak_memory(self.teacher.device),
        }
        self.record(row)
        self.listener.step(progress.step, self.pace.expected, row)
        return bool(stops)

    def _accumulate(self, prefetcher: Prefetcher) -> tuple[list[Tensor], Tensor, list[MicroBatch]]:
        """Run this rank's micro-batches of a step; return their losses, the record sums and the micro-batches."""
        sums = StepRecord.empty(self.steps, self.teacher.device).sums
        losses, items = [], []
        for number in range(1, self.accumulation + 1):
            item = next(prefetcher)
            loss, item_sums = self.backend.backward(item, last=number == self.accumulation)
            self.reader.keep(item)
            losses.append(loss.detach())
            sums += item_sums
            items.append(item)
        return losses, sums, items

    def _reduce(self, scalars: list[float], sums: Tensor) -> tuple[list[float], Tensor]:
        """Sum scalars and record sums over all ranks."""
        packed = torch.cat([torch.tensor(scalars, dtype=torch.float64, device=sums.device), sums.flatten()])
        if self.ranks > 1:
            torch.distributed.all_reduce(packed)
        return packed[: len(scalars)].tolist(), packed[len(scalars) :].view_as(sums)

    def _refuse(self, losses: list[Tensor], items: list[MicroBatch]) -> None:
        """Raise NumericsError on every rank, naming the conversations of micro-batches whose loss is not finite."""
        faulty = [
            item.indices for loss, item in zip(losses, items, strict=True) if not bool(torch.isfinite(loss).item())
        ]
        gathered: list[Any] = [faulty]
        if self.ranks > 1:
            gathered = [None] * self.ranks
            torch.distributed.all_gather_object(gathered, faulty)
        culprits = [index for part in gathered for micro in part for index in micro]
        raise NumericsError(self._not_finite("the loss", f" (conversations {culprits} of the store)"))

    def _not_finite(self, what: str, where: str = "") -> str:
        return (
            f"{what} is NaN or infinite at optimizer step {self.progress.step + 1}{where}; {self.saved()}\n"
            "lower training.learning_rate, or check the states with `firp store verify STORE`"
        )

    def _validate(self) -> None:
        """Measure the held-out conversations, all ranks together, and keep the weights if they are the best so far."""
        size = self.settings.micro_batch_size
        held_out = sorted(self.validation, key=lambda index: -self.lengths[index])
        groups = [held_out[place : place + size] for place in range(0, len(held_out), size)]
        rounds = math.ceil(len(groups) / self.ranks)
        # ranks without a group of their own repeat the first one, uncounted: ZeRO-3 needs all of them in each forward
        numbers = [number * self.ranks + self.rank for number in range(rounds)]
        wanted = ((groups[number if number < len(groups) else 0], VALIDATION_EPOCH) for number in numbers)
        sums = StepRecord.empty(self.steps, self.teacher.device).sums
        prefetcher = Prefetcher(self.reader, wanted, self.settings.readers)
        for number, item in zip(numbers, prefetcher, strict=True):
            group_sums = self.backend.evaluate(item)
            self.reader.keep(item)
            if number < len(groups):
                sums += group_sums
        prefetcher.close()
        _, sums = self._reduce([], sums)
        loss, averages = self._mean_loss(sums), StepRecord(sums).averages(self.pipeline)
        row = {"split": "validation", "step": self.progress.step, "loss": loss, **averages}
        if not math.isfinite(loss):
            raise NumericsError(self._not_finite("the validation loss"))
        self._rate(row)
        self.record(row)
        self.listener.validation(row)

    def _rate(self, row: Row) -> None:
        """Compare a validation with the earlier ones: update the best, the kept weights and the stale count."""
        progress, length = self.progress, row["expected_accepted_length"]
        progress.first, progress.last = progress.first or row, row
        best = progress.best["expected_accepted_length"] if progress.best else -math.inf
        progress.stale = 0 if length > best + self.settings.min_improvement else progress.stale + 1
        if length > best:
            progress.best = row
        # of equals the earlier one ranks first: it is the one that `best` names
        kept = sorted([*progress.kept, (length, progress.step)], key=lambda item: (-item[0], item[1]))
        progress.kept = kept[: self.settings.keep_best]
        if (length, progress.step) in progress.kept:
            self.keep_weights()

    def _mean_loss(self, sums: Tensor) -> float:
        """Return the objective over all anchors of a record."""
        fields = dict(zip(FIELDS, sums.tolist(), strict=True))
        drafts = sum(weight * count for weight, count in zip(self.weights, fields["count"], strict=True))
        total = sum(weight * loss for weight, loss in zip(self.weights, fields["loss"], strict=True))
        return total / drafts if drafts else 0.0


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process held so far: of the device's memory, on a CPU of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
