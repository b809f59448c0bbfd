"""Attention over whole sequences under masks that are computed from positions: no tensor grows with the square of a
length.

Real rows have positions 0..T-1 and see themselves and earlier rows. Pseudo states see the real rows up to their anchor,
and the pseudo states of earlier steps of that anchor. `AttentionMask` over `causal_allowed` and `rows_allowed` is the
dense reference of both. Rows past a sequence's length see the padding before them here; their output is not used.

Shapes: B sequences, T real rows, A anchors, k steps, P = k*A pseudo states (all anchors' step 1, then step 2, ...), Hq
query heads, Hk key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from firp_cli.teacher.attention import attend
from firp_cli.teacher.masks import AttentionMask, mask_levels, rows_allowed

MASK_BUDGET = 1 << 24  # bytes of an additive mask; a larger one is made in chunks, in forward and backward pass
WINDOW_ROWS = 512  # rows of one attention call under a sliding window


class CausalRows:
    """Causal mask of rows 0..T-1: each sees itself and the `window` - 1 rows before it (None: all)."""

    def __init__(self, window: int | None) -> None:
        self.window = window

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
        """Attend with queries (B, Hq, T, D) to keys and values (B, Hk, T, D): (B, Hq, T, D)."""
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
    """Causal mask for `Teacher.run`, equal to an `AttentionMask` over `causal_allowed`."""

    def additive(self, window: int | None) -> CausalRows:
        return CausalRows(window)


class AnchorRows:
    """Mask of the pseudo states of the first `steps` steps of all, over the real rows and themselves."""

    def __init__(self, whole: AnchoredMask, steps: int, window: int | None) -> None:
        self.whole, self.steps, self.window = whole, steps, window
        self.anchors, self.rows = whole.anchors, whole.rows

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float | None) -> Tensor:
        """Attend with queries (B, Hq, P, D) to keys and values (B, Hk, T + P, D): (B, Hq, P, D)."""
        batch, width = self.anchors.shape
        total, present = self.whole.steps * width, self.steps * width
        row_bytes = batch * (self.rows + total) * queries.element_size()
        if total * row_bytes <= MASK_BUDGET:
            kept = self.whole.kept
            if self.window not in kept:
                kept[self.window] = self.mask(0, total, total, queries.dtype)
            mask = kept[self.window][:, :, :present, : self.rows + present]
            return attend(queries, keys, values, mask, scaling)
        size = max(1, MASK_BUDGET // row_bytes)

        def piece(part: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
            mask = self.mask(first, first + part.shape[2], present, part.dtype)
            return attend(part, keys, values, mask, scaling)

        pieces = [
            # autograd would keep the mask for the backward pass; the checkpoint makes it again there
            checkpoint(piece, part, keys, values, place * size, use_reentrant=False, preserve_rng_state=False)
            for place, part in enumerate(queries.split(size, dim=2))
        ]
        return torch.cat(pieces, dim=2)

    def mask(self, first: int, last: int, present: int, dtype: torch.dtype) -> Tensor:
        """Return the additive mask (B, 1, last - first, T + present) of pseudo states first..last-1."""
        device, width = self.anchors.device, self.anchors.shape[1]
        row = torch.arange(first, last, device=device)
        step, anchor = row // width, self.anchors[:, row % width, None]  # (M,), (B, M, 1); steps from 0
        real = torch.arange(self.rows, device=device)
        other = torch.arange(present, device=device)
        seen = real <= anchor
        own = (other % width == row[:, None] % width) & (other // width <= step[:, None])
        if not self.whole.earlier:
            own = other == row[:, None]
        if self.window is not None:
            seen = seen & (anchor + step[:, None] + 1 - real < self.window)
            own = own & (step[:, None] - other // width < self.window)
        allowed = torch.cat([seen, own.expand(len(anchor), -1, -1)], dim=2)
        return torch.where(allowed, *mask_levels(dtype, device))[:, None]


class AnchoredMask:
    """Masks for `forward_anchors`: sequences of `rows` real rows, with pseudo states of `steps` steps at `anchors`.

    Args:
        anchors: (B, A) the real rows that pseudo states grow from.
        earlier: pseudo states see those of earlier steps of their anchor, as in decoding.
    """

    def __init__(self, anchors: Tensor, rows: int, steps: int, earlier: bool = True) -> None:
        self.anchors, self.rows, self.steps, self.earlier = anchors, rows, steps, earlier
        self.kept: dict[int | None, Tensor] = {}  # small masks of all steps by window, shared by the layers

    def real(self, window: int | None) -> Tensor | CausalRows:
        """Return the mask of the real rows over themselves."""
        return CausalRows(window)

    def pseudo(self, window: int | None, steps: int) -> Tensor | AnchorRows:
        """Return the mask of the first `steps` steps' pseudo states over the real rows and themselves."""
        return AnchorRows(self, steps, window)


class DenseAnchoredMask(AnchoredMask):
    """The same masks as one additive matrix over all rows: the reference, and for layers without standard attention.

    Args:
        allowed: (B, T, T) bool: real row m sees real row j. positions: (B, T + P).
    """

    def __init__(
        self,
        allowed: Tensor,
        positions: Tensor,
        anchors: Tensor,
        steps: int,
        dtype: torch.dtype,
        earlier: bool = True,
    ) -> None:
        super().__init__(anchors, allowed.shape[1], steps, earlier)
        self._mask = AttentionMask(rows_allowed(allowed, anchors, steps, earlier), dtype, positions, positions)

    def real(self, window: int | None) -> Tensor:
        return self._mask.additive(window)[:, :, : self.rows, : self.rows]

    def pseudo(self, window: int | None, steps: int) -> Tensor:
        end = self.rows + steps * self.anchors.shape[1]
        return self._mask.additive(window)[:, :, self.rows : end, :end]
