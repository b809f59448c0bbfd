"""Who sees whom: masks for real rows and pseudo states, built once per forward for every layer, and attention itself.

Shapes: B sequences, R real rows, A anchors, k steps, M = R + k*A rows, S cached K/V slots, Hq query heads, Hk key/value
heads, D head size. Rows stand in the order real rows, step-1 pseudo states of all anchors, step-2 pseudo states, ...
so that the rows present at a layer are always a prefix.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from firp_cli.errors import TeacherError

BACKENDS = ("auto", "sdpa", "triton")


def causal_allowed(lengths_B: Tensor, rows: int) -> Tensor:
    """(B, R, R) bool: a row sees itself and the earlier rows of its sequence; rows past a length are seen by none."""
    index = torch.arange(rows, device=lengths_B.device)
    causal = index[None, :] <= index[:, None]
    inside = index[None, :] < lengths_B[:, None]
    itself = torch.eye(rows, dtype=torch.bool, device=lengths_B.device)
    return (causal[None] & inside[:, None, :]) | itself[None]


def rows_allowed(real_BRR: Tensor, anchors_BA: Tensor | None, steps: int) -> Tensor:
    """(B, M, M) bool over real rows and pseudo states (FIRP section 3: a pseudo state sees what its anchor sees).

    A pseudo state (step i, anchor a) sees every real row that row `anchors[a]` sees, that row itself included, and the
    pseudo states of steps 1..i of the same anchor. Real rows never see pseudo states. `anchors_BA` None: every row.
    """
    batch, rows, _ = real_BRR.shape
    anchors = rows if anchors_BA is None else anchors_BA.shape[1]
    pseudo = steps * anchors
    allowed = real_BRR.new_zeros(batch, rows + pseudo, rows + pseudo)
    allowed[:, :rows, :rows] = real_BRR
    seen_BAR = real_BRR
    if anchors_BA is not None:
        seen_BAR = real_BRR.gather(1, anchors_BA[:, :, None].expand(batch, anchors, rows))
    allowed[:, rows:, :rows] = seen_BAR.repeat(1, steps, 1)
    allowed[:, rows:, rows:] = own_pseudo(steps, anchors, real_BRR.device)
    return allowed


def step_rows(
    ancestors_BNN: Tensor, positions_BN: Tensor, anchors_BA: Tensor | None, steps: int
) -> tuple[Tensor, Tensor]:
    """`rows_allowed` and positions of all rows for a decoding step, with few operations: (B, M, M) and (B, M).

    Every row is looked up at the node that it grows from, itself for a node.
    """
    batch, nodes, _ = ancestors_BNN.shape
    device = ancestors_BNN.device
    count = nodes if anchors_BA is None else anchors_BA.shape[1]
    offsets, own = _step_constants(nodes, count, steps, device)
    numbers = _step_numbers(nodes, steps, device)
    if anchors_BA is None:
        source = numbers.expand(batch, -1)
    else:
        source = torch.cat([numbers[:nodes].expand(batch, nodes), anchors_BA.repeat(1, steps)], dim=1)
    seen = ancestors_BNN.gather(1, source[:, :, None].expand(-1, -1, nodes))
    rows = torch.cat([seen, own.expand(batch, -1, -1)], dim=2)
    return rows, positions_BN.gather(1, source) + offsets


@cache  # graphs hold their addresses
def _step_constants(nodes: int, anchors: int, steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distance of each row from its node (M,), and who sees which pseudo state (M, kA)."""
    offsets = torch.arange(1, steps + 1, device=device).repeat_interleave(anchors)
    nothing = torch.zeros(nodes, steps * anchors, dtype=torch.bool, device=device)
    return torch.cat([offsets.new_zeros(nodes), offsets]), torch.cat([nothing, own_pseudo(steps, anchors, device)])


@cache  # graphs hold their addresses
def _step_numbers(nodes: int, steps: int, device: torch.device) -> Tensor:
    """(N(1 + k),) the node of every row where all nodes have pseudo states."""
    return torch.arange(nodes, device=device).repeat(1 + steps)


@lru_cache(maxsize=64)
def own_pseudo(steps: int, anchors: int, device: torch.device) -> Tensor:
    """(k*A, k*A) bool: pseudo state (i, a) sees (j, a) for j <= i."""
    order = torch.ones(steps, steps, dtype=torch.bool, device=device).tril()
    same = torch.eye(anchors, dtype=torch.bool, device=device)
    return (order[:, None, :, None] & same[None, :, None, :]).reshape(steps * anchors, steps * anchors)


