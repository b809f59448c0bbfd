"""Draft trees on the device: dynamic ones (the prefixes of highest joint draft probability) and static ones.

Shapes: B sequences, N nodes (root included), k draft steps, s candidates per node, C prefixes that may be among the
best. A candidate's position is its place among its parent's candidates, 0 for the most probable one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.draft import Draft

MAX_PREFIXES = 4096  # most prefixes that are scored at once


@dataclass
class Nodes:
    """Nodes of the draft trees of a batch: tokens and parents (B, N) long. Node 0 is the root, its own parent."""

    tokens: Tensor
    parents: Tensor


@dataclass
class Tree(Nodes):
    """Draft trees of a batch.

    Attributes:
        depth: (B, N) long. ancestors: (B, N, N) bool, a row is a node's path, itself included.
        paths: (B, N, P) long, the nodes from the root to each node, then that node again.
        scores: (B, N) joint draft log-probability of each node given the root; None where it is not needed.
    """

    depth: Tensor
    ancestors: Tensor
    paths: Tensor
    scores: Tensor | None = None


def build(spec: TreeSpec, predictor: TreePredictor, draft: Draft, root: Tensor) -> Tree:
    """Build a step's tree: root tokens (B,) and below them candidates that the predictor scores."""
    if spec.kind == "none":
        return root_tree(root)
    draft = first_steps(draft, spec)
    if spec.kind == "static":
        return _build_static(spec, predictor, draft, root)
    if predictor.coupling is not None:
        made = predictor.coupling.dynamic_tree(draft, root, spec.nodes)
        if made is not None:
            return Tree(*made)
    prefixes = None if predictor.parent_dependent else known_prefixes(spec, draft)
    if prefixes is None:
        return build_by_level(spec.nodes, predictor, draft, root)
    return _build_from_prefixes(prefixes, spec.nodes, draft, root)


def first_steps(draft: Draft, spec: TreeSpec) -> Draft:
    """Return the steps of a draft that a tree has."""
    run = spec.depth(draft.tokens.shape[1])
    return draft.map(lambda part: part[:, :run])


def known_prefixes(spec: TreeSpec, draft: Draft) -> Prefixes | None:
    """Return the prefixes that may be nodes where steps do not depend on the parent's token; a static tree's are its
    nodes, in their order. None if they are too many.
    """
    shape = (*draft.tokens.shape[1:], draft.tokens.device)
    return _static_shape(spec, *shape)[0] if spec.kind == "static" else _best_prefixes(spec.nodes, *shape)


@dataclass
class Prefixes:
    """Prefixes of drafts, the root's first and parents before children, as constants.

    Attributes:
        steps: (C, k) indices of a prefix's tokens among the k * s candidates of a draft, padded with k * s.
        facts: (C, k + 4) the numbers of the prefixes from the root to this one, padded with itself (k + 1); its parent;
            its depth; the index of its own token: 0 the root's, 1 the draft's first.
    """

    steps: Tensor
    facts: Tensor

    @staticmethod
    def of(paths: Sequence[tuple[int, ...]], steps: int, breadth: int, device: torch.device) -> Prefixes:
        """Return prefixes, given as positions, as constants for drafts of `steps` x `breadth` candidates."""
        number = {path: place for place, path in enumerate(paths)}
        places, facts = [], []
        for path in number:
            own = [depth * breadth + position for depth, position in enumerate(path)]
            way = [number[path[:depth]] for depth in range(len(path) + 1)]
            missing = steps - len(path)
            places.append(own + [steps * breadth] * missing)
            facts.append([*way, *way[-1:] * missing, number[path[:-1]], len(path), own[-1] + 1 if path else 0])
        return Prefixes(torch.tensor(places, device=device), torch.tensor(facts, device=device))

    def scores(self, draft: Draft) -> Tensor:
        """Return the joint log-probabilities (B, C)."""
        probable = torch.nn.functional.pad(draft.log_probs.flatten(1), (0, 1))
        return probable.index_select(1, self.steps.flatten()).view(len(probable), *self.steps.shape).sum(-1)


@cache  # graphs hold their addresses
def _best_prefixes(nodes: int, steps: int, breadth: int, device: torch.device) -> Prefixes | None:
    """Return the prefixes whose positions r_1.. have (r_1 + 1)(r_2 + 1).. < `nodes`; None if they are too many.

    Where steps do not depend on the parent's token, a prefix is at most as probable as every prefix of no greater
    positions. So one with a larger product cannot be among the `nodes - 1` best.
    """
    level: list[tuple[int, ...]] = [()]
    every = list(level)
    for _ in range(steps):
        level = [
            (*path, position)
            for path in level
            for position in range(breadth)
            if math.prod(above + 1 for above in path) * (position + 1) < nodes
        ]
        every += level
        if len(every) > MAX_PREFIXES:
            return None
    return Prefixes.of(every, steps, breadth, device)


