"""Local training: the training loop with torch's optimizer in one process, without DeepSpeed and without files.

For machines that have no DeepSpeed, and for measurements that train a predictor in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from firp_cli.config import TrainingConfig
from firp_cli.errors import StoreError, UsageError
from firp_cli.predictors.anchors import Sequenced
from firp_cli.predictors.base import Predictor
from firp_cli.results import Progress, no_progress
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.batches import MicroBatch
from firp_cli.training.draft_states import DraftStates
from firp_cli.training.first_stage import freeze_drafts, stage_settings
from firp_cli.training.loop import Row, TrainingLoop
from firp_cli.training.metrics_log import Listener
from firp_cli.training.objective import ObjectiveModule
from firp_cli.training.pace import Pace, make_optimizer

FIRST_SHARE = 0.5  # share of a time limit for the first of two stages


def train_local(
    predictor: Predictor,
    teacher: Teacher,
    sequences: Sequence[Sequenced],
    settings: TrainingConfig,
    seconds: float | None = None,
    progress: Progress = no_progress,
    ridge_sequences: int | None = None,
    kept: DraftStates | None = None,
) -> list[Row]:
    """Train a predictor in place, one with a coupling in two stages; it ends with the weights of the best validation.

    Args:
        seconds: time limit, the ridge start included; the schedule then follows the steps or the time, whichever is
            further. None: training.max_minutes applies; without a limit the losses are those of the trainer with one
            rank.
        ridge_sequences: the ridge start reads the first so many training sequences; None: all.
        kept: draft states of an earlier first stage with the same start values, sequences and anchors.

    Returns a row for each optimizer step and validation, as in metrics.jsonl, with `seconds` since the start. Raises
    UsageError on settings that need DeepSpeed, StoreError without sequences, NumericsError naming the step.
    """
    if settings.precision != "fp32" or settings.zero_stage:
        raise UsageError("local training keeps whole fp32 weights: set training.precision=fp32 and zero_stage=0")
    if not len(sequences):
        raise StoreError("there is no conversation to train on")
    listener = Listener(step=lambda done, total, row: progress(done, total))
    rows: list[Row] = []
    coupled = getattr(predictor.config, "coupling", None) is not None and settings.coupling.epochs > 0
    if coupled:
        share = None if seconds is None else seconds if settings.max_steps == 0 else FIRST_SHARE * seconds
        kept = kept or DraftStates((predictor.steps, teacher.hidden_size))
        run = _LocalRun(predictor, teacher, sequences, stage_settings(settings), listener, kept)
        rows += _train(run, share, ridge_sequences)
        if settings.max_steps == 0:
            return rows
        seconds = None if seconds is None or share is None else seconds - share
    run = _LocalRun(predictor, teacher, sequences, settings, listener)
    return rows + _train(run, seconds, ridge_sequences, initialise=not coupled)


def _train(run: _LocalRun, seconds: float | None, ridge_sequences: int | None, initialise: bool = True) -> list[Row]:
    """Train one stage in place; return its rows."""
    predictor = run.predictor.requires_grad_(True)
    if seconds is not None:
        run.pace = Pace(run.total, seconds)
    run.pace.start()
    if initialise:
        run.initialise(ridge_sequences)
    if run.frozen:
        freeze_drafts(predictor)
    run.pace.begin()
    settings, pace = run.settings, run.pace
    run.backend = LocalBackend(predictor, run.teacher, settings, pace, run.accumulation, run.frozen, run.frequent)
    run.run()
    if run.best_weights:
        predictor.load_state_dict(run.best_weights)
    predictor.eval().requires_grad_(False)
    return run.rows


class LocalBackend:
    """AdamW over the predictor's whole float32 weights."""

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
        self._module = ObjectiveModule(predictor, teacher, settings, frozen, frequent)
        self._parameters = [parameter for parameter in predictor.parameters() if parameter.requires_grad]
        self._optimizer, self._scheduler = make_optimizer(self._parameters, settings, pace)
        self._accumulation, self._max_norm = accumulation, settings.max_grad_norm or math.inf

    @property
    def learning_rate(self) -> float:
        return float(self._scheduler.get_last_lr()[0])

    def backward(self, item: MicroBatch, last: bool) -> tuple[Tensor, Tensor]:
        loss, sums, item.states = self._module(item.batch, item.anchors, item.states)
        (loss / self._accumulation).backward()
        return loss, sums

    def step(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        return float(norm)

    def evaluate(self, item: MicroBatch) -> Tensor:
        self._module.eval()
        with torch.no_grad():
            _, sums, item.states = self._module(item.batch, item.anchors, item.states)
        self._module.train()
        return sums


class _LocalRun(TrainingLoop):
    """Training loop that keeps its rows and its best weights in memory."""

    def __init__(
        self,
        predictor: Predictor,
        teacher: Teacher,
        store: Sequence[Sequenced],
        settings: TrainingConfig,
        listener: Listener,
        kept: DraftStates | None = None,
    ) -> None:
        super().__init__(predictor, teacher, store, settings, listener, frozen=kept is not None)
        self.reader.kept = kept
        self.rows: list[Row] = []
        self.best_weights: dict[str, Tensor] = {}

    def record(self, row: Row) -> None:
        """Add a row."""
        self.rows.append(row | {"seconds": self.pace.clock()})

    def keep_weights(self) -> None:
        """Copy the present weights if their validation is the best one."""
        if self.progress.best is self.progress.last:
            self.best_weights = {name: value.clone() for name, value in self.predictor.state_dict().items()}
