"""Methods that a bench compares: baselines (`firp_cli.evaluation.baselines`) and predictors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.make_engine import make_engine
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.errors import MethodError, UsageError
from firp_cli.evaluation import baselines
from firp_cli.evaluation.answer_runs import BatchRun, runs_of
from firp_cli.evaluation.bench_prompts import Generate
from firp_cli.evaluation.hf_generate import HuggingFaceGenerate
from firp_cli.evaluation.speed_ticks import measure_tick, pipeline_report
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.provenance import portable
from firp_cli.results import BenchRow, Generation
from firp_cli.teacher.teacher import Teacher

TURNS = ("all", "first")
AddDetails = Callable[[Sequence[BenchRow], Sequence[BatchRun], "BenchSettings"], None]


@dataclass
class Method:
    """Way to decode that a bench measures.

    Attributes:
        generate: `generate(prompts, max_new_tokens)` returns one Generation per prompt.
        predictor: folder of its predictor. tree: specification of its draft tree.
        engine: the engine of this package that decodes; None for others.
        on_all_ranks: all ranks must call `generate`, since they share the work.
        add_details: sets the fields of the method's rows that only methods of its kind have.
        reason: why it cannot run with this teacher or under these settings; None while nothing is known.
    """

    name: str
    generate: Generate
    predictor: str | None = None
    tree: str | None = None
    engine: Engine | PipelineEngine | None = None
    on_all_ranks: bool = False
    add_details: AddDetails | None = None
    reason: str | None = None


@dataclass(frozen=True)
class BenchSettings:
    """Conditions that all methods are measured under. Raises UsageError.

    Attributes:
        turns: user turns of a conversation that are asked: all, or first.
        warmup: uncounted times that each method decodes the longest batch.
        rank, ranks: this process among those that share a pipeline's stages.
        run_code: run the code of answers to data sets with tests, in a sandbox, for the accuracy.
        guard: predictors fall back to autoregressive decoding while drafting is slower; None: only pipelines do.
        engine: how this package's engine runs its steps.
        preset: published definition that they follow, as `presets.apply_preset` describes it.
    """

    max_new_tokens: int = 128
    batch_size: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    repeats: int = 3
    warmup: int = 1
    seed: int = 0
    rank: int = 0
    ranks: int = 1
    guard: bool | None = None
    turns: str = "all"
    run_code: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)
    preset: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.turns not in TURNS:
            raise UsageError(f"unknown turns {self.turns!r}: choose from {', '.join(TURNS)}")
        if self.max_new_tokens < 2:
            raise UsageError("one new token comes from prefill: no decoding step to compare; raise --max-new-tokens")


@dataclass
class LoadedPredictor:
    """Predictor with its draft trees (None for early exits) and its folder."""

    predictor: Predictor
    tree: TreeSpec | TunedTrees | None
    folder: Path


def predictor_names(kinds: Sequence[tuple[str, Path]]) -> list[str]:
    """Return a method name for each (kind, folder): the kind, or the folder where several have the same kind."""
    names = []
    for kind, folder in kinds:
        alike = [path for name, path in kinds if name == kind]
        folders = [path.name for path in alike]
        names.append(kind if len(alike) == 1 else folder.name if folders.count(folder.name) == 1 else str(folder))
    return names


def choose_methods(wanted: Sequence[str] | None, predictors: Sequence[str]) -> list[str]:
    """Return the methods to measure, in order. None takes the baselines `ar`, `hf`, `prompt-lookup` and `suffix`, and
    all predictors. Raises UsageError with the nearest name.
    """
    if wanted is None:
        return [*baselines.DEFAULT, *predictors]
    for name in wanted:
        baselines.check_method(name, predictors)
    return list(dict.fromkeys(wanted))


def make_methods(
    teacher: Teacher, predictors: dict[str, LoadedPredictor], names: Sequence[str], settings: BenchSettings
) -> list[Method]:
    """Return methods by name. `ar`, the n-gram baselines and the predictors use this package's engines, the other
    baselines do not. A method that cannot run has a reason.

    Raises UsageError where the model of an `assisted:MODEL` cannot be loaded.
    """
    options: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed}
    shown = baselines.shown_names(names)
    methods = []
    for name in names:
        kind = baselines.baseline(name)
        if name in predictors:
            method = _drafting_method(name, teacher, predictors[name], settings, options)
        elif kind is None:
            method = _refused(name, baselines.missing_reason(name, teacher))
        elif kind == "ar":
            engine = make_engine(teacher, options=settings.engine, **options)
            method = Method(name, engine.generate, engine=engine)
        elif kind in baselines.NGRAMS:
            method = _ngram_method(name, teacher, settings, options)
        else:
            method = _library_method(name, teacher, settings, options)
        method.name = shown[name]
        methods.append(method)
    return methods


def _refused(name: str, reason: str) -> Method:
    """Return a method that cannot run."""

    def refuse(*_: Any) -> list[Generation]:
        raise MethodError(f"{name}: {reason}")

    return Method(name, refuse, reason=reason)


def _ngram_method(name: str, teacher: Teacher, settings: BenchSettings, options: dict[str, Any]) -> Method:
    """Return a method whose drafts are copied from the text so far, through the trees of this package's engine."""
    from firp_cli.decoding.text_drafts import ngram_predictor

    predictor, tree = ngram_predictor(name, teacher)
    engine = make_engine(teacher, predictor, tree, guard=settings.guard, options=settings.engine, **options)
    return Method(name, engine.generate, tree=str(tree), engine=engine)


