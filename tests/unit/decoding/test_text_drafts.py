"""Trees of what followed earlier occurrences of a text's last tokens, against plain Python."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from firp_cli.decoding.text_drafts import TextDrafts, merged_tree, ngram_predictor
from firp_cli.decoding.tree_build import Tree
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import UsageError
from firp_cli.predictors.ngram import NOTHING, RULES, Continuations, NgramPredictor, NgramRule
from helpers.models import tiny_teacher
from helpers.trees import paths_of

CPU = torch.device("cpu")
RULE = NgramRule(steps=4, longest=6, occurrences=7, latest=True)
BOUNDED = replace(RULE, growth=1.5, least_share=0.2)


def random_found(seed: int, batch: int = 5) -> Continuations:
    """Return continuations that share prefixes, some cut short, and of some sequences none."""
    chance = random.Random(seed)
    tokens, matched = [], []
    for _ in range(batch):
        count = chance.choice([0, 1, 3, RULE.occurrences])
        lengths = sorted(chance.choices(range(1, 1 + RULE.longest), k=count), reverse=True)
        matched.append(lengths + [0] * (RULE.occurrences - count))
        rows = []
        for place in range(RULE.occurrences):
            known = chance.randint(1, RULE.steps) if place < count else 0
            rows.append(chance.choices([3, 5, 8], k=known) + [NOTHING] * (RULE.steps - known))
        tokens.append(rows)
    return Continuations(torch.tensor(tokens), torch.tensor(matched))


def slow_paths(found: Continuations, row: int, rule: NgramRule, nodes: int) -> list[tuple[int, ...]]:
    """Return the prefixes that are nodes, heaviest first, of equals the shorter one, then that of the first
    occurrence.
    """
    weights: dict[tuple[int, ...], int] = {}
    total = 0
    for tokens, matched in zip(found.tokens[row].tolist(), found.matched[row].tolist(), strict=True):
        total += 2**matched if matched else 0
        path = [token for token in tokens if token != NOTHING]
        for depth in range(1, len(path) + 1):
            weights[tuple(path[:depth])] = weights.get(tuple(path[:depth]), 0) + 2**matched
    order = sorted(weights, key=lambda path: (-weights[path], len(path)))  # stable: the first occurrence comes first
    order = [path for path in order if weights[path] >= rule.least_share * total][: nodes - 1]
    best = int(found.matched[row, 0])
    return [path for place, path in enumerate(order) if place < rule.growth * best]


def check_consistency(tree: Tree, row: int) -> None:
    """Check depth, ancestors and paths by the parents."""
    for node in range(tree.tokens.shape[1]):
        way = [node]
        while way[-1]:
            way.append(int(tree.parents[row, way[-1]]))
        way.reverse()
        assert int(tree.depth[row, node]) == len(way) - 1
        assert tree.ancestors[row, node].nonzero()[:, 0].tolist() == sorted(way)
        assert tree.paths[row, node].tolist() == (way + [node] * RULE.steps)[: tree.paths.shape[2]]


@pytest.mark.parametrize("rule", [RULE, BOUNDED])
@pytest.mark.parametrize("nodes", [2, 6, 12])
@pytest.mark.parametrize("seed", range(6))
def test_tree_is_that_of_the_heaviest_prefixes(rule: NgramRule, nodes: int, seed: int) -> None:
    found, root = random_found(seed), torch.arange(20, 25)
    for fixed in (True, False):
        tree = merged_tree(root, found, rule, nodes, fixed)
        drafted = []
        for row in range(len(root)):
            expected = slow_paths(found, row, RULE if fixed else rule, nodes)
            drafted.append(len(expected))
            assert int(tree.tokens[row, 0]) == int(root[row])
            assert paths_of(tree, row)[1 : 1 + len(expected)] == expected
            assert (tree.tokens[row, 1 + len(expected) :] == NOTHING).all()
            check_consistency(tree, row)
        assert tree.tokens.shape[1] == (nodes if fixed else 1 + max(drafted)), "bounds hold where nodes cost time"


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_repetition_is_drafted_at_once_and_its_absence_is_not(name: str, fixed: bool) -> None:
    predictor, spec = ngram_predictor(name, tiny_teacher())
    assert isinstance(predictor, NgramPredictor)
    drafts = TextDrafts(predictor, spec, 2, 60, CPU, fixed)
    repeating, distinct = [*range(10, 30), *range(10, 16)], list(range(30, 56))
    drafts.start([repeating, distinct])
    lengths, root = torch.tensor([25, 25]), torch.tensor([15, 55])
    tree = drafts.tree(root, lengths, 25)
    check = [[token for token in row if token != NOTHING] for row in tree.tokens.tolist()]
    assert check == [[15, *range(16, 16 + predictor.steps)], [55]]
    if name == "prompt-lookup":
        assert tree.tokens.shape[1] == spec.nodes, "the longest draft fills the chain"
    else:
        assert tree.tokens.shape[1] == (spec.nodes if fixed else 1 + predictor.steps)
    drafts.select(torch.tensor([1]))
    nodes = drafts.tree(root[1:], lengths[1:], 25).tokens.shape[1]
    assert nodes == (spec.nodes if fixed else 1), "without a match the step is an autoregressive one"


def test_text_grows_by_the_emitted_tokens() -> None:
    predictor, spec = ngram_predictor("prompt-lookup", tiny_teacher())
    assert isinstance(predictor, NgramPredictor)
    drafts = TextDrafts(predictor, spec, 3, 30, CPU, fixed=False)
    drafts.start([[5, 6, 7], [8]])
    lengths = torch.tensor([2, 0])
    row = torch.zeros(3, 12, dtype=torch.long)
    row[0, :4], row[1, :3] = torch.tensor([2, 5, 6, 9]), torch.tensor([0, -1, 44])
    drafts.append(lengths, row)
    first = predictor.rule.longest - 1
    assert drafts.tokens[0, first : first + 6].tolist() == [5, 6, 7, 5, 6, 9]
    assert drafts.tokens[1, first : first + 2].tolist() == [8, 0], "without a token the next step runs on any"
    row[1, :2] = torch.tensor([0, 8])
    drafts.append(torch.tensor([5, 0]), row)
    assert drafts.tokens[1, first : first + 2].tolist() == [8, 8]


def test_static_trees_that_are_no_chains_are_refused() -> None:
    predictor, _ = ngram_predictor("suffix", tiny_teacher())
    assert isinstance(predictor, NgramPredictor)
    with pytest.raises(UsageError, match="suffix fills trees dynamic:N or chain, not static:2x2"):
        TextDrafts(predictor, parse_tree("static:2x2", 3), 1, 9, CPU, fixed=False)
