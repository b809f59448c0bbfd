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
from heapq import heapify, heappop, heappush
from operator import ge

import numpy as np

from firp_cli.decoding.tree_spec import TreeSpec, parse_tree, static_tree
from firp_cli.predictors.base import TreePredictor
from firp_cli.tuning.acceptance import Acceptance
from firp_cli.tuning.cost import CostModel

NODES = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)
BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16)
DYNAMIC_GAIN = 1.01  # a smaller dynamic tree may emit a little more by chance
STATIC_GAIN = 1.03  # as may a static tree of paths that are best on the same answers
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
    the predictor may run some more draft steps: these draft for accepted nodes without pseudo rows.
    """
    if not predictor.transfer_layers:
        return []
    spec, steps = candidate.spec, predictor.steps
    reach = spec.drafting(steps)
    free = spec.kind == "static" or reach == spec.nodes - 1
    more = {min(reach + extra, steps) for extra in (0, 1, 3, steps)}
    runs = [run if run < steps else None for run in sorted(more)] if free else [spec.steps]
    return [
        replace(candidate, spec=replace(spec, budget=budget, steps=run))
        for run in runs
        for budget in BUDGETS
        if budget < spec.nodes
    ]


def probed_trees(candidates: Sequence[Candidate], predictor: TreePredictor) -> list[TreeSpec]:
    """Return trees of all kinds, small and large, to which step costs are fitted."""
    steps = predictor.steps
    names = [
        f"{shape}/{run}"
        for run in sorted({steps, max(1, steps // 2)})
        for shape in ("chain", "dynamic:2", "dynamic:6", "dynamic:12")
    ]
    static = [one.spec for one in candidates if one.spec.kind == "static" and one.spec.nodes in (6, 12, 24)]
    if predictor.transfer_layers:
        names += [f"chain/{steps}@1", "dynamic:6@1", "dynamic:12@3", "dynamic:32@2"]
        static += [replace(spec, budget=2, steps=None) for spec in static if spec.nodes > 6]
    return list(dict.fromkeys([parse_tree(name, steps) for name in names] + static))


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


class TreeSearch:
    """Search among trees and their variants under a budget, at any step costs.

    Accepted lengths are computed in the order of an upper bound of the throughput, until no other tree can be among the
    best. A tree is assumed to emit little more than a dynamic one that has at least its nodes, depth, draft steps and
    nodes with pseudo rows, if that one's length is known; lengths of earlier searches count as well.

    Args:
        candidates: trees with pseudo rows for every node. length: accepted length of a tree.
        fits: whether a tree may be chosen.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        predictor: TreePredictor,
        length: Callable[[TreeSpec], float],
        fits: Callable[[TreeSpec], bool] = lambda spec: True,
    ) -> None:
        self._length, self._steps = length, predictor.steps
        self._bounding = bounding_trees(candidates, self._depth)
        variants = (variant for whole in candidates for variant in with_budgets(whole, predictor))
        self.trees = [one for one in (*candidates, *variants) if fits(one.spec)]
        self.lengths: dict[TreeSpec, float] = {}
        self._dynamic: list[tuple[tuple[int, ...], float]] = []  # sizes and lengths

    def best(
        self, cost: Callable[[TreeSpec], float], keep: int, among: Callable[[TreeSpec], bool] = lambda spec: True
    ) -> list[Scored]:
        """Return trees by throughput, the `keep` best of those `among` which is searched first."""
        for spec in self._bounding:
            self._measured(spec)
        trees = [one for one in self.trees if among(one.spec)]
        found: list[Scored] = []
        queue = [(-self._bound(one.spec) / cost(one.spec), place) for place, one in enumerate(trees)]
        heapify(queue)
        while queue:
            place = heappop(queue)[1]
            spec = trees[place].spec
            bound = self._bound(spec) / cost(spec)
            if len(found) >= keep and bound <= found[keep - 1].rate:
                continue
            if queue and bound < -queue[0][0]:  # lengths that were computed since then lowered it
                heappush(queue, (-bound, place))
                continue
            found.append(Scored(trees[place], self._measured(spec), cost(spec)))
            found.sort(key=lambda scored: -scored.rate)
        return found

    def _depth(self, spec: TreeSpec) -> int:
        return spec.depth(spec.drafting(self._steps))

    def _sizes(self, spec: TreeSpec) -> tuple[int, ...]:
        """Return the nodes, depth, draft steps and nodes with pseudo rows: a tree emits more with more of each."""
        anchors = spec.budget if spec.limited and spec.budget else spec.nodes
        return spec.nodes, self._depth(spec), spec.drafting(self._steps) if spec.limited else self._steps, anchors

    def _bound(self, spec: TreeSpec) -> float:
        """Return an upper bound of the accepted length; the length itself where it is known."""
        if spec in self.lengths:
            return self.lengths[spec]
        sizes = self._sizes(spec)
        larger = (length for other, length in self._dynamic if all(map(ge, other, sizes)))
        gain = STATIC_GAIN if spec.kind == "static" else DYNAMIC_GAIN
        return min(1.0 + self._depth(spec), gain * min(larger, default=math.inf))

    def _measured(self, spec: TreeSpec) -> float:
        if spec not in self.lengths:
            self.lengths[spec] = self._length(spec)
            if spec.kind == "dynamic":
                self._dynamic.append((self._sizes(spec), self.lengths[spec]))
        return self.lengths[spec]


def bounding_trees(candidates: Sequence[Candidate], depth_of: Callable[[TreeSpec], int]) -> list[TreeSpec]:
    """Return the dynamic trees of the most nodes, of every depth, and those of the greatest depth, of some numbers of
    nodes: their accepted lengths bound those of all smaller trees.
    """
    dynamic = [one.spec for one in candidates if one.spec.kind == "dynamic"]
    nodes = max((spec.nodes for spec in dynamic), default=0)
    depth = max(map(depth_of, dynamic), default=0)
    sizes = {4, 6, 8, 12, 16, 24, 32, 64, 128}
    return [spec for spec in dynamic if spec.nodes == nodes or (depth_of(spec) == depth and spec.nodes in sizes)]
