"""Products of a decoding step's few rows with a layer's matrices on a CUDA device, as Triton kernels.

Such a product takes the time of reading its matrix, and each small operation around it takes as long as a launch. So
the products include the operations around them. `add_product` adds to the residual rows, multiplies them by the next
norm's weight and writes sums of their squares. `normed_product` reads these sums, multiplies its outputs by the norm's
factor (one number a row, so it may follow the product), and applies the gate of the feed-forward. A layer is then seven
kernels.

The order of a row's sums does not depend on the other rows, for up to 32 rows: a token's states do not depend on its
tree.

Rows and matrices are bfloat16 (or float16, where no row comes near its largest number); sums are float32.
Shapes: M rows, d hidden size, K inputs, N outputs, P parts of a row's sum of squares. Suffixes in the kernels: M rows,
N outputs, K inputs and P parts of a block.
"""
# mypy: disable-error-code="no-untyped-def"
# (A kernel's parameters are pointers and blocks, which have no Python types.)

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # most rows of a block
SHARED_BYTES = 208 << 10  # most shared memory of the blocks on a multiprocessor
RESERVED_BYTES = 16 << 10  # of a block's shared memory, for other needs than the blocks fetched ahead
MOST_STAGES = 6


class Tiles(NamedTuple):
    """Sizes of a launch: outputs and inputs of a block, blocks fetched ahead, warps."""

    outputs: int
    inputs: int
    stages: int
    warps: int


@dataclass
class Prepared:
    """Hidden rows between layers, prepared for the next norm.

    Attributes:
        hidden: (..., d) contiguous. norm: (d,) the weight of the next norm. scaled: (M, d) their product.
        squares: (M, P) float32 sums of the squares of parts of each row.
    """

    hidden: Tensor
    norm: Tensor
    scaled: Tensor
    squares: Tensor


