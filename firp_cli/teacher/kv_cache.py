"""Key/value caches that a Hugging Face decoder layer writes to and reads from.

A layer calls `update(keys, values, layer_index)` and attends to what comes back; that is all it needs of a cache.
Shapes: B sequences, H key/value heads, M rows of this forward, S slots, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Preallocated K/V of all layers. Committed tokens of sequence b fill slots [0, lengths[b]); the rest is scratch.

    A forward of M rows writes to slots lengths[b] .. lengths[b] + M - 1 and commits nothing; `commit` then moves the
    rows that were accepted to the front of the scratch and lengthens the prefix. Lengths live on the device;
    `longest` is the host's upper bound, which only sizes the view.
    """

    def __init__(self, layers: int, batch: int, slots: int, device: torch.device) -> None:
        self.layers, self.slots = layers, slots
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.longest = 0
        self._store: Tensor | None = None  # (layers, 2, B, H, S, D), made when the first keys show H, D and dtype
        self._rows_BM = self.lengths[:, None]
        self._view = 0

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    def begin(self, rows: int) -> int:
        """Announce a forward of at most `rows` rows; returns the number of slots its masks must cover."""
        self._rows_BM = self.lengths[:, None] + torch.arange(rows, device=self.lengths.device)
        self._view = self.longest + rows
        assert self._view <= self.slots, f"{self._view} slots needed, {self.slots} allocated"
        return self._view

    def update(self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write (B, H, M, D) keys and values behind the prefix; return (B, H, view, D) of both."""
        if self._store is None:
            batch, heads, _rows, size = keys.shape
            self._store = keys.new_zeros(self.layers, 2, batch, heads, self.slots, size)
        store = self._store[layer_index]
        slots = self._rows_BM[:, : keys.shape[2]]
        if slots.shape[0] == 1:
            store[0].index_copy_(2, slots[0], keys)
            store[1].index_copy_(2, slots[0], values)
        else:
            index = slots[:, None, :, None].expand_as(keys)
            store[0].scatter_(2, index, keys)
            store[1].scatter_(2, index, values)
        return store[0, :, :, : self._view], store[1, :, :, : self._view]

    def commit(self, path_BP: Tensor, counts_B: Tensor) -> None:
        """Keep rows `path[b, :counts[b]]` (ascending row numbers of the last forward) as the next committed tokens.

        Entries past a count may be anything in range: what they copy stays behind the prefix. The caller raises
        `longest` once it has read the counts.
        """
        assert self._store is not None
        source = self.lengths[:, None] + path_BP
        target = self.lengths[:, None] + torch.arange(path_BP.shape[1], device=path_BP.device)
        if path_BP.shape[0] == 1:
            self._store.index_copy_(4, target[0], self._store.index_select(4, source[0]))
        else:
            layers, two, _, heads, _, size = self._store.shape
            shape = (layers, two, *path_BP.shape[:1], heads, path_BP.shape[1], size)
            source_index = source[None, None, :, None, :, None].expand(shape)
            target_index = target[None, None, :, None, :, None].expand(shape)
            self._store.scatter_(4, target_index, self._store.gather(4, source_index))
        self.lengths = self.lengths + counts_B

    def advance(self, counts_B: Tensor) -> None:
        """Commit the first `counts[b]` rows of the last forward where they stand (prefill)."""
        self.lengths = self.lengths + counts_B

    def select(self, sequences: Tensor) -> None:
        """Keep only these sequences (indices into the batch): finished ones leave."""
        self.lengths = self.lengths.index_select(0, sequences)
        if self._store is not None:
            self._store = self._store.index_select(2, sequences)

    def bytes(self) -> int:
        """Memory held, 0 before the first forward."""
        return 0 if self._store is None else self._store.numel() * self._store.element_size()


class SequenceCache:
    """K/V of one forward over whole sequences: frozen real rows first, then rows that attend to them with gradients.

    While `recording`, a layer's K/V are kept; afterwards `update` returns them with the new rows' K/V behind.
    """

    def __init__(self) -> None:
        self.recording = True
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Same contract as `KVCache.update`; keys and values are (B, H, M, D)."""
        if self.recording:
            self._kept[layer_index] = (keys, values)
            return keys, values
        kept_keys, kept_values = self._kept.pop(layer_index)
        return torch.cat([kept_keys, keys], dim=2), torch.cat([kept_values, values], dim=2)