def _library_method(name: str, teacher: Teacher, settings: BenchSettings, options: dict[str, Any]) -> Method:
    """Return a method of transformers' `generate`."""
    if reason := baselines.library_reason(name, teacher, settings.batch_size):
        return _refused(name, reason)
    kind, given = baselines.baseline(name), baselines.argument(name)
    if kind == "early-exit":
        return Method(name, HuggingFaceGenerate(teacher, early_exit=int(given), **options).generate)
    if kind != "assisted":
        return Method(name, HuggingFaceGenerate(teacher, static=kind == "hf-static", **options).generate)
    assistant = baselines.load_assistant(given, teacher)
    if reason := baselines.assistant_reason(teacher, assistant):
        return _refused(name, reason)
    return Method(name, HuggingFaceGenerate(teacher, assistant=assistant, **options).generate, portable(given))


def _drafting_method(
    name: str, teacher: Teacher, loaded: LoadedPredictor, settings: BenchSettings, options: dict[str, Any]
) -> Method:
    predictor, tree = loaded.predictor, loaded.tree
    shared: dict[str, Any] = {"rank": settings.rank, "ranks": settings.ranks, "guard": settings.guard}
    engine = make_engine(teacher, predictor, tree, options=settings.engine, **shared, **options)
    method = Method(name, engine.generate, portable(str(loaded.folder)), engine=engine)
    if isinstance(predictor, SpeedPredictor):
        method.on_all_ranks, method.add_details = True, pipeline_details(teacher, predictor)
    elif isinstance(tree, TreeSpec):
        method.tree = str(tree)
    elif tree is not None:
        method.add_details = tuned_tree_details(tree)
    return method


def tuned_tree_details(trees: TunedTrees) -> AddDetails:
    """Return a function that records the tree of a typical batch in a method's rows, with its predicted performance."""

    def add(rows: Sequence[BenchRow], runs: Sequence[BatchRun], settings: BenchSettings) -> None:
        longest = median(length for run in runs for length in run.longest_prompts())
        context = int(longest) + settings.max_new_tokens // 2
        entry = trees.entry(settings.batch_size, context)
        for row in rows:
            row.tree = str(trees.at(settings.batch_size, context))
            row.predicted = entry.predicted if entry else None

    return add


def pipeline_details(teacher: Teacher, predictor: SpeedPredictor) -> AddDetails:
    """Return a function that adds the pipeline's statistics to a method's rows, with the cost of a tick in the middle
    of a typical answer.
    """

    def add(rows: Sequence[BenchRow], runs: Sequence[BatchRun], settings: BenchSettings) -> None:
        middle = [item.prompt_tokens + len(item.token_ids) // 2 for run in runs for item in run.generations]
        cost = measure_tick(teacher, predictor, int(median(middle))) if settings.ranks == 1 else None
        for row in rows:
            generations = [item for run in runs_of(row.dataset, row.category, runs) for item in run.generations]
            row.pipeline = pipeline_report(generations, teacher.looped is not None, settings.ranks, cost)

    return add
