"""`train`: fit a predictor on a store of hidden states from Python, as `firp train` does."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firp_cli.api.loading import complete_teacher, teacher_line
from firp_cli.chat_template import template_fingerprint, tokenizer_fingerprint
from firp_cli.collecting.answer import account_line, respond
from firp_cli.collecting.collect_store import OpenProgress, check_layers, silent, stored_dtype
from firp_cli.collecting.corpus import build_corpus, check_dataset, load_messages, longest_sequence
from firp_cli.collecting.engine_responder import make_responder
from firp_cli.collecting.online import HybridStates, OnlineStates
from firp_cli.collecting.vllm import check_responder
from firp_cli.config import PredictorConfig, Recipe, TeacherConfig
from firp_cli.distributed.launch import start
from firp_cli.distributed.rank_group import RankGroup
from firp_cli.distributed.sharding import load_for_ranks
from firp_cli.errors import CapacityError, StoreError, UsageError
from firp_cli.evaluation.gate import gate
from firp_cli.files import check_output, write_json
from firp_cli.machine import is_main, local_world_size, memory_of_rank, rank, readable_bytes, world_size
from firp_cli.predictors.folder import load_predictor
from firp_cli.recipe import load_recipe
from firp_cli.results import as_json
from firp_cli.store.reader import MANIFEST, Store, read_manifest, refuse_file
from firp_cli.teacher.teacher import Teacher
from firp_cli.teacher.weight_files import LoadedWeights
from firp_cli.training import trainer
from firp_cli.training.batches import split_validation
from firp_cli.training.checkpoint import guard_output
from firp_cli.training.memory_model import MemoryLine, total_bytes
from firp_cli.training.metrics_log import Listener, check_trackers
from firp_cli.training.plan import check_predictor
from firp_cli.training.preflight import preflight

LOG = logging.getLogger("firp")
GATE_TOKENS = 128  # new tokens per prompt of the gate
SHOWN_SHARE = 0.02  # smaller shares of a rank's memory are not printed


@dataclass(frozen=True)
class TrainRun:
    """A recipe resolved for training: its predictor, its folders, and the arguments that named it."""

    recipe: Recipe
    predictor: PredictorConfig
    store: Path
    output: Path
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run.

    Attributes:
        output: the predictor folder. steps, planned_steps: optimizer steps taken, and planned at the start.
        stopped: True when the run was interrupted; its checkpoint is saved, and `resume` continues.
        training: content of training.json; empty when stopped.
    """

    output: Path
    steps: int
    planned_steps: int
    stopped: bool
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def validation(self) -> dict[str, Any]:
        """The `first`, `best` and `last` validation; None each when nothing was held out."""
        return self.training.get("validation", {})

    @property
    def expected_accepted_length(self) -> float | None:
        """Expected accepted length of the best validation, in tokens."""
        return self.training.get("expected_accepted_length")

    @property
    def gate(self) -> dict[str, Any] | None:
        """Simulated and decoded accepted length after training; None when no gate was run."""
        return self.training.get("gate")

    def as_json(self) -> dict[str, Any]:
        """Return the content of training.json."""
        return self.training


def train(
    recipe: Recipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    store: str | Path | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    verify: bool = True,
    listener: Listener | None = None,
    progress: OpenProgress = silent,
) -> TrainResult:
    """Train the recipe's predictor and write its folder.

    Without a launcher this process is the only rank. Under torchrun, srun or DeepSpeed every rank calls this.

    Args:
        recipe: a Recipe, a recipe file, or the name of a shipped recipe.
        overrides: `section.field=value` each.
        store: folder that `collect` filled. output: predictor folder to write. None: the recipe's, else a usual one.
        resume: continue from the last checkpoint in `output`.
        verify: compare the store's checksums before training.
        listener: gets progress, validations and notes of the run.
        progress: opens a progress bar for the data of `data.mode` online and hybrid, as `progress("tokenizing")`.

    Raises UsageError, PredictorError, StoreError, FingerprintError, CapacityError or NumericsError.
    """
    run = resolve_train(recipe, overrides, store, output)
    check_train(run, resume, world_size(), local_world_size())
    return run_train(run, resume, verify, listener, progress)


