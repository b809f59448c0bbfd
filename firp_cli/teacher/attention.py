"""Attention masks for real rows and pseudo states, built once per forward for every layer.

Shapes: B sequences, R real rows, A anchors, k steps, M = R + k*A rows, S cached K/V slots. Rows stand in the order
real rows, step-1 pseudo states of all anchors, step-2 pseudo states, ... so that the rows present at a layer are
always a prefix.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


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


def behind_prefix(rows_BMM: Tensor, lengths_B: Tensor, slots: int) -> Tensor:
    """(B, M, S) bool over cache slots: every row sees the committed prefix [0, length) and, behind it, what
    `rows_BMM` allows; row j's K/V stands in slot length + j. Slots behind the rows are never seen.
    """
    rows = rows_BMM.shape[1]
    relative_BS = torch.arange(slots, device=rows_BMM.device)[None, :] - lengths_B[:, None]
    index = relative_BS.clamp(0, rows - 1)[:, None, :].expand(-1, rows, -1)
    tail = rows_BMM.gather(2, index) & ((relative_BS >= 0) & (relative_BS < rows))[:, None, :]
    return tail | (relative_BS < 0)[:, None, :]


@lru_cache(maxsize=8)
def _levels(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a mask adds where attention is allowed, and where it is not."""
    return torch.zeros((), dtype=dtype, device=device), torch.full(
        (), torch.finfo(dtype).min, dtype=dtype, device=device
    )


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
            self._additive[window] = torch.where(allowed, *_levels(self.dtype, allowed.device))[:, None]
        return self._additive[window]
