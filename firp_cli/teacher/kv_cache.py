"""Key/value caches that a decoder layer writes to and reads from.

A layer calls `update(keys, values, layer_index)` and attends to the keys and values returned.
Shapes: B sequences, H key/value heads, M rows of this forward, R scratch rows, S slots, D head size.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from firp_cli.teacher import cpu_kernels


class _Commit(ctypes.Structure):
    """Arguments of `firp_commit` (cpu_decoding.h)."""

    _fields_ = [
        *((name, c_int64) for name in ("items", "batch", "heads", "bytes", "first", "scratch", "capacity")),
        *((name, c_int64) for name in ("item_stride", "batch_stride", "head_stride", "path_stride")),
        *((name, c_void_p) for name in ("store", "path", "kept", "lengths")),
    ]


class KVCache:
    """Preallocated K/V of all layers: R scratch slots for the rows of a decoding step, then the committed tokens.

    Slot R + p of sequence b is position p; positions [0, lengths[b]) are committed. A step's rows are written to the
    last scratch slots, at any length of the sequences, and `commit` copies the accepted ones to the end of the prefix.
    So a step writes to fixed places, only accepted rows change the prefix, and nothing depends on numbers that only the
    device has. All tensors keep their place in memory; `select` moves sequences within it.

    Args:
        capacity: positions of the longest sequence. Lengths stop there, also where a finished sequence is decoded on.
        spread: rows that one commit may write past the capacity. kernel: commit by the Triton kernel.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        scratch: int,
        capacity: int,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
        spread: int = 1,
        kernel: bool = False,
    ) -> None:
        self.scratch, self.capacity = scratch, capacity
        slots = scratch + capacity + spread
        self._store = torch.zeros(layers, 2, batch, heads, slots, head_size, dtype=dtype, device=device)
        self._lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self._numbers = torch.arange(slots, device=device)
        self._sequences = torch.arange(batch, device=device)
        self._prefix_slots = self._numbers + scratch
        self._kernel = kernel
        self._packed: Any = None  # the CPU's kernel
        if device.type == "cpu" and cpu_kernels.missing() is None:
            self._packed = cpu_kernels.compiled().firp_commit
            self._packed.argtypes, self._packed.restype = [POINTER(_Commit), c_int], None
        self._arrived = torch.zeros(batch, dtype=torch.int32, device=device)  # of the kernel, zero between its calls
        self.use(batch)

    @staticmethod
    def bytes_needed(
        layers: int,
        batch: int,
        scratch: int,
        capacity: int,
        heads: int,
        head_size: int,
        dtype: torch.dtype,
        spread: int = 1,
    ) -> int:
        """Return the bytes of such a cache."""
        return layers * 2 * batch * heads * (scratch + capacity + spread) * head_size * dtype.itemsize

    def use(self, batch: int) -> None:
        """Start over with the first `batch` sequences, all empty."""
        self._narrow(batch)
        self.lengths.zero_()
        self._announce(self.scratch, self.scratch, 0, self.scratch)

    def _narrow(self, batch: int) -> None:
        self.batch = batch
        self.lengths = self._lengths[:batch]
        self._layers = [(keys[:batch], values[:batch]) for keys, values in self._store]

    def prefix_slots(self, longest: int) -> Tensor:
        """Return the numbers (longest,) of the first prefix slots, for masks."""
        return self._numbers[:longest]

    def begin(self, rows: int, longest: int) -> None:
        """Announce a decoding step of `rows` rows, of which layers may get the first only; `longest`: bound of lengths.

        `update` then returns the slots of all the rows, followed by `longest` slots of the prefix.
        """
        assert rows <= self.scratch and longest <= self.capacity, (rows, self.scratch, longest, self.capacity)
        self._announce(self.scratch - rows, self.scratch - rows, rows, self.scratch + longest)

    def begin_chunk(self, start: int, rows: int) -> None:
        """Announce a forward of the prompts' positions start..start + rows - 1, which are written to their own slots.
        `update` then returns the slots of the positions so far.
        """
        self._announce(self.scratch, self.scratch + start, rows, self.scratch + start + rows)

    def _announce(self, first: int, writes: int, rows: int, end: int) -> None:
        """Write rows to slots `writes`..; show layers slots first..end-1. Makes all layers' views in two calls."""
        self._first = first
        store = self._store[:, :, : self.batch]
        self._written = store.narrow(4, writes, rows).unbind()
        self._seen = store.narrow(4, first, end - first).unbind()

    def update(self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write (B, H, M, D) keys and values to the announced slots; return those in view, (B, H, S', D) of both."""
        written_keys, written_values = self.written(layer_index, keys.shape[2])
        written_keys.copy_(keys)
        written_values.copy_(values)
        return self.seen(layer_index)

    def written(self, layer_index: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return views (B, H, rows, D) of the slots announced for a layer's keys and values. A kernel that writes to
        them needs no `update`.
        """
        keys, values = self._written[layer_index].unbind()
        if rows != keys.shape[2]:  # a layer below the one where all of the step's rows are present
            keys, values = keys[:, :, :rows], values[:, :, :rows]
        return keys, values

    def seen(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """Return views (B, H, S', D) of the slots in view, of a layer's keys and values."""
        keys, values = self._seen[layer_index].unbind()
        return keys, values

    @property
    def layer_stride(self) -> int:
        """Elements from a layer's keys and values to the next layer's."""
        return self._store.stride(0)

    def commit(self, path_BP: Tensor, counts_B: Tensor) -> None:
        """Keep rows `path[b, :counts[b]]` of the last decoding step as the next committed tokens.

        Entries past a count may be any row: they may be copied to slots after the prefix.
        """
        batch, places = path_BP.shape
        if self._kernel:
            from firp_cli.teacher.triton_commit import commit_rows

            state = (self.lengths, self._arrived[:batch])
            commit_rows(self._store, path_BP, counts_B, *state, self._first, self.scratch, self.capacity)
            return
        if self._packed is not None and not cpu_kernels.watched():
            self._commit_packed(path_BP, counts_B)
            return
        store = self._store[:, :, :batch]
        if batch == places == 1 and self._first == self.scratch - 1:  # one row: there is only one path
            store.index_copy_(4, self.lengths + self.scratch, store.narrow(4, self._first, 1))
            self.set_lengths(self.lengths + counts_B)
            return
        rows = store.narrow(4, self._first, self.scratch - self._first)
        target = self.lengths[:, None] + self._prefix_slots[:places]
        if batch == 1:
            store.index_copy_(4, target[0], rows.index_select(4, path_BP[0]))
        else:
            layers, two, _, heads, _, size = store.shape
            shape = (layers, two, batch, heads, places, size)
            rows = rows.gather(4, path_BP[None, None, :, None, :, None].expand(shape))
            # by index: `scatter_` goes value by value on a CPU, hundreds of times slower in bfloat16
            store.permute(2, 4, 0, 1, 3, 5).index_put_(
                (self._sequences[:batch, None], target), rows.permute(2, 4, 0, 1, 3, 5)
            )
        self.set_lengths(self.lengths + counts_B)

    def _commit_packed(self, path_BP: Tensor, counts_B: Tensor) -> None:
        store, (batch, _) = self._store, path_BP.shape
        layers, two, _, heads, _, size = store.shape
        item = store.element_size()
        strides = [item * store.stride(dimension) for dimension in (1, 2, 3)]
        path, counts = path_BP.contiguous(), counts_B.contiguous()
        sizes = (layers * two, batch, heads, size * item, self._first, self.scratch, self.capacity)
        addresses = (part.data_ptr() for part in (store, path, counts, self.lengths))
        self._packed(_Commit(*sizes, *strides, path.stride(0), *addresses), torch.get_num_threads())

    def set_lengths(self, lengths_B: Tensor) -> None:
        """Commit the slots up to these lengths (B,)."""
        torch.clamp(lengths_B, max=self.capacity, out=self.lengths)

    def repeat(self, batch: int, length: int) -> None:
        """Go on with `batch` sequences that have the first `length` positions of the only one."""
        prefix = self._store.narrow(4, self.scratch, length)
        for keys, values in prefix:  # layer by layer: a copy is then one layer's
            keys[1:batch], values[1:batch] = keys[:1], values[:1]
        self._narrow(batch)

    @torch.no_grad()
    def fill(self, length: int) -> None:
        """Commit `length` random positions of every sequence, for timing, which does not depend on the values."""
        self._store.narrow(4, self.scratch, length).normal_()
        self.lengths.fill_(length)

    def select(self, sequences: Tensor) -> None:
        """Keep only these sequences (ascending places in the batch), moved to the front."""
        count = sequences.shape[0]
        for keys, values in self._store:  # layer by layer: the copy is then one layer's, not the whole cache's
            keys[:count] = keys[sequences]
            values[:count] = values[sequences]
        self._lengths[:count] = self._lengths[sequences]
        self._narrow(count)

    def adopt(self, places: Tensor, other: KVCache, length: int) -> None:
        """Copy the sequences of `other`, their first `length` positions, to `places` (n,) of this cache.

        The slots are zeroed first: a NaN after a new sequence's end would reach it, masked or not.
        """
        assert places.shape[0] == other.batch and length <= self.capacity
        for (keys, values), (old_keys, old_values) in zip(other._layers, self._layers, strict=True):
            for old, new in ((old_keys, keys), (old_values, values)):
                old.index_fill_(0, places, 0)
                old.narrow(2, self.scratch, length).index_copy_(0, places, new.narrow(2, other.scratch, length))
        self.lengths.index_copy_(0, places, other.lengths)

    def finite(self, sequence: int, length: int) -> bool:
        """Return True where the last layer's keys of the first `length` positions are finite: NaN in a state reaches
        them.
        """
        keys = self._layers[-1][0][sequence].narrow(1, self.scratch, min(length, self.capacity))
        return bool(keys.float().sum().isfinite())

    def bytes(self) -> int:
        """Return the bytes of the cache."""
        return self._store.numel() * self._store.element_size()


class SequenceCache:
    """K/V of one forward over whole sequences: frozen real rows first, then rows that attend to them with gradients.

    While `recording`, a layer's K/V are kept; afterwards `update` returns them followed by the new rows' K/V.
    """

    def __init__(self) -> None:
        self.recording = True
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values to attend to, as `KVCache.update`; arguments are (B, H, M, D)."""
        if self.recording:
            self._kept[layer_index] = (keys, values)
            return keys, values
        kept_keys, kept_values = self._kept[layer_index]  # not removed: a backward pass may run the layer again
        return torch.cat([kept_keys, keys], dim=2), torch.cat([kept_values, values], dim=2)
