"""Draft trees and acceptance against slow searches."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from firp_cli.decoding.accept import accept
from firp_cli.decoding.sampling import Sampler
from firp_cli.decoding.tree_build import Tree, build, build_by_level, root_tree
from firp_cli.decoding.tree_spec import default_tree, parse_tree
from firp_cli.errors import UsageError
from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.draft import Draft
from firp_cli.teacher.teacher import Teacher
from helpers.models import make_predictor
from helpers.trees import paths_of, random_draft


def best_prefixes(draft: Draft, row: int, nodes: int) -> set[tuple[int, ...]]:
    """Return the `nodes - 1` most probable token paths, by enumerating every path."""
    steps, breadth = draft.tokens.shape[1:]
    scored = []
    for depth in range(1, steps + 1):
        for ranks in itertools.product(range(breadth), repeat=depth):
            tokens = tuple(int(draft.tokens[row, level, rank]) for level, rank in enumerate(ranks))
            scored.append((sum(float(draft.log_probs[row, level, rank]) for level, rank in enumerate(ranks)), tokens))
    scored.sort(key=lambda item: -item[0])
    return {tokens for _, tokens in scored[: nodes - 1]}


@pytest.fixture
def predictor(teacher: Teacher) -> TreePredictor:
    return make_predictor(teacher, kind="firp", layer=1, steps=3)


@pytest.mark.parametrize("nodes", [2, 5, 9, 14])
def test_dynamic_tree_is_the_best_set_of_prefixes(predictor: TreePredictor, nodes: int) -> None:
    for seed in range(20):
        draft = random_draft(2, 3, 30, nodes - 1, seed, sharp=2.0)
        tree = build(parse_tree(f"dynamic:{nodes}", 3), predictor, draft, torch.tensor([7, 8]))
        assert tree.tokens.shape == (2, nodes)
        for row in range(2):
            paths = paths_of(tree, row)
            assert set(paths[1:]) == best_prefixes(draft, row, nodes)
            check_structure(tree, row, paths)


def check_structure(tree: Tree, row: int, paths: list[tuple[int, ...]]) -> None:
    assert [len(path) for path in paths] == tree.depth[row].tolist()
    assert all(parent < node for node, parent in enumerate(tree.parents[row].tolist()[1:], start=1))
    for node, path in enumerate(paths):
        ancestors = {above for above in range(len(paths)) if paths[above] == path[: len(paths[above])]}
        assert set(tree.ancestors[row, node].nonzero()[:, 0].tolist()) == ancestors


def test_certain_drafts_keep_parents_first(predictor: TreePredictor) -> None:
    """With probability 1 at every step a child ties with its parent; the choice is still closed under ancestors."""
    log_probs = torch.tensor([[[0.0, -50.0, -50.0]] * 3])
    draft = Draft(torch.tensor([[[4, 5, 6]] * 3]), log_probs)
    tree = build(parse_tree("dynamic:4", 3), predictor, draft, torch.tensor([9]))
    assert paths_of(tree, 0)[1:] == [(4,), (4, 4), (4, 4, 4)]


def test_static_trees(predictor: TreePredictor, tmp_path: Path) -> None:
    draft = random_draft(1, 3, 30, 4, 0)
    ranked = draft.tokens[0].tolist()
    tree = build(parse_tree("static:2x1", 3), predictor, draft, torch.tensor([9]))
    assert paths_of(tree, 0)[1:] == [
        (ranked[0][0],),
        (ranked[0][1],),
        (ranked[0][0], ranked[1][0]),
        (ranked[0][1], ranked[1][0]),
    ]
    check_structure(tree, 0, paths_of(tree, 0))
    chain = build(parse_tree("chain", 3), predictor, draft, torch.tensor([9]))
    assert paths_of(chain, 0)[-1] == tuple(ranked[level][0] for level in range(3))
    file = tmp_path / "tree.json"
    file.write_text(json.dumps({"paths": [[0], [1], [0, 2]]}))
    from_file = build(parse_tree(str(file), 3), predictor, draft, torch.tensor([9]))
    assert paths_of(from_file, 0)[-1] == (ranked[0][0], ranked[1][2])


def test_tree_files_and_refusals(predictor: TreePredictor, tmp_path: Path) -> None:
    assert str(default_tree(None, predictor)) == "dynamic:8"
    (tmp_path / "tree.json").write_text(json.dumps({"tree": "dynamic:5"}))
    assert default_tree(tmp_path, predictor).nodes == 5
    for bad in ("dynamic:1", "dynamic:x", "static:", "static:2x0", "spiral", "static:2x2x2x2"):
        with pytest.raises(UsageError):
            parse_tree(bad, 3)
    with pytest.raises(UsageError, match="tree static:99999x99999 has 9999900001 nodes, at most 1024"):
        parse_tree("static:99999x99999", 3)  # refused before it is made
    (tmp_path / "tree.json").write_text(json.dumps({"paths": [[0, 0]]}))
    with pytest.raises(UsageError, match="lacks its parent"):
        parse_tree(str(tmp_path / "tree.json"), 3)


@pytest.mark.parametrize("shape", ["dynamic:8", "chain", "static:3x2x1"])
@pytest.mark.parametrize("budget", [1, 2, 3])
def test_budget_follows_the_tree(shape: str, budget: int) -> None:
    whole, spec = parse_tree(shape, 3), parse_tree(f"{shape}@{budget}", 3)
    assert (spec.budget, spec.limited, str(spec)) == (budget, True, f"{shape}@{budget}")
    assert (whole.budget, whole.limited, str(whole)) == (None, False, shape)
    assert (spec.kind, spec.nodes, spec.paths) == (whole.kind, whole.nodes, whole.paths)
    assert parse_tree(str(spec), 3) == spec
    for enough in (whole.nodes, whole.nodes + 5):
        unlimited = parse_tree(f"{shape}@{enough}", 3)
        assert not unlimited.limited
        assert parse_tree(str(unlimited), 3) == whole


@pytest.mark.parametrize(
    ("spec", "breadth", "depth"),
    [("dynamic:9", 8, 3), ("dynamic:2", 1, 3), ("dynamic:60", 40, 3), ("chain", 1, 3), ("static:3x2", 3, 2)],
)
def test_breadth_is_the_most_candidates_of_a_node(spec: str, breadth: int, depth: int) -> None:
    """A dynamic tree may have all its nodes below the root; the vocabulary is an upper bound."""
    for tree in (parse_tree(spec, 3), parse_tree(f"{spec}@2", 3)):
        assert (tree.breadth(40), tree.depth(3)) == (breadth, depth)


def test_invalid_budgets_are_refused() -> None:
    for budget in ("0", "x", "-1", "1.5", ""):
        with pytest.raises(UsageError, match=r"dynamic:8@.*number of nodes with pseudo rows after @, at least 1"):
            parse_tree(f"dynamic:8@{budget}", 3)
    with pytest.raises(UsageError, match="no tree 'spiral'"):
        parse_tree("spiral@2", 3)
    with pytest.raises(UsageError, match="is 4 deep, the predictor drafts 3"):
        parse_tree("static:2x2x2x2@2", 3)


def test_tree_file_may_have_a_budget(predictor: TreePredictor, tmp_path: Path) -> None:
    file = tmp_path / "tree.json"
    file.write_text(json.dumps({"tree": "dynamic:8@3"}))
    for spec in (default_tree(tmp_path, predictor), parse_tree(str(file), 3)):
        assert (spec.nodes, spec.budget, str(spec)) == (8, 3, "dynamic:8@3")
    file.write_text(json.dumps({"paths": [[0], [1], [0, 2]], "name": "own"}))
    spec = parse_tree(f"{file}@2", 3)
    assert (spec.nodes, spec.budget, str(spec)) == (4, 2, "own@2")
    within = tmp_path / "me@home"
    within.mkdir()
    file.rename(within / "tree.json")
    assert parse_tree(str(within / "tree.json"), 3).budget is None


@pytest.mark.parametrize("spec", ["dynamic:9@2", "static:3x2@2"])
def test_scores_are_joint_probabilities(predictor: TreePredictor, spec: str) -> None:
    draft = random_draft(2, 3, 30, 8, 3)
    tree = build(parse_tree(spec, 3), predictor, draft, torch.tensor([7, 8]))
    assert tree.scores is not None
    for row in range(2):
        for node, path in enumerate(paths_of(tree, row)):
            ranks = [draft.tokens[row, depth].tolist().index(token) for depth, token in enumerate(path)]
            joint = sum(float(draft.log_probs[row, depth, rank]) for depth, rank in enumerate(ranks))
            assert float(tree.scores[row, node]) == pytest.approx(joint, abs=1e-5)


def walk(tree: Tree, targets: Tensor, row: int) -> list[int]:
    """Descend while a child carries the node's target; return the path."""
    node, path = 0, [0]
    while True:
        target = int(targets[row, node])
        children = [c for c in range(1, tree.tokens.shape[1]) if int(tree.parents[row, c]) == node]
        follow = [c for c in children if int(tree.tokens[row, c]) == target]
        if not follow:
            return path
        node = follow[0]
        path.append(node)


