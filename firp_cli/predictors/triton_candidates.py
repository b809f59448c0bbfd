"""The most probable tokens of rows of logits, as two Triton kernels (needs `triton`).

The first searches parts of a row: the part's largest logits, in order, and its sum of exponentials. The second merges a
row's parts. A logit and its token are one integer, the key: floats' bits in their order above, the token below, counted
down. So a search is a sequence of maxima, no two keys are equal, and of equal logits the lower token comes first. Like
the kernels of teacher/triton_attention.py these run on a CUDA device, can be captured in a CUDA graph after one call
with the same shapes, and are interpreted on the CPU if TRITON_INTERPRET=1.

Shapes: R rows, V vocabulary size, s tokens of a row. In the kernels suffix C is a part of a row, P the parts of a row
and K the keys of a row's parts, both rounded up to a power of two.
"""
# mypy: disable-error-code="no-untyped-def"
# (A kernel's parameters are pointers and blocks, which have no Python types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_PARTS, LEAST_PART = 64, 512  # parts of a row; logits of a part
NO_KEY = tl.constexpr(-(1 << 63))  # below every logit's key
LOW_BITS = tl.constexpr((1 << 31) - 1)  # all but the sign, of 32


@triton.jit
def reordered(bits):
    """Map a float's bits to an integer in the order of floats, or such an integer to the bits."""
    return tl.where(bits < 0, bits ^ LOW_BITS, bits)


@triton.jit(do_not_specialize=["breadth"])
def _search_part(
    logits_ptr, keys_ptr, tops_ptr, totals_ptr, row_stride, breadth, VOCABULARY: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """Find the largest logits of one part, its maximum and sum of exponentials; grid (R, parts)."""
    row = tl.program_id(0).to(tl.int64)
    at = row * tl.num_programs(1) + tl.program_id(1)
    token_C = tl.program_id(1) * PART + tl.arange(0, PART)
    inside_C = token_C < VOCABULARY
    logit_C = tl.load(logits_ptr + row * row_stride + token_C, mask=inside_C, other=float("-inf"))

    top = tl.max(logit_C, 0)
    reference = tl.where(top == float("-inf"), 0.0, top)  # -inf minus -inf would be NaN
    tl.store(tops_ptr + at, top)
    tl.store(totals_ptr + at, tl.sum(tl.exp(logit_C - reference), 0))

    bits_C = tl.where(logit_C == 0.0, 0.0, logit_C).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    key_C = (reordered(bits_C).to(tl.int64) << 32) | (token_C ^ LOW_BITS)
    key_C = tl.where(inside_C, key_C, NO_KEY)
    for place in range(breadth):
        best = tl.max(key_C, 0)
        tl.store(keys_ptr + at * breadth + place, best)
        key_C = tl.where(key_C == best, NO_KEY, key_C)


@triton.jit(do_not_specialize=["breadth"])
def _merge_parts(
    keys_ptr, tops_ptr, totals_ptr, tokens_ptr, log_probs_ptr, breadth,
    PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, MARK: tl.constexpr,
):  # fmt: skip
    """Choose one row's tokens from its parts' keys; grid (R,). A row with NaN has log-probabilities NaN, and, with
    MARK, the token -1.
    """
    row = tl.program_id(0).to(tl.int64)
    at_K = tl.arange(0, BLOCK_K)
    key_K = tl.load(keys_ptr + row * PARTS * breadth + at_K, mask=at_K < PARTS * breadth, other=NO_KEY)
    part_P = tl.arange(0, BLOCK_P)
    top_P = tl.load(tops_ptr + row * PARTS + part_P, mask=part_P < PARTS, other=float("-inf"))
    total_P = tl.load(totals_ptr + row * PARTS + part_P, mask=part_P < PARTS, other=0.0)

    top = tl.max(top_P, 0)
    reference = tl.where(top == float("-inf"), 0.0, top)
    log_total = tl.log(tl.sum(total_P * tl.exp(top_P - reference), 0))
    for place in range(breadth):
        best = tl.max(key_K, 0)
        logit = reordered((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        log_prob = logit - reference - log_total
        token = (best & LOW_BITS) ^ LOW_BITS
        if MARK:  # NaN or positive infinity anywhere in a row reaches the sum of its exponentials
            token = tl.where(log_prob == log_prob, token, -1)
        tl.store(tokens_ptr + row * breadth + place, token)
        # rounding may give a probability above 1; `tl.minimum` would drop NaN
        tl.store(log_probs_ptr + row * breadth + place, tl.where(log_prob > 0.0, 0.0, log_prob))
        key_K = tl.where(key_K == best, NO_KEY, key_K)


def most_probable(logits: Tensor, breadth: int, mark: bool = False) -> tuple[Tensor, Tensor]:
    """Return the `breadth` most probable tokens (..., s) of rows of logits (..., V), and their log-probabilities.

    Args:
        logits: float32, V contiguous. breadth: at most V. The time grows with it, and many keys leave the registers.
        mark: rows with NaN or positive infinity get the token -1.
    """
    vocabulary = logits.shape[-1]
    assert logits.dtype == torch.float32 and logits.stride(-1) == 1 and 0 < breadth <= vocabulary
    rows = logits.reshape(-1, vocabulary)
    count = rows.shape[0]
    part = max(LEAST_PART, triton.next_power_of_2(triton.cdiv(vocabulary, MOST_PARTS)))
    parts = triton.cdiv(vocabulary, part)
    keys = torch.empty(count, parts, breadth, dtype=torch.long, device=logits.device)
    tops, totals = rows.new_empty(count, parts), rows.new_empty(count, parts)
    shape = (*logits.shape[:-1], breadth)
    tokens, log_probs = keys.new_empty(shape), rows.new_empty(shape)
    block = triton.next_power_of_2(parts * breadth)
    with torch.cuda.device_of(logits):
        _search_part[count, parts](
            rows, keys, tops, totals, rows.stride(0), breadth, vocabulary, part, num_warps=4 if part <= 1024 else 8
        )
        _merge_parts[(count,)](
            keys, tops, totals, tokens, log_probs, breadth, parts, triton.next_power_of_2(parts), block, mark,
            num_warps=4 if block <= 1024 else 8,
        )  # fmt: skip
    return tokens, log_probs
