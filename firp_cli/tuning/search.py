"""Search for the tree with the highest throughput: shapes from acceptance, times from the cost model, accepted lengths
from simulated decoding of written answers.

For every number of draft steps k' and of nodes N there are two shapes: the static tree of the most probable paths,
which no other static tree of N nodes beats (`Acceptance.grow`), and the dynamic tree. Each may give pseudo rows to some
of its nodes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from firp_cli.decoding.tree_spec import TreeSpec, parse_tree, static_tree
from firp_cli.predictors.base import TreePredictor
from firp_cli.tuning.acceptance import Acceptance
from firp_cli.tuning.cost import CostModel

NODES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)
BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16)
STATIC_GAIN = 1.03  # a static tree of paths that are best on the same answers may emit more than a dynamic one
NO_TREE = TreeSpec("none", 1)  # autoregressive decoding


@dataclass(frozen=True)
class Candidate:
    """Tree, and for static trees the probability that each node is accepted, the root first."""

    spec: TreeSpec
    probabilities: tuple[float, ...] = ()


@dataclass(frozen=True)
class Scored:
    """Candidate with its accepted length and the milliseconds of its decoding step."""

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
    """Return the rows per sequence that each layer runs in a step: nodes, and pseudo rows from their layer on."""
    steps = spec.drafting(predictor.steps)
    anchors = spec.budget if spec.limited and spec.budget else spec.nodes
    entering = predictor.transfer_layers[:steps]
    return [spec.nodes + anchors * sum(layer <= number for layer in entering) for number in range(layers)]


def shapes(acceptance: Acceptance, predictor: TreePredictor, most_nodes: int) -> list[Candidate]:
    """Return all trees with pseudo rows for every node: static and dynamic, by draft steps and nodes."""
    candidates: dict[TreeSpec, Candidate] = {}
    for steps in range(1, predictor.steps + 1):
        grown = acceptance.grow(most_nodes, steps)
        for nodes in NODES:
            if nodes > most_nodes:
                break
            if nodes <= len(grown) + 1:
                chosen = grown[: nodes - 1]
                spec = static_shape([path for path, _ in chosen], predictor.steps)
                candidates.setdefault(spec, Candidate(spec, node_probabilities(chosen)))
            if steps < nodes:  # no path is longer
                spec = dynamic_tree(nodes, steps, predictor.steps)
                candidates[spec] = Candidate(spec)
    return list(candidates.values())


def node_probabilities(grown: Sequence[tuple[tuple[int, ...], float]]) -> tuple[float, ...]:
    """Return the probability that each node of the tree of these paths is accepted, in node order, the root first."""
    return (1.0, *(value for _, value in sorted(grown, key=lambda item: (len(item[0]), item[0]))))


def static_shape(paths: Sequence[tuple[int, ...]], steps: int) -> TreeSpec:
    """Return the tree of these paths, which are closed under parents; a chain where every node has one child."""
    depth = max(map(len, paths))
    if all(set(path) == {0} for path in paths):
        return parse_tree("chain" if depth == steps else f"chain/{depth}", steps)
    return static_tree(paths, steps, f"tuned:{len(paths) + 1}")


def dynamic_tree(nodes: int, run: int, steps: int) -> TreeSpec:
    """Return the dynamic tree of `nodes` nodes over the first `run` of a predictor's `steps` draft steps."""
    return parse_tree(f"dynamic:{nodes}" + (f"/{run}" if run < steps else ""), steps)


