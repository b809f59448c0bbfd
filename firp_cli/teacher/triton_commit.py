"""Commit of a decoding step's accepted rows to the prefix of a K/V cache, as one Triton kernel (needs `triton`).

It copies the rows of all layers, keys, values and heads and advances the lengths, so every program must have read its
sequence's length before one of them writes it: the programs of a sequence count themselves, and the last one writes.
Like the kernels of teacher/triton_attention.py it runs on a CUDA device, can be captured in a CUDA graph after one call
with the same dimensions, and is interpreted on the CPU if TRITON_INTERPRET=1.

Shapes: L layers, B sequences, H key/value heads, S slots, D head size, P places of a path. In the kernel suffix P is a
block of places and D the head size rounded up to a power of two.
"""
# mypy: disable-error-code="no-untyped-def"
# (A kernel's parameters are pointers and blocks, which have no Python types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PLACES_BLOCK = 8  # rows that are copied at once: few paths are longer


@triton.jit(do_not_specialize=["path_stride", "place_stride", "first", "scratch", "capacity"])
def _commit(
    store_ptr, path_ptr, counts_ptr, lengths_ptr, arrived_ptr, pair_stride, sequence_stride, head_stride,
    path_stride, place_stride, first, scratch, capacity,
    HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy one head's accepted rows, of one layer's keys or values and one sequence; grid (L * 2 * H, B)."""
    pair = (tl.program_id(0) // HEADS).to(tl.int64)
    head = (tl.program_id(0) % HEADS).to(tl.int64)  # a head times a stride may exceed 2**31
    sequence = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths_ptr + sequence)
    count = tl.load(counts_ptr + sequence)

    store_ptr += pair * pair_stride + sequence * sequence_stride + head * head_stride
    dims_D = tl.arange(0, BLOCK_D)
    for start in range(0, count, BLOCK_P):
        place_P = start + tl.arange(0, BLOCK_P)
        kept_P = place_P < count
        row_P = tl.load(path_ptr + sequence * path_stride + place_P * place_stride, mask=kept_P, other=0)
        kept_PD = kept_P[:, None] & (dims_D < HEAD)[None, :]
        source_PD = (first + row_P)[:, None] * HEAD + dims_D[None, :]
        target_PD = (scratch + length + place_P)[:, None] * HEAD + dims_D[None, :]
        # The rows are in scratch slots, the places in the prefix: no program writes what another one reads.
        tl.store(store_ptr + target_PD, tl.load(store_ptr + source_PD, mask=kept_PD), mask=kept_PD)

    tl.debug_barrier()  # all threads have read the length before one of them says so
    arrived = tl.atomic_add(arrived_ptr + sequence, 1)  # acquires and releases: the last program comes after all reads
    if arrived == tl.num_programs(0) - 1:
        tl.store(lengths_ptr + sequence, tl.minimum(length + count, capacity))
        tl.store(arrived_ptr + sequence, 0)


def commit_rows(
    store: Tensor,
    path: Tensor,
    counts: Tensor,
    lengths: Tensor,
    arrived: Tensor,
    first: int,
    scratch: int,
    capacity: int,
) -> None:
    """Copy rows `path[b, :counts[b]]` to the end of every sequence's prefix, and add the counts to the lengths.

    Args:
        store: (L, 2, B' >= B, H, S, D), contiguous, written. Row r is in slot `first` + r, below `scratch`; position p
            in slot `scratch` + p.
        path: (B, P) long. counts: (B,) long, at most P. lengths: (B,) long, written: at most `capacity` after it.
        arrived: (B,) int32, all zero before and after.
    """
    layers, two, _, heads, _, size = store.shape
    assert store.is_contiguous() and counts.is_contiguous() and lengths.is_contiguous() and arrived.is_contiguous()
    assert path.shape[0] == counts.shape[0] == lengths.shape[0] == arrived.shape[0] <= store.shape[2]
    with torch.cuda.device_of(store):
        _commit[layers * two * heads, path.shape[0]](
            store, path, counts, lengths, arrived, *store.stride()[1:4], *path.stride(), first, scratch, capacity,
            heads, size, PLACES_BLOCK, triton.next_power_of_2(size), num_warps=1,
        )  # fmt: skip
