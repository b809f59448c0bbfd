"""The decoding loop that a predictor needs: draft trees, or a pipeline."""

from __future__ import annotations

from typing import Any

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.decoding.speed.stages import Ranks
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.errors import UsageError
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.speed import SpeedPredictor
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
    """Plain decoding without a predictor, a pipeline for early exits, else draft trees.

    Args:
        rank, ranks: this process's place among those that share a pipeline. Raises UsageError for other predictors.
        guard: decode plainly for a while where drafting does not pay; None: pipelines do, trees do not.
    """
    if isinstance(predictor, SpeedPredictor):
        chunk = (options or EngineOptions()).prefill_chunk
        parts = Ranks(predictor.loops, rank, ranks)
        return PipelineEngine(
            teacher, predictor, prefill_chunk=chunk, guard=guard is not False, ranks=parts, **sampling
        )
    if ranks > 1 and predictor is not None:
        raise UsageError(
            f"several ranks share the pipeline of a speed predictor; {predictor.kind} decodes on one device: leave "
            "--gpus out"
        )
    return Engine(teacher, predictor, tree, options=options, guard=bool(guard), **sampling)
