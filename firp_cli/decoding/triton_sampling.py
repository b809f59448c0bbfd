"""Top-p's threshold of every row of probabilities, as one Triton kernel that sorts nothing (needs `triton`).

A token is kept if the tokens that are more probable have less than `top_p` together. The smallest such probability is
found by bisection on its bits: floats that are not negative have the order of their bits. Every pass over the row,
which stays in the device's cache, tries three thresholds, so 15 passes find one of 2**30. Sums have a fixed order: the
result does not change from call to call. Like the kernels of teacher/triton_attention.py it runs on a CUDA device, can
be captured in a CUDA graph after one call with the same vocabulary, and is interpreted on the CPU if
TRITON_INTERPRET=1.

Shapes: R rows, V vocabulary size. In the kernel suffix C is a chunk of a row.
"""
# mypy: disable-error-code="no-untyped-def"
# (A kernel's parameters are pointers and blocks, which have no Python types.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192  # probabilities of a row that are read at once: enough loads in flight for one multiprocessor


@triton.jit
def _find_threshold(probabilities_ptr, thresholds_ptr, top_p, VOCABULARY: tl.constexpr, CHUNK: tl.constexpr):
    """Find one row's threshold; grid (R,)."""
    row = tl.program_id(0).to(tl.int64)
    probabilities_ptr += row * VOCABULARY
    # The threshold's bits are in (low, high]: the tokens above low have at least top_p, those above high, 1.0, less.
    low = -1
    high = 0x3F800000
    while high - low > 1:
        step = (high - low + 3) // 4
        first_C = tl.zeros((CHUNK,), tl.float32)
        second_C = tl.zeros((CHUNK,), tl.float32)
        third_C = tl.zeros((CHUNK,), tl.float32)
        for start in range(0, VOCABULARY, CHUNK):
            at_C = start + tl.arange(0, CHUNK)
            probability_C = tl.load(probabilities_ptr + at_C, mask=at_C < VOCABULARY, other=0.0)
            bits_C = probability_C.to(tl.int32, bitcast=True)
            first_C += tl.where(bits_C > low + step, probability_C, 0.0)
            second_C += tl.where(bits_C > low + 2 * step, probability_C, 0.0)
            third_C += tl.where(bits_C > low + 3 * step, probability_C, 0.0)
        # Rounded sums in the same order never grow with the threshold.
        reached = (tl.sum(first_C, 0) >= top_p).to(tl.int32)
        reached += (tl.sum(second_C, 0) >= top_p).to(tl.int32)
        reached += (tl.sum(third_C, 0) >= top_p).to(tl.int32)
        low += reached * step
        high = tl.minimum(high, low + step)
    tl.store(thresholds_ptr + row, tl.cast(high, tl.float32, bitcast=True))


def top_p_thresholds(probabilities: Tensor, top_p: float) -> Tensor:
    """Return the smallest probability (R, 1) that top-p keeps in each row of (R, V), float32, contiguous."""
    assert probabilities.dtype == torch.float32 and probabilities.is_contiguous()
    rows, vocabulary = probabilities.shape
    thresholds = probabilities.new_empty(rows, 1)
    with torch.cuda.device_of(probabilities):
        _find_threshold[(rows,)](probabilities, thresholds, top_p, vocabulary, CHUNK, num_warps=32)
    return thresholds
