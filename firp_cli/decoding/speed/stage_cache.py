"""K/V cache of a pipeline: kept per effective layer, with the stage as part of the batch dimension.

A tick runs a group's layers once for the tokens at all of its stages; each stage has its own K/V. Slot p of a sequence
holds position p, and a row sees only slots up to its own position. A flushed token's K/V lies after all positions that
read it until the token that replaces it overwrites it, so no K/V is rolled back.
Shapes: B sequences, H key/value heads, M rows, n stages, S slots, D head size, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from firp_cli.teacher.looped import LayerGroup


class StageCache:
    """Preallocated K/V of the layers in `groups`. The last slot takes the writes of rows that hold no token."""

    def __init__(self, groups: Sequence[LayerGroup], batch: int, slots: int, device: torch.device) -> None:
        self.groups, self.batch, self.slots, self.device = list(groups), batch, slots + 1, device
        self._stores: list[Tensor | None] = [None] * len(self.groups)  # (layers, 2, n, B, S, H, D)
        self._places = {
            group.effective(stage, layer): (number, layer, stage - group.stages.start)
            for number, group in enumerate(self.groups)
            for stage in group.stages
            for layer in range(len(group.layers))
        }
        self._tick: list[Tensor] | None = None
        self._offsets = self._row_offsets()
        self._rows = torch.empty(0, dtype=torch.long, device=device)
        self._view = 0

    def begin_tick(self, positions: Tensor, view: int, first_stage: int = 0) -> None:
        """Announce a tick: `positions` (stages, B) from `first_stage` on, -1 where a stage is empty. `view`: slots that
        its masks cover.
        """
        slots = torch.where(positions < 0, self.slots - 1, positions)
        self._tick = []
        for group, offsets in zip(self.groups, self._offsets, strict=True):
            first = group.stages.start - first_stage
            self._tick.append((slots[first : first + len(group.stages)] + offsets).flatten())
        self._view = view

    def _row_offsets(self) -> list[Tensor]:
        """Return the first slot of each stage and sequence in a group's store (n, B)."""
        counts = [len(group.stages) for group in self.groups]
        return [
            (torch.arange(count * self.batch, device=self.device) * self.slots).view(count, self.batch)
            for count in counts
        ]

    def begin_rows(self, positions: Tensor, view: int) -> None:
        """Announce a forward of rows (B, M) at `positions` through one layer after the other."""
        row = torch.arange(self.batch, device=self.device)[:, None] * self.slots
        self._rows, self._tick, self._view = (positions + row).flatten(), None, view

    def update(self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values at the announced positions and return the keys and values to attend to.

        A tick gives (n*B, H, 1, D) of all stages of a group, stage by stage, under the layer's number at the first
        stage, and gets (n*B, H, view, D). A forward of rows gives (B, H, M, D) of one effective layer and gets
        (B, H, view, D).
        """
        number, layer, stage = self._places[layer_index]
        store = self._stores[number]
        if store is None:
            store = self._stores[number] = self._allocate(number, keys)
        if self._tick is None:
            block, index = store[layer, :, stage], self._rows
        else:
            block, index = store[layer].flatten(1, 2), self._tick[number]
        flat = block.flatten(1, 2)
        flat[0].index_copy_(0, index, keys.transpose(1, 2).flatten(0, 1))
        flat[1].index_copy_(0, index, values.transpose(1, 2).flatten(0, 1))
        seen = block[:, :, : self._view].transpose(2, 3)
        return seen[0], seen[1]

    def _allocate(self, number: int, keys: Tensor) -> Tensor:
        group = self.groups[number]
        _, heads, _, size = keys.shape
        return keys.new_zeros(len(group.layers), 2, len(group.stages), self.batch, self.slots, heads, size)

    def select(self, sequences: Tensor) -> None:
        """Keep only these sequences (indices into the batch)."""
        self._stores = [None if store is None else store.index_select(3, sequences) for store in self._stores]
        self.batch = sequences.shape[0]
        self._offsets = self._row_offsets()
