"""Training run with DeepSpeed on any number of ranks: the loop with checkpoints, metrics and the predictor folder.

A predictor with a coupling is trained in two stages. In the first one only the coupling learns, on draft states that
are computed once; it is a run of its own in `output/coupling`. In the second one all parameters learn, from the weights
of the first stage on. The weights of the best validation are kept, so the second stage can only improve on the first.

A resumed run has the losses of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from firp_cli import provenance
from firp_cli.config import Recipe
from firp_cli.data.prompt_text import PromptTexts
from firp_cli.distributed.launch import barrier, start
from firp_cli.distributed.signals import handling_signals
from firp_cli.errors import PredictorError, StoreError
from firp_cli.files import file_sha256
from firp_cli.machine import is_main, rank, world_size
from firp_cli.predictors.anchors import Sequenced
from firp_cli.predictors.folder import build_predictor, kept_tensors, teacher_record
from firp_cli.predictors.trained_prompts import trained_keys
from firp_cli.results import as_json
from firp_cli.teacher.teacher import Teacher
from firp_cli.training import checkpoint as checkpoints
from firp_cli.training.batches import token_pair
from firp_cli.training.deepspeed_engine import DeepSpeedBackend, give_back_freed_memory
from firp_cli.training.draft_states import DraftStates
from firp_cli.training.first_stage import cpu_weights, freeze_drafts, has_first_stage, stage_recipe
from firp_cli.training.loop import Row, TrainingLoop
from firp_cli.training.metrics_log import Listener, MetricsLog
from firp_cli.training.resuming import check_finished, check_restart, check_resumable, data_identity

DRAFT_STATES = "draft-states"  # folder of a first stage; removed at its end


@dataclass
class Outcome:
    """End of a run.

    Attributes:
        step, total_steps: optimizer steps taken and planned. They also differ where training ended early, without
            improvement or at its time limit; such a run is not `stopped`.
        stopped: True for a run that was stopped from outside before its end.
        training: the contents of training.json; None where the run was stopped.
    """

    step: int
    total_steps: int
    stopped: bool
    training: dict[str, Any] | None


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
    PredictorError, NumericsError naming the optimizer step. After any error the last checkpoint is whole.
    """
    if recipe.predictor is None:
        raise PredictorError("the recipe has no predictor section: give predictor.kind and its fields")
    if not len(store):
        raise StoreError("the store has no conversation; fill it with `firp collect`")
    start()
    if teacher.device.type == "cpu":
        give_back_freed_memory()
    with checkpoints.locked(output):
        checkpoints.guard_output(output, resume)
        listener, store_summary = listener or Listener(), store_summary or {}
        if resume and not checkpoints.content(output):
            listener.note(f"nothing to resume: {output} has no checkpoint; training starts at the beginning")
        start_from, given = None, (teacher, store, listener, store_summary, resume)
        if has_first_stage(recipe):
            start_from = output / checkpoints.FIRST_STAGE
            if (start_from / "config.json").is_file():
                check_finished(start_from, stage_recipe(recipe), data_identity(len(store), store_summary))
            else:
                outcome = _run(stage_recipe(recipe), start_from, *given, stage=True)
                if outcome.training is None:
                    return outcome
                barrier()  # rank 0 has written the folder that all ranks read
        return _run(recipe, output, *given, start_from=start_from)


def _run(
    recipe: Recipe,
    output: Path,
    teacher: Teacher,
    store: Sequence[Sequenced],
    listener: Listener,
    store_summary: dict[str, Any],
    resume: bool,
    stage: bool = False,
    start_from: Path | None = None,
) -> Outcome:
    """Run one stage, in its folder `output`. `stage`: it is the first of two."""
    found = checkpoints.latest_checkpoint(output) if resume else None
    data = data_identity(len(store), store_summary)
    per_step = None if found is None else check_resumable(found, recipe, data)
    if resume and found is None:
        check_restart(output, recipe, data)
    run = _Run(recipe, teacher, store, output, listener, store_summary, per_step, stage, start_from)
    run.prepare(found)
    with _until_signal(run):
        return run.finish()


