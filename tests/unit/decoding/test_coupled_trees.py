"""Trees of predictors with a coupling, against every prefix scored node by node."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from firp_cli.decoding.tree_build import Tree, build
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.draft import Draft
from helpers.coupling import FORMS, UNCOUPLED, coupled, section
from helpers.models import HIDDEN, VOCABULARY, random_prompts, sequence_batch, tiny_teacher
from helpers.pairwise import covered
from helpers.trees import paths_of

Prefix = tuple[tuple[int, ...], tuple[int, ...], float]  # tokens, positions among the parent's candidates, score
TEACHER = tiny_teacher("llama", lean=True)
SEQUENCES = random_prompts(3, seed=41, low=12, high=15)


def drafts(predictor: TreePredictor, breadth: int) -> tuple[Draft, Tensor]:
    """Return the drafts of three sequences at one position of each, and their roots."""
    teacher = TEACHER
    batch = sequence_batch(teacher, SEQUENCES, [1] * 3, list(predictor.required_layers))
    places = torch.tensor([[4], [7], [9]])
    states = predictor.draft_states(teacher, batch, places)[:, 0]
    final = torch.stack([batch.final[row, place] for row, place in enumerate((4, 7, 9))])
    roots = torch.tensor([row[place + 1] for row, place in zip(SEQUENCES, (4, 7, 9), strict=True)])
    return predictor.draft(teacher, states, breadth, final=final), roots


def prefixes(
    predictor: TreePredictor, draft: Draft, root: int, breadth: int, depth: int, above: Prefix, state: Tensor | None
) -> Iterator[Prefix]:
    """Yield every prefix below one, of one sequence, each node's candidates by a call of its own."""
    steps = draft.tokens.shape[1]
    if depth > steps:
        return
    tokens, positions, score = above
    parent = torch.tensor([[tokens[-1] if tokens else root]])
    children = predictor.child_candidates(draft, depth, parent, breadth, state)
    for position in range(children.tokens.shape[2]):
        token, log_prob = int(children.tokens[0, 0, position]), float(children.log_probs[0, 0, position])
        child = (*tokens, token), (*positions, position), score + log_prob
        yield child
        yield from prefixes(predictor, draft, root, breadth, depth + 1, child, children.states)


def every_prefix(predictor: TreePredictor, draft: Draft, roots: Tensor, row: int, breadth: int) -> list[Prefix]:
    own = draft.map(lambda part: part[row : row + 1])
    return list(prefixes(predictor, own, int(roots[row]), breadth, 1, ((), (), 0.0), None))


def check_scores(tree: Tree, row: int, known: list[Prefix]) -> None:
    scores = {tokens: score for tokens, _, score in known}
    assert tree.scores is not None
    for node, path in enumerate(paths_of(tree, row)[1:], start=1):
        assert float(tree.scores[row, node]) == pytest.approx(scores[path], abs=1e-3)


@pytest.mark.parametrize(("form", "share", "kind", "nodes"), covered(FORMS, [True, False], list(UNCOUPLED), [2, 5, 8]))
@torch.no_grad()
def test_dynamic_tree_is_the_best_set_of_prefixes(form: str, share: bool, kind: str, nodes: int) -> None:
    predictor = coupled(TEACHER, section(kind, form, share, candidates=5), strength=8.0).for_decoding(TEACHER)
    draft, roots = drafts(predictor, nodes - 1)
    tree = build(parse_tree(f"dynamic:{nodes}", 3), predictor, draft, roots)
    assert tree.tokens.shape == (3, nodes) and torch.equal(tree.tokens[:, 0], roots)
    for row in range(3):
        known = every_prefix(predictor, draft, roots, row, max(5, nodes - 1))
        best = sorted(known, key=lambda item: -item[2])[: nodes - 1]
        paths = paths_of(tree, row)
        assert set(paths[1:]) == {tokens for tokens, _, _ in best}
        assert [len(path) for path in paths] == tree.depth[row].tolist()
        check_scores(tree, row, known)


@pytest.mark.parametrize(
    ("form", "share", "tree"),
    covered(FORMS, [True, False], ["static:3x2x1", "static:2x2/2", "chain", "static:1x3x2@2"]),
)
@torch.no_grad()
def test_static_tree_takes_its_positions(form: str, share: bool, tree: str) -> None:
    """Each node is its parent's candidate of that position, most probable first; several sequences at once."""
    predictor = coupled(TEACHER, section("firp_plus", form, share, candidates=5), strength=8.0)
    spec = parse_tree(tree, 3)
    draft, roots = drafts(predictor, spec.breadth(VOCABULARY))
    built = build(spec, predictor.for_decoding(TEACHER), draft, roots)
    followed = 0
    for row in range(3):
        known = every_prefix(predictor, draft, roots, row, 5)
        by_position = {positions: tokens for tokens, positions, _ in known}
        paths = paths_of(built, row)
        assert paths[1:] == [by_position[positions] for positions in spec.paths]
        check_scores(built, row, known)
        first = draft.tokens[row].tolist()
        followed += sum(path[-1] != first[len(path) - 1][spec.paths[node][-1]] for node, path in enumerate(paths[1:]))
    assert followed > 0, "the coupling changes the trees"


@torch.no_grad()
def test_recurrent_states_follow_the_kept_nodes() -> None:
    """Children of a node read that node's own state, not that of another node of its depth."""
    predictor = coupled(TEACHER, section("firp_plus", "recurrent", candidates=6), strength=8.0).for_decoding(TEACHER)
    draft, roots = drafts(predictor, 8)
    tree = build(parse_tree("dynamic:9", 3), predictor, draft, roots)
    shuffled = 0
    for row in range(3):
        own = draft.map(lambda part, row=row: part[row : row + 1])
        top = predictor.child_candidates(own, 1, roots[row].view(1, 1), 8)
        assert top.states is not None and top.states.shape == (1, 1, HIDDEN)
        for node in range(1, 9):
            path = paths_of(tree, row)[node]
            if len(path) == 2:
                children = predictor.child_candidates(own, 2, torch.tensor([[path[0]]]), 8, top.states)
                assert path[1] in children.tokens[0, 0].tolist()
                wrong = predictor.child_candidates(own, 2, torch.tensor([[path[0]]]), 8, -top.states)
                shuffled += int(not torch.allclose(wrong.log_probs, children.log_probs, atol=1e-3))
    assert shuffled > 0, "the parent's state matters"
