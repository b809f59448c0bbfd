"""Draft trees from the texts of a batch's sequences: see predictors/ngram.py.

Shapes: B sequences, T positions, W occurrences, D tokens drafted after one, N nodes (root included), C = D * W
candidates: one for each occurrence and depth, those of depth 1 first.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from firp_cli.decoding.tree_build import Tree, numbers, root_tree
from firp_cli.decoding.tree_spec import TreeSpec, parse_tree
from firp_cli.errors import UsageError
from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.ngram import BEFORE, NOTHING, RULES, Continuations, NgramPredictor, NgramRule
from firp_cli.teacher.teacher import Teacher

# 33 nodes instead of 17 add 1% to the accepted length of SmolLM2, 9 take 4% away where the shape is fixed.
TREES = {"prompt-lookup": "chain", "suffix": "dynamic:17"}


def ngram_predictor(name: str, teacher: Teacher) -> tuple[TreePredictor, TreeSpec]:
    """Return `prompt-lookup` or `suffix`, and the tree that it fills: a chain of the tokens after one occurrence, or
    the most likely of the continuations of several.
    """
    predictor = NgramPredictor(name, RULES[name]).to(teacher.device)
    return predictor, parse_tree(TREES[name], predictor.steps)


class TextDrafts:
    """Texts of up to `batch` sequences, and the draft trees of their next steps.

    Args:
        capacity: the furthest position of a root.
        fixed: all trees have N nodes, for graphs; the nodes without a draft carry NOTHING. Otherwise they are left out,
            and so are the nodes after the bounds `growth` and `least_share` of the rule: they would take more time than
            they save.

    Raises UsageError on a static tree that is not a chain.
    """

    def __init__(
        self, predictor: NgramPredictor, spec: TreeSpec, batch: int, capacity: int, device: torch.device, fixed: bool
    ) -> None:
        self._depth = spec.depth(predictor.steps)
        if spec.kind == "static" and self._depth < spec.nodes - 1:
            raise UsageError(f"{predictor.kind} fills trees dynamic:N or chain, not {spec}")
        self._predictor, self._spec, self._fixed = predictor, spec, fixed
        self._before = predictor.rule.longest - 1
        places = self._before + capacity + 2 + predictor.steps
        self.tokens = torch.zeros(batch, places, dtype=torch.long, device=device)
        self.tokens[:, : self._before] = BEFORE
        self._numbers = torch.arange(places, device=device)

    def start(self, prompts: list[list[int]]) -> None:
        """Start over with these texts."""
        width = max(map(len, prompts))
        padded = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
        self.tokens[: len(prompts), self._before : self._before + width].copy_(padded)

    def append(self, lengths: Tensor, row: Tensor) -> None:
        """Append a step's output `row` (B, 1 + P), counts and tokens, to texts whose last tokens are at `lengths` (B,).
        What the row holds after a sequence's tokens is written as well: the next step overwrites it.
        """
        ahead = self._numbers[self._before + 1 : self._before + row.shape[1]]
        emitted = row[: len(lengths), 1:].clamp(min=0)  # none is `sampling.NO_TOKEN`
        self.tokens[: len(lengths)].scatter_(1, lengths[:, None] + ahead, emitted)

    def select(self, sequences: Tensor) -> None:
        """Keep only these sequences (ascending places in the batch)."""
        self.tokens[: len(sequences)] = self.tokens[sequences]

    def tree(self, root: Tensor, lengths: Tensor, longest: int) -> Tree:
        """Build the trees below the roots (B,), which are the texts' last tokens, at `lengths` (B,) <= `longest`."""
        found = self._predictor.continuations(self.tokens[: len(root)], lengths, longest + 1, self._numbers)
        if not self._fixed and not found.matched.any():
            return root_tree(root)
        if self._spec.kind == "static":
            return chain_tree(root, found.tokens[:, 0, : self._depth], self._fixed)
        return merged_tree(root, found, self._predictor.rule, self._spec.nodes, self._fixed)