def resolve_train(
    recipe: Recipe | str | Path | None,
    overrides: Sequence[str] = (),
    store: str | Path | None = None,
    output: str | Path | None = None,
) -> TrainRun:
    """Return the recipe with its overrides and the folders given, or usual ones. Raises RecipeError, UsageError."""
    resolved = load_recipe(recipe, overrides)
    name = None if isinstance(recipe, Recipe) or recipe is None else str(recipe)
    predictor = resolved.predictor
    if predictor is None:
        raise UsageError(
            f"{name or 'the recipe'} names no predictor: give a recipe with a predictor section "
            "(`firp train demo`), or predictor.kind=firp predictor.layer=4"
        )
    stem = Path(name).stem if name else resolved.data.dataset
    store = Path(store or resolved.store or Path("stores") / stem)
    output = Path(output or resolved.output or Path("runs") / f"{stem}-{predictor.kind}")
    resolved = resolved.model_copy(
        update={"store": str(store), "output": str(output), "teacher": _as_collected(resolved, store)}
    )
    named = ["RECIPE"] if isinstance(recipe, Recipe) else [name] if name else []
    return TrainRun(resolved, predictor, store, output, (*named, *overrides))


def _as_collected(recipe: Recipe, store: Path) -> TeacherConfig:
    """Return the recipe's teacher, with the settings of the store's teacher where the recipe has none: model, dtype,
    revision and chat template. Running code of the teacher's repository always needs the recipe's own permission.
    """
    teacher, path = recipe.teacher, store / MANIFEST
    if recipe.data.mode != "cached" or not path.is_file():
        return teacher
    manifest = read_manifest(store)
    collected = manifest["recipe"].get("teacher", {}) if isinstance(manifest["recipe"], dict) else {}
    loading = dict(manifest["teacher"].get("loading", {}))
    loading |= {"model": collected["model"]} if "model" in collected else {}
    if "model" in teacher.model_fields_set and teacher.model != loading.get("model", teacher.model):
        return teacher  # another one: the fingerprints tell
    missing = {name: value for name, value in loading.items() if name not in teacher.model_fields_set}
    if "model" in teacher.model_fields_set:
        missing.pop("revision", None)
    missing.pop("trust_remote_code", None)
    changed = {name: value for name, value in missing.items() if value != getattr(teacher, name)}
    if not changed:
        return teacher
    shown = ", ".join(f"{name}={_short(value)}" for name, value in changed.items())
    LOG.info(f"teacher as in the store {store}: {shown}")
    return teacher.model_copy(update=changed)


def _short(value: object) -> str:
    return str(value) if len(str(value)) <= 40 else f"{str(value)[:40]!r}..."


def check_train(run: TrainRun, resume: bool, ranks: int, local_ranks: int) -> None:
    """Check a run before a teacher is loaded: predictor, trackers, data, output folder and devices.

    Raises FirpError; CapacityError with settings that fit the devices, where `training.preflight` is `refuse`.
    """
    recipe = run.recipe
    if is_main():
        check_output(run.output)
    check_predictor(recipe)
    check_trackers(recipe)
    if recipe.data.mode != "cached":
        check_responder(recipe)
        check_dataset(recipe.data, training=True)
    elif not (run.store / MANIFEST).is_file():
        refuse_file(run.store)
        kept = [item for item in run.arguments if not item.startswith(("store=", "output="))]
        command = shlex.join(["firp", "collect", *kept, "--output", str(run.store)])
        raise StoreError(f"no hidden-state store at {run.store}; fill it first:\n  {command}")
    guard_output(run.output, resume)
    _check_devices(recipe, ranks, local_ranks)


def run_train(
    run: TrainRun,
    resume: bool = False,
    verify: bool = True,
    listener: Listener | None = None,
    progress: OpenProgress = silent,
) -> TrainResult:
    """Train a run that `check_train` has passed, then decode a few prompts with the result. Every rank calls this."""
    start()
    teacher = _load_teacher(run)
    cached = run.recipe.data.mode == "cached"
    data = _open_store(run, teacher, verify and is_main()) if cached else _online_states(run, teacher, progress)
    outcome = trainer.train(
        run.recipe, teacher, data, run.output, resume=resume, listener=listener, store_summary=data.describe()
    )
    training = outcome.training or {}
    if is_main() and not outcome.stopped:
        loaded = teacher.loaded_weights
        whole = teacher if loaded.kind == "whole" else None
        del teacher  # frees its memory where the gate loads the whole teacher
        training = _run_gate(run, loaded, whole, data) or training
    return TrainResult(run.output, outcome.step, outcome.total_steps, outcome.stopped, training)


