"""Acceptance: the path of a draft tree that the teacher's own choices follow.

`targets` is, for every node, the token that the teacher puts after it: its argmax, or one draw from its distribution at
temperature > 0. Descending while a child carries that token emits exactly the tokens that autoregressive decoding
chooses or draws, for any draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from firp_cli.decoding.tree_build import Tree, nearest_anchor, numbers


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


class NextDraft(NamedTuple):
    """The rows of the next draft: those of the deepest accepted node or, if it has no pseudo rows, of its nearest
    ancestor with some, from the step on that lies ahead.

    Attributes:
        place: (B,) the node's or ancestor's index among the anchors. picks: (B, k) the steps' rows.
        floor: (B, k) to be added to log-probabilities: -inf where the ancestor does not reach; None: all are reached.
    """

    place: Tensor
    picks: Tensor
    floor: Tensor | None


class Taken(NamedTuple):
    """Rows that a step keeps: their number (B,) on the path (B, P), and those of the next draft, if it makes one."""

    kept: Tensor
    path: Tensor
    following: NextDraft | None


def next_draft(
    tree: Tree, accepted: Accepted, anchors: Tensor | None, steps: int, strides: tuple[int, int]
) -> NextDraft:
    """Return where the rows of the next draft of `steps` steps are.

    Args:
        anchors: (B, A), None: all nodes. strides: rows from an anchor to the next one and from a step to the next one.
    """
    count = numbers(steps, tree.tokens.device)
    if anchors is None:
        return NextDraft(accepted.node, accepted.node[:, None] * strides[0] + count * strides[1], None)
    place, passed = nearest_anchor(tree, anchors, accepted.path, accepted.count)
    ahead = passed[:, None] + count
    picks = place[:, None] * strides[0] + ahead.clamp(max=steps - 1) * strides[1]
    return NextDraft(place, picks, torch.zeros_like(picks, dtype=torch.float32).masked_fill(ahead >= steps, -torch.inf))


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
