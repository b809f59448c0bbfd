"""`firp_cli.evaluate`: quality of a predictor's drafts, without decoding."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from firp_cli.analyses.run import chosen_analyses, run_analyses
from firp_cli.analyses.subject import Subject
from firp_cli.api.loading import LOG, load_pair
from firp_cli.assets import DEFAULT_TEACHER
from firp_cli.chat_template import template_fingerprint, tokenizer_fingerprint
from firp_cli.collecting.collect_store import OpenProgress, collect_store, silent
from firp_cli.collecting.corpus import check_dataset
from firp_cli.collecting.engine_responder import EngineResponder
from firp_cli.config import DataConfig, Recipe, TeacherConfig
from firp_cli.data.prompt_text import PromptTexts
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.decoding.tree_spec import TreeSpec, default_tree, parse_tree
from firp_cli.errors import NumericsError, UsageError
from firp_cli.evaluation.environment import measurement_environment
from firp_cli.evaluation.quality import Quality, Sequences
from firp_cli.evaluation.quality import evaluate as measure_quality
from firp_cli.evaluation.speed_ticks import measure_tick, pipeline_report
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.folder import load_predictor, predictor_folder, trained_store
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.predictors.trained_prompts import prompt_key
from firp_cli.provenance import portable
from firp_cli.recipe import load_recipe
from firp_cli.results import EvalReport, PipelineReport
from firp_cli.store.reader import MANIFEST, Store, read_manifest
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.batches import split_validation

DEFAULT_LIMIT = 40
ANALYSED = 200  # conversations of an analysis, where no limit is given
DECODED = 16  # prompts that a pipeline decodes for its diagnostics
DECODED_TOKENS = 128  # new tokens of each


@dataclass
class _Finite:
    """Some sequences of a store, whose states are checked as they are read. Raises NumericsError."""

    store: Store
    folder: Path
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Any:
        number = self.indices[index]
        item = self.store[number]
        for name, states in [*item.hidden.items(), ("final", item.final)]:
            bad = ~torch.isfinite(states).all(dim=-1)
            if bad.any():
                shards = read_manifest(self.folder)["shards"]
                file = next((shard["file"] for shard in shards if shard["first"] <= number < shard["next"]), "?")
                raise NumericsError(
                    f"NaN or infinity in hidden.{name} of {self.folder / file}, token {int(bad.int().argmax())} of "
                    f"conversation {number}: `{shlex.join(['firp', 'store', 'verify', str(self.folder)])}` names all "
                    "such places and the remedy"
                )
        return item


def evaluate(
    predictor: str | Path,
    *,
    store: str | Path | None = None,
    dataset: str | None = None,
    teacher: str | TeacherConfig | None = None,
    dtype: str = "auto",
    data_dir: str | None = None,
    split: str = "test",
    limit: int | None = None,
    tree: str | None = None,
    force: bool = False,
    analyses: str | Sequence[str] = (),
    against: Sequence[str | Path] = (),
    progress: OpenProgress = silent,
) -> EvalReport:
    """Measure top-1, top-5, KL, expected accepted length and similarity of the drafts by step.

    Args:
        predictor: predictor folder or embedded name.
        store: hidden-state store to evaluate on. Of the store that the predictor was trained on, the conversations
            that training held out are used.
        dataset: known name, hub id, file or folder, whose prompts of `split` the teacher answers first. Without it and
            `store`: the training store, else the data set of the predictor's recipe.
        limit: conversations at most. None: all of a store, 40 prompts.
        analyses: names of `firp_cli.results.ANALYSES`, or `all`. against: other predictors for the analysis `heads`.
        progress: `progress(description)` opens a progress bar, a context manager: a function of (done, total).

    Example:
        >>> firp_cli.evaluate("firp", dataset="arithmetic", limit=8).expected_accepted_length_tree

    Raises UsageError, TeacherError, PredictorError, FingerprintError, DatasetError, StoreError and
    NumericsError.
    """
    names = _analyses(analyses, against)
    _check_source(store, dataset, data_dir, split)
    model, loaded, folder = load_pair(str(predictor), teacher, force, dtype)
    spec, recipe = _tree(tree, folder, loaded), _recipe(folder)
    others = _others(model, list(map(str, against)), force)
    trained_on = _training_store(recipe, folder)
    source = Path(store) if store is not None else None if dataset else trained_on
    with tempfile.TemporaryDirectory(prefix="firp-eval-") as temporary:
        if source is None:
            prompts = _test_prompts(recipe.data, dataset, data_dir, limit, split)
            place = Path(temporary) / "store"
            sequences, data = _answered(model, [loaded, *others.values()], recipe, prompts, place, progress)
        else:
            sequences, data = _from_store(model, loaded, recipe, source, trained_on)
        with progress("evaluating") as bar:
            quality = measure_quality(model, loaded, sequences, spec, limit=limit, progress=bar)
            pipeline = _pipeline(model, loaded, sequences, limit)
        chosen = replace(sequences, indices=sequences.indices[: limit or ANALYSED])
        subject = Subject(model, loaded, chosen, recipe.training.ridge_lambda, others)
        analysed = run_analyses(names, subject, progress)
    described = {"folder": portable(str(folder)), **loaded.describe()}
    return replace(_report(model, described, data, quality, spec), pipeline=pipeline, analyses=analysed)


def _report(
    teacher: Teacher, predictor: dict[str, Any], data: dict[str, Any], quality: Quality, spec: TreeSpec | None
) -> EvalReport:
    return EvalReport(
        environment=measurement_environment(teacher),
        teacher=teacher.describe(),
        predictor=predictor,
        data={**data, "sequences": quality.sequences, "anchors": quality.anchors},
        steps=quality.steps,
        expected_accepted_length_chain=quality.expected_accepted_length_chain,
        expected_accepted_length_tree=quality.expected_accepted_length_tree,
        tree=str(spec) if spec else "",
        similarity=quality.similarity,
    )


def _analyses(analyses: str | Sequence[str], against: Sequence[str | Path]) -> list[str]:
    """Return the chosen analyses. Raises UsageError."""
    names = chosen_analyses(analyses) if analyses else []
    if against and "heads" not in names:
        raise UsageError("--against is for the analysis heads: add --analysis heads")
    return names


def _others(teacher: Teacher, names: list[str], force: bool) -> dict[str, Predictor]:
    """Load predictors to compare with, by the names of their folders, where two are equal by their paths. Raises
    UsageError, PredictorError and FingerprintError.
    """
    folders = {name: predictor_folder(name) for name in names}
    short = [folder.resolve().name for folder in folders.values()]
    loaded = {}
    for label, (name, folder) in zip(short, folders.items(), strict=True):
        other = load_predictor(folder, teacher, force)
        if other.pipeline:
            raise UsageError(f"--against {name}: it feeds a pipeline, and heads compares drafters of later tokens")
        loaded[f"{label if short.count(label) == 1 else name} (against)"] = other
    return loaded


def _check_source(store: str | Path | None, dataset: str | None, data_dir: str | None, split: str) -> None:
    """Find the data set that is named, if any, before a teacher is loaded. Raises UsageError, DatasetError."""
    if store is not None and dataset is not None:
        raise UsageError("give either --store or --dataset")
    if dataset is not None:
        check_dataset(DataConfig(dataset=dataset, data_dir=data_dir, split=split, regenerate=True))


def _tree(tree: str | None, folder: Path, predictor: Predictor) -> TreeSpec | None:
    """Return the tree to evaluate the drafts with, where each node has its own pseudo rows; None for a pipeline."""
    if predictor.pipeline and tree:
        raise UsageError(f"{folder} feeds a pipeline, which has no tree: leave --tree out")
    if predictor.pipeline:
        return None
    spec = parse_tree(tree, predictor.steps) if tree else default_tree(folder, predictor)
    return replace(spec, budget=None)


def _pipeline(teacher: Teacher, predictor: Predictor, sequences: Sequences, limit: int | None) -> PipelineReport | None:
    """Decode the prompts of a few sequences in a SPEED pipeline and measure a tick; None for other predictors."""
    if not isinstance(predictor, SpeedPredictor):
        return None
    engine = PipelineEngine(teacher, predictor, guard=False)
    generations = []
    for index in range(min(len(sequences), limit or len(sequences), DECODED)):
        ids, mask = sequences[index].input_ids, sequences[index].loss_mask
        start = int(mask.int().argmax())
        if 0 < start <= teacher.max_positions - DECODED_TOKENS:
            generations += engine.generate([ids[:start].tolist()], DECODED_TOKENS)
    middle = [item.prompt_tokens + len(item.token_ids) // 2 for item in generations]
    cost = measure_tick(teacher, predictor, sum(middle) // len(middle)) if middle else None
    return pipeline_report(generations, teacher.looped is not None, cost=cost)


def _answered(
    teacher: Teacher,
    predictors: Sequence[Predictor],
    recipe: Recipe,
    prompts: DataConfig,
    folder: Path,
    progress: OpenProgress,
) -> tuple[_Finite, dict[str, Any]]:
    """Let the teacher answer prompts into the store `folder`, with the states that the first predictor needs; return
    those that no predictor was trained on. Raises UsageError, DatasetError.
    """
    _collect(teacher, prompts, predictors[0], folder, progress)
    every, _ = _from_store(teacher, predictors[0], recipe, folder)
    return _without_trained(every, predictors, prompts, teacher.tokenizer)


def _without_trained(
    sequences: _Finite, predictors: Sequence[Predictor], data: DataConfig, tokenizer: Any
) -> tuple[_Finite, dict[str, Any]]:
    """Return the answered prompts that no predictor was trained on, with their description for the report. Raises
    UsageError where none remains.
    """
    known: set[int] = set()
    for predictor in predictors:
        known |= set() if predictor.trained_prompts is None else set(predictor.trained_prompts.tolist())
    texts, kept = PromptTexts(tokenizer), []
    for number in sequences.indices:
        rows = sequences.store.stored(number)
        asked = rows["input_ids"][: int(rows["loss_mask"].int().argmax())]
        if not known or prompt_key(texts.of_tokens(asked.tolist())) not in known:
            kept.append(number)
    count, left_out = len(sequences), len(sequences) - len(kept)
    if not kept:
        raise UsageError(
            f"{data.dataset}: the predictor was trained on all {count} prompts; give others, or raise --limit"
        )
    if left_out:
        LOG.info(f"{data.dataset}: {left_out} of {count} prompts are left out: the predictor was trained on them")
    described = {"dataset": data.dataset, "split": data.split, "answers": "teacher, greedy"}
    return replace(sequences, indices=kept), described | {"left_out_trained": left_out}


def _recipe(folder: Path) -> Recipe:
    """Return the recipe that the predictor was trained with; an empty one where the folder has none."""
    path = folder / "recipe.yaml"
    return load_recipe(str(path)) if path.is_file() else Recipe()


def _training_store(recipe: Recipe, folder: Path) -> Path | None:
    """Return the store that the predictor in `folder` was trained on, where it still exists: as the recipe names it, or
    as seen from the predictor's folder.
    """
    places = [Path(recipe.store)] if recipe.store else []
    store = trained_store(folder).get("folder")
    places += [(folder / store).resolve()] if isinstance(store, str) else []
    return next((place for place in places if (place / MANIFEST).is_file()), None)


def _test_prompts(
    config: DataConfig, dataset: str | None, data_dir: str | None, limit: int | None, split: str
) -> DataConfig:
    """Describe the test prompts that the teacher answers: those of `dataset`, else of the predictor's recipe."""
    name = dataset or config.dataset or DEFAULT_TEACHER
    if limit is None:
        LOG.info(f"{name}: the teacher answers at most {DEFAULT_LIMIT} prompts; --limit N for another number")
    return config.model_copy(
        update={
            "dataset": name,
            "split": split,
            "sample": None,
            "columns": config.columns if name == config.dataset else {},
            "data_dir": data_dir or config.data_dir,
            "limit": limit or DEFAULT_LIMIT,
            "regenerate": True,
        }
    )