def pseudo_positions(positions_BR: Tensor, anchors_BA: Tensor | None, steps: int) -> Tensor:
    """(B, k*A) positions of pseudo states: step i of an anchor at position n stands at n + i. None: every row."""
    anchor_positions = positions_BR if anchors_BA is None else positions_BR.gather(1, anchors_BA)
    offsets = torch.arange(1, steps + 1, device=positions_BR.device)
    return (anchor_positions[:, None, :] + offsets[None, :, None]).flatten(1)


@cache  # graphs hold their addresses
def mask_levels(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a mask adds where attention is allowed, and where it is not."""
    return torch.zeros((), dtype=dtype, device=device), torch.full(
        (), torch.finfo(dtype).min, dtype=dtype, device=device
    )


class StructuredRows(Protocol):
    """A mask that does its own attention."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
        """As the function `attend`."""
        ...


class Mask(Protocol):
    """Who sees whom in one forward, for each layer."""

    def at(self, window: int | None, rows: int) -> Tensor | TreeRows:
        """For a layer of `window` positions (None: all) at which the first `rows` rows are present."""
        ...


class AttentionMask:
    """Additive masks (B, 1, M, S) for each layer, made on first use: full attention, or cut to a sliding window.

    Args:
        allowed: (B, M, S) bool.
        query_positions: (B, M) positions of the rows, needed for windows only.
        key_positions: (B, S) positions of the columns, needed for windows only.
        dtype: the teacher's floating dtype. Masked entries hold its lowest finite value: -inf would turn a row that
            sees nothing into NaN.
    """

    def __init__(
        self,
        allowed: Tensor,
        dtype: torch.dtype,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
    ) -> None:
        self.allowed = allowed
        self.dtype = dtype
        self.query_positions = query_positions
        self.key_positions = key_positions
        self._additive: dict[int | None, Tensor] = {}

    def additive(self, window: int | None) -> Tensor:
        """(B, 1, M, S) additive mask for a layer that sees `window` positions back (None: all)."""
        if window not in self._additive:
            allowed = self.allowed
            if window is not None:
                assert self.query_positions is not None and self.key_positions is not None
                allowed = allowed & (self.query_positions[:, :, None] - self.key_positions[:, None, :] < window)
            self._additive[window] = torch.where(allowed, *mask_levels(self.dtype, allowed.device))[:, None]
        return self._additive[window]

    def at(self, window: int | None, rows: int) -> Tensor:
        """The additive mask of the first `rows` rows."""
        additive = self.additive(window)
        return additive if rows == additive.shape[2] else additive[:, :, :rows]


@dataclass(frozen=True)
class TreeRows:
    """What the attention kernel reads of a step's mask; the arguments of `tree_attention` of the same names."""

    lengths: Tensor
    bits: Tensor
    positions: Tensor
    scratch: int
    longest: int
    window: int | None

    def first(self, rows: int) -> TreeRows:
        """For a layer at which only the first rows are present. Contiguous, as the kernel reads it."""
        if rows == self.bits.shape[1]:
            return self
        bits, positions = self.bits[:, :rows].contiguous(), self.positions[:, :rows]
        if self.window is not None:  # else nothing reads them
            positions = positions.contiguous()
        return TreeRows(self.lengths, bits, positions, self.scratch, self.longest, self.window)


LayerMask = Tensor | TreeRows | StructuredRows | None  # what a layer may get; None: every row sees every slot


class StepMask:
    """The mask of a decoding step over a `KVCache`: M scratch rows in front of the committed prefix.

    Args:
        rows: (B, M, M) bool, who sees whom among the rows; every row sees the whole prefix.
        positions: (B, M). lengths: (B,) of the prefixes, on the device.
        slots: (S,) the numbers 0.. of the prefix slots in view. Not all of them are committed in every sequence,
            unless the caller knows so (`exact`).
        dtype: the teacher's. kernel: give layers what the attention kernel reads in place of a dense mask.
        bits: `row_bits` of the rows, where the caller has kept them.
    """

    def __init__(
        self,
        rows: Tensor,
        positions: Tensor,
        lengths: Tensor,
        slots: Tensor,
        dtype: torch.dtype,
        kernel: bool = False,
        exact: bool = False,
        bits: Tensor | None = None,
    ) -> None:
        self.rows, self.positions, self.lengths, self.slots = rows, positions, lengths, slots
        self.dtype, self.kernel, self.exact, self.bits = dtype, kernel, exact, bits
        self._made: dict[int | None, Tensor] = {}
        self._tree_rows: dict[tuple[int | None, int], TreeRows] = {}

    def at(self, window: int | None, rows: int) -> Tensor | TreeRows:
        """An additive mask (B, 1, rows, M + S), or the kernel's arguments."""
        if self.kernel:
            return self._first(window, rows)
        if window not in self._made:
            self._made[window] = self._additive(window)
        made = self._made[window]
        return made if rows == made.shape[2] else made[:, :, :rows]

    def _own(self, window: int | None) -> Tensor:
        if window is None:
            return self.rows
        return self.rows & (self.positions[:, :, None] - self.positions[:, None] < window)

    def _additive(self, window: int | None) -> Tensor:
        batch, count = self.positions.shape
        if self.exact and window is None:
            allowed = torch.nn.functional.pad(self.rows, (0, self.slots.shape[0]), value=True)
            return torch.where(allowed, *mask_levels(self.dtype, allowed.device))[:, None]
        committed = (self.slots < self.lengths[:, None])[:, None]
        if window is not None:
            committed = committed & (self.slots > self.positions[:, :, None] - window)
        allowed = torch.cat([self._own(window), committed.expand(batch, count, -1)], dim=2)
        return torch.where(allowed, *mask_levels(self.dtype, allowed.device))[:, None]

    def _first(self, window: int | None, rows: int) -> TreeRows:
        """The kernel's arguments for the first rows; made once a step, and not in every layer."""
        key, count = (window, rows), self.rows.shape[1]
        if key not in self._tree_rows:
            if rows == count:
                self._tree_rows[key] = self._whole(window)
            else:
                self._tree_rows[key] = self._first(window, count).first(rows)
        return self._tree_rows[key]

    def _whole(self, window: int | None) -> TreeRows:
        from firp_cli.teacher.triton_attention import row_bits

        bits = self.bits
        if bits is None or window is not None:
            bits = row_bits(self._own(window))
        return TreeRows(self.lengths, bits, self.positions, self.rows.shape[2], self.slots.shape[0], window)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: LayerMask, scaling: float | None = None) -> Tensor:
    """Attention of queries (B, Hq, M, D) over keys and values (B, Hk, S, D), Hq a multiple of Hk: (B, Hq, M, D).

    Args:
        mask: additive (B, 1, M, S), the kernel's arguments, one that does it all, or None where every row sees
            everything.
        scaling: of the scores; None: 1 / sqrt(D).
    """
    if isinstance(mask, TreeRows):
        from firp_cli.teacher.triton_attention import tree_attention

        return tree_attention(
            queries,
            keys,
            values,
            mask.lengths,
            mask.bits,
            scratch=mask.scratch,
            scaling=queries.shape[-1] ** -0.5 if scaling is None else scaling,
            longest=mask.longest,
            window=mask.window,
            positions=None if mask.window is None else mask.positions,
        )
    if not (mask is None or isinstance(mask, Tensor)):
        return mask.attend(queries, keys, values, scaling)
    grouped = queries.shape[1] != keys.shape[1]
    if grouped and mask is not None and queries.is_cuda:
        # with a mask and grouped heads CUDA has the plain kernel only, which holds all scores
        share = queries.shape[1] // keys.shape[1]
        keys, values, grouped = keys.repeat_interleave(share, 1), values.repeat_interleave(share, 1), False
    if grouped and queries.shape[2] == 1:  # heads that share keys as rows: they see the same slots, and are read once
        shape = queries.shape
        queries = queries.reshape(shape[0], keys.shape[1], -1, shape[3])
        return functional.scaled_dot_product_attention(queries, keys, values, mask, scale=scaling).view(shape)
    return functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=scaling, enable_gqa=grouped
    )


def choose_backend(name: str, device: torch.device) -> str:
    """`auto` takes the kernel on CUDA devices where Triton is installed, else torch. Raises TeacherError."""
    if name not in BACKENDS:
        raise TeacherError(f"unknown attention {name!r}: choose from {', '.join(BACKENDS)}")
    installed = importlib.util.find_spec("triton") is not None
    if name == "triton" and not installed:
        raise TeacherError("attention triton needs the package triton: pip install 'firp[triton]', or attention=sdpa")
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise TeacherError(f"attention triton runs on CUDA devices, the teacher is on {device}: use sdpa")
    if name == "auto":
        return "triton" if device.type == "cuda" and installed else "sdpa"
    return name
