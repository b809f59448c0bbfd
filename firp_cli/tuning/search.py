"""The search for the tree that emits most tokens per second: shapes by acceptance, times by the cost model, accepted
lengths by walking through written answers.

For every number of steps k' and of nodes N there are two shapes: the static tree of the likeliest paths, which no other
static tree of N nodes beats (`Acceptance.grow`), and the dynamic one. Each may give pseudo rows to few of its nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from firp_cli.decoding.tree_spec import TreeSpec, parse_tree, static_tree
from firp_cli.predictors.base import TreePredictor
from firp_cli.tuning.acceptance import Acceptance
from firp_cli.tuning.cost import CostModel

NODES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)
BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16)
PLAIN = TreeSpec("none", 1)


@dataclass(frozen=True)
class Candidate:
    """A tree, and how likely each of its nodes is accepted, the root first (static trees)."""

    spec: TreeSpec
    probabilities: tuple[float, ...] = ()


@dataclass(frozen=True)
class Scored:
    """A candidate with its accepted length and the milliseconds of its step."""

    candidate: Candidate
    length: float
    milliseconds: float

    @property
    def rate(self) -> float:
        """Tokens per millisecond and sequence."""
        return self.length / self.milliseconds

    @property
    def spec(self) -> TreeSpec:
        return self.candidate.spec


def layer_rows(spec: TreeSpec, predictor: TreePredictor, layers: int) -> list[int]:
    """Rows per sequence that each layer runs in a step: nodes, and from their layers on the pseudo rows."""
    steps = spec.drafting(predictor.steps)
    anchors = spec.budget if spec.limited and spec.budget else spec.nodes
    entering = predictor.transfer_layers[:steps]
    return [spec.nodes + anchors * sum(layer <= number for layer in entering) for number in range(layers)]


def shapes(acceptance: Acceptance, predictor: TreePredictor, most_nodes: int) -> list[Candidate]:
    """All trees with pseudo rows for every node: static and dynamic, by steps and nodes."""
    found: dict[TreeSpec, Candidate] = {}
    for steps in range(1, predictor.steps + 1):
        grown = acceptance.grow(most_nodes, steps)
        for nodes in NODES:
            if nodes > most_nodes:
                break
            if nodes <= len(grown) + 1:
                chosen = grown[: nodes - 1]
                spec = static_shape([path for path, _ in chosen], predictor.steps)
                found.setdefault(spec, Candidate(spec, chances(chosen)))
            if steps < nodes:  # no path is longer
                spec = dynamic_tree(nodes, steps, predictor.steps)
                found[spec] = Candidate(spec)
    return list(found.values())


def chances(grown: Sequence[tuple[tuple[int, ...], float]]) -> tuple[float, ...]:
    """How likely each node of the tree of these paths is accepted, in the order of its nodes, the root first."""
    return (1.0, *(value for _, value in sorted(grown, key=lambda item: (len(item[0]), item[0]))))


def static_shape(paths: Sequence[tuple[int, ...]], steps: int) -> TreeSpec:
    """The tree of these paths, closed under parents. One that goes straight down is called a chain."""
    depth = max(map(len, paths))
    if all(set(path) == {0} for path in paths):
        return parse_tree("chain" if depth == steps else f"chain/{depth}", steps)
    return static_tree(paths, steps, f"tuned:{len(paths) + 1}")


def dynamic_tree(nodes: int, run: int, steps: int) -> TreeSpec:
    """The dynamic tree of so many nodes over the first `run` of a predictor's `steps`."""
    return parse_tree(f"dynamic:{nodes}" + (f"/{run}" if run < steps else ""), steps)


def with_budgets(candidate: Candidate, predictor: TreePredictor) -> list[Candidate]:
    """A tree once more with pseudo rows for its likeliest ends only. One that reaches less deep than the predictor may
    run more steps: what lies behind an end without rows of its own comes from them.
    """
    if not predictor.transfer_layers:
        return []
    spec, steps = candidate.spec, predictor.steps
    reach = spec.drafting(steps)
    free = spec.kind == "static" or reach == spec.nodes - 1
    runs = [run if run < steps else None for run in range(reach, steps + 1)] if free else [spec.steps]
    return [
        replace(candidate, spec=replace(spec, budget=budget, steps=run))
        for run in runs
        for budget in BUDGETS
        if budget < spec.nodes
    ]