def _collect(teacher: Teacher, config: DataConfig, predictor: Predictor, folder: Path, progress: OpenProgress) -> None:
    """Fill a temporary store with the teacher's own answers and their states."""
    responder = EngineResponder(teacher, config.batch_size)
    collect_store(teacher, config, predictor.required_layers, folder, progress=progress, responder=responder)


def _from_store(
    teacher: Teacher, predictor: Predictor, recipe: Recipe, folder: Path, trained_on: Path | None = None
) -> tuple[_Finite, dict[str, Any]]:
    """Open a store and return its sequences, with their description for the report; of the store that the predictor
    was trained on, only those that training held out.
    """
    store = Store.open(folder, layers=predictor.required_layers)
    tokenizer = teacher.tokenizer
    store.check_teacher(teacher.fingerprint, tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer))
    data: dict[str, Any] = {"store": str(folder)}
    if trained_on is None or trained_on.resolve() != folder.resolve():
        return _Finite(store, folder, range(len(store))), data
    _, held_out = split_validation(len(store), recipe.training.validation_fraction, recipe.training.seed)
    if not held_out:
        LOG.info(f"{folder}: training held nothing out of this store, so the figures are those of its training data")
        return _Finite(store, folder, range(len(store))), data
    LOG.info(f"{folder}: the predictor was trained on this store; the {len(held_out)} held-out conversations are used")
    return _Finite(store, folder, held_out), {**data, "part": "held out of training"}