def with_budgets(candidate: Candidate, predictor: TreePredictor) -> list[Candidate]:
    """Return the tree's variants with pseudo rows for some of its nodes only. Variants of a tree that is shallower than
    the predictor may run more draft steps: these draft for accepted nodes without pseudo rows.
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
    """Milliseconds of a decoding step at one batch size and context.

    The cost model gives the time of the passes. The rest of a step is linear in the features of its tree, with weights
    fitted to a few whole steps.
    """

    def __init__(self, model: CostModel, predictor: TreePredictor, batch: int, context: int) -> None:
        self.model, self.predictor, self.batch, self.context = model, predictor, batch, context
        self._weights = np.zeros(len(self._features(NO_TREE)))
        self._scale = 1.0
        self.ar = 0.0  # milliseconds of an autoregressive step
        self.probed: dict[TreeSpec, float] = {}  # milliseconds of the steps that the weights are fitted to

    def passes(self, spec: TreeSpec, batch: int | None = None) -> float:
        """Return the time of the layers, and of the head on the nodes and on the drafts of predictors that share it."""
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
        """Fit the weights to whole steps in milliseconds, an autoregressive one (NO_TREE) among them."""
        self.ar = measured[NO_TREE]
        specs = [spec for spec in measured if spec != NO_TREE]
        self.probed = {spec: measured[spec] for spec in specs}
        beyond = np.array([measured[spec] - self.passes(spec) for spec in specs])
        weights = np.array([1 / measured[spec] for spec in specs])
        features = np.array([self._features(spec) for spec in specs])
        self._weights = np.linalg.lstsq(features * weights[:, None], beyond * weights, rcond=1e-6)[0]

    def settle(self, measured: dict[TreeSpec, float]) -> None:
        """Scale all times to whole steps that were timed thoroughly, an autoregressive one (NO_TREE) among them."""
        ratios = [measured[spec] / self(spec) for spec in measured if spec != NO_TREE]
        self._scale, self.ar = float(np.median(ratios)) if ratios else 1.0, measured[NO_TREE]

    def __call__(self, spec: TreeSpec) -> float:
        if spec.kind == "none":
            return self.ar
        whole = self.passes(spec) + float(np.dot(self._features(spec), self._weights))
        return self._scale * max(self.passes(NO_TREE), whole)


def search(
    candidates: Sequence[Candidate],
    predictor: TreePredictor,
    cost: Callable[[TreeSpec], float],
    length: Callable[[TreeSpec], float],
    keep: int,
    fits: Callable[[TreeSpec], bool] = lambda spec: True,
) -> list[Scored]:
    """Return the best candidates and their variants under a budget, the best first.

    Accepted lengths are computed in the order of an upper bound of the throughput, until no other tree can be among the
    best `keep`. Bounds: no tree emits more than its depth plus one; a tree is assumed to emit no more than the dynamic
    tree without a budget that has at least its nodes and its depth. Those of `bounding_trees` are computed first.
    """
    best: list[Scored] = []
    lengths: dict[TreeSpec, float] = {}

    def length_of(spec: TreeSpec) -> float:
        if spec not in lengths:
            lengths[spec] = length(spec)
        return lengths[spec]

    def depth_of(spec: TreeSpec) -> int:
        return spec.depth(spec.drafting(predictor.steps))

    bounding = [(spec.nodes, depth_of(spec), length_of(spec)) for spec in bounding_trees(candidates, depth_of)]

    def least() -> float:
        return best[keep - 1].rate if len(best) >= keep else 0.0

    def most(spec: TreeSpec) -> float:
        depth = depth_of(spec)
        larger = (found for nodes, deepest, found in bounding if nodes >= spec.nodes and deepest >= depth)
        return min(1.0 + depth, STATIC_GAIN * min(larger, default=math.inf))

    def consider(some: Sequence[Candidate]) -> None:
        bounds = sorted(((most(item.spec) / cost(item.spec), item) for item in some), key=lambda pair: -pair[0])
        for bound, candidate in bounds:
            if bound <= least():
                break
            best.append(Scored(candidate, length_of(candidate.spec), cost(candidate.spec)))
            best.sort(key=lambda scored: -scored.rate)

    consider([candidate for candidate in candidates if fits(candidate.spec)])
    variants = (variant for whole in candidates for variant in with_budgets(whole, predictor))
    consider([variant for variant in variants if fits(variant.spec)])
    return best


def bounding_trees(candidates: Sequence[Candidate], depth_of: Callable[[TreeSpec], int]) -> list[TreeSpec]:
    """Return the dynamic trees of the most nodes, of every depth, and those of the greatest depth, of some numbers of
    nodes: their accepted lengths bound those of all smaller trees.
    """
    dynamic = [one.spec for one in candidates if one.spec.kind == "dynamic"]
    nodes = max((spec.nodes for spec in dynamic), default=0)
    depth = max(map(depth_of, dynamic), default=0)
    sizes = {4, 6, 8, 12, 16, 24, 32, 64, 128}
    return [spec for spec in dynamic if spec.nodes == nodes or (depth_of(spec) == depth and spec.nodes in sizes)]
