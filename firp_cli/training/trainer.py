"""The training loop: the same for every predictor kind, number of ranks and ZeRO stage.

A run is a function of its recipe, store and teacher: data order, anchors and the schedule depend on the number of the
optimizer step alone, so `--resume` goes on with the losses that an uninterrupted run would have had. A run with
`training.max_minutes` is not: its number of steps and its learning rates depend on the speed of the machine as well.
"""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from firp_cli import provenance
from firp_cli.config import Recipe, TrainingConfig
from firp_cli.distributed.launch import handling_signals, start
from firp_cli.errors import NumericsError, PredictorError, StoreError
from firp_cli.machine import is_main, rank, world_size
from firp_cli.predictors.anchors import Sequenced
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.folder import build_predictor
from firp_cli.results import as_json
from firp_cli.teacher.teacher import Teacher
from firp_cli.training import checkpoint as checkpoints
from firp_cli.training.batches import VALIDATION_EPOCH, MicroBatch, Order, Prefetcher, Reader, split_validation
from firp_cli.training.checkpoint import RunState
from firp_cli.training.deepspeed_engine import build_engine, give_back_freed_memory, optimizer_step, predictor_weights
from firp_cli.training.metrics_log import Listener, MetricsLog
from firp_cli.training.objective import FIELDS, StepRecord
from firp_cli.training.pace import Pace
from firp_cli.training.ridge import ridge_start

EVENTS_PER_RUN = 10  # validations, and checkpoints, of a run that names no interval


@dataclass
class Outcome:
    """How a run ended. `training` is what training.json holds; None when the run was stopped before its end. A run that
    ended early because validations got no better or its minutes were over is not `stopped`: its `step` is below
    `total_steps`.
    """

    step: int
    total_steps: int
    stopped: bool
    training: dict[str, Any] | None


def planned_steps(settings: TrainingConfig, order: Order) -> int:
    """Optimizer steps of a run."""
    steps = settings.epochs * order.steps_per_epoch
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def make_pace(settings: TrainingConfig, total: int) -> Pace:
    """The pace of a run of `total` planned steps, limited by `training.max_minutes`."""
    return Pace(total, None if settings.max_minutes is None else 60 * settings.max_minutes)


def usual_interval(settings: TrainingConfig, total: int) -> int:
    """Planned steps between the validations, and checkpoints, of a run that names no interval: EVENTS_PER_RUN of each,
    of a run with `training.max_minutes` at most one a minute.
    """
    events = EVENTS_PER_RUN
    if settings.max_minutes is not None:
        events = max(1, min(events, round(settings.max_minutes)))
    return max(1, math.ceil(total / events))


def data_order(
    settings: TrainingConfig,
    indices: Sequence[int],
    ranks: int,
    lengths: Sequence[int] | None = None,
    per_step: int | None = None,
) -> Order:
    """The order in which a group of `ranks` goes through the training conversations.

    Args:
        lengths: in tokens, by conversation number.
        per_step: micro-batches of an optimizer step as a run began, on however many ranks; None: as the settings say.
    """
    per_step = per_step or settings.gradient_accumulation * ranks
    return Order(indices, settings.micro_batch_size, per_step, settings.seed, lengths if settings.balance else None)


def sequence_lengths(store: Sequence[Sequenced]) -> Sequence[int]:
    """Tokens of every conversation, without reading states where the store knows them."""
    known: Sequence[int] | None = getattr(store, "lengths", None)
    return [len(item.input_ids) for item in store] if known is None else known


def train(
    recipe: Recipe,
    teacher: Teacher,
    store: Sequence[Sequenced],
    output: Path,
    *,
    resume: bool = False,
    listener: Listener | None = None,
    store_summary: dict[str, Any] | None = None,
) -> Outcome:
    """Train the recipe's predictor on a store; every rank calls it. Rank 0 writes the predictor folder `output`.

    Raises UsageError when `output` holds a run already or another process writes it, StoreError for a store too small,
    PredictorError, NumericsError naming the optimizer step; whatever is raised, the last checkpoint is whole.
    """
    if recipe.predictor is None:
        raise PredictorError("the recipe has no predictor section: give predictor.kind and its fields")
    if not len(store):
        raise StoreError("the store has no conversation; fill it with `firp collect`")
    start()
    if teacher.device.type == "cpu":
        give_back_freed_memory()
    with checkpoints.locked(output):
        return _train(recipe, teacher, store, output, resume, listener or Listener(), store_summary or {})


