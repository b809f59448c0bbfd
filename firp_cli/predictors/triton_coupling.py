"""Candidate prefixes of a coupled draft, as Triton kernels: four for each depth (needs `triton`).

`CandidatePrefixes.of` makes what `decoding.tree_build.build_by_level` makes before it chooses the nodes: the most
probable prefixes of every depth. In torch a depth is about thirty-five operations, whose launches take longer than
their work. Like the kernels of teacher/triton_layer.py these run on a CUDA device, can be captured in a CUDA graph
after one call with the same shapes, and are interpreted on the CPU if TRITON_INTERPRET=1.

Shapes: B sequences, F prefixes of one depth, M candidates of a step, C prefixes of all depths (the root's first), k
steps, d hidden size, w width of the head. In the kernels suffixes F and M are these numbers, rounded up to a power of
two, or a block of them; N are outputs and K inputs of a block.
"""
# mypy: disable-error-code="no-untyped-def"
# (A kernel's parameters are pointers and blocks, which have no Python types.)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_cli.predictors.draft import Draft
from firp_cli.predictors.triton_candidates import LOW_BITS, NO_KEY, reordered
from firp_cli.teacher.triton_products import ROWS, row_block

MOST_KEYS = 8192  # prefixes of a depth from which one program chooses
CANDIDATES, INPUTS = 16, 64  # candidates and inputs of a block


@dataclass(frozen=True)
class CoupledHead:
    """Matrices of a shared coupling and of the teacher, of one dtype.

    Attributes:
        node: (w, 2 d) of recurrent couplings, else (w, d). output: (d, w). embedding, vocabulary: (V, d).
        bias: (V,) of the vocabulary. cap: bound of the logits. scale: factor of embeddings.
        recurrent: the head reads the parent node's adjusted state. activated: by SiLU. epsilon: of that state's root
            mean square.
    """

    node: Tensor
    output: Tensor
    embedding: Tensor
    vocabulary: Tensor
    bias: Tensor | None
    cap: float | None
    scale: float
    recurrent: bool
    activated: bool
    epsilon: float

    def serves(self) -> bool:
        """Return True where the kernels can read the matrices."""
        parts = (self.node, self.output, self.embedding, self.vocabulary)
        return all(part.is_contiguous() and part.dtype == self.vocabulary.dtype for part in parts)


@triton.jit
def _dot(rows_FK, weight_NK, sums_FN, UPCAST: tl.constexpr):
    """Add the product of rows with a matrix's rows; numpy, which interprets, cannot multiply bfloat16."""
    if UPCAST:
        rows_FK, weight_NK = rows_FK.to(tl.float32), weight_NK.to(tl.float32)
    return tl.dot(rows_FK, tl.trans(weight_NK), sums_FN, input_precision="ieee")


