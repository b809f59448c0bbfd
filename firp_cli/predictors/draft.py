"""Drafts: the most probable tokens of each step, and the candidate children of tree nodes.

Shapes: B sequences, M nodes, k steps, s candidates per node, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_PARTS, MOST_PARTS = 8, 128  # parts of a vocabulary that `largest` searches separately
KERNEL_BREADTH = 32  # the kernel searches one token at a time


@dataclass
class Draft:
    """Candidates for the tokens after a root: for each depth the s most probable, in descending order.

    Attributes:
        tokens: (B, k, s) long. log_probs: (B, k, s) float32. Only a predictor may read them: the tree builder asks
            `TreePredictor.child_candidates`.
        context: (B, k, c) what a parent-dependent predictor needs of each step; None where it needs nothing.
    """

    tokens: Tensor
    log_probs: Tensor
    context: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the draft."""
        parts = (self.tokens, self.log_probs)
        return parts if self.context is None else (*parts, self.context)

    def map(self, change: Callable[[Tensor], Tensor]) -> Draft:
        """Return the draft of the changed tensors."""
        return Draft(*map(change, self.tensors))

    @staticmethod
    def cat(drafts: Sequence[Draft]) -> Draft:
        """Return the drafts of all sequences as one."""
        return Draft(*map(torch.cat, zip(*(draft.tensors for draft in drafts), strict=True)))


class Children(NamedTuple):
    """Candidate children of M nodes: tokens and log-probabilities given the node (B, M, s), and the state (B, M, d)
    that a child's own children depend on; None where they do not.
    """

    tokens: Tensor
    log_probs: Tensor
    states: Tensor | None = None


def most_probable_tokens(logits: Tensor, breadth: int, kernel: bool = False) -> Draft:
    """Return the `breadth` most probable tokens of each step, from float32 logits (B, k, V). `kernel`: find them by
    Triton kernels.
    """
    if kernel and breadth <= KERNEL_BREADTH:
        from firp_cli.predictors.triton_candidates import most_probable

        return Draft(*most_probable(logits, breadth))
    if logits.is_cuda:  # one kernel, `logsumexp` takes eight
        values, tokens = largest(logits.log_softmax(-1), breadth)
    else:
        values, tokens = logits.topk(breadth, dim=-1)
        values = values - logits.logsumexp(-1, keepdim=True)
    return Draft(tokens, values.clamp(max=0))  # rounding may give a probability above 1


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of (..., V), in descending order, and their indices. Equals `topk` with half of its
    kernels on a CUDA device: it takes the largest of each part, then of these.
    """
    size = values.shape[-1]
    parts = max(number for number in range(1, MOST_PARTS + 1) if size % number == 0)
    length = size // parts
    if parts < LEAST_PARTS or length < 4 * count:
        return values.topk(count, dim=-1)
    part_values, places = values.unflatten(-1, (parts, length)).topk(count, dim=-1, sorted=False)
    best, chosen = part_values.flatten(-2).topk(count, dim=-1)
    return best, places.flatten(-2).gather(-1, chosen) + chosen // count * length
