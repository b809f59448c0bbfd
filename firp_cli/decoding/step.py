"""One decoding step on the device: tree, forward, acceptance, K/V, next root, next draft (DESIGN section 2).

A step works in place on tensors that keep their addresses and asks the host nothing, so it can be captured as a CUDA
graph. Plain decoding is the same step with a tree of one node, so a speedup compares like with like.
Shapes: B sequences, N nodes, k steps, A nodes with pseudo rows, M = N + kA rows, P = deepest path, root included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding

from firp_cli.decoding.accept import Accepted, accept, accept_root
from firp_cli.decoding.output_ring import OutputRing
from firp_cli.decoding.sampling import Sampler
from firp_cli.decoding.tree_build import Tree, anchor_nodes, build, nearest_anchor, numbers, root_tree
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.predictors.base import Draft, Predictor, PseudoStateMaker
from firp_cli.predictors.forward import forward_rows
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.masks import AttentionMask, StepMask, step_rows
from firp_cli.teacher.teacher import Teacher

PREFILL_ENTRIES = 1 << 26  # of a prefill chunk's mask, at most
# Rows of a sequence whose logits are made in one pass over the vocabulary matrix; more go through it in two: all nodes,
# then the accepted one's drafts. On a CPU sixteen rows cost less than two passes of few (scripts/NOTES.md, rows); the
# bound on CUDA devices is a guess, to be measured.
ONE_PASS_ROWS, ONE_PASS_ROWS_CUDA = 16, 64
Mode = Literal["drafted", "start", "plain"]  # a tree; the root alone, with its draft; the root alone, without one


class DecodeStep:
    """The device's side of a batch: K/V cache, roots, drafts, and the ring of what was emitted.

    Args:
        tree: the trees of steps that have a draft. batch: sequences at most. capacity: positions of the longest one.
        every: steps between two reads of the host. kernel: attention by the Triton kernel.
        make_pseudo_states: the predictor's, made ready for decoding.
    """

    def __init__(
        self,
        teacher: Teacher,
        predictor: Predictor | None,
        tree: TreeSpec | None,
        sampler: Sampler,
        batch: int,
        capacity: int,
        every: int = 1,
        kernel: bool = False,
        make_pseudo_states: PseudoStateMaker | None = None,
    ) -> None:
        self.teacher, self.predictor, self.tree, self.sampler = teacher, predictor, tree, sampler
        self.make_pseudo_states = make_pseudo_states or (predictor.make_pseudo_states if predictor else None)
        self.kernel, self.capacity, self.most = kernel, capacity, batch
        self._transfer = predictor.transfer_layers if predictor else ()
        self._constant: dict[int, tuple[Tensor, Tensor]] = {}
        self._bits: dict[tuple[int, int, int], Tensor] = {}  # graphs hold their addresses
        self._windowed = any(window is not None for window in teacher.windows)
        device, steps = teacher.device, predictor.steps if predictor else 0
        self._breadth = tree.breadth(teacher.vocab_size) if tree else 1
        self.width = step_width(predictor, tree)
        self.cache = KVCache(**cache_shape(teacher, predictor, tree, batch, capacity), device=device)
        positions = capacity + self.width + steps
        self._angles = teacher.rotary_table(positions)
        if self._angles is not None:
            self._angle_shape = self._angles[0].shape[1:]
            self._last_angle = len(self._angles[0]) - 1 if len(self._angles[0]) < positions else None
            self._angles = [torch.cat([part.flatten(1) for part in self._angles], dim=-1)]  # one look-up for both
        self._root = torch.zeros(batch, dtype=torch.long, device=device)
        self._draft = Draft(self._root.new_zeros(0), torch.zeros(0, device=device))
        if predictor is not None:
            self._draft = Draft(
                torch.zeros(batch, steps, self._breadth, dtype=torch.long, device=device),
                torch.zeros(batch, steps, self._breadth, device=device),
            )
        self.ring = OutputRing(batch, self.width, every, device)
        self._one_pass = ONE_PASS_ROWS_CUDA if device.type == "cuda" else ONE_PASS_ROWS

    @property
    def batch(self) -> int:
        return self.cache.batch

    def prefill(self, prompts: list[list[int]], chunk: int) -> None:
        """K/V of every prompt but its last token, in chunks; the last tokens become the roots of the first step, the
        one position whose pseudo rows are run.
        """
        teacher, device, cache = self.teacher, self.teacher.device, self.cache
        cache.use(len(prompts))
        self.ring.reset()
        width = max(len(prompt) for prompt in prompts) - 1
        chunk = min(chunk, max(1, PREFILL_ENTRIES // max(1, width)))
        padded = [[*prompt[:-1], *[0] * (width + 1 - len(prompt))] for prompt in prompts]
        ids = torch.tensor(padded, dtype=torch.long).to(device)
        for start in range(0, width, chunk):
            part = ids[:, start : start + chunk]
            rows = part.shape[1]
            cache.begin_chunk(start, rows)
            positions = torch.arange(start, start + rows, device=device)[None]
            slots = cache.prefix_slots(start + rows)[None]
            mask = AttentionMask(slots <= positions[:, :, None], teacher.dtype, positions, slots)
            forward_rows(teacher, teacher.embed(part), positions, mask, cache=cache, rotary=self._rotary(positions))
        cache.set_lengths(torch.tensor([len(prompt) - 1 for prompt in prompts], device=device))
        self._root[: len(prompts)].copy_(torch.tensor([prompt[-1] for prompt in prompts], device=device))

    def select(self, sequences: Tensor) -> None:
        """Keep only these sequences (ascending places in the batch): others have left."""
        count = sequences.shape[0]
        for state in (self._root, self._draft.tokens, self._draft.log_probs):
            if state.numel():
                state[:count] = state[sequences]
        self.cache.select(sequences)

    def adopt(self, places: Tensor, other: DecodeStep, length: int) -> None:
        """Let the sequences that `other` has prefilled, of `length` positions at most, start at `places` (n,) of this
        batch, which decodes plainly.
        """
        assert self.predictor is None
        self._root[: self.batch].index_copy_(0, places, other._root[: other.batch])
        self.cache.adopt(places, other.cache, length)

    def state(self) -> list[Tensor]:
        """What the next step starts from: lengths, roots and drafts of the batch. Their memory stays in place."""
        batch, draft = self.batch, self._draft
        state = [self.cache.lengths, self._root[:batch]]
        return state if self.predictor is None else [*state, draft.tokens[:batch], draft.log_probs[:batch]]

    def step(self, longest: int, mode: Mode, exact: bool = False) -> None:
        """Emit tokens of all sequences; but for a `plain` step draft the next ones.

        Args:
            longest: bound of the committed lengths. exact: every sequence has this length.
            mode: `drafted` builds a tree from the last step's draft, so that step was not a plain one. Without a
                predictor all steps are plain.
        """
        batch = self.batch
        root = self._root[:batch]
        drafting = self.predictor is not None and mode != "plain"
        if mode == "drafted" and self.tree is not None and self.predictor is not None:
            draft = Draft(self._draft.tokens[:batch], self._draft.log_probs[:batch])
            tree = build(self.tree, self.predictor, draft, root)
            anchors = anchor_nodes(tree, self.tree.budget or 1) if self.tree.limited and self._transfer else None
        else:
            tree, anchors = root_tree(root), None
        real, pseudo = self._forward(tree, anchors, longest, drafting, exact)
        normed = self.teacher.norm(real)
        logits, drafted = self._logits(normed, pseudo, drafting)
        targets = self.sampler(logits)
        single = tree.tokens.shape[1] == 1
        accepted = accept_root(targets) if single else accept(tree, targets, self.width - 1)
        self.cache.commit(accepted.path, accepted.count + 1)
        root.copy_(accepted.bonus)
        self.ring.push(accepted.count, accepted.tokens)
        if drafting:
            self._draft_next(tree, accepted, anchors, normed, pseudo, drafted)

    def _logits(self, normed: Tensor, pseudo: Tensor | None, drafting: bool) -> tuple[Tensor, Tensor | None]:
        """Logits (B, N, V) of the normed real rows (B, N, d) and, where one pass of the head does for both, those of
        every anchor's drafts (B, A, k, V), of which the accepted node's are then taken.
        """
        predictor, (batch, nodes, size) = self.predictor, normed.shape
        anchors = nodes if pseudo is None else pseudo.shape[2]
        rows = nodes + anchors * (predictor.steps if predictor else 0)
        if not drafting or predictor is None or not predictor.teachers_head or batch * rows > self._one_pass:
            return self.teacher.head(normed), None
        own = None if pseudo is None else pseudo.transpose(1, 2).flatten(0, 1)
        states = predictor.draft_hidden(self.teacher, normed.flatten(0, 1), own)
        logits = self.teacher.head(torch.cat([normed, states.reshape(batch, -1, size)], dim=1))
        return logits[:, :nodes], logits[:, nodes:].view(batch, anchors, predictor.steps, -1)

    def _forward(
        self, tree: Tree, anchors: Tensor | None, longest: int, drafting: bool, exact: bool
    ) -> tuple[Tensor, Tensor | None]:
        """All rows of a step through all layers: real rows (B, N, d) and pseudo states (B, k, A, d) or None."""
        teacher, cache = self.teacher, self.cache
        transfer = self._transfer if drafting else ()
        rows, offsets = self._rows(tree, anchors) if transfer else (tree.ancestors, tree.depth)
        positions = cache.lengths[:, None] + offsets
        cache.begin(rows.shape[1], longest)
        mask = None
        if self.kernel or rows.shape[1] > 1 or self._windowed or not exact:
            slots = cache.prefix_slots(longest)
            bits = self._row_bits(rows, tree, anchors)
            mask = StepMask(rows, positions, cache.lengths, slots, teacher.dtype, self.kernel, exact, bits)
        return forward_rows(
            teacher,
            teacher.embed(tree.tokens),
            positions,
            mask,
            transfer_layers=transfer,
            make_pseudo_states=self.make_pseudo_states,
            anchors=anchors,
            cache=cache,
            rotary=self._rotary(positions),
        )

    def _rows(self, tree: Tree, anchors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Who sees whom among real and pseudo rows (B, M, M), and their distances from the root (B, M): made once
        where they do not change from step to step.
        """
        steps = len(self._transfer)
        batch, nodes = tree.tokens.shape
        if not self._unchanging(tree, anchors):
            return step_rows(tree.ancestors, tree.depth, anchors, steps)
        if nodes not in self._constant:
            self._constant[nodes] = step_rows(tree.ancestors[:1], tree.depth[:1], None, steps)
        rows, offsets = self._constant[nodes]
        return rows.expand(batch, -1, -1), offsets.expand(batch, -1)

    def _unchanging(self, tree: Tree, anchors: Tensor | None) -> bool:
        """Whether who sees whom among a step's rows is the same at every step."""
        static = self.tree is not None and self.tree.kind == "static"
        return anchors is None and (static or tree.tokens.shape[1] == 1)

    def _row_bits(self, rows: Tensor, tree: Tree, anchors: Tensor | None) -> Tensor | None:
        """`row_bits` of rows (B, M, M) for the kernel, made once where they do not change; else None."""
        if not self.kernel or not self._unchanging(tree, anchors):
            return None
        from firp_cli.teacher.triton_attention import row_bits

        key = (len(rows), tree.tokens.shape[1], rows.shape[1])
        if key not in self._bits:
            if rows.is_cuda and torch.cuda.is_current_stream_capturing():
                return row_bits(rows)  # made by one graph's replays alone, so no other step may read it
            self._bits[key] = row_bits(rows)
        return self._bits[key]

    def _rotary(self, positions: Tensor) -> list[Tensor] | None:
        """Position embeddings looked up, where they depend on the position alone."""
        if self._angles is None:
            return None
        if self._last_angle is not None:
            positions = positions.clamp(max=self._last_angle)
        looked_up = embedding(positions, self._angles[0]).view(*positions.shape, *self._angle_shape[:-1], -1)
        return list(looked_up.chunk(2, dim=-1))

    def _draft_next(
        self,
        tree: Tree,
        accepted: Accepted,
        anchors: Tensor | None,
        normed: Tensor,
        pseudo: Tensor | None,
        drafted: Tensor | None,
    ) -> None:
        """The next draft, from the accepted node's rows alone. Where that node has no pseudo rows, from the steps of
        its nearest ancestor's that are still ahead; the missing last ones draft nothing.

        Args:
            drafted: the logits of every anchor's drafts (B, A, k, V), where they were made already.
        """
        assert self.predictor is not None
        place, behind = accepted.node, None
        if anchors is not None:
            place, behind = nearest_anchor(tree, anchors, accepted.path, accepted.count)
        if drafted is not None:
            choose = self.predictor.candidates
            draft = draft_behind(_rows_at(drafted, place), behind, lambda rows: choose(rows, self._breadth))
        else:
            final = normed[:, 0] if pseudo is not None else _rows_at(normed, place)
            own = None if pseudo is None else _rows_at(pseudo.transpose(1, 2), place)
            states = self.predictor.draft_hidden(self.teacher, final, own)
            predictor, teacher = self.predictor, self.teacher
            draft = draft_behind(states, behind, lambda rows: predictor.draft(teacher, rows, self._breadth))
        self._draft.tokens[: self.batch].copy_(draft.tokens)
        self._draft.log_probs[: self.batch].copy_(draft.log_probs)


