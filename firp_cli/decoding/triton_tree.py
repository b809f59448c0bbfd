"""The draft tree of a decoding step and its acceptance, as two Triton kernels (needs `triton`).

`build_tree` makes what tree_build.py, `anchor_nodes` and teacher/masks.py make from a draft whose steps do not depend
on the parent's token: nodes, anchors, and which row sees which. `accept_tree` walks down the tree as accept.py finds
its path, and writes what the next step reads. Each is one program per sequence; in torch they are forty operations,
whose launches take longer than their work. Like the kernels of teacher/triton_layer.py they run on a CUDA device, can
be captured in a CUDA graph after one call with the same shapes, and are interpreted on the CPU if TRITON_INTERPRET=1.

Shapes: B sequences, N nodes, k draft steps, s candidates, C prefixes, A anchors, M rows, W = ceil(M / 32), P nodes of
the longest path. In the kernels suffixes C, N, A are these numbers rounded up to a power of two, K the steps, J a chunk
of values, R a chunk of rows, S the rows that one of them can see. A node's way are the prefixes from the root to it.
"""
# mypy: disable-error-code="no-untyped-def"
# (A kernel's parameters are pointers and blocks, which have no Python types.)

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from firp_cli.decoding.accept import NextDraft, Taken
from firp_cli.decoding.tree_build import Nodes, first_steps, known_prefixes
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.predictors.coupling import Coupling
from firp_cli.predictors.draft import Draft

MOST_RANKED = 1024  # prefixes: each is compared with each, so more are quicker sorted by torch
CHUNK = 16  # values that are compared with all at once


@dataclass
class BuiltTree(Nodes):
    """Draft trees of a batch and their rows.

    Attributes:
        anchors: (B, A) the nodes with pseudo rows; None: all. bits: (B, M, W) int32, see `row_bits`.
        positions: (B, M) long.
    """

    anchors: Tensor | None
    bits: Tensor
    positions: Tensor


@triton.jit
def _scores(log_probs_ptr, steps_ptr, at_X, inside_X, candidates, STEPS: tl.constexpr):
    """Return the joint log-probabilities of prefixes `at`. NaN, which has no rank, becomes -inf."""
    score_X = tl.zeros(at_X.shape, tl.float32)
    for step in tl.static_range(STEPS):
        candidate_X = tl.load(steps_ptr + at_X * STEPS + step, mask=inside_X, other=candidates)
        score_X += tl.load(log_probs_ptr + candidate_X, mask=candidate_X < candidates, other=0.0)
    return tl.where(score_X == score_X, score_X, float("-inf"))


@triton.jit
def _ranks(values_ptr, own_X, at_X, count, CHUNK: tl.constexpr):
    """Return the place of each value `own`, the one at `at` of `count`, in their stable descending order."""
    rank_X = tl.zeros(at_X.shape, tl.int32)
    for start in range(0, count, CHUNK):
        other_J = start + tl.arange(0, CHUNK)
        value_J = tl.load(values_ptr + other_J, mask=other_J < count, other=float("-inf"))
        before_XJ = value_J[None, :] > own_X[:, None]
        before_XJ = before_XJ | ((value_J[None, :] == own_X[:, None]) & (other_J[None, :] < at_X[:, None]))
        rank_X += tl.sum(before_XJ.to(tl.int32), 1)
    return rank_X


