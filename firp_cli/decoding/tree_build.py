"""Draft trees on the device: dynamic ones (the prefixes of highest joint draft probability) and static ones.

Shapes: B sequences, N nodes (root included), k draft steps, s candidates per node, C prefixes that may be among the
best. A candidate's position is its place among its parent's candidates, 0 for the most probable one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.predictors.base import Draft, TreePredictor

MAX_CANDIDATES = 4096  # most prefixes that are scored at once


@dataclass
class Tree:
    """Draft trees of a batch.

    Attributes:
        tokens, parents, depth: (B, N) long. ancestors: (B, N, N) bool, a row is a node's path, itself included.
        paths: (B, N, P) long, the nodes from the root to each node, then that node again.
        scores: (B, N) joint draft log-probability of each node given the root; None where it is not needed.
    """

    tokens: Tensor
    parents: Tensor
    depth: Tensor
    ancestors: Tensor
    paths: Tensor
    scores: Tensor | None = None


def build_best(nodes: int, predictor: TreePredictor, draft: Draft, root: Tensor) -> Tree:
    """Build the tree of the root tokens (B,) and the `nodes - 1` best prefixes of the draft."""
    if not predictor.parent_dependent:
        candidates = _candidates(nodes, *draft.tokens.shape[1:], root.device)
        if candidates is not None:
            return _build_from_candidates(candidates, nodes, draft, root)
    return build_by_level(nodes, predictor, draft, root)


@dataclass
class _Candidates:
    """All prefixes that may be among the best, the root first and parents before children.

    `tokens` (C, k): indices of a prefix's tokens among the k * s candidates of a draft, padded with k * s.
    `facts` (C, P + 3): the prefixes from the root to this one, padded with itself (P = k + 1); its parent; its depth;
    the index of its own token: 0 the root's, 1 the draft's first.
    """

    tokens: Tensor
    facts: Tensor


@cache  # graphs hold their addresses
def _candidates(nodes: int, steps: int, breadth: int, device: torch.device) -> _Candidates | None:
    """Return the prefixes whose positions r_1.. have (r_1 + 1)(r_2 + 1).. < `nodes`; None if they are too many.

    Where steps do not depend on the parent's token, a prefix is at most as probable as every prefix of no greater
    positions. So one with a larger product cannot be among the `nodes - 1` best.
    """
    level: list[tuple[int, ...]] = [()]
    every: list[tuple[int, ...]] = []
    for _ in range(steps):
        level = [
            (*path, position)
            for path in level
            for position in range(breadth)
            if math.prod(above + 1 for above in path) * (position + 1) < nodes
        ]
        every += level
        if len(every) > MAX_CANDIDATES:
            return None
    number = {path: place for place, path in enumerate([(), *every])}
    tokens, facts = [], []
    for path in number:
        places = [depth * breadth + position for depth, position in enumerate(path)]
        way = [number[path[:depth]] for depth in range(len(path) + 1)]
        tokens.append(places + [steps * breadth] * (steps - len(path)))
        way_and_parent = [*way, *way[-1:] * (steps - len(path)), number[path[:-1]]]
        facts.append([*way_and_parent, len(path), places[-1] + 1 if path else 0])
    return _Candidates(torch.tensor(tokens, device=device), torch.tensor(facts, device=device))


def _build_from_candidates(candidates: _Candidates, nodes: int, draft: Draft, root: Tensor) -> Tree:
    """Build the tree where steps do not depend on the parent's token: score all prefixes at once."""
    batch, (count, steps) = root.shape[0], candidates.tokens.shape
    probable = torch.nn.functional.pad(draft.log_probs.flatten(1), (0, 1))
    scores = probable.index_select(1, candidates.tokens.flatten()).view(batch, count, steps).sum(-1)
    order = scores.sort(dim=1, descending=True, stable=True)  # of equals the parent comes first
    places = order.indices[:, :nodes]  # candidate number of every node
    nodes = places.shape[1]
    facts = candidates.facts[places]
    node_of = torch.empty(batch, count, dtype=torch.long, device=root.device)  # only nodes are read: a tree is closed
    node_of.scatter_(1, places, numbers(nodes, root.device).expand(batch, nodes))
    ways = node_of.gather(1, facts[:, :, : steps + 2].flatten(1)).view(batch, nodes, steps + 2)
    paths = ways[:, :, : steps + 1]
    ancestors = torch.zeros(batch, nodes, nodes, dtype=torch.bool, device=root.device)
    every = torch.cat([root[:, None], draft.tokens.flatten(1)], dim=1)
    return Tree(
        tokens=every.gather(1, facts[:, :, -1]),
        parents=ways[:, :, -1],
        depth=facts[:, :, -2],
        ancestors=ancestors.scatter_(2, paths, True),
        paths=paths,
        scores=order.values[:, :nodes],
    )


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
    frontier_tokens, frontier_scores = tokens[0], scores[0]
    for depth in range(1, steps + 1):
        child_tokens, log_probs = predictor.child_candidates(draft, depth, frontier_tokens)
        breadth = child_tokens.shape[2]
        if depth == 1 and breadth <= limit:  # the root's candidates come in order
            frontier_scores, frontier_tokens = log_probs[:, 0], child_tokens[:, 0]
            parents.append(torch.zeros_like(frontier_tokens))
        else:
            joint = (frontier_scores[:, :, None] + log_probs).flatten(1)
            frontier_scores, picks = joint.topk(min(limit, joint.shape[1]), dim=1)
            frontier_tokens = child_tokens.flatten(1).gather(1, picks)
            parents.append((picks // breadth).add_(sum(widths[:-1])))
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


def build(spec: TreeSpec, predictor: TreePredictor, draft: Draft, root: Tensor) -> Tree:
    """Build a step's tree: root tokens (B,) and below them candidates that the predictor scores."""
    if spec.kind == "none":
        return root_tree(root)
    if spec.kind == "static":
        return _build_static(spec, predictor, draft, root)
    run = spec.depth(draft.tokens.shape[1])
    return build_best(spec.nodes, predictor, Draft(draft.tokens[:, :run], draft.log_probs[:, :run]), root)


@cache  # graphs hold their addresses
def _static_shape(spec: TreeSpec, device: torch.device) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Return parents (N,), depth (N,), ancestors (N, N), paths (N, P), and per depth its nodes' (parent, position)."""
    index = {path: number for number, path in enumerate(((), *spec.paths))}
    parents = [index[path[:-1]] for path in index]
    ancestors = torch.zeros(spec.nodes, spec.nodes, dtype=torch.bool)
    ways = []
    for path, number in index.items():
        way = [index[path[:depth]] for depth in range(len(path) + 1)]
        ancestors[number, way] = True
        ways.append(way + way[-1:] * (spec.depth(0) + 1 - len(way)))
    levels = []
    for depth in range(1, spec.depth(0) + 1):
        paths = [path for path in spec.paths if len(path) == depth]
        nodes = torch.tensor([index[path[:-1]] for path in paths], device=device)
        levels.append((nodes, torch.tensor([path[-1] for path in paths], device=device)))
    depths = torch.tensor([len(path) for path in index])
    shape = (torch.tensor(parents), depths, ancestors, torch.tensor(ways))
    return [part.to(device) for part in shape], levels


@cache  # graphs hold their addresses
def _static_places(spec: TreeSpec, breadth: int, device: torch.device) -> Tensor:
    """Return (N - 1,) the indices of the nodes' tokens, without the root, among the k * s candidates of a draft."""
    return torch.tensor([(len(path) - 1) * breadth + path[-1] for path in spec.paths], device=device)


def _build_static(spec: TreeSpec, predictor: TreePredictor, draft: Draft, root: Tensor) -> Tree:
    shape, levels = _static_shape(spec, root.device)
    batch = root.shape[0]
    parents, depth, ancestors, paths = (part.expand(batch, *part.shape) for part in shape)
    if not predictor.parent_dependent and not spec.limited:  # every node's token has an index of its own
        places = _static_places(spec, draft.tokens.shape[2], root.device)
        tokens = torch.cat([root[:, None], draft.tokens.flatten(1).index_select(1, places)], dim=1)
        return Tree(tokens, parents, depth, ancestors, paths)
    tokens, scores = root[:, None], draft.log_probs.new_zeros(batch, 1)
    for number, (nodes, positions) in enumerate(levels, start=1):
        candidates, log_probs = predictor.child_candidates(draft, number, tokens[:, nodes])
        picks = positions[None, :, None].expand(batch, -1, 1)
        if spec.limited:
            scores = torch.cat([scores, scores[:, nodes] + log_probs.gather(2, picks)[:, :, 0]], dim=1)
        tokens = torch.cat([tokens, candidates.gather(2, picks)[:, :, 0]], dim=1)
    return Tree(tokens, parents, depth, ancestors, paths, scores if spec.limited else None)


def anchor_nodes(tree: Tree, count: int) -> Tensor:
    """Return the nodes with pseudo rows (B, count): the root, and those where the accepted path most likely ends.

    A path ends at a node if it reaches it and none of its children. The draft gives the probabilities.
    """
    assert tree.scores is not None
    reached = tree.scores.exp()
    passed = torch.zeros_like(reached).scatter_add_(1, tree.parents[:, 1:], reached[:, 1:])
    ending = reached - passed
    ending[:, 0] = torch.inf  # every node needs an ancestor with pseudo rows
    return ending.topk(count, dim=1).indices


def nearest_anchor(tree: Tree, anchors: Tensor, path: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the deepest of `anchors` (B, A) on a path (B, P) of `count` (B,) nodes below the root: its index among the
    anchors (B,), and its distance from the path's end in tokens (B,).
    """
    on_path = (anchors[:, :, None] == path[:, None]).any(-1)  # after its end a path repeats its last node
    depth, place = torch.where(on_path, tree.depth.gather(1, anchors), -1).max(dim=1)
    return place, count - depth