@pytest.mark.parametrize("spec", ["dynamic:7", "chain", "static:3x2x2"])
def test_acceptance_is_a_walk(predictor: TreePredictor, spec: str) -> None:
    generator = torch.Generator().manual_seed(1)
    depths = set()
    for seed in range(60):
        draft = random_draft(3, 3, 6, 5, seed)
        tree = build(parse_tree(spec, 3), predictor, draft, torch.tensor([1, 2, 3]))
        targets = torch.randint(0, 4, tree.tokens.shape, generator=generator)
        got = accept(tree, targets, 3)
        for row in range(3):
            path = walk(tree, targets, row)
            count = len(path) - 1
            depths.add(count)
            assert int(got.count[row]) == count
            assert int(got.node[row]) == path[-1]
            assert got.path[row, : count + 1].tolist() == path
            bonus = int(targets[row, path[-1]])
            assert int(got.bonus[row]) == bonus
            drafted = [int(tree.tokens[row, node]) for node in path[1:]]
            assert got.tokens[row, : count + 1].tolist() == [*drafted, bonus]
            assert got.path[row, count:].unique().tolist() == path[-1:]
    assert {0, 1, 2} <= depths


def test_root_tree_accepts_nothing() -> None:
    got = accept(root_tree(torch.tensor([4, 5])), torch.tensor([[8], [9]]), 0)
    assert got.count.tolist() == [0, 0]
    assert got.tokens.tolist() == [[8], [9]]


