"""Acceptance: the path of a draft tree that the teacher's own choices follow.

`targets` is, for every node, the token that the teacher puts after it: its argmax, or one draw from its distribution at
temperature > 0. Descending while a child carries that token emits exactly the tokens that autoregressive decoding
chooses or draws, for any draft.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from firp_cli.decoding.tree_build import Tree


@dataclass
class Accepted:
    """The outcome of one step, on the device.

    Attributes:
        count: (B,) accepted drafted tokens a. node: (B,) the deepest accepted node.
        path: (B, P) node numbers root..node at [0, a], then that node again. P = depth of the tree + 1.
        tokens: (B, P) emitted tokens: a drafted ones, then the bonus token, repeated.
        bonus: (B,) the next root.
    """

    count: Tensor
    node: Tensor
    path: Tensor
    tokens: Tensor
    bonus: Tensor


def accept(tree: Tree, targets: Tensor, depth: int) -> Accepted:
    """Descend the tree along `targets` (B, N). `depth` is the tree's greatest depth, which the host knows."""
    misses = tree.tokens != targets.gather(1, tree.parents)
    cut = (misses[:, None, 1:] & tree.ancestors[:, :, 1:]).any(-1)  # a miss on the node's path; the root is none
    count, node = tree.depth.masked_fill(cut, -1).max(dim=1)
    width = min(depth + 1, tree.tokens.shape[1])
    index = node[:, None, None].expand(-1, 1, tree.paths.shape[2])
    path = tree.paths.gather(1, index)[:, 0, :width]
    chosen = targets.gather(1, path)  # an accepted child's token is its parent's target
    return Accepted(count, node, path, chosen, chosen.gather(1, count[:, None])[:, 0])


def accept_root(targets: Tensor) -> Accepted:
    """Accept for a tree of the root alone (`targets` (B, 1)): there is no draft, the target is the bonus token."""
    nothing = torch.zeros_like(targets[:, 0])
    return Accepted(nothing, nothing, nothing[:, None], targets, targets[:, 0])