def _train(
    recipe: Recipe,
    teacher: Teacher,
    store: Sequence[Sequenced],
    output: Path,
    resume: bool,
    listener: Listener,
    store_summary: dict[str, Any],
) -> Outcome:
    checkpoints.guard_output(output, resume)
    found = checkpoints.latest_checkpoint(output) if resume else None
    per_step = None if found is None else checkpoints.check_resumable(found, recipe, len(store))
    run = _Run(recipe, teacher, store, output, listener, store_summary, per_step)
    run.prepare(found)
    with _until_signal(run):
        return run.loop()


class _Run:
    """One run in one process."""

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        store: Sequence[Sequenced],
        output: Path,
        listener: Listener,
        store_summary: dict[str, Any],
        per_step: int | None,
    ) -> None:
        self.recipe, self.settings, self.teacher, self.store = recipe, recipe.training, teacher, store
        self.output, self.listener, self.store_summary = output, listener, store_summary
        self.ranks, self.rank = world_size(), rank()
        self.training, self.validation = split_validation(
            len(store), self.settings.validation_fraction, self.settings.seed
        )
        self.lengths = sequence_lengths(store)
        self.order = data_order(self.settings, self.training, self.ranks, self.lengths, per_step)
        self.accumulation = self.order.per_step // self.ranks
        self.total = planned_steps(self.settings, self.order)
        self.pace = make_pace(self.settings, self.total)
        self.usual = usual_interval(self.settings, self.total)
        self.validate_every = self.settings.validate_every
        self.save_every = self.settings.save_every or self.validate_every
        self.state = RunState()
        self.saved_at = 0
        self.interrupted = False
        self.engine: Any = None
        self.journal: MetricsLog | None = None
        self.described: dict[str, Any] = {}
        self.steps = 0
        self.weights: list[float] = []
        self.pipeline: tuple[int, ...] = ()

    def prepare(self, found: Path | None) -> None:
        """Build the predictor with its start values, the engine around it, and restore a checkpoint."""
        assert self.recipe.predictor is not None
        predictor = build_predictor(self.recipe.predictor, self.teacher)
        self.steps, self.described = predictor.steps, predictor.describe()
        self.weights, self.pipeline = predictor.loss_weights(self.settings.step_decay), predictor.pipeline
        self.reader = Reader(
            self.store,
            predictor.offsets,
            self.settings.anchors_per_sequence,
            self.settings.seed,
            self.teacher.device,
            self.teacher.dtype,
        )
        if found is None:
            self._initialise(predictor)
        else:
            checkpoints.load_weights(found, predictor)
        self.engine = build_engine(predictor, self.teacher, self.settings, self.pace, self.accumulation)
        if found is not None:
            self.state = checkpoints.load_checkpoint(self.engine, found, self.recipe)
            self.saved_at = self.state.step
            self.pace.resume(self.state.step, self.state.spent)
            self.listener.note(f"resuming after step {self.state.step} of {self.total}")
        if is_main():
            resumed = None if found is None else self.state.step
            validated = self.state.last["step"] if self.state.last else -1
            self.journal = MetricsLog(self.output, self.recipe, resumed, validated)

    def _initialise(self, predictor: Predictor) -> None:
        torch.manual_seed(self.settings.seed)
        predictor.initialise(self.settings.init, self.teacher)
        if self.settings.init == "ridge":
            ridge_start(
                predictor,
                self.teacher,
                self.store,
                self.training,
                self.settings.ridge_lambda,
                self.settings.micro_batch_size,
                self.listener.ridge,
            )

    def loop(self) -> Outcome:
        """Train to the end, or until somebody stops the run; then save or export."""
        state = self.state
        wanted = self.order.of_rank(state.step, self.total, self.rank, self.ranks)
        prefetcher = Prefetcher(self.reader, wanted, self.settings.readers)
        try:
            while True:
                if self.validation and self._due(self.validate_every) and (state.last or {}).get("step") != state.step:
                    self._validate()
                ended = self.pace.ended or self._stale()
                if (ended or self._due(self.save_every)) and state.step > self.saved_at:
                    self._save()
                if ended:
                    return Outcome(state.step, self.total, False, self._export())
                if self._step(prefetcher) and not self.pace.ended:
                    self._save()
                    return Outcome(state.step, self.total, True, None)
        finally:
            prefetcher.close()
            if self.journal:
                self.journal.close()

    def _due(self, every: int | None) -> bool:
        """Whether what happens every so many optimizer steps happens now; None: at the usual interval."""
        due = self.pace.passed(self.usual) if every is None else self.state.step % every == 0
        return due or self.pace.ended

    def _stale(self) -> bool:
        """Whether so many validations brought nothing that the run ends."""
        return self.settings.patience is not None and self.state.stale >= self.settings.patience

    def _save(self) -> None:
        keep_states = getattr(self.store, "flush", None)
        if keep_states is not None:  # a store that is filled while it is read: what a checkpoint saw is not lost
            keep_states()
        checkpoints.save_checkpoint(
            self.engine, self.output, self.state, self.recipe, len(self.store), self.order.per_step
        )
        self.saved_at = self.state.step

    def _step(self, prefetcher: Prefetcher) -> bool:
        """One optimizer step over all micro-batches of all ranks; returns whether to stop."""
        state = self.state
        self.pace.start()
        began, waited = time.perf_counter(), prefetcher.waited
        losses, sums, items = self._accumulate(prefetcher)
        loss = torch.stack(losses).double().sum().item()
        stop = self.interrupted or self.listener.stop(state.step + 1)
        tokens = sum(int(item.batch.lengths.sum()) for item in items)
        mine = [loss, float(tokens), prefetcher.waited - waited, float(stop)]
        if self.pace.seconds is not None:
            mine.append(self.pace.clock() if self.rank == 0 else 0.0)  # all ranks go by the clock of rank 0
        (loss, all_tokens, wait, stops, *spent), sums = self._reduce(mine, sums)
        if not math.isfinite(loss):
            self._refuse(losses, items)
        state.spent = sum(spent)
        self.pace.move(state.step + 1, state.spent)
        rate = self.engine.get_lr()[0]
        norm = optimizer_step(self.engine, self.settings)
        if norm is not None and not math.isfinite(norm):
            raise NumericsError(self._broken("the gradient", ""))
        seconds = time.perf_counter() - began
        state.step += 1
        state.seconds += seconds
        state.waited += wait / self.ranks
        state.tokens += int(all_tokens)
        row = {
            "split": "train",
            "step": state.step,
            "epoch": (state.step - 1) // self.order.steps_per_epoch,
            "loss": loss / self.order.per_step,
            **StepRecord(sums).averages(self.pipeline),
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": all_tokens / seconds,
            "step_seconds": seconds,
            "data_wait": wait / self.ranks / seconds,
            "memory_bytes": peak_memory(self.teacher.device),
        }
        self._tell(row)
        self.listener.step(state.step, self.pace.expected, row)
        return bool(stops)

    def _accumulate(self, prefetcher: Prefetcher) -> tuple[list[Tensor], Tensor, list[MicroBatch]]:
        """Forward and backward of this rank's micro-batches of a step: losses, record sums, what was read."""
        sums = StepRecord.empty(self.steps, self.teacher.device).sums
        losses, items = [], []
        for micro in range(self.accumulation):
            item = next(prefetcher)
            loss, micro_sums = self.engine(item.batch, item.anchors)
            self.engine.backward(loss)
            if micro < self.accumulation - 1:
                self.engine.step()  # counts the micro-batch; the last one takes the optimizer step
            losses.append(loss.detach())
            sums += micro_sums
            items.append(item)
        return losses, sums, items

    def _reduce(self, scalars: list[float], sums: Tensor) -> tuple[list[float], Tensor]:
        """Add scalars and record sums up over all ranks."""
        packed = torch.cat([torch.tensor(scalars, dtype=torch.float64, device=sums.device), sums.flatten()])
        if self.ranks > 1:
            torch.distributed.all_reduce(packed)
        return packed[: len(scalars)].tolist(), packed[len(scalars) :].view_as(sums)

    def _refuse(self, losses: list[Tensor], items: list[MicroBatch]) -> None:
        """Raise on every rank, naming the conversations of the micro-batches whose loss is not finite."""
        mine = [item.indices for loss, item in zip(losses, items, strict=True) if not bool(torch.isfinite(loss).item())]
        gathered: list[Any] = [mine]
        if self.ranks > 1:
            gathered = [None] * self.ranks
            torch.distributed.all_gather_object(gathered, mine)
        culprits = [index for part in gathered for micro in part for index in micro]
        raise NumericsError(self._broken("the loss", f" (conversations {culprits} of the store)"))

    def _broken(self, what: str, where: str) -> str:
        kept = checkpoints.latest_checkpoint(self.output)
        remedy = f"checkpoint {kept.name} is kept" if kept else "nothing was saved"
        return (
            f"{what} is NaN or infinite at optimizer step {self.state.step + 1}{where}; {remedy}\n"
            "lower training.learning_rate, or check those conversations with `firp collect --resume`"
        )

    def _validate(self) -> None:
        """Measure the held-out conversations, all ranks together, and keep the weights if they are the best so far."""
        if not self.validation:
            return
        size = self.settings.micro_batch_size
        held_out = sorted(self.validation, key=lambda index: -self.lengths[index])
        groups = [held_out[place : place + size] for place in range(0, len(held_out), size)]
        rounds = math.ceil(len(groups) / self.ranks)
        # ranks without a group of their own repeat the first one, uncounted: ZeRO-3 needs all of them in each forward
        mine = [index if (index := number * self.ranks + self.rank) < len(groups) else 0 for number in range(rounds)]
        sums = StepRecord.empty(self.steps, self.teacher.device).sums
        wanted = ((groups[index], VALIDATION_EPOCH) for index in mine)
        prefetcher = Prefetcher(self.reader, wanted, self.settings.readers)
        self.engine.eval()
        with torch.no_grad():
            for number, item in enumerate(prefetcher):
                _, group_sums = self.engine(item.batch, item.anchors)
                if number * self.ranks + self.rank < len(groups):
                    sums += group_sums
        self.engine.train()
        _, sums = self._reduce([], sums)
        averages = StepRecord(sums).averages(self.pipeline)
        row = {"split": "validation", "step": self.state.step, **self._mean_loss(sums), **averages}
        if not math.isfinite(row["loss"]):
            raise NumericsError(self._broken("the validation loss", ""))
        self._judge(row)
        self._tell(row)
        self.listener.validation(row)

    def _judge(self, row: dict[str, Any]) -> None:
        """Take a validation into account: the best so far, the weights to keep, how long there was nothing better."""
        state, length = self.state, row["expected_accepted_length"]
        state.first, state.last = state.first or row, row
        best = state.best["expected_accepted_length"] if state.best else -math.inf
        state.stale = 0 if length > best + self.settings.min_improvement else state.stale + 1
        if length > best:
            state.best = row
        # of equals the earlier one is better: it is the one that `best` names
        kept = sorted([*state.kept, (length, state.step)], key=lambda item: (-item[0], item[1]))
        state.kept = kept[: self.settings.keep_best]
        if (length, state.step) in state.kept:
            weights = predictor_weights(self.engine, self.settings)
            if is_main():
                checkpoints.save_best(self.output, state.step, weights)

    def _mean_loss(self, sums: Tensor) -> dict[str, Any]:
        """The objective over all anchors of a record."""
        fields = dict(zip(FIELDS, sums.tolist(), strict=True))
        drafts = sum(weight * count for weight, count in zip(self.weights, fields["count"], strict=True))
        total = sum(weight * loss for weight, loss in zip(self.weights, fields["loss"], strict=True))
        return {"loss": total / drafts if drafts else 0.0}

    def _tell(self, row: dict[str, Any]) -> None:
        if self.journal:
            self.journal.write(row)

    def _export(self) -> dict[str, Any]:
        """Write the predictor folder from the best weights, or from the last ones where nothing was held out."""
        state = self.state
        weights = predictor_weights(self.engine, self.settings) if state.best is None else {}
        training = as_json(
            {
                "steps": state.step,
                "planned_steps": self.total,
                "best_step": state.best["step"] if state.best else state.step,
                "expected_accepted_length": state.best["expected_accepted_length"] if state.best else None,
                "validation": {"first": state.first, "best": state.best, "last": state.last},
                "conversations": {"training": len(self.training), "validation": len(self.validation)},
                "tokens": state.tokens,
                "seconds": state.seconds,
                "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
                "data_wait_share": state.waited / state.seconds if state.seconds else None,
                "world_size": self.ranks,
                "predictor": self.described,
                "teacher": self.teacher.describe(),
                "teacher_memory": self.teacher.loaded_weights.describe(),
                "store": self.store_summary,
                "environment": provenance.environment(),
            }
        )
        if is_main():
            if state.best is not None:
                weights = checkpoints.load_best(self.output, state.best["step"])
            config, teacher = self.engine.module.predictor.config, self.teacher.describe()
            checkpoints.export_predictor(self.output, weights, config, teacher, self.recipe, training)
        return training


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held at once so far: of the device's memory, on a CPU of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def _until_signal(run: _Run) -> Iterator[None]:
    """Ctrl-C, SIGTERM or a closed terminal end the run after its current step; a second Ctrl-C at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: Any) -> None:
        if run.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.interrupted = True

    with handling_signals(interrupt):
        yield
