"""Check that decoding accepts the tokens that the training forward predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.decoding.tree_spec import TreeSpec, default_tree, parse_tree
from firp_cli.evaluation.simulate import simulate_answer, simulate_ticks
from firp_cli.predictors.base import Predictor, TreePredictor
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.teacher.teacher import Teacher

GATE_TOLERANCE = {torch.float32: 0.02}  # relative; in other dtypes rounding flips near-ties between the two forwards
GATE_TOLERANCE_ROUNDED = 0.1


def gate(
    teacher: Teacher,
    predictor: Predictor,
    prompts: Sequence[Sequence[int]],
    tree: TreeSpec | str | None,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Decode the prompts greedily, simulate the same output, and compare mean accepted lengths.

    Prompts that leave no room for the answer in the teacher's context are skipped. Returns `simulated` and `real`
    (tokens per decoding step, bonus included; for early exits tokens in r ticks), `prompts` (number of decoded
    prompts), and `agree`.
    """
    prompts = [prompt for prompt in prompts if len(prompt) + max_new_tokens <= teacher.max_positions]
    if isinstance(predictor, SpeedPredictor):
        simulated, real = _pipeline_lengths(teacher, predictor, prompts, max_new_tokens)
    else:
        assert isinstance(predictor, TreePredictor)
        simulated, real = _tree_lengths(teacher, predictor, prompts, tree, max_new_tokens)
    tolerance = GATE_TOLERANCE.get(teacher.dtype, GATE_TOLERANCE_ROUNDED)
    return {
        "simulated": simulated,
        "real": real,
        "prompts": len(prompts),
        "agree": abs(simulated - real) <= tolerance * real,
    }


def _tree_lengths(
    teacher: Teacher,
    predictor: TreePredictor,
    prompts: Sequence[Sequence[int]],
    tree: TreeSpec | str | None,
    max_new_tokens: int,
) -> tuple[float, float]:
    """Return simulated and decoded tokens per step."""
    if isinstance(tree, str):
        tree = parse_tree(tree, predictor.steps)
    spec = tree or default_tree(None, predictor)
    generations = Engine(teacher, predictor, spec).generate(prompts, max_new_tokens) if prompts else []
    simulated: list[int] = []
    real: list[int] = []
    for prompt, generation in zip(prompts, generations, strict=True):
        real += generation.accepted_lengths
        simulated += simulate_answer(teacher, predictor, [*prompt, *generation.token_ids], len(prompt), spec)
    return _mean(simulated), _mean(real)


def _mean(lengths: Sequence[int]) -> float:
    return sum(lengths) / len(lengths) if lengths else 1.0


def _pipeline_lengths(
    teacher: Teacher, predictor: SpeedPredictor, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[float, float]:
    """Return simulated and decoded tokens in r ticks."""
    engine = PipelineEngine(teacher, predictor, guard=False)
    tokens = simulated = ticks = 0
    for prompt, generation in zip(prompts, engine.generate(prompts, max_new_tokens) if prompts else [], strict=True):
        assert generation.pipeline is not None
        tokens += generation.pipeline.left
        ticks += generation.pipeline.ticks
        simulated += simulate_ticks(teacher, predictor, [*prompt, *generation.token_ids], len(prompt))
    lengths = [predictor.loops * tokens / count if count else 1.0 for count in (simulated, ticks)]
    return lengths[0], lengths[1]
