"""Search for trees: growth against all possible trees, costs, pruning, budgets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from firp_cli.decoding.tree_spec import TreeSpec, parse_tree
from firp_cli.predictors.base import Predictor
from firp_cli.tune_results import CostCurve, CostReport
from firp_cli.tuning.acceptance import Acceptance
from firp_cli.tuning.cost import CostModel
from firp_cli.tuning.search import NO_TREE, Candidate, StepCosts, TreeSearch, layer_rows, shapes, with_budgets
from helpers.models import make_predictor, tiny_teacher

STEPS, BREADTH = 3, 3


def some_positions(seed: int, count: int = 60, steps: int = STEPS, breadth: int = BREADTH) -> np.ndarray:
    """Return random candidate positions, mostly small; some are -1, after the end of an answer."""
    generator = np.random.default_rng(seed)
    positions = generator.geometric(0.5, size=(count, steps)) - 1
    positions = np.minimum(positions, breadth)
    for row in generator.choice(count, count // 5, replace=False):
        positions[row, generator.integers(1, steps) :] = -1
    return positions.astype(np.int64)


def value_of(acceptance: Acceptance, path: tuple[int, ...]) -> float:
    """Return the probability of a path by the definition: one smoothed factor per draft step."""
    value, chosen = 1.0, acceptance.positions
    for step, position in enumerate(path):
        chosen = chosen[chosen[:, step] >= 0]
        hits = int((chosen[:, step] == position).sum())
        value *= (hits + 16 * acceptance.rates[step][position]) / (len(chosen) + 16)
        chosen = chosen[chosen[:, step] == position]
    return value


def closed_trees(nodes: int, steps: int = STEPS, breadth: int = BREADTH) -> list[frozenset[tuple[int, ...]]]:
    """Return all sets of `nodes - 1` paths that contain the parents of all their paths."""
    level = {frozenset()}
    for _ in range(nodes - 1):
        level = {
            tree | {(*parent, rank)}
            for tree in level
            for parent in {(), *tree}
            if len(parent) < steps
            for rank in range(breadth)
            if (*parent, rank) not in tree
        }
    return list(level)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 6])
def test_grown_tree_is_the_best_of_all_trees(seed: int, nodes: int) -> None:
    acceptance = Acceptance(some_positions(seed), BREADTH)
    best = max(sum(value_of(acceptance, path) for path in tree) for tree in closed_trees(nodes))
    grown = acceptance.grow(nodes)
    assert sum(value for _, value in grown) == pytest.approx(best, abs=1e-12)
    for path, value in grown:
        assert value == pytest.approx(value_of(acceptance, path), abs=1e-12)


@pytest.mark.parametrize("depth", [1, 2])
def test_grown_tree_is_the_best_of_limited_depth(depth: int) -> None:
    acceptance = Acceptance(some_positions(5), BREADTH)
    for nodes in (2, 3, 4):
        best = max(
            sum(value_of(acceptance, path) for path in tree)
            for tree in closed_trees(nodes)
            if max(map(len, tree)) <= depth
        )
        grown = acceptance.grow(nodes, depth)
        assert max(len(path) for path, _ in grown) <= depth
        assert sum(value for _, value in grown) == pytest.approx(best, abs=1e-12)


def test_every_prefix_of_the_grown_paths_is_a_tree() -> None:
    grown = [path for path, _ in Acceptance(some_positions(7), BREADTH).grow(30)]
    values = [value for _, value in Acceptance(some_positions(7), BREADTH).grow(30)]
    assert values == sorted(values, reverse=True)
    for end, path in enumerate(grown):
        assert path[:-1] in {(), *grown[:end]}


def test_acceptance_counts_accepted_parents_only() -> None:
    positions = np.array([[0, 1], [0, 0], [1, 0], [3, 0], [0, -1]])
    acceptance = Acceptance(positions, 3)
    assert acceptance.counts == [5, 3]  # the fourth is no candidate, the fifth has ended
    assert acceptance.rates[0].tolist() == [0.6, 0.2, 0.0]
    assert acceptance.rates[1].tolist() == pytest.approx([2 / 3, 1 / 3, 0.0])
    shown = {(rate.step, rate.rank): (rate.count, rate.rate) for rate in acceptance.by_candidate()}
    assert shown[1, 0] == (5, 0.6) and shown[2, 1] == (3, pytest.approx(1 / 3))
    assert len(list(itertools.chain(shown))) == 6


def small_search() -> tuple[Predictor, list[Candidate]]:
    predictor = make_predictor(tiny_teacher(), kind="firp", layer=2, steps=3)
    return predictor, shapes(Acceptance(some_positions(3, 400, 3, 8), 8), predictor, 12)


def fake_length(spec: TreeSpec) -> float:
    """More for more nodes and for depth, less under a budget: as real trees behave."""
    depth = min(spec.depth(spec.drafting(3)), spec.nodes - 1)
    length = 1 + depth * (1 - 0.6 ** (spec.nodes - 1)) * (0.9 if spec.kind == "static" else 1.0)
    return length * (1 - 0.3 / (1 + spec.budget) if spec.limited and spec.budget else 1.0)


@pytest.mark.parametrize("row", [0.02, 0.1, 0.4])
def test_search_with_pruning_equals_exhaustive_search(row: float) -> None:
    predictor, candidates = small_search()

    def cost(spec: TreeSpec) -> float:
        return 1 + row * max(layer_rows(spec, predictor, 4))

    asked: list[TreeSpec] = []

    def length(spec: TreeSpec) -> float:
        asked.append(spec)
        return fake_length(spec)

    every = [*candidates, *(other for one in candidates for other in with_budgets(one, predictor))]
    rates = sorted((fake_length(one.spec) / cost(one.spec) for one in every), reverse=True)
    trees = TreeSearch(candidates, predictor, length)
    found = trees.best(cost, 3)
    assert [scored.rate for scored in found[:3]] == pytest.approx(rates[:3])
    assert len(asked) == len(set(asked)) < len(every)
    four = max((one.spec for one in every if one.spec.nodes == 4), key=lambda spec: fake_length(spec) / cost(spec))
    assert trees.best(cost, 1, lambda spec: spec.nodes == 4)[0].spec == four
    assert len(asked) == len(set(asked)) < len(every)
    assert TreeSearch(candidates, predictor, fake_length, lambda spec: spec.nodes < 4).best(cost, 3)[0].spec.nodes < 4


def test_shapes_cover_sizes_kinds_and_depths() -> None:
    _, candidates = small_search()
    specs = [one.spec for one in candidates]
    assert len(set(specs)) == len(specs)
    assert {spec.drafting(3) for spec in specs if spec.kind == "static"} == {1, 2, 3}
    assert {(spec.nodes, spec.drafting(3)) for spec in specs if spec.kind == "dynamic"} >= {(2, 1), (12, 3)}
    for one in candidates:
        if one.spec.kind == "static":
            assert len(one.probabilities) == one.spec.nodes and one.probabilities[0] == 1.0


def test_budgets_are_for_predictors_with_pseudo_states() -> None:
    predictor, candidates = small_search()
    limited = [other.spec for one in candidates for other in with_budgets(one, predictor)]
    assert all(spec.limited for spec in limited)
    assert any(spec.kind == "static" and spec.depth(3) == 1 and spec.drafting(3) == 3 for spec in limited)
    medusa = make_predictor(tiny_teacher(), kind="medusa", steps=3)
    assert not with_budgets(candidates[0], medusa)


def test_layer_rows_by_kind_tree_and_budget() -> None:
    firp = make_predictor(tiny_teacher(), kind="firp", layer=2, steps=3)
    assert layer_rows(parse_tree("dynamic:5", 3), firp, 4) == [5, 5, 20, 20]
    assert layer_rows(parse_tree("dynamic:5/2@2", 3), firp, 4) == [5, 5, 9, 9]
    assert layer_rows(parse_tree("chain/1", 3), firp, 4) == [2, 2, 4, 4]
    transfer = make_predictor(tiny_teacher(), kind="hidden_transfer", layers=[1, 2, 3])
    assert layer_rows(parse_tree("dynamic:4", 3), transfer, 4) == [4, 8, 12, 16]
    assert layer_rows(NO_TREE, firp, 4) == [1, 1, 1, 1]


def test_step_costs_fit_the_time_beyond_the_passes() -> None:
    predictor = make_predictor(tiny_teacher(), kind="firp", layer=2, steps=3)
    curve = CostCurve(1, 100, [1, 64], [1.0, 5.0], [1.0, 5.0], [0.5, 2.0])
    costs = StepCosts(CostModel(CostReport({}, {}, {}, 2, 4, [curve], [], 0.0)), predictor, 1, 100)

    def truth(spec: TreeSpec) -> float:
        return costs.passes(spec) + (
            0.4 + 0.05 * spec.nodes + 0.1 * (spec.kind == "dynamic") if spec != NO_TREE else 0.2
        )

    names = ["chain", "chain/2", "dynamic:2", "dynamic:8", "dynamic:4/2", "dynamic:8@2", "static:2x2", "dynamic:12/1"]
    probes = [parse_tree(name, 3) for name in names]
    costs.fit({spec: truth(spec) for spec in [NO_TREE, *probes]})
    for spec in probes:
        assert costs(spec) == pytest.approx(truth(spec), rel=1e-6)
    for name in ("dynamic:10", "dynamic:6@1", "static:3x1"):
        spec = parse_tree(name, 3)
        assert costs(spec) == pytest.approx(truth(spec), rel=0.02)
    assert costs(NO_TREE) == truth(NO_TREE)
    before = costs(probes[3])
    costs.settle({NO_TREE: 3.0, probes[3]: 1.2 * truth(probes[3]), probes[0]: 1.2 * truth(probes[0])})
    assert costs(NO_TREE) == 3.0 and costs(probes[3]) == pytest.approx(1.2 * before)
