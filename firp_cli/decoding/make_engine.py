"""Choice of the decoding loop: draft trees or a pipeline. No other decoding code depends on the predictor's type."""

from __future__ import annotations

from typing import Any

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.decoding.speed.stages import PipelineStages
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.errors import UsageError
from firp_cli.predictors.base import ExitPredictor, Predictor, TreePredictor
from firp_cli.teacher.teacher import Teacher


def make_engine(
    teacher: Teacher,
    predictor: Predictor | None = None,
    tree: TreeSpec | TunedTrees | None = None,
    rank: int = 0,
    ranks: int = 1,
    guard: bool | None = None,
    options: EngineOptions | None = None,
    **sampling: Any,
) -> Engine | PipelineEngine:
    """Return the engine for a predictor: a pipeline for early exits, else draft trees; autoregressive without one.

    Args:
        rank, ranks: this process's place among those that share a pipeline. Raises UsageError for other predictors.
        guard: fall back to autoregressive decoding while drafting is slower; None: pipelines do, trees do not.
    """
    if isinstance(predictor, ExitPredictor):
        chunk = (options or EngineOptions()).prefill_chunk
        stages = PipelineStages(predictor.loops, rank, ranks)
        return PipelineEngine(
            teacher, predictor, prefill_chunk=chunk, guard=guard is not False, stages=stages, **sampling
        )
    assert predictor is None or isinstance(predictor, TreePredictor)
    if ranks > 1 and predictor is not None:
        raise UsageError(
            f"several ranks share the pipeline of a speed predictor; {predictor.kind} decodes on one device: leave "
            "--gpus out"
        )
    return Engine(teacher, predictor, tree, options=options, guard=bool(guard), **sampling)