def test_sampler_follows_temperature_and_top_p() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).expand(1, 20000, 4)
    draws = Sampler(0.5, 1.0, 0, torch.device("cpu"))(logits)
    share = torch.bincount(draws[0], minlength=4) / 20000
    assert torch.allclose(share, (logits[0, 0] / 0.5).softmax(-1), atol=0.012)
    cut = Sampler(1.0, 0.8, 0, torch.device("cpu"))(logits)
    assert set(cut[0].unique().tolist()) == {0, 1}  # .64 + .24 passes .8
    assert Sampler(0.0, 1.0, 0, torch.device("cpu"))(logits).unique().tolist() == [0]


@pytest.mark.parametrize("nodes", [2, 3, 6, 9, 17, 40])
def test_prefix_scoring_builds_the_tree_of_build_by_level(predictor: TreePredictor, nodes: int) -> None:
    """Also with steps of probability 0: their prefixes fill the tree up, parents first."""
    assert not predictor.parent_dependent
    for seed in range(20):
        draft = random_draft(2, 3, 50, nodes - 1, seed)
        draft.tokens = torch.arange(nodes - 1).expand(2, 3, -1)  # a path then lists its positions
        if seed % 4 == 0:
            draft.log_probs[:, 2] = -torch.inf
        root = torch.tensor([1, 2])
        fast = build(parse_tree(f"dynamic:{nodes}", 3), predictor, draft, root)
        slow = build_by_level(nodes, predictor, draft, root)
        assert fast.scores is not None and slow.scores is not None
        for row in range(2):
            assert torch.equal(fast.scores[row].sort().values, slow.scores[row].sort().values)
            certain = bool((fast.scores > -torch.inf).all())
            paths = paths_of(fast, row)
            check_structure(fast, row, paths)
            assert not certain or set(paths) == set(paths_of(slow, row))
