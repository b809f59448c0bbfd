"""Products of the few rows of a decoding step with a frozen matrix on a CUDA device, as a Triton kernel.

Such a product takes the time of reading the matrix, and what stands around it (norm before, gate or residual behind)
takes as long as a launch: so one kernel does both. A row's sums run in one order however many rows there are, up to
`ROWS`, so that a token's logits do not depend on the tree that it stands in, which products of a library that chooses
its kernel by the number of rows do not give.

Shapes: M rows, K inputs, N outputs. Suffixes in the kernel: M rows, N outputs and K inputs of a block.
"""
# mypy: disable-error-code="no-untyped-def"
# (A kernel's parameters are pointers and blocks, which have no Python types.)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # at most
SHARED_BYTES = 96 << 10  # of a block, so that two share a multiprocessor
MOST_STAGES = 5


class Tiles(NamedTuple):
    """Sizes of a launch: outputs and inputs of a block, blocks that are fetched ahead, warps."""

    outputs: int
    inputs: int
    stages: int
    warps: int


@triton.jit(do_not_specialize=["rows"])
def _product(
    rows_ptr, weight_ptr, bias_ptr, norm_ptr, output_ptr, rows, row_stride, epsilon,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of outputs of one block of rows; grid (N blocks, M blocks). With GATED the matrix has 2 N rows."""
    out_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    real_M, real_N = row_M < rows, out_N < N
    in_K = tl.arange(0, BLOCK_K)
    at_MK = rows_ptr + row_M[:, None] * row_stride + in_K[None, :]
    at_NK = weight_ptr + out_N.to(tl.int64)[:, None] * K + in_K[None, :]
    sums_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    more_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares_M = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, K, BLOCK_K):
        wanted_K = (in_K < K - first) | (K % BLOCK_K == 0)  # known at compile time where blocks come out even
        rows_MK = tl.load(at_MK + first, mask=real_M[:, None] & wanted_K[None, :], other=0.0)
        weight_NK = tl.load(at_NK + first, mask=real_N[:, None] & wanted_K[None, :], other=0.0)
        kept = rows_MK.dtype
        if NORM:
            wide_MK = rows_MK.to(tl.float32)
            squares_M += tl.sum(wide_MK * wide_MK, 1)
            norm_K = tl.load(norm_ptr + first + in_K, mask=wanted_K, other=0.0).to(tl.float32)
            rows_MK = (wide_MK * norm_K[None, :]).to(kept)
        if UPCAST:
            rows_MK, weight_NK = rows_MK.to(tl.float32), weight_NK.to(tl.float32)
        sums_MN = tl.dot(rows_MK, tl.trans(weight_NK), sums_MN, input_precision="ieee")
        if GATED:
            up_NK = tl.load(at_NK + N * K + first, mask=real_N[:, None] & wanted_K[None, :], other=0.0)
            if UPCAST:
                up_NK = up_NK.to(tl.float32)
            more_MN = tl.dot(rows_MK, tl.trans(up_NK), more_MN, input_precision="ieee")
    if NORM:  # the norm's factor is a row's own: it may stand behind the sum
        scale_M = tl.rsqrt(squares_M / K + epsilon)
        sums_MN *= scale_M[:, None]
        more_MN *= scale_M[:, None]
    if BIAS:
        sums_MN += tl.load(bias_ptr + out_N, mask=real_N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            more_MN += tl.load(bias_ptr + N + out_N, mask=real_N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        sums_MN = sums_MN * tl.sigmoid(sums_MN) * more_MN
    at_MN = output_ptr + row_M[:, None] * N + out_N[None, :]
    real_MN = real_M[:, None] & real_N[None, :]
    if ADD:
        sums_MN += tl.load(at_MN, mask=real_MN, other=0.0).to(tl.float32)
    tl.store(at_MN, sums_MN.to(output_ptr.dtype.element_ty), mask=real_MN)


def choose(outputs: int, inputs: int, block: int, gated: bool) -> Tiles:
    """Tiles for a matrix (N, K), or two of them, and blocks of so many rows: enough of them for all multiprocessors,
    and as much of the matrix under way in each as its shared memory holds.
    """
    wide = 16 if outputs <= 8192 else 32
    deep = next(size for size in (256, 128, 64, 32) if size == 32 or inputs % size == 0)
    stage = 2 * deep * (block + wide * (2 if gated else 1))
    return Tiles(wide, deep, max(2, min(MOST_STAGES, SHARED_BYTES // stage)), 4)


def row_product(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
    onto: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """y = n(x) W^T + b for few rows x (..., K), one behind the other, of float16 or bfloat16; sums are float32.

    Args:
        weight: (N, K), contiguous; (2 N, K) if `gated`. bias: (N,), or (2 N,).
        norm: weight (K,) and epsilon of the RMS norm n, left out where None.
        gated: y = silu(first half) * second half of the products.
        onto: (..., N) contiguous rows that the product is added to, in place, and which are returned.
        dtype: of the result, the rows' by default.

    Returns (..., N).
    """
    inputs, outputs = weight.shape[1], len(weight) // (2 if gated else 1)
    assert rows.shape[-1] == inputs and weight.is_contiguous() and rows.dtype == weight.dtype
    flat = rows.reshape(-1, inputs)  # a copy where a step's rows do not lie one behind the other
    count = len(flat)
    assert flat.stride(1) == 1
    result = onto
    if result is None:
        result = rows.new_empty(*rows.shape[:-1], outputs, dtype=dtype or rows.dtype)
    assert result.is_contiguous() and result.shape[:-1] == rows.shape[:-1]
    block = max(16, min(ROWS, triton.next_power_of_2(count)))
    tiles = tiles or choose(outputs, inputs, block, gated)
    interpreted = not isinstance(_product, triton.JITFunction)  # numpy cannot multiply bfloat16
    scale, epsilon = norm or (weight, 0.0)
    with torch.cuda.device_of(rows):
        _product[triton.cdiv(outputs, tiles.outputs), triton.cdiv(count, block)](
            flat, weight, weight if bias is None else bias, scale, result, count, flat.stride(0), epsilon,
            outputs, inputs, block, tiles.outputs, tiles.inputs,
            bias is not None, norm is not None, gated, onto is not None, interpreted,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
    return result