class StepCosts:
    """Milliseconds of a step at one batch size and context: its passes by the cost model, and around them what a few
    whole steps took beyond their passes, linear in what a step has to handle.
    """

    def __init__(self, model: CostModel, predictor: TreePredictor, batch: int, context: int) -> None:
        self.model, self.predictor, self.batch, self.context = model, predictor, batch, context
        self._weights = np.zeros(len(self._features(PLAIN)))
        self._scale = 1.0
        self.plain = 0.0

    def passes(self, spec: TreeSpec, batch: int | None = None) -> float:
        """Layers, and the head on the nodes and on the drafts of predictors that share it."""
        batch = batch or self.batch
        rows = layer_rows(spec, self.predictor, self.model.report.layers)
        total = self.model.layers(rows, batch, self.context)
        total += self.model.parts(spec.nodes, batch, self.context)[2]
        if self.predictor.transfer_layers and spec.kind != "none":
            total += self.model.parts(spec.drafting(self.predictor.steps), batch, self.context)[2]
        return total

    def _features(self, spec: TreeSpec) -> list[float]:
        steps = spec.drafting(self.predictor.steps)
        anchors = spec.budget if spec.limited and spec.budget else spec.nodes
        drafted = spec.kind != "none"
        dynamic, limited, nodes = float(spec.kind == "dynamic"), float(spec.limited), spec.nodes * float(drafted)
        return [float(drafted), dynamic, limited, float(steps), nodes, nodes * limited, float(anchors * steps)]

    def fit(self, measured: dict[TreeSpec, float]) -> None:
        """Learn from whole steps in milliseconds, a plain one among them."""
        self.plain = measured[PLAIN]
        specs = [spec for spec in measured if spec != PLAIN]
        beyond = np.array([measured[spec] - self.passes(spec) for spec in specs])
        weights = np.array([1 / measured[spec] for spec in specs])
        features = np.array([self._features(spec) for spec in specs])
        self._weights = np.linalg.lstsq(features * weights[:, None], beyond * weights, rcond=1e-6)[0]

    def settle(self, measured: dict[TreeSpec, float]) -> None:
        """Learn what steps take on the machine as it is, from some that were timed closely, a plain one among them."""
        known = [measured[spec] / self(spec) for spec in measured if spec != PLAIN]
        self._scale, self.plain = float(np.median(known)) if known else 1.0, measured[PLAIN]

    def __call__(self, spec: TreeSpec) -> float:
        if spec.kind == "none":
            return self.plain
        whole = self.passes(spec) + float(np.dot(self._features(spec), self._weights))
        return self._scale * max(self.passes(PLAIN), whole)


def search(
    candidates: Sequence[Candidate],
    predictor: TreePredictor,
    cost: Callable[[TreeSpec], float],
    length: Callable[[TreeSpec], float],
    keep: int,
    fits: Callable[[TreeSpec], bool] = lambda spec: True,
) -> list[Scored]:
    """The best candidates and their variants under a budget, the best first.

    Accepted lengths are asked for in the order of what a tree could reach at most, until nothing can come among the
    best `keep` any more: no tree emits more than its depth and one, and one under a budget is taken to emit no more
    than without.
    """
    best: list[Scored] = []

    def least() -> float:
        return best[keep - 1].rate if len(best) >= keep else 0.0

    def consider(some: Sequence[Candidate], most: Callable[[TreeSpec], float]) -> None:
        bounds = sorted(((most(one.spec) / cost(one.spec), one) for one in some), key=lambda item: -item[0])
        for bound, one in bounds:
            if bound <= least():
                break
            best.append(Scored(one, length(one.spec), cost(one.spec)))
            best.sort(key=lambda scored: -scored.rate)

    def deepest(spec: TreeSpec) -> float:
        return 1.0 + spec.depth(spec.drafting(predictor.steps))

    whole = [one for one in candidates if fits(one.spec)]
    consider(whole, deepest)
    known = {scored.spec: scored.length for scored in best}

    def unlimited(spec: TreeSpec) -> float:
        return known.get(shapes_of[spec], deepest(spec))

    limited = [(other, one.spec) for one in candidates for other in with_budgets(one, predictor) if fits(other.spec)]
    shapes_of = {other.spec: shape for other, shape in limited}
    consider([other for other, _ in limited], unlimited)
    return best
