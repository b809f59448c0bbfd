"""Position embeddings as a table, for steps that look up many positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


class RotaryTable:
    """Position embeddings of the first positions, from one look-up. Positions after them get the last ones.

    Args:
        parts: embeddings of positions 0.. as `Teacher.rotary` returns them, (1, count, ..., D) each.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._joined = torch.cat([part[0].flatten(1) for part in parts], dim=-1)
        self._parts, self._shape = len(parts), parts[0].shape[2:-1]
        self.last = len(self._joined) - 1

    def __call__(self, positions: Tensor, most: int) -> list[Tensor]:
        """Return the embeddings (B, R, ..., D) of positions (B, R), none above `most`."""
        if most > self.last:
            positions = positions.clamp(max=self.last)
        looked_up = functional.embedding(positions, self._joined).view(*positions.shape, *self._shape, -1)
        return list(looked_up.chunk(self._parts, dim=-1))
