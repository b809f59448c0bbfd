"""Attention masks of real rows and pseudo states, built once per forward for all layers.

Shapes: B sequences, R real rows, A anchors, k draft steps, M = R + k*A rows, S cached K/V slots. The order of rows is
real rows, step-1 pseudo states of all anchors, step-2 pseudo states, ...: the rows present at a layer are always a
prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


def causal_allowed(lengths_B: Tensor, rows: int) -> Tensor:
    """Return (B, R, R) bool: a row sees itself and the earlier rows of its sequence.

    No other row sees a row past a length.
    """
    index = torch.arange(rows, device=lengths_B.device)
    causal = index[None, :] <= index[:, None]
    inside = index[None, :] < lengths_B[:, None]
    itself = torch.eye(rows, dtype=torch.bool, device=lengths_B.device)
    return (causal[None] & inside[:, None, :]) | itself[None]


def rows_allowed(real_BRR: Tensor, anchors_BA: Tensor | None, steps: int, earlier: bool = True) -> Tensor:
    """Return (B, M, M) bool over real rows and pseudo states (FIRP section 3: pseudo states see as their anchors).

    The pseudo state of step i and anchor a sees every real row that row `anchors[a]` sees, that row itself included,
    and the pseudo states of steps 1..i of the same anchor; without `earlier` only its own. Real rows never see pseudo
    states. `anchors_BA` None: every real row is an anchor.
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
    allowed[:, rows:, rows:] = own_pseudo(steps, anchors, real_BRR.device, earlier)
    return allowed


def step_rows(
    ancestors_BNN: Tensor, positions_BN: Tensor, anchors_BA: Tensor | None, steps: int
) -> tuple[Tensor, Tensor]:
    """Return `rows_allowed` and positions of all rows of a decoding step, in few operations: (B, M, M) and (B, M).

    Each row copies the mask of the node that it grows from; a node grows from itself.
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
    """Return the distance of each row from its node (M,), and the pseudo states that each row sees (M, kA)."""
    offsets = torch.arange(1, steps + 1, device=device).repeat_interleave(anchors)
    nothing = torch.zeros(nodes, steps * anchors, dtype=torch.bool, device=device)
    return torch.cat([offsets.new_zeros(nodes), offsets]), torch.cat([nothing, own_pseudo(steps, anchors, device)])


@cache  # graphs hold their addresses
def _step_numbers(nodes: int, steps: int, device: torch.device) -> Tensor:
    """Return the node of each row (N(1 + k),), where all nodes have pseudo states."""
    return torch.arange(nodes, device=device).repeat(1 + steps)


@lru_cache(maxsize=64)
def own_pseudo(steps: int, anchors: int, device: torch.device, earlier: bool = True) -> Tensor:
    """Return (k*A, k*A) bool: pseudo state (i, a) sees pseudo state (j, a) for j <= i; without `earlier` for j = i."""
    order = torch.ones(steps, steps, dtype=torch.bool, device=device).tril()
    order = order if earlier else order & order.T
    same = torch.eye(anchors, dtype=torch.bool, device=device)
    return (order[:, None, :, None] & same[None, :, None, :]).reshape(steps * anchors, steps * anchors)


def pseudo_positions(positions_BR: Tensor, anchors_BA: Tensor | None, steps: int) -> Tensor:
    """Return the positions (B, k*A) of pseudo states: n + i for step i of an anchor at position n. None: every row."""
    anchor_positions = positions_BR if anchors_BA is None else positions_BR.gather(1, anchors_BA)
    offsets = torch.arange(1, steps + 1, device=positions_BR.device)
    return (anchor_positions[:, None, :] + offsets[None, :, None]).flatten(1)


@cache  # graphs hold their addresses
def mask_levels(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the scalars that a mask adds to a score where attention is allowed, and where it is not."""
    return torch.zeros((), dtype=dtype, device=device), torch.full(
        (), torch.finfo(dtype).min, dtype=dtype, device=device
    )