def _build_from_prefixes(prefixes: Prefixes, nodes: int, draft: Draft, root: Tensor) -> Tree:
    """Build the tree of the best prefixes, where steps do not depend on the parent's token: score all at once."""
    batch, steps = draft.tokens.shape[:2]
    order = prefixes.scores(draft).sort(dim=1, descending=True, stable=True)  # of equals the parent comes first
    places = order.indices[:, :nodes]  # number of every node's prefix
    nodes = places.shape[1]
    facts = prefixes.facts[places]
    node_of = torch.empty_like(order.indices)  # only nodes are read: a node's ancestors are nodes
    node_of.scatter_(1, places, numbers(nodes, root.device).expand(batch, nodes))
    ways = node_of.gather(1, facts[:, :, : steps + 2].flatten(1)).view(batch, nodes, steps + 2)
    paths = ways[:, :, : steps + 1]
    ancestors = torch.zeros(batch, nodes, nodes, dtype=torch.bool, device=root.device)
    return Tree(
        tokens=_with_root(root, draft).gather(1, facts[:, :, -1]),
        parents=ways[:, :, -1],
        depth=facts[:, :, -2],
        ancestors=ancestors.scatter_(2, paths, True),
        paths=paths,
        scores=order.values[:, :nodes],
    )


def _with_root(root: Tensor, draft: Draft) -> Tensor:
    """Return the root's token and all candidates (B, 1 + k * s)."""
    return torch.cat([root[:, None], draft.tokens.flatten(1)], dim=1)


@cache  # graphs hold their addresses
def numbers(count: int, device: torch.device) -> Tensor:
    """Return (count,) 0, 1, ..., made once."""
    return torch.arange(count, device=device)


def build_by_level(nodes: int, predictor: TreePredictor, draft: Draft, root: Tensor) -> Tree:
    """Build the dynamic tree of any predictor: each level keeps its `nodes - 1` best prefixes, then the best of
    all levels are chosen.

    A child's joint probability never exceeds its parent's and the sort is stable with parents first, so the choice is
    closed under ancestors.
    """
    batch, limit, steps = root.shape[0], nodes - 1, draft.tokens.shape[1]
    # Candidate 0 is the root; the candidates of each level follow. `parents` holds candidate numbers.
    tokens, scores, parents, widths = [root[:, None]], [draft.log_probs.new_zeros(batch, 1)], [], [1]
    frontier_tokens, frontier_scores, states = tokens[0], scores[0], None
    most = min(max(1, limit), draft.tokens.shape[2])
    for depth in range(1, steps + 1):
        child_tokens, log_probs, states = predictor.child_candidates(draft, depth, frontier_tokens, most, states)
        breadth = child_tokens.shape[2]
        if depth == 1 and breadth <= limit:  # the root's candidates come in order
            frontier_scores, frontier_tokens = log_probs[:, 0], child_tokens[:, 0]
            parents.append(torch.zeros_like(frontier_tokens))
            above = parents[-1]
        else:
            joint = (frontier_scores[:, :, None] + log_probs).flatten(1)
            frontier_scores, picks = joint.topk(min(limit, joint.shape[1]), dim=1)
            frontier_tokens = child_tokens.flatten(1).gather(1, picks)
            above = picks // breadth
            parents.append(above + sum(widths[:-1]))
        if states is not None:
            states = states.gather(1, above[:, :, None].expand(-1, -1, states.shape[2]))
        tokens.append(frontier_tokens)
        scores.append(frontier_scores)
        widths.append(frontier_tokens.shape[1])
    levels, node_numbers, itself = _dynamic_shape(tuple(widths), min(nodes, sum(widths)), root.device)
    every = torch.cat(scores, dim=1)
    order = every[:, 1:].sort(dim=1, descending=True, stable=True)
    chosen = order.indices[:, :limit]
    places = torch.nn.functional.pad(chosen + 1, (1, 0))  # candidate number of every node, the root first
    node_of = torch.zeros_like(levels).expand(batch, -1).scatter(1, places, node_numbers.expand(batch, -1))
    above = torch.cat(parents, dim=1).gather(1, chosen)
    parent = torch.nn.functional.pad(node_of.gather(1, above), (1, 0))
    level = levels[places]
    return Tree(
        tokens=torch.cat(tokens, dim=1).gather(1, places),
        parents=parent,
        depth=level,
        ancestors=_ancestors(parent, itself, steps),
        paths=_paths(parent, level, node_numbers, steps),
        scores=every.gather(1, places),
    )


def _paths(parents: Tensor, depth: Tensor, node_numbers: Tensor, steps: int) -> Tensor:
    """Return `Tree.paths` (B, N, k + 1) from parents and depth (B, N): climb from every node, then reverse."""
    climb = [node_numbers.expand_as(parents)]
    for _ in range(steps):
        climb.append(parents.gather(1, climb[-1]))
    ahead = depth[:, :, None] - numbers(steps + 1, parents.device)
    return torch.stack(climb, dim=2).gather(2, ahead.clamp(min=0))