@triton.jit
def _prepare(hidden_ptr, norm_ptr, scaled_ptr, squares_ptr, row_stride, D: tl.constexpr, BLOCK: tl.constexpr,
             PARTS: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    """Multiply a row by the norm's weight, and sum its squares into the first part; grid (M,)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < D
    hidden = tl.load(hidden_ptr + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + at, mask=inside, other=0.0).to(tl.float32)
    part = tl.arange(0, BLOCK_P)
    tl.store(squares_ptr + row * PARTS + part, tl.where(part == 0, tl.sum(hidden * hidden, 0), 0.0), mask=part < PARTS)
    tl.store(scaled_ptr + row * D + at, (hidden * norm).to(scaled_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _product(
    rows_ptr, weight_ptr, bias_ptr, squares_in_ptr, output_ptr, norm_ptr, scaled_ptr, squares_ptr, rows, epsilon,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BIAS: tl.constexpr, NORMED: tl.constexpr, GATED: tl.constexpr,
    PREPARED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute one block of outputs of one block of rows; grid (N blocks, M blocks).

    NORMED: normalise the rows; otherwise add to the output. GATED: the matrix has 2 N rows.
    """
    block = tl.program_id(0)
    out_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    row_M = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    real_M, real_N = row_M < rows, out_N < N
    in_K = tl.arange(0, BLOCK_K)
    at_MK = rows_ptr + row_M[:, None] * K + in_K[None, :]
    at_NK = weight_ptr + out_N.to(tl.int64)[:, None] * K + in_K[None, :]
    if NORMED:  # loaded now, used after the loop
        part_P = tl.arange(0, BLOCK_P)
        at_MP = squares_in_ptr + row_M[:, None] * PARTS + part_P[None, :]
        squares_MP = tl.load(at_MP, mask=real_M[:, None] & (part_P < PARTS)[None, :], other=0.0)
    sums_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    more_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        wanted_K = (in_K < K - first) | (K % BLOCK_K == 0)  # constant at compile time where K is a multiple of a block
        rows_MK = tl.load(at_MK + first, mask=real_M[:, None] & wanted_K[None, :], other=0.0)
        weight_NK = tl.load(at_NK + first, mask=real_N[:, None] & wanted_K[None, :], other=0.0)
        if UPCAST:
            rows_MK, weight_NK = rows_MK.to(tl.float32), weight_NK.to(tl.float32)
        sums_MN = tl.dot(rows_MK, tl.trans(weight_NK), sums_MN, input_precision="ieee")
        if GATED:
            up_NK = tl.load(at_NK + N * K + first, mask=real_N[:, None] & wanted_K[None, :], other=0.0)
            if UPCAST:
                up_NK = up_NK.to(tl.float32)
            more_MN = tl.dot(rows_MK, tl.trans(up_NK), more_MN, input_precision="ieee")
    if NORMED:
        scale_M = tl.rsqrt(tl.sum(squares_MP, 1) / K + epsilon)
        sums_MN *= scale_M[:, None]
        more_MN *= scale_M[:, None]
    if BIAS:
        sums_MN += tl.load(bias_ptr + out_N, mask=real_N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            more_MN += tl.load(bias_ptr + N + out_N, mask=real_N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        sums_MN = sums_MN * tl.sigmoid(sums_MN) * more_MN
    at_MN = row_M[:, None] * N + out_N[None, :]
    real_MN = real_M[:, None] & real_N[None, :]
    if not NORMED:
        sums_MN += tl.load(output_ptr + at_MN, mask=real_MN, other=0.0).to(tl.float32)
    kept_MN = sums_MN.to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + at_MN, kept_MN, mask=real_MN)
    if PREPARED:  # from the stored values: the norm is that of the rounded rows
        kept_MN = kept_MN.to(tl.float32)
        squares_M = tl.sum(kept_MN * kept_MN, 1)
        tl.store(squares_ptr + row_M * tl.num_programs(0) + block, squares_M, mask=real_M)
        norm_N = tl.load(norm_ptr + out_N, mask=real_N, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + at_MN, (kept_MN * norm_N[None, :]).to(scaled_ptr.dtype.element_ty), mask=real_MN)


def prepare(hidden: Tensor, norm: Tensor) -> Prepared:
    """Prepare rows (..., d), d contiguous, for a norm of weight (d,)."""
    size = hidden.shape[-1]
    flat = hidden.reshape(-1, size)
    scaled = flat.new_empty(flat.shape)
    parts = triton.cdiv(size, choose(size, size, row_block(len(flat)), False, _processors(flat.device)).outputs)
    squares = flat.new_empty(len(flat), parts, dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        _prepare[(len(flat),)](
            flat, norm, scaled, squares, flat.stride(0), size, triton.next_power_of_2(size), parts,
            triton.next_power_of_2(parts), num_warps=4,
        )  # fmt: skip
    return Prepared(hidden, norm, scaled, squares)


def normed_product(
    rows: Prepared,
    weight: Tensor,
    bias: Tensor | None,
    epsilon: float,
    gated: bool = False,
    tiles: Tiles | None = None,
) -> Tensor:
    """Return the product (..., N) of the rows' RMS norm with W (N, K), plus the bias (N,). `gated`: W is (2 N, K) and
    the result is silu(first half) * second half.
    """
    hidden, outputs = rows.hidden, len(weight) // (2 if gated else 1)
    result = hidden.new_empty(*hidden.shape[:-1], outputs)
    _launch(rows.scaled, weight, bias, result, tiles, squares=rows.squares, epsilon=epsilon, gated=gated)
    return result


def add_product(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: Tensor | None,
    tiles: Tiles | None = None,
) -> Prepared | None:
    """Add the product of rows (..., K) with W (d, K), and the bias (d,), to the residual rows (..., d) in place.

    Returns them prepared for the norm of weight (d,), or None without a norm.
    """
    size = len(weight)
    flat = rows.reshape(-1, rows.shape[-1])
    assert residual.is_contiguous() and residual.shape == (*rows.shape[:-1], size)
    prepared = None
    if norm is not None:
        tiles = tiles or choose(size, flat.shape[1], row_block(len(flat)), False, _processors(flat.device))
        squares = rows.new_empty(len(flat), triton.cdiv(size, tiles.outputs), dtype=torch.float32)
        prepared = Prepared(residual, norm, flat.new_empty(len(flat), size), squares)
    _launch(flat, weight, bias, residual, tiles, prepared=prepared)
    return prepared


def _launch(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    tiles: Tiles | None,
    *,
    squares: Tensor | None = None,
    epsilon: float = 0.0,
    gated: bool = False,
    prepared: Prepared | None = None,
) -> None:
    """Launch the product; with the squares of its rows, of their norm."""
    count, inputs = rows.shape
    outputs = len(weight) // (2 if gated else 1)
    assert weight.shape[1] == inputs and weight.is_contiguous() and rows.is_contiguous() and rows.dtype == weight.dtype
    block = row_block(count)
    tiles = tiles or choose(outputs, inputs, block, gated, _processors(rows.device))
    interpreted = not isinstance(_product, triton.JITFunction)  # numpy cannot multiply bfloat16
    parts = 1 if squares is None else squares.shape[1]
    following = (rows, rows, rows) if prepared is None else (prepared.norm, prepared.scaled, prepared.squares)
    with torch.cuda.device_of(rows):
        _product[triton.cdiv(outputs, tiles.outputs), triton.cdiv(count, block)](
            rows, weight, rows if bias is None else bias, rows if squares is None else squares, output, *following,
            count, epsilon, outputs, inputs, block, tiles.outputs, tiles.inputs, parts, triton.next_power_of_2(parts),
            bias is not None, squares is not None, gated, prepared is not None, interpreted,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip


def row_block(count: int) -> int:
    """Return the rows of a block, for `count` rows in all."""
    return max(16, min(ROWS, triton.next_power_of_2(count)))


class Processors(NamedTuple):
    """Multiprocessors of a device, and bytes of shared memory that a block may take."""

    number: int
    shared: int


@cache
def _processors(device: torch.device) -> Processors:
    if device.type != "cuda":  # interpreted or compiled alone: those of an H100
        return Processors(132, 227 << 10)
    index = torch.cuda.current_device() if device.index is None else device.index
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return Processors(properties["multiprocessor_count"], properties["max_shared_mem"])


def choose(outputs: int, inputs: int, block: int, gated: bool, processors: Processors) -> Tiles:
    """Return tiles for a matrix (N, K), or two of them if `gated`, and blocks of `block` rows: enough tiles for all
    multiprocessors, and as many bytes of the matrix in flight in each as its shared memory takes.

    Tiles of matrices with d 4096 were the fastest of those tried on an H100, those of small ones in whole steps on an
    H200 (scripts/NOTES.md, GPU).
    """
    warps = 4
    if outputs >= 4096 and inputs >= 4096:
        if gated:
            wide, deep, warps = (32, 128, 4) if block == 16 else (64, 128, 8)
        else:
            wide = 32 if triton.cdiv(outputs, 32) <= processors.number else 64
            deep = 256 if block == 16 and wide == 32 else 128
    else:
        wide, deep = (64, 64) if gated else (32, 128)
        wide = wide if outputs >= 4096 else 16
        while inputs % deep and deep > 32:
            deep //= 2
    alone = warps == 8 or triton.cdiv(outputs, wide) <= processors.number  # else two on a multiprocessor
    shared = min(SHARED_BYTES // (1 if alone else 2), processors.shared - RESERVED_BYTES)
    stage = 2 * deep * (block + wide * (2 if gated else 1))
    return Tiles(wide, deep, max(2, min(MOST_STAGES, shared // stage)), warps)
