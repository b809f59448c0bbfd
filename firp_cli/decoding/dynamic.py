"""Dynamic draft trees: each step the prefixes of highest joint draft probability, found on the device.

Shapes: B sequences, N nodes (root included), k steps, s candidates per node, C prefixes that may be among the best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from firp_cli.predictors.base import Draft, Predictor

MAX_CANDIDATES = 4096  # prefixes that are scored at once


@dataclass
class Tree:
    """`tokens`, `parents`, `depth`: (B, N) long; `ancestors`: (B, N, N) bool, a row is a node's path with itself;
    `paths`: (B, N, P) long, the nodes from the root to each node, filled up with that node; `scores`: (B, N) joint
    draft log-probability of each node given the root, None where nobody asks.
    """

    tokens: Tensor
    parents: Tensor
    depth: Tensor
    ancestors: Tensor
    paths: Tensor
    scores: Tensor | None = None


def build_best(nodes: int, predictor: Predictor, draft: Draft, root: Tensor) -> Tree:
    """The tree of the root tokens (B,) and the `nodes - 1` best prefixes that the draft's steps can make."""
    if not predictor.conditional:
        candidates = _candidates(nodes, *draft.tokens.shape[1:], root.device)
        if candidates is not None:
            return _build_from_candidates(candidates, nodes, draft, root)
    return build_by_level(nodes, predictor, draft, root)


@dataclass
class _Candidates:
    """All prefixes that may be among the best, the root first and parents before children.

    `tokens` (C, k): places of a prefix's tokens among the k * s candidates of a draft, filled up with place k * s.
    `facts` (C, P + 3): the candidates from the root to it, filled up with itself (P = k + 1); its parent; its depth;
    the place of its own token, 0 the root's and 1 the draft's first.
    """

    tokens: Tensor
    facts: Tensor


@cache  # graphs hold their addresses
def _candidates(nodes: int, steps: int, breadth: int, device: torch.device) -> _Candidates | None:
    """The prefixes whose ranks r_1.. have (r_1 + 1)(r_2 + 1).. < `nodes`; None where they are too many to be worth it.

    Where steps do not depend on the parent's token, every prefix of ranks no greater is as probable as a prefix at
    least: one with a larger product cannot be among the `nodes - 1` best.
    """
    level: list[tuple[int, ...]] = [()]
    every: list[tuple[int, ...]] = []
    for _ in range(steps):
        level = [
            (*path, rank)
            for path in level
            for rank in range(breadth)
            if math.prod(one + 1 for one in path) * (rank + 1) < nodes
        ]
        every += level
        if len(every) > MAX_CANDIDATES:
            return None
    number = {path: place for place, path in enumerate([(), *every])}
    tokens, facts = [], []
    for path in number:
        places = [depth * breadth + rank for depth, rank in enumerate(path)]
        way = [number[path[:depth]] for depth in range(len(path) + 1)]
        tokens.append(places + [steps * breadth] * (steps - len(path)))
        way_and_parent = [*way, *way[-1:] * (steps - len(path)), number[path[:-1]]]
        facts.append([*way_and_parent, len(path), places[-1] + 1 if path else 0])
    return _Candidates(torch.tensor(tokens, device=device), torch.tensor(facts, device=device))


def _build_from_candidates(candidates: _Candidates, nodes: int, draft: Draft, root: Tensor) -> Tree:
    """`build_by_level` for steps that do not depend on the parent's token: all prefixes are scored at once."""
    batch, (count, steps) = root.shape[0], candidates.tokens.shape
    probable = torch.nn.functional.pad(draft.log_probs.flatten(1), (0, 1))
    scores = probable.index_select(1, candidates.tokens.flatten()).view(batch, count, steps).sum(-1)
    order = scores.sort(dim=1, descending=True, stable=True).indices  # of equals the parent comes first
    places = order[:, :nodes].sort(dim=1).values  # candidate number of every node
    nodes = places.shape[1]
    facts = candidates.facts[places]
    node_of = torch.zeros(batch, count, dtype=torch.long, device=root.device)
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
        scores=scores.gather(1, places),
    )


@cache  # graphs hold their addresses
def numbers(count: int, device: torch.device) -> Tensor:
    """(count,) 0, 1, ..., made once."""
    return torch.arange(count, device=device)


def build_by_level(nodes: int, predictor: Predictor, draft: Draft, root: Tensor) -> Tree:
    """A dynamic tree of any predictor: each level keeps its `nodes - 1` best prefixes, then the best over all levels
    are chosen.

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
    levels, own, itself = _dynamic_shape(tuple(widths), min(nodes, sum(widths)), root.device)
    every = torch.cat(scores, dim=1)
    order = every[:, 1:].sort(dim=1, descending=True, stable=True).indices
    chosen = order[:, :limit].sort(dim=1).values
    places = torch.nn.functional.pad(chosen + 1, (1, 0))  # candidate number of every node, the root first
    node_of = torch.zeros_like(levels).expand(batch, -1).scatter(1, places, own.expand(batch, -1))
    above = torch.cat(parents, dim=1).gather(1, chosen)
    parent = torch.nn.functional.pad(node_of.gather(1, above), (1, 0))
    level = levels[places]
    return Tree(
        tokens=torch.cat(tokens, dim=1).gather(1, places),
        parents=parent,
        depth=level,
        ancestors=_ancestors(parent, itself, steps),
        paths=_paths(parent, level, own, steps),
        scores=every.gather(1, places),
    )


def _paths(parents: Tensor, depth: Tensor, own: Tensor, steps: int) -> Tensor:
    """(B, N, k + 1) `Tree.paths` from parents and depth (B, N): climb from every node, then turn the climb round."""
    climb = [own.expand_as(parents)]
    for _ in range(steps):
        climb.append(parents.gather(1, climb[-1]))
    ahead = depth[:, :, None] - numbers(steps + 1, parents.device)
    return torch.stack(climb, dim=2).gather(2, ahead.clamp(min=0))


@cache  # graphs hold their addresses
def _dynamic_shape(widths: tuple[int, ...], nodes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Constants of a tree: the level of every candidate, node numbers (N,), and the identity (N, N) bool."""
    levels = [level for level, width in enumerate(widths) for _ in range(width)]
    itself = torch.eye(nodes, dtype=torch.bool, device=device)
    return torch.tensor(levels, device=device), torch.arange(nodes, device=device), itself


def _ancestors(parents: Tensor, itself: Tensor, depth: int) -> Tensor:
    """(B, N, N) bool from parents (B, N): each round doubles how far up a node sees. `itself`: the identity (N, N)."""
    seen = itself.expand(parents.shape[0], -1, -1).scatter(2, parents[:, :, None], True).float()
    reach = 1
    while reach < depth:
        seen = seen @ seen
        reach *= 2
    return seen > 0