@cache  # graphs hold their addresses
def _dynamic_shape(widths: tuple[int, ...], nodes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return constants: the level of every candidate, node numbers (N,), and the identity (N, N) bool."""
    levels = [level for level, width in enumerate(widths) for _ in range(width)]
    itself = torch.eye(nodes, dtype=torch.bool, device=device)
    return torch.tensor(levels, device=device), torch.arange(nodes, device=device), itself


def _ancestors(parents: Tensor, itself: Tensor, depth: int) -> Tensor:
    """Return (B, N, N) bool from parents (B, N): each round doubles a node's reach. `itself`: identity (N, N)."""
    seen = itself.expand(parents.shape[0], -1, -1).scatter(2, parents[:, :, None], True).float()
    reach = 1
    while reach < depth:
        seen = seen @ seen
        reach *= 2
    return seen > 0


def root_tree(root: Tensor) -> Tree:
    """Return the tree of autoregressive decoding: one node per sequence. `root`: (B,) tokens."""
    zeros, itself = _root_shape(root.shape[0], root.device)
    return Tree(root[:, None], zeros, zeros, itself, zeros[:, None])


@cache  # graphs hold their addresses
def _root_shape(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(batch, 1, dtype=torch.long, device=device)
    return zeros, torch.ones(batch, 1, 1, dtype=torch.bool, device=device)


@cache  # graphs hold their addresses
def _static_shape(
    spec: TreeSpec, steps: int, breadth: int, device: torch.device
) -> tuple[Prefixes, Tensor, list[tuple[Tensor, Tensor]]]:
    """Return prefixes, ancestors (N, N) bool, and by depth the parents and positions of its nodes."""
    prefixes = Prefixes.of(((), *spec.paths), steps, breadth, device)
    itself = torch.zeros(spec.nodes, spec.nodes, dtype=torch.bool, device=device)
    ancestors = itself.scatter(1, prefixes.facts[:, : steps + 1], True)
    levels, parents = [], prefixes.facts[1:, -3]
    for depth in range(1, steps + 1):
        level = [node for node, path in enumerate(spec.paths) if len(path) == depth]
        positions = torch.tensor([spec.paths[node][-1] for node in level], device=device)
        levels.append((parents[level], positions))
    return prefixes, ancestors, levels


def _build_static(spec: TreeSpec, predictor: TreePredictor, draft: Draft, root: Tensor) -> Tree:
    prefixes, ancestors, levels = _static_shape(spec, *draft.tokens.shape[1:], root.device)
    batch, steps, scores = len(root), draft.tokens.shape[1], None
    if not predictor.parent_dependent:
        tokens = _with_root(root, draft).index_select(1, prefixes.facts[:, -1])
        scores = prefixes.scores(draft) if spec.limited else None
    else:
        tokens, scores = root[:, None], draft.log_probs.new_zeros(batch, 1)
        breadth, states = spec.breadth(draft.tokens.shape[2]), None
        for depth, (parents, positions) in enumerate(levels, start=1):
            above = None if states is None else states[:, parents]
            candidates, log_probs, made = predictor.child_candidates(draft, depth, tokens[:, parents], breadth, above)
            if made is not None:  # by node; the root has none
                states = torch.cat([made[:, :1] if states is None else states, made], dim=1)
            picks = positions[None, :, None].expand(batch, -1, 1)
            scores = torch.cat([scores, scores[:, parents] + log_probs.gather(2, picks)[:, :, 0]], dim=1)
            tokens = torch.cat([tokens, candidates.gather(2, picks)[:, :, 0]], dim=1)
    facts = prefixes.facts.expand(batch, -1, -1)
    paths, parents, depth_of = facts[:, :, : steps + 1], facts[:, :, -3], facts[:, :, -2]
    return Tree(tokens, parents, depth_of, ancestors.expand(batch, -1, -1), paths, scores)


def anchor_nodes(tree: Tree, count: int) -> Tensor:
    """Return the nodes with pseudo rows (B, count): the root, and those where the accepted path most likely ends.

    A path ends at a node if it reaches it and none of its children. The draft gives the probabilities.
    """
    assert tree.scores is not None
    reached = tree.scores.exp()
    passed = (
        _passed_start(reached.shape[1], reached.device)
        .expand_as(reached)
        .scatter_add(1, tree.parents[:, 1:], reached[:, 1:])
    )
    return (reached - passed).sort(dim=1, descending=True, stable=True).indices[:, :count]


@cache  # graphs hold their addresses
def _passed_start(nodes: int, device: torch.device) -> Tensor:
    """Return (N,) zeros, for the root -inf: every node needs an ancestor with pseudo rows."""
    return torch.tensor([-torch.inf] + [0.0] * (nodes - 1), device=device)


def nearest_anchor(tree: Tree, anchors: Tensor, path: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the deepest of `anchors` (B, A) on a path (B, P) of `count` (B,) nodes below the root: its index among the
    anchors (B,), and its distance from the path's end in tokens (B,).
    """
    on_path = (anchors[:, :, None] == path[:, None]).any(-1)  # after its end a path repeats its last node
    depth, place = torch.where(on_path, tree.depth.gather(1, anchors), -1).max(dim=1)
    return place, count - depth