class _Run(TrainingLoop):
    """Training loop of one rank, with its files in `output`.

    Args:
        first_stage: this is the first of two stages.
        start_from: the predictor folder of the first stage, which gives the start values.
    """

    backend: DeepSpeedBackend

    def __init__(
        self,
        recipe: Recipe,
        teacher: Teacher,
        store: Sequence[Sequenced],
        output: Path,
        listener: Listener,
        store_summary: dict[str, Any],
        per_step: int | None,
        first_stage: bool = False,
        start_from: Path | None = None,
    ) -> None:
        assert recipe.predictor is not None
        predictor = build_predictor(recipe.predictor, teacher)
        super().__init__(
            predictor, teacher, store, recipe.training, listener, rank(), world_size(), per_step, frozen=first_stage
        )
        self.described = predictor.describe()
        self.start_from = start_from
        self.recipe, self.output, self.store_summary = recipe, output, store_summary
        self.data = data_identity(len(store), store_summary)
        self.saved_at = 0
        self.log: MetricsLog | None = None

    def prepare(self, found: Path | None) -> None:
        """Set the start values, or restore checkpoint `found`, and build the engine."""
        if self.frozen:
            self._prepare_first_stage()
        elif self.start_from is not None and found is None:
            checkpoints.load_whole(self.predictor, self.start_from / "predictor.safetensors")
        elif found is None:
            self.initialise()
        if found is not None:
            checkpoints.load_weights(found, self.predictor)
        self.backend = DeepSpeedBackend(
            self.predictor, self.teacher, self.settings, self.pace, self.accumulation, self.frozen, self.frequent
        )
        if found is not None:
            self.progress = checkpoints.load_checkpoint(self.backend.engine, found, self.recipe)
            self.saved_at = self.progress.step
            self.pace.resume(self.progress.step, self.progress.spent)
            self.listener.note(f"resuming after step {self.progress.step} of {self.total}")
        if is_main():
            resumed = None if found is None else self.progress.step
            validated = self.progress.last["step"] if self.progress.last else -1
            self.log = MetricsLog(self.output, self.recipe, resumed, validated)

    def _prepare_first_stage(self) -> None:
        """Set the start values of a first stage, those of an interrupted one if there are any, and keep them."""
        start_values = self.output / checkpoints.START_FILE
        known = start_values.is_file()
        barrier()  # all ranks have looked before rank 0 writes
        if known:
            checkpoints.load_whole(self.predictor, start_values)
        else:
            self.listener.note("first stage: the coupling alone")
            self.initialise()
            if is_main():
                checkpoints.save_start(self.output, cpu_weights(self.predictor))
            barrier()
        freeze_drafts(self.predictor)
        if self.teacher.loaded_weights.kind != "zero3":  # there all ranks must run each forward
            settings, shape = self.settings, (self.steps, self.teacher.hidden_size)
            key = [file_sha256(start_values), settings.anchors_per_sequence, settings.seed, len(self.store)]
            if is_main():
                DraftStates(shape, self.output / DRAFT_STATES, key)
            barrier()
            self.reader.kept = DraftStates(shape, self.output / DRAFT_STATES, key, self.rank)

    def finish(self) -> Outcome:
        """Train to the end and export the predictor, or save a checkpoint where the run is stopped."""
        try:
            training = self._export() if self.run() else None
            if training is not None and self.frozen and is_main():
                shutil.rmtree(self.output / DRAFT_STATES, ignore_errors=True)
            return Outcome(self.progress.step, self.total, training is None, training)
        finally:
            if self.log:
                self.log.close()

    def record(self, row: Row) -> None:
        """Write a row to the metrics log."""
        if self.log:
            self.log.write(row)

    def keep_weights(self) -> None:
        """Write the present weights as those of one of the best validations."""
        weights = self.backend.weights()
        if is_main():
            checkpoints.save_best(self.output, self.progress.step, weights)

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one."""
        if self.progress.step == self.saved_at:
            return
        flush = getattr(self.store, "flush", None)
        if flush is not None:  # a store that is filled while it is read must hold the states that a checkpoint used
            flush()
        checkpoints.save_checkpoint(
            self.backend.engine, self.output, self.progress, self.recipe, self.data, self.order.per_step
        )
        self.saved_at = self.progress.step

    def saved(self) -> str:
        """Name the last checkpoint for an error message."""
        found = checkpoints.latest_checkpoint(self.output)
        return f"checkpoint {found.name} is kept" if found else super().saved()

    def _first_stage(self) -> dict[str, Any] | None:
        """Return the figures of the first stage that this run goes on from."""
        if self.start_from is None:
            return None
        record = json.loads((self.start_from / "training.json").read_text(encoding="utf-8"))
        return {key: record[key] for key in ("steps", "best_step", "validation", "tokens", "seconds")}

    def _trained_prompts(self) -> Tensor | None:
        """Return hashes of the training prompts: the tokens before the first answer of each conversation."""
        if self.teacher.tokenizer is None:
            return None
        texts, found = PromptTexts(self.teacher.tokenizer), []
        for input_ids, loss_mask in (token_pair(self.store, index) for index in self.training):
            start = int(loss_mask.int().argmax())
            found += [texts.of_tokens(input_ids[:start].tolist())] if start else []
        return trained_keys(found)

    def _store_record(self) -> dict[str, Any]:
        """Return the description of the store, its folder as seen from the predictor's."""
        folder, record = self.store_summary.get("folder"), provenance.portable(self.store_summary)
        return record | ({"folder": os.path.relpath(Path(folder).resolve(), self.output.resolve())} if folder else {})

    def _export(self) -> dict[str, Any]:
        """Write the predictor folder from the best weights, or from the last ones where nothing was held out."""
        progress, best = self.progress, self.progress.best
        weights = self.backend.weights() if best is None else {}
        training = as_json(
            {
                "steps": progress.step,
                "planned_steps": self.total,
                "best_step": best["step"] if best else progress.step,
                "expected_accepted_length": best["expected_accepted_length"] if best else None,
                "validation": {"first": progress.first, "best": best, "last": progress.last},
                "conversations": {"training": len(self.training), "validation": len(self.validation)},
                "tokens": progress.tokens,
                "seconds": progress.seconds,
                "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
                "data_wait_share": progress.waited / progress.seconds if progress.seconds else None,
                "world_size": self.ranks,
                "predictor": self.described,
                "first_stage": self._first_stage(),
                "teacher": self.teacher.describe(),
                "teacher_memory": self.teacher.loaded_weights.describe(),
                "store": self._store_record(),
                "environment": provenance.environment(),
            }
        )
        if is_main():
            if best is not None:
                weights = checkpoints.load_best(self.output, best["step"])
            self.predictor.trained_prompts = self._trained_prompts()
            weights |= kept_tensors(self.predictor)
            config, teacher = self.predictor.config, teacher_record(self.teacher, self.output)
            checkpoints.export_predictor(self.output, weights, config, teacher, self.recipe, training)
        return training


@contextlib.contextmanager
def _until_signal(run: _Run) -> Iterator[None]:
    """Stop the run after its current step at Ctrl-C, SIGTERM or a closed terminal; at once at a second Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: Any) -> None:
        if run.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.interrupted = True

    with handling_signals(interrupt):
        yield
