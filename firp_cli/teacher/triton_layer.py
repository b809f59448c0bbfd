"""Operations of a decoding step in a layer between its products and its attention, as two Triton kernels.

`rotate_and_write` normalises and rotates a step's queries and keys, and writes keys and values to the cache's slots;
`silu_product` is the gated feed-forward's activation. Both replace sequences of small operations, whose launches take
longer than their work. Like the kernels of teacher/triton_attention.py they run on a CUDA device, can be captured in a
CUDA graph after one call with the same shapes, and are interpreted on the CPU if TRITON_INTERPRET=1.

Shapes: B sequences, R rows, d hidden size, Hq query heads, Hk key/value heads, D head size, f feed-forward size. In the
kernels suffix D is half a head and C a part of a hidden row, both rounded up to a power of two. Arithmetic is float32.
"""
# mypy: disable-error-code="no-untyped-def"
# (A kernel's parameters are pointers and blocks, which have no Python types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HeadNorm = tuple[Tensor, float]  # an RMS norm of each head: weight (D,) and epsilon

FEATURES_BLOCK = 512  # of one program of `silu_product`


@triton.jit
def _rotate(
    first_D, second_D, weight_ptr, epsilon, cosine_ptr, sine_ptr, dims_D, inside_D,
    HEAD: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate a head, given and returned as its halves. The sine's first half is negated."""
    HALF: tl.constexpr = HEAD // 2
    if NORMED:
        mean = (tl.sum(first_D * first_D, 0) + tl.sum(second_D * second_D, 0)) / HEAD
        scale = tl.rsqrt(mean + epsilon)
        first_D = first_D * scale * tl.load(weight_ptr + dims_D, mask=inside_D, other=0.0).to(tl.float32)
        second_D = second_D * scale * tl.load(weight_ptr + HALF + dims_D, mask=inside_D, other=0.0).to(tl.float32)
    first_cosine_D = tl.load(cosine_ptr + dims_D, mask=inside_D, other=0.0).to(tl.float32)
    second_cosine_D = tl.load(cosine_ptr + HALF + dims_D, mask=inside_D, other=0.0).to(tl.float32)
    first_sine_D = tl.load(sine_ptr + dims_D, mask=inside_D, other=0.0).to(tl.float32)
    second_sine_D = tl.load(sine_ptr + HALF + dims_D, mask=inside_D, other=0.0).to(tl.float32)
    return (
        first_D * first_cosine_D + second_D * first_sine_D,
        second_D * second_cosine_D + first_D * second_sine_D,
    )


@triton.jit
def _write_head(target_ptr, first_D, second_D, dims_D, inside_D, HEAD: tl.constexpr):
    """Write the halves of a head."""
    tl.store(target_ptr + dims_D, first_D.to(target_ptr.dtype.element_ty), mask=inside_D)
    tl.store(target_ptr + HEAD // 2 + dims_D, second_D.to(target_ptr.dtype.element_ty), mask=inside_D)


@triton.jit(do_not_specialize=["rows"])
def _rotate_and_write(
    joined_ptr, query_weight_ptr, key_weight_ptr, query_epsilon, key_epsilon, cosine_ptr, sine_ptr, hidden_ptr,
    queries_ptr, keys_ptr, values_ptr, copy_ptr, cosine_strides, sine_strides, hidden_strides, key_strides,
    value_strides, rows, QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    NORMED: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Process one head of one row, and copy a part of its hidden row; grid (B * R, Hq + 2 Hk)."""
    at = tl.program_id(0).to(tl.int64)
    sequence = at // rows
    row = at % rows
    head = tl.program_id(1)

    part_C = head * BLOCK_C + tl.arange(0, BLOCK_C)
    hidden_ptr += sequence * hidden_strides[0] + row * hidden_strides[1]
    hidden_C = tl.load(hidden_ptr + part_C, mask=part_C < HIDDEN, other=0.0)

    dims_D = tl.arange(0, BLOCK_D)
    inside_D = dims_D < HEAD // 2
    joined_ptr += (at * (QUERY_HEADS + 2 * KEY_HEADS) + head) * HEAD
    first_D = tl.load(joined_ptr + dims_D, mask=inside_D, other=0.0).to(tl.float32)
    second_D = tl.load(joined_ptr + HEAD // 2 + dims_D, mask=inside_D, other=0.0).to(tl.float32)
    cosine_ptr += sequence * cosine_strides[0] + row * cosine_strides[1]
    sine_ptr += sequence * sine_strides[0] + row * sine_strides[1]
    if head < QUERY_HEADS:
        first_D, second_D = _rotate(
            first_D, second_D, query_weight_ptr, query_epsilon, cosine_ptr, sine_ptr, dims_D, inside_D, HEAD, NORMED
        )
        queries_ptr += (at * QUERY_HEADS + head) * HEAD
        _write_head(queries_ptr, first_D, second_D, dims_D, inside_D, HEAD)
    elif head < QUERY_HEADS + KEY_HEADS:
        first_D, second_D = _rotate(
            first_D, second_D, key_weight_ptr, key_epsilon, cosine_ptr, sine_ptr, dims_D, inside_D, HEAD, NORMED
        )
        key_head = (head - QUERY_HEADS).to(tl.int64)  # a head times a stride may exceed 2**31
        keys_ptr += sequence * key_strides[0] + key_head * key_strides[1] + row * key_strides[2]
        _write_head(keys_ptr, first_D, second_D, dims_D, inside_D, HEAD)
    else:
        value_head = (head - QUERY_HEADS - KEY_HEADS).to(tl.int64)
        values_ptr += sequence * value_strides[0] + value_head * value_strides[1] + row * value_strides[2]
        _write_head(values_ptr, first_D, second_D, dims_D, inside_D, HEAD)
    # Last: a store waits for its values, and later loads wait for the store.
    tl.store(copy_ptr + at * HIDDEN + part_C, hidden_C, mask=part_C < HIDDEN)


def rotate_and_write(
    joined: Tensor,
    cosine: Tensor,
    sine: Tensor,
    keys: Tensor,
    values: Tensor,
    hidden: Tensor,
    *norms: HeadNorm,
) -> tuple[Tensor, Tensor]:
    """Split a step's joined product into heads; rotate queries and keys; write keys and values to their slots.

    The hidden rows are copied: the layer's products are then added to the copy in place, and the caller's rows do not
    change.

    Args:
        joined: (B, R, (Hq + 2 Hk) D), contiguous: queries, keys, values. float32, float16 or bfloat16.
        cosine, sine: (B or 1, R, 1, D), the sine's first half negated; any strides, D contiguous.
        keys, values: (B, Hk, R, D), written; any strides, D contiguous.
        hidden: (B, R, d); any strides, d contiguous.
        norms: of queries and of keys, or none.

    Returns:
        Queries (B, Hq, R, D), whose `.transpose(1, 2)` is contiguous, and the hidden rows' copy (B, R, d), contiguous.
    """
    batch, key_heads, rows, size = keys.shape
    heads = joined.shape[2] // size
    query_heads = heads - 2 * key_heads
    assert keys.shape == values.shape and joined.shape == (batch, rows, heads * size) and query_heads > 0
    assert joined.is_contiguous() and keys.stride(3) == values.stride(3) == hidden.stride(2) == 1
    assert hidden.shape[:2] == (batch, rows) and size % 2 == 0 and len(norms) in (0, 2)
    for angles in (cosine, sine):
        assert angles.shape[0] in (1, batch) and angles.shape[1:] == (rows, 1, size) and angles.stride(3) == 1
    queries = joined.new_empty(batch, rows, query_heads, size)
    copy = hidden.new_empty(hidden.shape)
    cosine_strides, sine_strides = (
        (angles.stride(0) if angles.shape[0] > 1 else 0, angles.stride(1)) for angles in (cosine, sine)
    )
    # without norms the kernel does not read them
    (query_weight, query_epsilon), (key_weight, key_epsilon) = norms or ((joined, 0.0), (joined, 0.0))
    hidden_size = hidden.shape[2]
    with torch.cuda.device_of(joined):
        _rotate_and_write[batch * rows, heads](
            joined, query_weight, key_weight, query_epsilon, key_epsilon, cosine, sine, hidden,
            queries, keys, values, copy, cosine_strides, sine_strides, hidden.stride()[:2], keys.stride()[:3],
            values.stride()[:3], rows, query_heads, key_heads, size, triton.next_power_of_2(size // 2),
            len(norms) == 2, hidden_size, triton.next_power_of_2(triton.cdiv(hidden_size, heads)),
            num_warps=1,
        )  # fmt: skip
    return queries.transpose(1, 2), copy


@triton.jit
def _silu_product(joined_ptr, product_ptr, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """Compute a block of one row's features; grid (rows, blocks)."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < FEATURES
    joined_ptr += row * (2 * FEATURES)
    gate = tl.load(joined_ptr + feature, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(joined_ptr + FEATURES + feature, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(product_ptr + row * FEATURES + feature, product.to(product_ptr.dtype.element_ty), mask=inside)


def silu_product(joined: Tensor) -> Tensor:
    """Return silu(gate) * up (rows, f) of joined rows (rows, 2 f), contiguous, the gate first."""
    rows, both = joined.shape
    assert joined.is_contiguous() and both % 2 == 0
    features = both // 2
    product = joined.new_empty(rows, features)
    with torch.cuda.device_of(joined):
        _silu_product[rows, triton.cdiv(features, FEATURES_BLOCK)](
            joined, product, features, FEATURES_BLOCK, num_warps=4
        )
    return product