def chain_tree(root: Tensor, tokens: Tensor, fixed: bool) -> Tree:
    """Return chains of the `tokens` (B, D) below the roots (B,), if not `fixed` only as long as the longest draft."""
    if not fixed:
        tokens = tokens[:, : int((tokens != NOTHING).sum(1).max())]
    batch, nodes = len(tokens), tokens.shape[1] + 1
    places = numbers(nodes, root.device)
    parents, ancestors, paths = _chain_shape(nodes, root.device)
    shared = (part.expand(batch, *part.shape) for part in (parents, places, ancestors, paths))
    return Tree(torch.cat([root[:, None], tokens], dim=1), *shared)


@cache  # graphs hold their addresses
def _chain_shape(nodes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return parents (N,), ancestors (N, N) and paths (N, N) of a chain."""
    places = numbers(nodes, device)
    return (places - 1).clamp(min=0), places[:, None] >= places, torch.minimum(places[:, None], places)


def _candidates(found: Continuations) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight of each candidate (B, C), 0 where it is none, the path to each (B, W, D) as candidates, and
    the weight of all occurrences (B,).

    Occurrences that continue alike share a node: its candidate is the one of the first of them.
    """
    tokens, matched = found
    (count, depth), device = tokens.shape[1:], tokens.device
    weights = torch.where(matched > 0, torch.exp2(matched.float()), 0.0)  # their sums are exact
    alike = (tokens[:, :, None] == tokens[:, None]).cumprod(-1)  # (B, W, W, D)
    first = torch.where(alike > 0, numbers(count, device)[:, None], count).amin(2)  # (B, W, D)
    own = (first == numbers(count, device)[:, None]) & (tokens != NOTHING)
    joint = torch.where(own, (alike * weights[:, None, :, None]).sum(2), 0.0)
    return joint.transpose(1, 2).flatten(1), first + numbers(depth, device) * count, weights.sum(1)


def merged_tree(root: Tensor, found: Continuations, rule: NgramRule, nodes: int, fixed: bool) -> Tree:
    """Return the trees of the at most `nodes - 1` heaviest prefixes of the continuations, below the roots (B,).

    No prefix is heavier than its parent, and the sort is stable with parents first, so the choice is closed under
    ancestors.
    """
    joint, paths, total = _candidates(found)
    (batch, count, depth), device = found.tokens.shape, root.device
    order = joint.sort(dim=1, descending=True, stable=True)
    chosen = order.indices[:, : nodes - 1]
    drafted = order.values[:, : nodes - 1] > 0
    if not fixed:
        drafted &= order.values[:, : nodes - 1] >= total[:, None] * rule.least_share
        drafted &= numbers(chosen.shape[1], device) < found.matched[:, :1] * rule.growth
        most = int(drafted.sum(1).max())
        chosen, drafted = chosen[:, :most], drafted[:, :most]
    number = numbers(chosen.shape[1], device) + 1
    node_of = torch.zeros_like(order.indices).scatter_(1, chosen, number.expand_as(chosen))  # only nodes are read
    ways = node_of.gather(1, paths.flatten(1)).view(batch, count, depth)
    occurrence = (chosen % count)[:, :, None].expand(-1, -1, depth)
    above = torch.where(drafted, chosen // count, 0)[:, :, None]  # drafted ancestors; without a draft: the root alone
    ways = torch.where(numbers(depth, device) < above, ways.gather(1, occurrence), number[:, None])
    paths = functional.pad(ways, (1, 0, 1, 0))
    tokens = torch.where(drafted, found.tokens.transpose(1, 2).flatten(1).gather(1, chosen), NOTHING)
    ancestors = torch.zeros(batch, len(number) + 1, len(number) + 1, dtype=torch.bool, device=device)
    return Tree(
        tokens=torch.cat([root[:, None], tokens], dim=1),
        parents=paths.gather(2, functional.pad(above, (0, 0, 1, 0)))[:, :, 0],
        depth=functional.pad(above[:, :, 0] + 1, (1, 0)),
        ancestors=ancestors.scatter_(2, paths, True),
        paths=paths,
    )
