"""Attention over whole sequences whose mask follows from numbers: nothing of the square of a length is ever made.

Real rows stand at positions 0..T-1 and see themselves and what stands before them. Pseudo states see the real rows up
to their anchor and earlier pseudo states of that anchor. `AttentionMask` over `causal_allowed` and `rows_allowed` is
the dense reference of both. Rows past a sequence's length see the padding before them here; nobody reads them.

Shapes: B sequences, T real rows, A anchors, k steps, P = k*A pseudo states (all anchors' step 1, then step 2, ...), Hq
query heads, Hk key/value heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from firp_cli.teacher.attention import attend
from firp_cli.teacher.masks import AttentionMask, mask_levels, rows_allowed

if TYPE_CHECKING:
    pass

MASK_BUDGET = 1 << 24  # bytes of an additive mask; a larger one is made in pieces, in both passes
WINDOW_ROWS = 512  # rows of one call under a sliding window


class CausalRows:
    """Rows 0..T-1 of sequences, each of which sees itself and the `window` - 1 rows before it (None: all)."""

    def __init__(self, window: int | None) -> None:
        self.window = window

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
        """Queries (B, Hq, T, D) over keys and values (B, Hk, T, D): (B, Hq, T, D)."""
        rows, window = queries.shape[2], self.window
        if window is None or window >= rows:
            grouped = queries.shape[1] != keys.shape[1]
            return functional.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=scaling, enable_gqa=grouped
            )
        pieces = []
        for first in range(0, rows, WINDOW_ROWS):
            last, begin = min(rows, first + WINDOW_ROWS), max(0, first - window + 1)
            place = torch.arange(begin, last, device=queries.device)
            back = place[first - begin :, None] - place
            mask = torch.where((back >= 0) & (back < window), *mask_levels(queries.dtype, queries.device))
            part = queries[:, :, first:last]
            pieces.append(attend(part, keys[:, :, begin:last], values[:, :, begin:last], mask[None, None], scaling))
        return torch.cat(pieces, dim=2)


class CausalMask:
    """In place of an `AttentionMask` over `causal_allowed`, for `Teacher.run`."""

    def additive(self, window: int | None) -> CausalRows:
        return CausalRows(window)


class AnchorRows:
    """The first `steps` * A pseudo states: keys and values are T real rows, then these pseudo states.

    Args:
        anchors: (B, A) the real rows that they grow from.
        kept: where the additive mask of all steps is held for the other layers, by window, if it is small enough.
    """

    def __init__(
        self, anchors: Tensor, rows: int, steps: int, all_steps: int, window: int | None, kept: dict[int | None, Tensor]
    ) -> None:
        self.anchors, self.rows, self.steps, self.all_steps = anchors, rows, steps, all_steps
        self.window, self.kept = window, kept

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
        """Queries (B, Hq, P, D) over keys and values (B, Hk, T + P, D): (B, Hq, P, D)."""
        batch, width = self.anchors.shape
        everyone, present = self.all_steps * width, self.steps * width
        row_bytes = batch * (self.rows + everyone) * queries.element_size()
        if everyone * row_bytes <= MASK_BUDGET:
            if self.window not in self.kept:
                self.kept[self.window] = self.mask(0, everyone, everyone, queries.dtype)
            mask = self.kept[self.window][:, :, :present, : self.rows + present]
            return attend(queries, keys, values, mask, scaling)
        size = max(1, MASK_BUDGET // row_bytes)

        def piece(part: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
            mask = self.mask(first, first + part.shape[2], present, part.dtype)
            return attend(part, keys, values, mask, scaling)

        pieces = [
            # the mask would be kept for the backward pass: it is made again there
            checkpoint(piece, part, keys, values, place * size, use_reentrant=False, preserve_rng_state=False)
            for place, part in enumerate(queries.split(size, dim=2))
        ]
        return torch.cat(pieces, dim=2)

    def mask(self, first: int, last: int, present: int, dtype: torch.dtype) -> Tensor:
        """(B, 1, last - first, T + present) additive mask of pseudo states first..last-1."""
        device, width = self.anchors.device, self.anchors.shape[1]
        row = torch.arange(first, last, device=device)
        step, anchor = row // width, self.anchors[:, row % width, None]  # (M,), (B, M, 1); steps from 0
        real = torch.arange(self.rows, device=device)
        other = torch.arange(present, device=device)
        seen = real <= anchor
        own = (other % width == row[:, None] % width) & (other // width <= step[:, None])
        if self.window is not None:
            seen = seen & (anchor + step[:, None] + 1 - real < self.window)
            own = own & (step[:, None] - other // width < self.window)
        allowed = torch.cat([seen, own.expand(len(anchor), -1, -1)], dim=2)
        return torch.where(allowed, *mask_levels(dtype, device))[:, None]


class AnchoredMask:
    """Masks of `forward_anchors`: sequences of `rows` real rows, with pseudo states of `steps` steps at `anchors`."""

    def __init__(self, anchors: Tensor, rows: int, steps: int) -> None:
        self.anchors, self.rows, self.steps = anchors, rows, steps
        self._kept: dict[int | None, Tensor] = {}

    def real(self, window: int | None) -> Tensor | CausalRows:
        """Of the real rows among themselves."""
        return CausalRows(window)

    def pseudo(self, window: int | None, steps: int) -> Tensor | AnchorRows:
        """Of the pseudo states of the first `steps` steps over the real rows and themselves."""
        return AnchorRows(self.anchors, self.rows, steps, self.steps, window, self._kept)


class DenseAnchoredMask(AnchoredMask):
    """The same as one additive matrix over all rows: the reference, and the way for layers with attention of their own.

    Args:
        allowed: (B, T, T) who sees whom among the real rows. positions: (B, T + P).
    """

    def __init__(self, allowed: Tensor, positions: Tensor, anchors: Tensor, steps: int, dtype: torch.dtype) -> None:
        super().__init__(anchors, allowed.shape[1], steps)
        self._mask = AttentionMask(rows_allowed(allowed, anchors, steps), dtype, positions, positions)

    def real(self, window: int | None) -> Tensor:
        return self._mask.additive(window)[:, :, : self.rows, : self.rows]

    def pseudo(self, window: int | None, steps: int) -> Tensor:
        end = self.rows + steps * self.anchors.shape[1]
        return self._mask.additive(window)[:, :, self.rows : end, :end]