def _rows_at(rows: Tensor, place: Tensor) -> Tensor:
    """rows[b, place[b]] of rows (B, A, ...): (B, ...)."""
    index = place.view(-1, *[1] * (rows.dim() - 1))
    return rows.gather(1, index.expand(-1, 1, *rows.shape[2:]))[:, 0]


def draft_behind(rows: Tensor, behind: Tensor | None, draft: Callable[[Tensor], Draft]) -> Draft:
    """The draft of nodes from the states or logits (B, k, ...) of an ancestor that is `behind` (B,) tokens back (None:
    none is): step i from its step i + behind. Steps that the ancestor did not reach have probability 0.
    """
    if behind is None:
        return draft(rows)
    steps = rows.shape[1]
    ahead = behind[:, None] + numbers(steps, rows.device)
    made = draft(rows.gather(1, ahead.clamp(max=steps - 1)[:, :, None].expand_as(rows)))
    return Draft(made.tokens, made.log_probs.masked_fill((ahead >= steps)[:, :, None], -torch.inf))


def cache_shape(
    teacher: Teacher, predictor: Predictor | None, tree: TreeSpec | None, batch: int, capacity: int
) -> dict:
    """What a `KVCache` for these steps is made with. The scratch holds the rows of the largest step."""
    nodes = tree.nodes if tree and predictor else 1
    pseudo = len(predictor.transfer_layers) if predictor else 0
    anchors = nodes if tree is None or not tree.limited else tree.budget or 1
    return {
        "layers": teacher.num_layers,
        "batch": batch,
        "scratch": max(nodes + pseudo * anchors, 1 + pseudo),
        "capacity": capacity,
        "heads": teacher.kv_heads,
        "head_size": teacher.head_size,
        "dtype": teacher.dtype,
        "spread": step_width(predictor, tree),
    }


def step_width(predictor: Predictor | None, tree: TreeSpec | None) -> int:
    """Tokens that a step may emit: a path of the tree, the bonus token included."""
    return tree.depth(predictor.steps) + 1 if predictor and tree else 1