class StructuredRows(Protocol):
    """A mask that attends by itself."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
        """Return the same as `firp_cli.teacher.attention.attend`."""
        ...


class Mask(Protocol):
    """Mask of one forward, for each layer."""

    def at(self, window: int | None, rows: int) -> Tensor | TreeRows:
        """Return the mask of a layer of `window` positions (None: all) at which the first `rows` rows are present."""
        ...


class AttentionMask:
    """Additive masks (B, 1, M, S), one per window size, made on first use.

    Args:
        allowed: (B, M, S) bool.
        query_positions: (B, M) positions of the rows, needed for windows only.
        key_positions: (B, S) positions of the columns, needed for windows only.
        dtype: the teacher's floating dtype. Masked entries are its lowest finite value: -inf would turn a row that
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
        """Return the additive mask (B, 1, M, S) of a layer that sees `window` positions back (None: all)."""
        if window not in self._additive:
            allowed = self.allowed
            if window is not None:
                assert self.query_positions is not None and self.key_positions is not None
                allowed = allowed & (self.query_positions[:, :, None] - self.key_positions[:, None, :] < window)
            self._additive[window] = torch.where(allowed, *mask_levels(self.dtype, allowed.device))[:, None]
        return self._additive[window]

    def at(self, window: int | None, rows: int) -> Tensor:
        """Return the additive mask of the first `rows` rows."""
        additive = self.additive(window)
        return additive if rows == additive.shape[2] else additive[:, :, :rows]


def step_mask(
    rows: Tensor,
    positions: Tensor,
    lengths: Tensor,
    slots: Tensor,
    dtype: torch.dtype,
    exact: bool = False,
    windowed: bool = True,
) -> AttentionMask:
    """Return the dense mask of a decoding step over a `KVCache`: M scratch rows before the committed prefix.

    Args:
        rows: (B, M, M) bool: row m sees row j. Every row sees the whole prefix.
        positions: (B, M). lengths: (B,) of the prefixes, on the device.
        slots: (S,) numbers 0.. of the prefix slots in view. `exact`: every sequence has committed all of them.
        windowed: some layer has a window.
    """
    if exact:
        allowed = functional.pad(rows, (0, slots.shape[0]), value=True)
    else:
        committed = (slots < lengths[:, None])[:, None]
        allowed = torch.cat([rows, committed.expand(*positions.shape, -1)], dim=2)
    if not windowed:
        return AttentionMask(allowed, dtype)
    keys = torch.cat([positions, slots.expand(len(positions), -1)], dim=1)
    return AttentionMask(allowed, dtype, positions, keys)


@cache  # graphs hold their addresses
def _bit_numbers(device: torch.device) -> Tensor:
    """Return the numbers of the bits of a word (32,)."""
    return torch.arange(32, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class TreeRows:
    """Mask of a layer in a decoding step as the attention kernel reads it: arguments of `tree_attention`."""

    lengths: Tensor
    bits: Tensor
    positions: Tensor
    scratch: int
    longest: int
    window: int | None


LayerMask = Tensor | TreeRows | StructuredRows | None  # a layer's argument; None: every row sees every slot


class KernelMask:
    """Mask of a decoding step for the attention kernel, each layer's arguments made once.

    Args:
        rows, positions, lengths: see `step_mask`. longest: bound of the lengths.
        bits: `row_bits` of the rows, where the caller has them already. It then needs no `rows`.
    """

    def __init__(
        self, rows: Tensor | None, positions: Tensor, lengths: Tensor, longest: int, bits: Tensor | None = None
    ) -> None:
        self._rows, self.positions, self.lengths, self.longest, self._bits = rows, positions, lengths, longest, bits
        self._made: dict[tuple[int | None, int], TreeRows] = {}

    def at(self, window: int | None, rows: int) -> TreeRows:
        """Return the kernel's arguments for the first `rows` rows."""
        if (window, rows) not in self._made:
            count = self.positions.shape[1]
            positions = self.positions[:, :rows]
            if rows == count:
                bits = self._whole(window)
            else:
                bits = self.at(window, count).bits[:, :rows].contiguous()
                if window is not None:  # the kernel reads positions only under a window
                    positions = positions.contiguous()
            self._made[window, rows] = TreeRows(self.lengths, bits, positions, count, self.longest, window)
        return self._made[window, rows]

    @property
    def rows(self) -> Tensor:
        """(B, M, M) bool: row m sees row j."""
        if self._rows is None:
            assert self._bits is not None
            bits = self._bits[..., None] >> _bit_numbers(self._bits.device)
            self._rows = (bits & 1).flatten(2)[:, :, : self.positions.shape[1]] != 0
        return self._rows

    def _whole(self, window: int | None) -> Tensor:
        from firp_cli.teacher.triton_attention import row_bits

        if window is None or window >= self.positions.shape[1]:  # what a row sees is less than M positions away
            return row_bits(self.rows) if self._bits is None else self._bits
        return row_bits(self.rows & (self.positions[:, :, None] - self.positions[:, None] < window))