def _check_devices(recipe: Recipe, ranks: int, local_ranks: int) -> None:
    """Compare the memory that each rank needs with the memory of this machine's devices."""
    mode = recipe.training.preflight
    if mode == "ignore" or not is_main():
        return
    room = memory_of_rank(local_ranks)
    checked = None if room is None else preflight(recipe, ranks, *room)
    if room is None or checked is None:
        return
    lines, fault = checked
    if not fault:
        needed = readable_bytes(total_bytes(lines))
        LOG.info(f"memory per rank: about {needed} of {readable_bytes(room[0])} ({room[1]})")
        return
    _log_memory(lines)
    if mode == "refuse":
        raise CapacityError(fault)
    LOG.info(fault)


def _log_memory(lines: list[MemoryLine]) -> None:
    """Log the largest parts of a rank's memory."""
    total = total_bytes(lines)
    shown = [line for line in lines if line.bytes > SHOWN_SHARE * total]
    width = max(len(line.name) for line in shown)
    for line in sorted(shown, key=lambda line: -line.bytes):
        LOG.info(f"{line.name:<{width}}  {readable_bytes(line.bytes):>12}  {line.rule}")


def _load_teacher(run: TrainRun) -> Teacher:
    """Load the layers that training runs: with a store those from the lowest transfer layer on, else all.

    Predictors of the final state need no layer; a coupling reads the embedding.
    """
    cached = run.recipe.data.mode == "cached"
    lowest = min(run.predictor.transfer_layers, default=sys.maxsize) if cached else 0
    coupled = getattr(run.predictor, "coupling", None) is not None
    teacher = load_for_ranks(run.recipe.teacher, lowest, embedding=coupled)
    LOG.info(teacher_line(teacher.loaded_weights))
    return teacher


def _open_store(run: TrainRun, teacher: Teacher, verify: bool) -> Store:
    store = Store.open(run.store, layers=run.predictor.required_layers(teacher), verify=verify)
    tokenizer = teacher.tokenizer
    store.check_teacher(teacher.fingerprint, tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer))
    return store


def _online_states(run: TrainRun, teacher: Teacher, progress: OpenProgress) -> OnlineStates:
    """Return the recipe's conversations with states that the teacher computes when they are read."""
    data, folder = run.recipe.data, run.store
    with progress("tokenizing") as bar:
        corpus = build_corpus(load_messages(data), teacher, data, bar)
    responder = make_responder(run.recipe, teacher)
    if responder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        longest = longest_sequence(teacher, data)
        with progress("answering") as bar:
            corpus, account = respond(teacher, corpus, data, longest, folder, responder, bar, RankGroup.join())
        LOG.info(account_line(account))
    layers, dtype = check_layers(run.predictor.required_layers(teacher), teacher), stored_dtype(teacher, data)
    if data.mode == "online":
        return OnlineStates(teacher, corpus, layers, dtype, data.pack_tokens)
    return HybridStates(teacher, corpus, layers, dtype, data.pack_tokens, folder, data.shard_tokens, rank())


def _run_gate(
    run: TrainRun, loaded: LoadedWeights, teacher: Teacher | None, data: Store | OnlineStates
) -> dict[str, Any] | None:
    """Decode a few held-out prompts with the new predictor; return training.json with the figures added.

    `teacher` None: training held a part of it, and the whole one is loaded here. Returns None without a gate.
    """
    settings = run.recipe.training
    if not settings.gate_prompts:
        LOG.info("no gate: training.gate_prompts is 0, so nothing was decoded")
        return None
    training, held_out = split_validation(len(data), settings.validation_fraction, settings.seed)
    prompts = []
    for index in (held_out or training)[: settings.gate_prompts]:
        item = data[index]
        answer_start = int(item.loss_mask.int().argmax())
        if answer_start:
            prompts.append(item.input_ids[:answer_start].tolist())
    began = time.monotonic()
    whole = complete_teacher(run.recipe.teacher, loaded) if teacher is None else teacher
    if isinstance(whole, str):
        LOG.info(f"no gate: {whole}")
        return _record_gate(run.output, {"skipped": whole})
    limit = min(GATE_TOKENS, run.recipe.data.max_new_tokens)
    if not held_out:
        LOG.info("nothing held out: the gate decodes trained text")
    figures = gate(whole, load_predictor(run.output, whole), prompts, None, limit)
    return _record_gate(
        run.output,
        {**figures, "held_out": bool(held_out), "max_new_tokens": limit, "seconds": time.monotonic() - began},
    )


def _record_gate(output: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """Add the gate's figures to training.json and return its content."""
    path = output / "training.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["gate"] = as_json(figures)
    write_json(path, record)
    return record
