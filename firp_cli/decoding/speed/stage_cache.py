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
        self.groups, self.batch, self.slots = list(groups), batch, slots + 1
        self._stores: list[Tensor | None] = [None] * len(self.groups)  # (layers, 2, n, B, S, H, D)
        self._places = {
            group.effective(stage, layer): (number, layer, stage - group.stages.start)
            for number, group in enumerate(self.groups)
            for stage in group.stages
            for layer in range(len(group.layers))
        }
        most = max(len(group.stages) for group in self.groups)
        self._first = torch.arange(most * batch, device=device) * self.slots  # first slot of each stage and sequence

    def begin_tick(self, positions: Tensor, view: int, first_stage: int = 0) -> None:
        """Announce a tick: `positions` (stages, B) from `first_stage` on, -1 where a stage is empty. `view`: slots that
        its masks cover.
        """
        slots = torch.where(positions < 0, self.slots - 1, positions).flatten()
        self._whole, self._view, self._written = True, view, []
        for group in self.groups:
            start, count = (group.stages.start - first_stage) * self.batch, len(group.stages) * self.batch
            self._written.append(slots[start : start + count] + self._first[:count])

    def begin_rows(self, positions: Tensor, view: int) -> None:
        """Announce a forward of rows (B, M) at `positions` through one layer after the other."""
        written = (positions + self._first[: self.batch, None]).flatten()
        self._whole, self._view, self._written = False, view, [written] * len(self.groups)

    def update(self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values at the announced positions and return the keys and values to attend to.

        A tick gives (n*B, H, 1, D) of all stages of a group, stage by stage, under the layer's number at the first
        stage, and gets (n*B, H, view, D). A forward of rows gives (B, H, M, D) of one effective layer and gets
        (B, H, view, D).
        """
        number, layer, stage = self._places[layer_index]
        store = self._stores[number]
        if store is None:
            group = self.groups[number]
            shape = len(group.layers), 2, len(group.stages), self.batch, self.slots, keys.shape[1], keys.shape[3]
            store = self._stores[number] = keys.new_zeros(shape)
        block = store[layer].flatten(1, 2) if self._whole else store[layer, :, stage]
        flat, index = block.flatten(1, 2), self._written[number]
        flat[0].index_copy_(0, index, keys.transpose(1, 2).flatten(0, 1))
        flat[1].index_copy_(0, index, values.transpose(1, 2).flatten(0, 1))
        seen = block[:, :, : self._view].transpose(2, 3)
        return seen[0], seen[1]

    def select(self, sequences: Tensor) -> None:
        """Keep only these sequences (indices into the batch)."""
        self._stores = [None if store is None else store.index_select(3, sequences) for store in self._stores]
        self.batch = sequences.shape[0]