@triton.jit
def _choose(
    log_probs_ptr, steps_ptr, nodes_ptr, prefixes_ptr, values_ptr, nodes, prefixes, candidates,
    STEPS: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the node of every prefix (C,), those that are none from N on, and the prefix of every node (N,)."""
    at_C = tl.arange(0, BLOCK_C)
    inside_C = at_C < prefixes
    score_C = _scores(log_probs_ptr, steps_ptr, at_C, inside_C, candidates, STEPS)
    tl.store(values_ptr + at_C, score_C, mask=inside_C)
    tl.debug_barrier()  # what one thread stored others load
    rank_C = _ranks(values_ptr, score_C, at_C, prefixes, CHUNK)
    tl.store(nodes_ptr + at_C, rank_C, mask=inside_C)
    tl.store(prefixes_ptr + rank_C, at_C, mask=inside_C & (rank_C < nodes))
    tl.debug_barrier()


@triton.jit
def _choose_anchors(
    log_probs_ptr, steps_ptr, prefix_N, parents_ptr, anchors_ptr, values_ptr, nodes, candidates, anchors,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the nodes (A,) where the accepted path most likely ends, as `anchor_nodes`. Children are subtracted in
    their order: nodes of equal children tie.
    """
    node_N = tl.arange(0, BLOCK_N)
    inside_N = node_N < nodes
    reached_N = tl.exp(_scores(log_probs_ptr, steps_ptr, prefix_N, inside_N, candidates, STEPS))
    tl.debug_barrier()  # `values` were read before, and the parents just written
    tl.store(values_ptr + node_N, reached_N, mask=inside_N)
    tl.debug_barrier()
    passed_N = tl.zeros((BLOCK_N,), tl.float32)
    for child in range(1, nodes):
        passed_N += tl.where(node_N == tl.load(parents_ptr + child), tl.load(values_ptr + child), 0.0)
    ending_N = tl.where(node_N == 0, float("inf"), reached_N - passed_N)  # every node needs an ancestor with rows
    tl.debug_barrier()
    tl.store(values_ptr + node_N, ending_N, mask=inside_N)
    tl.debug_barrier()
    rank_N = _ranks(values_ptr, ending_N, node_N, nodes, CHUNK)
    tl.store(anchors_ptr + rank_N, node_N, mask=inside_N & (rank_N < anchors))
    tl.debug_barrier()


@triton.jit
def _write_rows(
    facts_ptr, nodes_ptr, prefixes_ptr, anchors_ptr, bits_ptr, positions_ptr, length, nodes, anchors, pseudo,
    STEPS: tl.constexpr, DYNAMIC: tl.constexpr, LIMITED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Write positions (M,) and bits (M, W): a node sees its path, a pseudo row also those of its anchor's steps."""
    rows = nodes + pseudo * anchors
    words = (rows + 31) // 32
    seen_S = tl.arange(0, BLOCK_S)
    for start in range(0, rows, BLOCK_R):
        row_R = start + tl.arange(0, BLOCK_R)
        inside_R = row_R < rows
        anchor_R = (tl.maximum(row_R - nodes, 0)) % anchors
        step_R = tl.where(row_R < nodes, 0, (row_R - nodes) // anchors + 1)
        source_R = anchor_R
        if LIMITED:
            source_R = tl.load(anchors_ptr + anchor_R).to(tl.int32)
        source_R = tl.where(row_R < nodes, row_R, source_R)
        if DYNAMIC:
            source_R = tl.load(prefixes_ptr + source_R, mask=inside_R, other=0)
        fact_R = facts_ptr + source_R * (STEPS + 4)
        depth_R = tl.load(fact_R + STEPS + 2, mask=inside_R, other=0).to(tl.int32)
        tl.store(positions_ptr + row_R, length + depth_R + step_R, mask=inside_R)
        on_path_RS = (seen_S[None, :] <= depth_R[:, None]) & inside_R[:, None]
        column_RS = tl.load(fact_R[:, None] + seen_S[None, :], mask=on_path_RS, other=0).to(tl.int32)
        if DYNAMIC:
            column_RS = tl.load(nodes_ptr + column_RS, mask=on_path_RS, other=0)
        step_S = seen_S - (STEPS + 1)
        own_RS = nodes + step_S[None, :] * anchors + anchor_R[:, None]
        column_RS = tl.where(on_path_RS, column_RS, own_RS)
        sees_RS = on_path_RS | ((step_S >= 0)[None, :] & (step_S[None, :] < step_R[:, None]))
        for word in range(words):
            bit_RS = tl.where(sees_RS & (column_RS // 32 == word), 1 << (column_RS & 31), 0)
            tl.store(bits_ptr + row_R * words + word, tl.sum(bit_RS, 1), mask=inside_R)  # no two share a bit


@triton.jit(do_not_specialize=["draft_stride", "facts_stride", "nodes", "prefixes", "candidates", "anchors", "pseudo"])
def _build_tree(
    root_ptr, draft_ptr, log_probs_ptr, steps_ptr, facts_ptr, lengths_ptr,
    tokens_ptr, parents_ptr, anchors_ptr, bits_ptr, positions_ptr, integers_ptr, values_ptr, draft_stride,
    facts_stride, nodes, prefixes, candidates, anchors, pseudo,
    STEPS: tl.constexpr, DYNAMIC: tl.constexpr, LIMITED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Build one sequence's tree; grid (B,)."""
    rows = nodes + pseudo * anchors
    sequence = tl.program_id(0).to(tl.int64)
    draft_ptr += sequence * draft_stride
    log_probs_ptr += sequence * draft_stride
    facts_ptr += sequence * facts_stride
    tokens_ptr += sequence * nodes
    parents_ptr += sequence * nodes
    anchors_ptr += sequence * anchors
    nodes_ptr = integers_ptr + sequence * (prefixes + nodes)  # of the prefixes; then the prefixes of the nodes
    prefixes_ptr = nodes_ptr + prefixes
    values_ptr += sequence * prefixes
    node_N = tl.arange(0, BLOCK_N)
    inside_N = node_N < nodes
    prefix_N = node_N
    if DYNAMIC:
        _choose(
            log_probs_ptr, steps_ptr, nodes_ptr, prefixes_ptr, values_ptr, nodes, prefixes, candidates, STEPS, BLOCK_C,
            CHUNK,
        )  # fmt: skip
        prefix_N = tl.load(prefixes_ptr + node_N, mask=inside_N, other=0)
    fact_N = facts_ptr + prefix_N * (STEPS + 4)
    parent_N = tl.load(fact_N + STEPS + 1, mask=inside_N, other=0).to(tl.int32)
    if DYNAMIC:
        parent_N = tl.load(nodes_ptr + parent_N, mask=inside_N, other=0)
    candidate_N = tl.load(fact_N + STEPS + 3, mask=inside_N, other=0)  # 0: the root
    token_N = tl.load(draft_ptr + candidate_N - 1, mask=candidate_N > 0, other=0)
    token_N = tl.where(node_N == 0, tl.load(root_ptr + sequence), token_N)
    tl.store(tokens_ptr + node_N, token_N, mask=inside_N)
    tl.store(parents_ptr + node_N, parent_N, mask=inside_N)
    if LIMITED:
        _choose_anchors(
            log_probs_ptr, steps_ptr, prefix_N, parents_ptr, anchors_ptr, values_ptr, nodes, candidates, anchors,
            STEPS, BLOCK_N, CHUNK,
        )  # fmt: skip
    bits_ptr += sequence * (rows * ((rows + 31) // 32))
    _write_rows(
        facts_ptr, nodes_ptr, prefixes_ptr, anchors_ptr, bits_ptr, positions_ptr + sequence * rows,
        tl.load(lengths_ptr + sequence), nodes, anchors, pseudo, STEPS, DYNAMIC, LIMITED, BLOCK_R, BLOCK_S,
    )  # fmt: skip


@dataclass
class _Scored:
    """Prefixes (C, the root's first) that the kernel chooses from.

    Attributes:
        tokens, scores: (B, n) candidates and their log-probabilities. steps: (C, k) the candidates whose sum is a
            prefix's score, padded with n. facts: (C, k + 4), or (B, C, k + 4), see `tree_build.Prefixes`.
    """

    tokens: Tensor
    scores: Tensor
    steps: Tensor
    facts: Tensor


def _scored(spec: TreeSpec, draft: Draft, root: Tensor, coupling: Coupling | None) -> _Scored | None:
    if coupling is not None:
        found = coupling.candidate_prefixes(draft, root, spec.nodes - 1) if spec.kind == "dynamic" else None
        if found is None:
            return None
        own = _own_scores(found.tokens.shape[1], draft.tokens.shape[1], root.device)
        return _Scored(found.tokens[:, 1:], found.scores[:, 1:], own, found.facts)
    prefixes = known_prefixes(spec, draft)
    if prefixes is None:
        return None
    assert draft.tokens.stride()[1:] == (draft.tokens.shape[2], 1)
    return _Scored(draft.tokens.flatten(1), draft.log_probs.flatten(1), prefixes.steps, prefixes.facts)


@cache  # graphs hold its address
def _own_scores(prefixes: int, steps: int, device: torch.device) -> Tensor:
    """Return `_Scored.steps` of prefixes that have a candidate of their own each, with their joint score."""
    own = torch.full((prefixes, steps), prefixes - 1, device=device)
    own[1:, 0] = torch.arange(prefixes - 1, device=device)
    return own


def build_tree(
    spec: TreeSpec,
    draft: Draft,
    root: Tensor,
    lengths: Tensor,
    anchors: int,
    pseudo: int,
    coupling: Coupling | None = None,
) -> BuiltTree | None:
    """Build the trees of a batch, their anchors and rows. None where there are too many prefixes for the kernel, or
    where the children of a static tree depend on their parents.

    Args:
        draft: (B, k, s), the first sequences of a larger one as well. root: (B,) tokens.
        lengths: (B,) of the committed prefixes.
        anchors: A, where not every node is one, else 0. pseudo: number of steps with pseudo rows.
        coupling: of the predictor that made the draft, if it has one.
    """
    draft, dynamic = first_steps(draft, spec), spec.kind == "dynamic"
    scored = _scored(spec, draft, root, coupling)
    if scored is None or (dynamic and len(scored.steps) > MOST_RANKED):
        return None
    batch, (count, steps) = len(root), scored.steps.shape
    nodes = min(spec.nodes, count)
    assert anchors <= nodes and scored.tokens.stride() == scored.scores.stride()
    assert root.is_contiguous() and lengths.is_contiguous()
    rows = nodes + pseudo * (anchors or nodes)
    tokens, parents = root.new_empty(batch, nodes), root.new_empty(batch, nodes)
    chosen = root.new_empty(batch, anchors) if anchors else None
    bits = root.new_empty(batch, rows, triton.cdiv(rows, 32), dtype=torch.int32)
    positions = root.new_empty(batch, rows)
    integers = root.new_empty(batch, count + nodes, dtype=torch.int32)  # for the exchange between threads
    values = draft.log_probs.new_empty(batch, count)
    block = triton.next_power_of_2(count if dynamic else nodes)
    with torch.cuda.device_of(root):
        _build_tree[(batch,)](
            root, scored.tokens, scored.scores, scored.steps, scored.facts, lengths,
            tokens, parents, tokens if chosen is None else chosen, bits, positions, integers, values,
            scored.tokens.stride(0), scored.facts.stride(0) if scored.facts.dim() == 3 else 0,
            nodes, count, scored.tokens.shape[1], anchors or nodes, pseudo, steps, dynamic,
            anchors > 0, triton.next_power_of_2(nodes), block, min(128, triton.next_power_of_2(rows)),
            triton.next_power_of_2(1 + steps + pseudo), CHUNK, num_warps=8 if block > 256 else 4,
        )  # fmt: skip
    return BuiltTree(tokens, parents, chosen, bits, positions)


@triton.jit(do_not_specialize=["row_stride", "anchor_stride", "step_stride", "nodes", "width", "anchors"])
def _accept_tree(
    tokens_ptr, parents_ptr, targets_ptr, anchors_ptr, root_ptr, row_ptr, kept_ptr, path_ptr, place_ptr, picks_ptr,
    floor_ptr, row_stride, anchor_stride, step_stride, nodes, width, anchors,
    STEPS: tl.constexpr, LIMITED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Walk down one sequence's tree, in registers; grid (B,)."""
    sequence = tl.program_id(0).to(tl.int64)
    path_ptr += sequence * width
    row_ptr += sequence * row_stride
    node_N = tl.arange(0, BLOCK_N)
    inside_N = node_N < nodes
    at_N = sequence * nodes + node_N
    token_N = tl.load(tokens_ptr + at_N, mask=inside_N, other=-1).to(tl.int32)
    parent_N = tl.load(parents_ptr + at_N, mask=inside_N & (node_N > 0), other=-1).to(tl.int32)
    target_N = tl.load(targets_ptr + at_N, mask=inside_N, other=0).to(tl.int32)
    if LIMITED:
        place_A = tl.arange(0, BLOCK_A)
        anchor_A = tl.load(anchors_ptr + sequence * anchors + place_A, mask=place_A < anchors, other=-1).to(tl.int32)
    node = 0
    count = 0
    target = 0
    place = 0
    anchor_count = 0
    for level in range(width):
        target = tl.sum(tl.where(node_N == node, target_N, 0), 0)
        tl.store(path_ptr + level, node)  # after its end the path repeats its last node
        tl.store(row_ptr + 1 + level, target)
        if LIMITED:
            found = tl.max((anchor_A == node).to(tl.int32), 0) != 0
            place = tl.where(found, tl.sum(tl.where(anchor_A == node, place_A, 0), 0), place)
            anchor_count = tl.where(found, count, anchor_count)
        child = tl.min(tl.where((parent_N == node) & (token_N == target), node_N, BLOCK_N), 0)
        node = tl.where(child < BLOCK_N, child, node)
        count += (child < BLOCK_N).to(tl.int32)
    tl.store(root_ptr + sequence, tl.maximum(target, 0))  # without a token (`sampling.NO_TOKEN`) any serves
    tl.store(row_ptr, count)
    tl.store(kept_ptr + sequence, count + 1)
    if STEPS > 0:
        if not LIMITED:
            place = node
            anchor_count = count
        tl.store(place_ptr + sequence, place)
        step_K = tl.arange(0, BLOCK_K)
        inside_K = step_K < STEPS
        ahead_K = step_K + count - anchor_count
        at_K = sequence * STEPS + step_K
        reached_K = tl.minimum(ahead_K, STEPS - 1)
        tl.store(picks_ptr + at_K, place * anchor_stride + reached_K * step_stride, mask=inside_K)
        if LIMITED:
            tl.store(floor_ptr + at_K, tl.where(ahead_K < STEPS, 0.0, float("-inf")), mask=inside_K)


def accept_tree(
    tree: Nodes,
    targets: Tensor,
    depth: int,
    anchors: Tensor | None,
    steps: int,
    strides: tuple[int, int],
    root: Tensor,
    row: Tensor,
) -> Taken:
    """Descend the trees of a batch along `targets` (B, N), and write the next roots and the output.

    Args:
        depth: the trees' greatest one. anchors: (B, A), None: all nodes. steps: k of the next draft, 0 for none.
        strides: see `next_draft`. root: (B,), written. row: (B, 1 + P'), written: counts and tokens.
    """
    batch, nodes = targets.shape
    width = min(depth + 1, nodes)
    assert row.stride(1) == 1 and row.shape[1] > width and root.is_contiguous() and tree.tokens.shape == targets.shape
    tokens, parents, targets = tree.tokens.contiguous(), tree.parents.contiguous(), targets.contiguous()
    kept, path = root.new_empty(batch), root.new_empty(batch, width)
    place, picks = root.new_empty(batch), root.new_empty(batch, steps)
    floor = root.new_empty(batch, steps, dtype=torch.float32)
    chosen = tokens if anchors is None else anchors.contiguous()
    count = chosen.shape[1]
    with torch.cuda.device_of(root):
        _accept_tree[(batch,)](
            tokens, parents, targets, chosen, root, row, kept, path, place, picks,
            floor, row.stride(0), *strides, nodes, width, count, steps, anchors is not None,
            triton.next_power_of_2(nodes), triton.next_power_of_2(count), triton.next_power_of_2(max(1, steps)),
            num_warps=1 if nodes <= 128 else 4,
        )  # fmt: skip
    return Taken(kept, path, NextDraft(place, picks, None if anchors is None else floor) if steps else None)
