"""Methods that a bench compares: plain decoding, transformers' generate and predictors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firp_cli.assets import nearest
from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.make_engine import make_engine
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.errors import UsageError
from firp_cli.evaluation.hf_generate import HuggingFaceGenerate
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.results import Generation
from firp_cli.teacher.teacher import Teacher

BASELINES = ("ar", "hf")
Generate = Callable[[Sequence[Sequence[int]], int], list[Generation]]


@dataclass
class Method:
    """Something that decodes: `generate(prompts, max_new_tokens)` returns one Generation per prompt."""

    name: str
    generate: Generate
    predictor: str | None = None  # folder that the predictor came from
    tree: str | None = None
    exits: SpeedPredictor | None = None  # of a pipeline
    engine: Engine | PipelineEngine | None = None  # of ours


@dataclass(frozen=True)
class BenchSettings:
    """What every method is measured under. `warmup`: times that each method decodes the longest batch, uncounted.

    `ranks`: processes that share a pipeline's stages, of which this is `rank`. `guard`: predictors may fall back to
    plain decoding; None: those that feed a pipeline. `engine`: how our engine runs its steps.
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
    engine: EngineOptions = field(default_factory=EngineOptions)


@dataclass
class LoadedPredictor:
    """A predictor with the trees it is measured with (None: it feeds a pipeline) and the folder it came from."""

    predictor: Predictor
    tree: TreeSpec | TunedTrees | None
    folder: Path


def predictor_names(kinds: Sequence[tuple[str, Path]]) -> list[str]:
    """A method name for each (kind, folder): the kind, or the folder where a kind stands twice."""
    names = []
    for kind, folder in kinds:
        shared = [other for name, other in kinds if name == kind]
        folders = [other.name for other in shared]
        unique = len(shared) == 1
        names.append(kind if unique else folder.name if folders.count(folder.name) == 1 else str(folder))
    return names


def choose_methods(wanted: Sequence[str] | None, predictors: Sequence[str]) -> list[str]:
    """The methods to measure, in order; None takes all. Raises UsageError with the nearest name."""
    known = [*BASELINES, *predictors]
    if wanted is None:
        return known
    for name in wanted:
        if name not in known:
            raise UsageError(f"unknown method {name!r}{nearest(name, known)}")
    return list(dict.fromkeys(wanted))


def make_methods(
    teacher: Teacher, predictors: dict[str, LoadedPredictor], names: Sequence[str], settings: BenchSettings
) -> list[Method]:
    """Methods by name: `ar` and the predictors in the same engine, `hf` outside it."""
    options: dict[str, Any] = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed}
    methods = []
    for name in names:
        if name == "hf":
            methods.append(Method(name, HuggingFaceGenerate(teacher, **options).generate))
        elif name == "ar":
            plain = make_engine(teacher, options=settings.engine, **options)
            methods.append(Method(name, plain.generate, engine=plain))
        else:
            loaded = predictors[name]
            shared: dict[str, Any] = {"rank": settings.rank, "ranks": settings.ranks, "guard": settings.guard}
            engine = make_engine(teacher, loaded.predictor, loaded.tree, options=settings.engine, **shared, **options)
            tree = str(loaded.tree) if isinstance(loaded.tree, TreeSpec) else None
            exits = loaded.predictor if isinstance(loaded.predictor, SpeedPredictor) else None
            methods.append(Method(name, engine.generate, str(loaded.folder), tree, exits, engine))
    return methods