@triton.jit(do_not_specialize=["rows", "first", "prefixes", "count", "previous_stride", "context_stride"])
def _hidden(
    root_ptr, tokens_ptr, above_ptr, embedding_ptr, previous_ptr, features_ptr, weight_ptr, hidden_ptr,
    rows, first, prefixes, count, previous_stride, context_stride, scale, epsilon,
    D: tl.constexpr, W: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ROOT: tl.constexpr, RECURRENT: tl.constexpr, ACTIVATED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute one block of the head's hidden units of one block of a depth's nodes; grid (N blocks, F blocks)."""
    out_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_F, in_K = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K)
    inside_F, inside_N = row_F < rows, out_N < W
    sequence_F, node_F = (row_F // count).to(tl.int64), row_F % count
    if ROOT:
        token_F = tl.load(root_ptr + sequence_F, mask=inside_F, other=0)
    else:
        token_F = tl.load(tokens_ptr + sequence_F * prefixes + first + node_F, mask=inside_F, other=0)
    inputs = D * 2 if RECURRENT else D
    at_NK = weight_ptr + out_N.to(tl.int64)[:, None] * inputs + in_K[None, :]
    at_FK = embedding_ptr + token_F[:, None] * D + in_K[None, :]
    sums_FN = tl.zeros((BLOCK_F, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        wanted_K = in_K < D - start
        rows_FK = tl.load(at_FK + start, mask=inside_F[:, None] & wanted_K[None, :], other=0.0)
        weight_NK = tl.load(at_NK + start, mask=inside_N[:, None] & wanted_K[None, :], other=0.0)
        sums_FN = _dot(rows_FK, weight_NK, sums_FN, UPCAST)
    sums_FN *= scale
    if RECURRENT:
        above_F = node_F * 0
        if not ROOT:
            above_F = tl.load(above_ptr + sequence_F * prefixes + first + node_F, mask=inside_F, other=0).to(tl.int32)
        at_FK = previous_ptr + (sequence_F * previous_stride + above_F * D)[:, None] + in_K[None, :]
        more_FN = tl.zeros((BLOCK_F, BLOCK_N), tl.float32)
        squares_F = tl.zeros((BLOCK_F,), tl.float32)
        for start in range(0, D, BLOCK_K):
            wanted_K = in_K < D - start
            rows_FK = tl.load(at_FK + start, mask=inside_F[:, None] & wanted_K[None, :], other=0.0)
            weight_NK = tl.load(at_NK + D + start, mask=inside_N[:, None] & wanted_K[None, :], other=0.0)
            more_FN = _dot(rows_FK, weight_NK, more_FN, UPCAST)
            wide_FK = rows_FK.to(tl.float32)
            squares_F += tl.sum(wide_FK * wide_FK, 1)
        sums_FN += more_FN * tl.rsqrt(squares_F / D + epsilon)[:, None]
    inside_FN = inside_F[:, None] & inside_N[None, :]
    at_FN = features_ptr + (sequence_F * context_stride)[:, None] + out_N[None, :]
    sums_FN += tl.load(at_FN, mask=inside_FN, other=0.0).to(tl.float32)
    if ACTIVATED:
        sums_FN = sums_FN * tl.sigmoid(sums_FN)
    at_FN = hidden_ptr + row_F[:, None] * W + out_N[None, :]
    tl.store(at_FN, sums_FN.to(hidden_ptr.dtype.element_ty), mask=inside_FN)


@triton.jit(do_not_specialize=["rows", "count", "context_stride"])
def _adjusted(
    hidden_ptr, weight_ptr, state_ptr, adjusted_ptr, rows, count, context_stride,
    D: tl.constexpr, W: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute one block of the adjusted states of one block of nodes; grid (N blocks, F blocks)."""
    out_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_F, in_K = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K)
    inside_F, inside_N = row_F < rows, out_N < D
    sums_FN = tl.zeros((BLOCK_F, BLOCK_N), tl.float32)
    for start in range(0, W, BLOCK_K):
        wanted_K = in_K < W - start
        at_FK = hidden_ptr + row_F[:, None] * W + start + in_K[None, :]
        at_NK = weight_ptr + out_N.to(tl.int64)[:, None] * W + start + in_K[None, :]
        rows_FK = tl.load(at_FK, mask=inside_F[:, None] & wanted_K[None, :], other=0.0)
        weight_NK = tl.load(at_NK, mask=inside_N[:, None] & wanted_K[None, :], other=0.0)
        sums_FN = _dot(rows_FK, weight_NK, sums_FN, UPCAST)
    inside_FN = inside_F[:, None] & inside_N[None, :]
    sequence_F = (row_F // count).to(tl.int64)
    at_FN = state_ptr + (sequence_F * context_stride)[:, None] + out_N[None, :]
    sums_FN += tl.load(at_FN, mask=inside_FN, other=0.0).to(tl.float32)
    at_FN = adjusted_ptr + row_F[:, None] * D + out_N[None, :]
    tl.store(at_FN, sums_FN.to(adjusted_ptr.dtype.element_ty), mask=inside_FN)


@triton.jit(do_not_specialize=["count", "candidates", "draft_stride"])
def _score(
    adjusted_ptr, vocabulary_ptr, bias_ptr, draft_ptr, logits_ptr, count, candidates, draft_stride, cap,
    D: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the logits of one block of candidates as children of the nodes; grid (M blocks, B)."""
    sequence = tl.program_id(1).to(tl.int64)
    at_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    node_F, in_K = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_K)
    inside_F, inside_M = node_F < count, at_M < candidates
    token_M = tl.load(draft_ptr + sequence * draft_stride + at_M, mask=inside_M, other=0)
    row_F = sequence * count + node_F
    sums_FM = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    for start in range(0, D, BLOCK_K):
        wanted_K = in_K < D - start
        at_FK = adjusted_ptr + row_F[:, None] * D + start + in_K[None, :]
        at_MK = vocabulary_ptr + token_M[:, None] * D + start + in_K[None, :]
        rows_FK = tl.load(at_FK, mask=inside_F[:, None] & wanted_K[None, :], other=0.0)
        weight_MK = tl.load(at_MK, mask=inside_M[:, None] & wanted_K[None, :], other=0.0)
        sums_FM = _dot(rows_FK, weight_MK, sums_FM, UPCAST)
    if BIAS:
        sums_FM += tl.load(bias_ptr + token_M, mask=inside_M, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        sums_FM = (2 * tl.sigmoid(2 * sums_FM / cap) - 1) * cap  # tanh
    at_FM = logits_ptr + row_F[:, None] * candidates + at_M[None, :]
    tl.store(at_FM, sums_FM, mask=inside_F[:, None] & inside_M[None, :])


@triton.jit
def _keys(score_FM, inside_FM):
    """Return integers in the order of the scores, of equal ones the earlier first; NaN is -inf."""
    score_FM = tl.where(score_FM == score_FM, score_FM, float("-inf"))
    bits_FM = tl.where(score_FM == 0.0, 0.0, score_FM).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    place = tl.arange(0, score_FM.shape[0] * score_FM.shape[1])
    key = (tl.reshape(reordered(bits_FM), place.shape).to(tl.int64) << 32) | (place ^ LOW_BITS)
    return tl.where(tl.reshape(inside_FM, place.shape), key, NO_KEY)


_NUMBERS = ["first", "begin", "prefixes", "count", "width", "candidates", "draft_stride", "context_stride", "depth"]


@triton.jit(do_not_specialize=_NUMBERS)
def _select(
    logits_ptr, draft_ptr, log_probs_ptr, over_ptr, root_ptr, tokens_ptr, scores_ptr, above_ptr, facts_ptr,
    first, begin, prefixes, count, width, candidates, draft_stride, context_stride, depth,
    STEPS: tl.constexpr, FACTS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    ROOT: tl.constexpr,
):  # fmt: skip
    """Choose the `width` most probable prefixes of a depth of one sequence; grid (B,).

    `first`: the first prefix of the depth above, of `count`. `begin`: the first of this depth.
    """
    sequence = tl.program_id(0).to(tl.int64)
    node_F, at_M = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_M)
    inside_FM = (node_F < count)[:, None] & (at_M < candidates)[None, :]
    at_FM = logits_ptr + (sequence * count + node_F[:, None]) * candidates + at_M[None, :]
    logit_FM = tl.load(at_FM, mask=inside_FM, other=float("-inf"))
    tokens_ptr += sequence * prefixes
    scores_ptr += sequence * prefixes
    above_ptr += sequence * prefixes
    facts_ptr += sequence * prefixes * (STEPS + 4)

    top_F = tl.max(logit_FM, 1)
    reference_F = tl.where(top_F == float("-inf"), 0.0, top_F)  # -inf minus -inf would be NaN
    total_F = tl.sum(tl.exp(logit_FM - reference_F[:, None]), 1)
    total_F = tl.where(node_F < count, total_F, 1.0)
    known = tl.load(log_probs_ptr + sequence * draft_stride).to(tl.float32)
    known += tl.load(over_ptr + sequence * context_stride).to(tl.float32)
    known = tl.where(known > 0.0, 0.0, known)  # rounding may give a probability above 1
    above_F = node_F * 0.0
    if not ROOT:
        above_F = tl.load(scores_ptr + first + node_F, mask=node_F < count, other=0.0)
    score_FM = logit_FM + (above_F + known - reference_F - tl.log(total_F))[:, None]
    key = _keys(score_FM, inside_FM)
    order = tl.arange(0, BLOCK_C)
    taken, chosen = order < width, tl.full((BLOCK_C,), NO_KEY, tl.int64)
    for number in range(width):  # a sort of all keys would be a megabyte of instructions
        best = tl.max(key, 0)
        chosen = tl.where(order == number, best, chosen)
        key = tl.where(key == best, NO_KEY, key)
    place = ((chosen & LOW_BITS) ^ LOW_BITS).to(tl.int32)
    node, candidate = place // BLOCK_M, place % BLOCK_M
    own = begin + order
    score = reordered((chosen >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    tl.store(scores_ptr + own, score, mask=taken)
    token = tl.load(draft_ptr + sequence * draft_stride + candidate, mask=taken, other=0)
    tl.store(tokens_ptr + own, token, mask=taken)
    tl.store(above_ptr + own, node, mask=taken)
    parent = first + node
    fact_ptr = facts_ptr + own * (STEPS + 4)
    for step in tl.static_range(STEPS + 1):
        way = tl.load(facts_ptr + parent * (STEPS + 4) + step, mask=taken & (step < depth) & (step > 0), other=0)
        tl.store(fact_ptr + step, tl.where(step < depth, way, own), mask=taken)
    tl.store(fact_ptr + STEPS + 1, parent, mask=taken)
    tl.store(fact_ptr + STEPS + 2, depth, mask=taken)
    tl.store(fact_ptr + STEPS + 3, own, mask=taken)
    if ROOT:
        fact = tl.arange(0, FACTS)
        tl.store(facts_ptr + fact, 0, mask=fact < STEPS + 4)
        tl.store(scores_ptr, 0.0)
        tl.store(tokens_ptr, tl.load(root_ptr + sequence))


@dataclass
class CandidatePrefixes:
    """Prefixes of coupled drafts, the root's first and parents before children.

    Attributes:
        tokens: (B, C) long, the last token of each. scores: (B, C) float32 joint log-probabilities.
        facts: (B, C, k + 4) long, see `decoding.tree_build.Prefixes`; a prefix's own token is the one of its number.
    """

    tokens: Tensor
    scores: Tensor
    facts: Tensor

    @staticmethod
    def of(head: CoupledHead, draft: Draft, root: Tensor, limit: int) -> CandidatePrefixes | None:
        """Return the `limit` most probable prefixes of every depth, below root tokens (B,); None where they are too
        many for the kernels.

        Args:
            draft: (B, k, M) with its context, the first sequences of a larger one as well.
        """
        (batch, steps, candidates), context = draft.tokens.shape, draft.context
        assert context is not None and context.stride(2) == draft.tokens.stride(2) == 1 and root.is_contiguous()
        assert draft.log_probs.stride() == draft.tokens.stride()
        widths = [1]
        for _ in range(steps):
            widths.append(min(limit, widths[-1] * candidates))
        if not 1 <= limit <= ROWS or _count_keys(max(widths[:-1]), candidates) > MOST_KEYS:
            return None
        prefixes = sum(widths)
        found = CandidatePrefixes(
            root.new_empty(batch, prefixes),
            context.new_empty(batch, prefixes, dtype=torch.float32),
            root.new_empty(batch, prefixes, steps + 4),
        )
        depths = _Depths(head, draft, root, found, root.new_empty(batch, prefixes, dtype=torch.int32))
        first = 0
        with torch.cuda.device_of(root):
            for depth in range(1, steps + 1):
                depths.add(depth, first, widths[depth - 1], widths[depth])
                first += widths[depth - 1]
        return found


def _count_keys(nodes: int, candidates: int) -> int:
    return triton.next_power_of_2(nodes) * triton.next_power_of_2(candidates)


class _Depths:
    """Prefixes of one depth after the other. `above`: (B, C) a prefix's parent among the prefixes of its depth."""

    def __init__(self, head: CoupledHead, draft: Draft, root: Tensor, found: CandidatePrefixes, above: Tensor) -> None:
        self.head, self.draft, self.root, self.found, self.above = head, draft, root, found, above
        self.size, self.width = head.output.shape
        self.interpreted = not isinstance(_hidden, triton.JITFunction)
        self.previous: Tensor | None = None  # (B, F, d) adjusted states of the nodes of the depth above

    def add(self, depth: int, first: int, count: int, chosen: int) -> None:
        """Add the `chosen` prefixes of a depth (from 1), children of the `count` prefixes from `first` on."""
        head, draft, found, root = self.head, self.draft, self.found, self.root
        size, width, (batch, steps, candidates) = self.size, self.width, draft.tokens.shape
        assert draft.context is not None
        context, prefixes, rows = draft.context[:, depth - 1], found.tokens.shape[1], batch * count
        block, blocks = row_block(rows), triton.cdiv(rows, row_block(rows))
        final = context[:, size + width :]
        previous = final if self.previous is None else self.previous
        hidden = head.output.new_empty(rows, width)
        adjusted = context.new_empty(batch, count, size)
        wide = 32 if width >= 4096 else 16
        _hidden[triton.cdiv(width, wide), blocks](
            root, found.tokens, self.above, head.embedding, previous, context[:, size:], head.node, hidden,
            rows, first, prefixes, count, previous.stride(0), context.stride(0), head.scale, head.epsilon,
            size, width, block, wide, INPUTS, depth == 1, head.recurrent, head.activated, self.interpreted,
            num_warps=4,
        )  # fmt: skip
        wide = 32 if size >= 4096 else 16
        _adjusted[triton.cdiv(size, wide), blocks](
            hidden, head.output, context, adjusted, rows, count, context.stride(0), size, width, block, wide, INPUTS,
            self.interpreted, num_warps=4,
        )  # fmt: skip
        tokens, log_probs = draft.tokens[:, depth - 1], draft.log_probs[:, depth - 1]
        logits = found.scores.new_empty(batch, count, candidates)
        _score[triton.cdiv(candidates, CANDIDATES), batch](
            adjusted, head.vocabulary, head.vocabulary if head.bias is None else head.bias, tokens, logits, count,
            candidates, tokens.stride(0), head.cap or 0.0, size, row_block(count), CANDIDATES, INPUTS,
            head.bias is not None, head.cap is not None, self.interpreted, num_warps=4,
        )  # fmt: skip
        keys = _count_keys(count, candidates)
        _select[(batch,)](
            logits, tokens, log_probs, context[:, -2:], root, found.tokens, found.scores, self.above, found.facts,
            first, first + count, prefixes, count, chosen, candidates, tokens.stride(0), context.stride(0), depth,
            steps, triton.next_power_of_2(steps + 4), triton.next_power_of_2(count),
            triton.next_power_of_2(candidates), triton.next_power_of_2(chosen), depth == 1,
            num_warps=4 if keys <= 2048 else 8,
        )  # fmt: skip
        self.previous = adjusted
