"""Attention of the few rows of a decoding step over a preallocated K/V cache, as Triton kernels (needs `triton`).

Split-K attention, known as Flash-Decoding (Dao, Haziza, Massa and Sizov, 2023): several programs share the keys of one
sequence and head, each writes a partial output and the logarithm of its softmax sum, and a second kernel combines them.
The lengths are read on the device, so that one captured CUDA graph serves every length. Tensors are on a CUDA device;
on the CPU, TRITON_INTERPRET=1 must be set before anything imports triton, as transformers does.

Shapes: B sequences, Hq query heads, Hk key/value heads, G = Hq / Hk, M query rows, R scratch slots, S slots in view,
D head size, W = ceil(R / 32). In the kernels the G * M query rows of one key/value head, the packed rows, share
programs, head fastest: packed row r is the step's row r // G in query head r % G of the group. Suffixes of names in the
kernels: M packed rows and N slots of a block, D the head size rounded up to a power of two, S splits, C a chunk of
splits.
"""
# mypy: disable-error-code="no-untyped-def"
# (A kernel's parameters are pointers and blocks, which have no Python types.)

from __future__ import annotations

from functools import cache, lru_cache
from math import e, log2
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_SPLITS = 128
MOST_ELEMENTS = 4096  # of a block of rows with four warps; larger blocks need eight to stay in registers
MANY_ROWS = 256  # packed rows from which blocks of eight warps are faster with large heads (scripts/NOTES.md, GPU)


class LaunchSizes(NamedTuple):
    """Sizes of a launch: `block_m` packed rows and `block_n` slots at a time; `tiles` * `splits` programs per head."""

    block_m: int
    block_n: int
    tiles: int
    splits: int


def head_block(size: int) -> int:
    """Return the head size of the kernels' blocks: a power of two, at least 16 as `tl.dot` requires."""
    return max(16, triton.next_power_of_2(size))


def launch_sizes(
    packed: int,
    scratch: int,
    prefix: int,
    size: int,
    itemsize: int,
    heads: int,
    multiprocessors: int,
    most_m: int | None = None,
) -> LaunchSizes:
    """Return tile sizes and grid: splits for two programs per multiprocessor, or one of 64 rows of 128, each with at
    least one block of slots.

    Args:
        packed: G * M rows of each key/value head.
        scratch, prefix: slots that a row may see: R, and at most this many committed ones.
        size: D, in elements of `itemsize` bytes.
        heads: B * Hk.
        most_m: most packed rows of a block, a power of two; None: what four warps hold, or eight if the rows are many.
    """
    width = head_block(size)
    # The largest blocks that ptxas fits into registers with almost no spilling (sm_80 and sm_90, 4 warps). Two blocks
    # of keys and values in flight then take at most 70 KB of shared memory.
    block_n = min(64, max(16, (8192 if itemsize <= 2 else 2048) // width))
    most_m = most_m or (64 if itemsize <= 2 and (width <= 64 or (width == 128 and packed >= MANY_ROWS)) else 32)
    block_m = min(most_m, max(16, triton.next_power_of_2(packed)))
    tiles = triton.cdiv(packed, block_m)
    blocks = triton.cdiv(scratch, block_n) + triton.cdiv(prefix, block_n)
    if block_m * width > MOST_ELEMENTS and width == 128:
        splits = max(1, multiprocessors // (heads * tiles))
    else:
        splits = triton.cdiv(2 * multiprocessors, heads * tiles)
    return LaunchSizes(block_m, block_n, tiles, min(splits, blocks, MAX_SPLITS))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def row_bits(allowed: Tensor) -> Tensor:
    """Pack (B, M, R) bool, row m sees row j, into (B, M, W) int32: bit j % 32 of word j // 32. A CUDA graph can
    capture it.
    """
    batch, rows, columns = allowed.shape
    words = triton.cdiv(columns, 32)
    padded = torch.nn.functional.pad(allowed, (0, words * 32 - columns)).view(batch, rows, words, 32)
    # No two terms share a bit, so the sum never carries. Bit 31 is the sign and wraps around in two's complement.
    return torch.where(padded, *_bits(allowed.device)).sum(-1, dtype=torch.int32)


@cache  # graphs hold their addresses
def _bits(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the values of bits 0 to 31 of a word (32,), and 0."""
    bits = torch.ones(32, dtype=torch.int32, device=device) << torch.arange(32, dtype=torch.int32, device=device)
    return bits, torch.zeros((), dtype=torch.int32, device=device)


@triton.jit
def _absorb(
    queries_MD, keys_ptr, values_ptr, key_stride, value_stride, slot_N, seen_N, allowed_MN, scale,
    output_MD, top_M, total_M, HEAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add a block's slots, read where `seen`, to the running output, maximum and sum. Exponents are base 2."""
    dims_D = tl.arange(0, queries_MD.shape[1])
    wanted_ND = seen_N[:, None] & (dims_D < HEAD)[None, :]
    at_N = slot_N.to(tl.int64)  # a slot times a stride may exceed 2**31
    keys_ND = tl.load(keys_ptr + (at_N * key_stride)[:, None] + dims_D[None, :], mask=wanted_ND, other=0.0)
    values_ND = tl.load(values_ptr + (at_N * value_stride)[:, None] + dims_D[None, :], mask=wanted_ND, other=0.0)
    if UPCAST:
        keys_ND = keys_ND.to(tl.float32)
        values_ND = values_ND.to(tl.float32)
    scores_MN = tl.dot(queries_MD, tl.trans(keys_ND), input_precision="ieee") * scale
    scores_MN = tl.where(allowed_MN, scores_MN, float("-inf"))
    new_top_M = tl.maximum(top_M, tl.max(scores_MN, 1))
    # For a row that has seen no slot yet: -inf minus -inf would be NaN.
    reference_M = tl.where(new_top_M == float("-inf"), 0.0, new_top_M)
    weights_MN = tl.exp2(scores_MN - reference_M[:, None])
    shrink_M = tl.exp2(top_M - reference_M)
    total_M = total_M * shrink_M + tl.sum(weights_MN, 1)
    output_MD = output_MD * shrink_M[:, None]
    output_MD += tl.dot(weights_MN.to(values_ND.dtype), values_ND, input_precision="ieee")
    return output_MD, new_top_M, total_M


@triton.jit
def _rows_allowed(bits_ptr, at_M, row_M, real_M, slot_N, scratch):
    """Return (M, N) bool, row sees scratch slot: by row `at` of the bits; every row sees its own slot."""
    words_MN = bits_ptr + (at_M * tl.cdiv(scratch, 32))[:, None] + (slot_N // 32)[None, :]
    words_MN = tl.load(words_MN, mask=real_M[:, None] & (slot_N < scratch)[None, :], other=0)
    set_MN = ((words_MN >> (slot_N % 32)[None, :]) & 1) != 0
    return (set_MN | (slot_N[None, :] == row_M[:, None])) & real_M[:, None]


@triton.jit
def _write_part(parts_ptr, log_sums_ptr, at_M, real_M, output_MD, top_M, total_M, HEAD: tl.constexpr):
    """Write a split's normalised output and log-sum to row `at`; for a row that saw no slot -inf and no output."""
    found_M = total_M != 0  # also true for NaN, which goes on to the output
    total_M = tl.where(found_M, total_M, 1.0)
    tl.store(log_sums_ptr + at_M, tl.where(found_M, top_M + tl.log2(total_M), float("-inf")), mask=real_M)
    dims_D = tl.arange(0, output_MD.shape[1])
    output_MD = (output_MD / total_M[:, None]).to(parts_ptr.dtype.element_ty)
    wanted_MD = (found_M & real_M)[:, None] & (dims_D < HEAD)[None, :]
    tl.store(parts_ptr + at_M[:, None] * HEAD + dims_D[None, :], output_MD, mask=wanted_MD)


@triton.jit(do_not_specialize=["rows", "scratch", "window"])
def _attend(
    queries_ptr, keys_ptr, values_ptr, lengths_ptr, bits_ptr, positions_ptr, parts_ptr, log_sums_ptr,
    query_strides, key_strides, value_strides, rows, scratch, window, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Attend with one tile of packed rows to one split of the slots that they see; grid (B * Hk, tiles, splits).

    The splits get runs of equally many blocks of the scratch and of the visible prefix, by the true length: a short
    prefix uses few splits, and the others read nothing.
    """
    sequence, head = tl.program_id(0).to(tl.int64) // HEADS, tl.program_id(0).to(tl.int64) % HEADS
    packed_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_M, query_head_M = packed_M // GROUP, head * GROUP + packed_M % GROUP
    real_M = row_M < rows
    at_M = sequence * rows + row_M
    dims_D = tl.arange(0, BLOCK_D)
    queries_M = queries_ptr + sequence * query_strides[0] + query_head_M * query_strides[1] + row_M * query_strides[2]
    wanted_MD = real_M[:, None] & (dims_D < HEAD)[None, :]
    queries_MD = tl.load(queries_M[:, None] + dims_D[None, :], mask=wanted_MD, other=0.0)
    if UPCAST:
        queries_MD = queries_MD.to(tl.float32)
    keys_ptr += sequence * key_strides[0] + head * key_strides[1]
    values_ptr += sequence * value_strides[0] + head * value_strides[1]

    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    start = 0
    if WINDOWED:
        first_seen_M = tl.load(positions_ptr + at_M, mask=real_M, other=2**30).to(tl.int32) - window + 1
        start = tl.maximum(tl.min(first_seen_M, 0), 0)
    scratch_blocks = tl.cdiv(scratch, BLOCK_N)
    blocks = scratch_blocks + tl.cdiv(tl.maximum(length - start, 0), BLOCK_N)
    run = tl.cdiv(blocks, tl.num_programs(2))
    first = tl.program_id(2) * run
    last = tl.minimum(first + run, blocks)
    output_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top_M, total_M = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for block in range(first, tl.minimum(last, scratch_blocks)):
        slot_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
        allowed_MN = _rows_allowed(bits_ptr, at_M, row_M, real_M, slot_N, scratch)
        seen_N = tl.max(allowed_MN.to(tl.int32), 0) != 0  # slots that no row sees may be NaN, and 0 * NaN is NaN
        output_MD, top_M, total_M = _absorb(
            queries_MD, keys_ptr, values_ptr, key_strides[2], value_strides[2], slot_N, seen_N, allowed_MN, scale,
            output_MD, top_M, total_M, HEAD, UPCAST,
        )  # fmt: skip
    for block in range(tl.maximum(first, scratch_blocks), last):
        position_N = start + (block - scratch_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        seen_N = position_N < length
        allowed_MN = seen_N[None, :]
        if WINDOWED:
            allowed_MN = allowed_MN & (position_N[None, :] >= first_seen_M[:, None])
        output_MD, top_M, total_M = _absorb(
            queries_MD, keys_ptr, values_ptr, key_strides[2], value_strides[2], scratch + position_N, seen_N,
            allowed_MN, scale, output_MD, top_M, total_M, HEAD, UPCAST,
        )  # fmt: skip
    # Partial outputs have the output's layout, (B, M, Hq, D), one after another.
    part = tl.program_id(2).to(tl.int64) * (tl.num_programs(0) * GROUP * rows)
    at_M = part + at_M * (HEADS * GROUP) + query_head_M
    _write_part(parts_ptr, log_sums_ptr, at_M, real_M, output_MD, top_M, total_M, HEAD)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    parts_ptr, log_sums_ptr, output_ptr, splits,
    HEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr = 16,
):  # fmt: skip
    """Add the splits' outputs of one row and head, weighted by their softmax sums; grid (B * M * Hq,)."""
    at = tl.program_id(0).to(tl.int64)
    stride = tl.num_programs(0)
    split_S = tl.arange(0, BLOCK_S)
    log_sum_S = tl.load(log_sums_ptr + split_S * stride + at, mask=split_S < splits, other=float("-inf"))
    top = tl.max(log_sum_S, 0)  # finite: every row sees itself
    total = tl.sum(tl.exp2(log_sum_S - top), 0)
    dims_D = tl.arange(0, BLOCK_D)
    output_D = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, splits, CHUNK):
        split_C = first + tl.arange(0, CHUNK)
        at_C = split_C.to(tl.int64) * stride + at
        weight_C = tl.exp2(tl.load(log_sums_ptr + at_C, mask=split_C < splits, other=float("-inf")) - top)
        # not masked by the weights, so that it does not wait for them; a split that saw no slot has written nothing
        wanted_CD = (split_C < splits)[:, None] & (dims_D < HEAD)[None, :]
        parts_CD = tl.load(parts_ptr + at_C[:, None] * HEAD + dims_D[None, :], mask=wanted_CD, other=0.0)
        output_D += tl.sum(tl.where((weight_C > 0)[:, None], weight_C[:, None] * parts_CD, 0.0), 0)
    output_D = (output_D / total).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + at * HEAD + dims_D, output_D, mask=dims_D < HEAD)


def tree_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    bits: Tensor,
    *,
    scratch: int,
    scaling: float,
    longest: int,
    window: int | None = None,
    positions: Tensor | None = None,
    splits: int | None = None,
    most_m: int | None = None,
) -> Tensor:
    """Softmax attention of a step's rows over each other and over the committed prefix (Flash-Decoding): (B, Hq, M, D)
    in the queries' dtype, whose `.transpose(1, 2)` is contiguous.

    Slots [0, R) contain the K/V of this step's rows, row j in slot j; slots [R, R + length_b) the committed prefix of
    sequence b, position p in slot R + p. Others, and scratch that no row sees, are never read. Nothing waits for the
    device. Before a CUDA graph captures it, call it once with the same shapes, so that Triton compiles.

    Args:
        queries: (B, Hq, M, D) float32, float16 or bfloat16, M <= R; any strides, D contiguous.
        keys, values: (B, Hk, S, D) of the same dtype, Hk dividing Hq; any strides, D contiguous.
        lengths: (B,) integers on the device, at most S - R.
        bits: (B, M, W) int32 from `row_bits`: the rows that a row sees. A row always sees itself.
        scratch: R. scaling: factor of the scores, usually D ** -0.5.
        longest: the host's upper bound of the lengths. Chooses the number of splits and nothing else.
        window: a row sees only the prefix positions p with position - p < window; None: the whole prefix.
        positions: (B, M) integer positions of the rows, needed with a window.
        splits: number of splits, instead of that of `launch_sizes`. most_m: see there.
    """
    batch, query_heads, rows, size = queries.shape
    heads, group = keys.shape[1], query_heads // keys.shape[1]
    assert keys.shape == values.shape and (keys.shape[0], keys.shape[3]) == (batch, size) and query_heads % heads == 0
    assert queries.stride(3) == keys.stride(3) == values.stride(3) == 1 and queries.dtype == keys.dtype == values.dtype
    assert rows <= scratch and bits.shape == (batch, rows, triton.cdiv(scratch, 32)) and bits.dtype == torch.int32
    assert window is None or positions is not None, "a window needs the rows' positions"
    prefix, processors = longest if window is None else min(longest, window), _multiprocessors(queries.device)
    packed, itemsize, width = group * rows, queries.element_size(), head_block(size)
    chosen = launch_sizes(packed, scratch, prefix, size, itemsize, batch * heads, processors, most_m)
    splits, warps = splits or chosen.splits, max(1, width // 128)
    output = queries.new_empty(batch, rows, query_heads, size)
    parts = output if splits == 1 else output.new_empty(splits, *output.shape, dtype=torch.float32)
    log_sums = output.new_empty(parts.shape[:-1], dtype=torch.float32)
    row_data = (bits.contiguous(), lengths if positions is None else positions.contiguous())
    interpreted = not isinstance(_attend, triton.JITFunction)  # numpy cannot multiply bfloat16
    with torch.cuda.device_of(queries):
        _attend[batch * heads, chosen.tiles, splits](
            queries, keys, values, lengths.contiguous(), *row_data, parts, log_sums,
            queries.stride()[:3], keys.stride()[:3], values.stride()[:3], rows, scratch, window or 0, scaling * log2(e),
            heads, group, size, width, chosen.block_m, chosen.block_n, window is not None, interpreted,
            num_warps=4 if chosen.block_m * width <= MOST_ELEMENTS else 8, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            _combine[(batch * rows * query_heads,)](
                parts, log_sums, output, splits, size, width, triton.next_power_of_2(splits), num_warps=warps
            )
    return output.transpose(1, 2)
