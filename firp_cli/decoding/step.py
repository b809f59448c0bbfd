"""One decoding step on the device: tree, forward, acceptance, next root and draft, K/V.

A step works in place on tensors that keep their addresses and reads nothing back to the host, so CUDA graphs can
capture it. Autoregressive decoding is the same step with a tree of one node, so a speedup compares like with like.
Shapes: B sequences, N nodes, k draft steps, A anchors (nodes with pseudo rows), M = N + kA rows, P = longest path of
the tree, root included.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from firp_cli.decoding.accept import Taken, accept, accept_root, next_draft
from firp_cli.decoding.cpu_accept import AcceptKernel, Descended
from firp_cli.decoding.output_buffer import OutputBuffer
from firp_cli.decoding.sampling import Sampler
from firp_cli.decoding.sequences import check_fits
from firp_cli.decoding.step_shape import DraftSetup
from firp_cli.decoding.text_drafts import TextDrafts
from firp_cli.decoding.tree_build import Nodes, Tree, anchor_nodes, build, numbers, root_tree
from firp_cli.predictors.draft import Draft
from firp_cli.predictors.draft_kernel import DraftKernel, DraftRows
from firp_cli.predictors.forward import forward_rows
from firp_cli.predictors.ngram import NgramPredictor
from firp_cli.teacher.cpu_kernels import watched
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.masks import AttentionMask, KernelMask, Mask, step_mask, step_rows
from firp_cli.teacher.teacher import Teacher

PREFILL_ENTRIES = 1 << 26  # most entries of a prefill chunk's mask
# Most rows of a batch whose logits are made in one pass over the vocabulary matrix. More rows take two passes: all
# nodes, then the accepted one's drafts. On a CPU sixteen rows cost less than two passes of few (scripts/NOTES.md,
# rows). The bound on CUDA devices is not measured yet.
ONE_PASS_ROWS, ONE_PASS_ROWS_CUDA = 16, 64
Mode = Literal["drafted", "autoregressive"]  # a tree from the last step's draft, which drafts again; the root alone


class StepRows(NamedTuple):
    """Rows of a step: which sees which (B, M, M) bool, distances from the root (B, M), the kernel's `row_bits`."""

    seen: Tensor
    offsets: Tensor
    bits: Tensor | None


class StepTree(NamedTuple):
    """Tree of a step: its nodes, its anchors (B, A) (None: all nodes), positions of the rows (B, M), and which row sees
    which as (B, M, M) bool or as the kernel's `row_bits`.
    """

    nodes: Nodes
    anchors: Tensor | None
    positions: Tensor
    seen: Tensor | None
    bits: Tensor | None


class AllDrafts(NamedTuple):
    """Drafts of all anchors: the states that the head reads (B, A, k, d), and their logits (B, A, k, V)."""

    states: Tensor
    logits: Tensor


class DecodeStep:
    """Device side of a batch: K/V cache, roots, drafts, and the emitted tokens.

    Args:
        setup: predictor and tree of the steps that have a draft. batch: most sequences. capacity: positions of the
            longest one.
        kernel: attention, trees, candidates and commits by the Triton kernels; without them no Triton runs.
        graphs: steps are captured, so their shapes depend on no values.

    Raises CapacityError where the K/V cache does not fit the device.
    """

    def __init__(
        self,
        teacher: Teacher,
        setup: DraftSetup,
        sampler: Sampler,
        batch: int,
        capacity: int,
        kernel: bool = False,
        graphs: bool = False,
    ) -> None:
        self.teacher, self.sampler, self.kernel = teacher, sampler, kernel
        self.capacity, self.most = capacity, batch
        self.predictor, self.tree, self.shape = setup.predictor, setup.tree, setup.shape
        self.make_pseudo_states = setup.make_pseudo_states
        predictor, device, steps = setup.predictor, teacher.device, setup.shape.steps
        self._transfer = predictor.transfer_layers if predictor else ()
        self._fixed_rows: dict[tuple[int, ...], StepRows] = {}  # graphs hold their addresses
        self._windowed = any(window is not None for window in teacher.windows)
        self._text: TextDrafts | None = None
        if isinstance(predictor, NgramPredictor):
            assert setup.tree is not None
            fixed = graphs or device.type != "cpu"  # elsewhere the host would wait for a value
            self._text, steps = TextDrafts(predictor, setup.tree, batch, capacity, device, fixed), 0
        self._breadth = setup.tree.breadth(teacher.vocab_size) if setup.tree else 1
        cache = setup.shape.cache(teacher, batch, capacity)
        check_fits(KVCache.bytes_needed(**cache), batch, capacity, device)
        self.cache = KVCache(**cache, device=device, kernel=kernel)
        self._positions = capacity + setup.shape.width + setup.shape.steps  # of the furthest row, and one
        self._table = teacher.rotary_table(self._positions)
        self._root = torch.zeros(batch, dtype=torch.long, device=device)
        width = predictor.width(self._breadth, teacher.vocab_size) if predictor else 1
        shape = (batch, steps, width)  # empty without a predictor
        self._draft = Draft(torch.empty(shape, dtype=torch.long, device=device), torch.empty(shape, device=device))
        if predictor is not None and predictor.coupling is not None:
            columns = predictor.coupling.context_columns
            self._draft.context = torch.zeros(batch, steps, columns, dtype=teacher.dtype, device=device)
        self._no_draft()
        self.output = OutputBuffer(batch, setup.shape.width, device)
        self._accept_kernel = (
            AcceptKernel(self._root, self.output.row) if not kernel and AcceptKernel.serves(teacher) else None
        )
        self._one_pass = ONE_PASS_ROWS_CUDA if device.type == "cuda" else ONE_PASS_ROWS

    @property
    def batch(self) -> int:
        return self.cache.batch

    def prefill(self, prompts: list[list[int]], chunk: int) -> None:
        """Make the K/V of every prompt but its last token, in chunks; once where all prompts are the same. The last
        tokens become the roots of the first step, which runs the first pseudo rows.
        """
        teacher, device, cache = self.teacher, self.teacher.device, self.cache
        distinct = prompts[:1] if all(prompt == prompts[0] for prompt in prompts) else prompts
        cache.use(len(distinct))
        self.output.drain()
        self._no_draft()
        width = max(len(prompt) for prompt in prompts) - 1
        chunk = min(chunk, max(1, PREFILL_ENTRIES // max(1, width)))
        padded = [[*prompt[:-1], *[0] * (width + 1 - len(prompt))] for prompt in distinct]
        ids = torch.tensor(padded, dtype=torch.long).to(device)
        for start in range(0, width, chunk):
            part = ids[:, start : start + chunk]
            rows = part.shape[1]
            cache.begin_chunk(start, rows)
            positions = torch.arange(start, start + rows, device=device)[None]
            slots = cache.prefix_slots(start + rows)[None]
            mask = AttentionMask(slots <= positions[:, :, None], teacher.dtype, positions, slots)
            forward_rows(teacher, teacher.embed(part), positions, mask, cache=cache, rotary=self._rotary(positions))
        if len(distinct) < len(prompts):
            cache.repeat(len(prompts), width)
        cache.set_lengths(torch.tensor([len(prompt) - 1 for prompt in prompts], device=device))
        if self._text is not None:
            self._text.start(prompts)
        self._root[: len(prompts)].copy_(torch.tensor([prompt[-1] for prompt in prompts], device=device))

    def _no_draft(self) -> None:
        """Set a draft of arbitrary tokens of probability 0. They are distinct: one path of a tree can be accepted."""
        self._draft.tokens.copy_(numbers(self._draft.tokens.shape[2], self.teacher.device))
        self._draft.log_probs.fill_(-torch.inf)

    def step(self, longest: int, mode: Mode, exact: bool = False, first: bool = False) -> None:
        """Emit tokens of all sequences and, except in an `autoregressive` step, draft the next ones.

        Args:
            longest: bound of the committed lengths. exact: every sequence has this length.
            mode: `drafted` builds a tree from the draft of the last step of this mode. Without a predictor all steps
                are autoregressive.
            first: the step follows prefill, so its tree is the root alone.
        """
        drafting = self.predictor is not None and mode == "drafted"
        # 1. Build the tree of N nodes from the draft distributions.
        tree = self._build(drafting, first, longest)
        drafting = drafting and self._text is None  # the next draft of a text needs none of this step's states
        # 2. Run the N nodes through all layers, from layer t_i on also the step-i pseudo states of the anchors.
        real, pseudo = self._forward(tree, longest, drafting, exact)
        # 3. Apply the head to the N real rows, and descend while a child's token is its parent's target. The bonus
        #    token is the next root.
        normed = self.teacher.norm(real)
        logits, drafted = self._logits(normed, pseudo, drafting)
        taken, rows = self._accept(tree, logits, drafting, drafted is not None)
        # 4. The deepest accepted node's pseudo rows are the next draft.
        if rows is not None and self.predictor is not None and self.predictor.kernel is not None:
            self._draft_in_kernel(self.predictor.kernel, rows, normed, pseudo, drafted)
        elif taken.following is not None:
            self._draft_next(taken, tree.anchors, normed, pseudo, drafted)
        if self._text is not None:
            self._text.append(self.cache.lengths, self.output.row)
        # 5. Move the accepted path's K/V to the prefix; the next step overwrites all other rows.
        self.cache.commit(taken.path, taken.kept)

    def _build(self, drafting: bool, first: bool, longest: int) -> StepTree:
        """Build the tree of the last draft, or of the text, and choose its anchors, or the root alone."""
        root, lengths = self._root[: self.batch], self.cache.lengths
        transfer, anchors = self._transfer if drafting else (), None
        if not drafting or first:
            tree = root_tree(root)
        elif self._text is not None:
            tree = self._text.tree(root, lengths, longest)
        else:
            assert self.tree is not None and self.predictor is not None
            draft = self._draft.map(lambda part: part[: self.batch])
            limit = self.shape.anchors if self.tree.limited else 0
            coupling = self.predictor.coupling
            served = coupling is not None or not self.predictor.parent_dependent
            if self.kernel and self.tree.kind != "none" and served:
                from firp_cli.decoding.triton_tree import build_tree

                built = build_tree(self.tree, draft, root, lengths, limit, len(transfer), coupling)
                if built is not None:
                    return StepTree(built, built.anchors, built.positions, None, built.bits)
            tree = build(self.tree, self.predictor, draft, root)
            anchors = anchor_nodes(tree, limit) if limit else None
        seen, offsets, bits = self._rows(tree, anchors, len(transfer))
        positions = lengths[:, None] if seen.shape[1] == 1 else lengths[:, None] + offsets
        return StepTree(tree, anchors, positions, seen, bits)

    def _accept(self, tree: StepTree, logits: Tensor, drafting: bool, drafted: bool) -> Descended:
        """Accept a path by the nodes' logits (B, N, V); write the next roots and the output.

        Args:
            drafted: the next draft is chosen from rows (B, A, k, ...), not from the pseudo states (B, k, A, d).
        """
        nodes, anchors, root = tree.nodes, tree.anchors, self._root[: self.batch]
        steps = self.predictor.steps if drafting and self.predictor else 0
        strides = (steps, 1) if drafted else (1, logits.shape[1] if anchors is None else anchors.shape[1])
        depth = self.shape.width - 1
        if self._accept_kernel is not None and not watched():
            assert isinstance(nodes, Tree)
            chosen = logits if self.sampler.greedy else self.sampler(logits)
            return self._accept_kernel(nodes, chosen, depth, anchors, steps, strides)
        targets = self.sampler(logits)
        if self.kernel:
            from firp_cli.decoding.triton_tree import accept_tree

            return Descended(accept_tree(nodes, targets, depth, anchors, steps, strides, root, self.output.row), None)
        assert isinstance(nodes, Tree)
        accepted = accept_root(targets) if targets.shape[1] == 1 else accept(nodes, targets, depth)
        following = next_draft(nodes, accepted, anchors, steps, strides) if steps else None
        torch.clamp(accepted.bonus, min=0, out=root)  # without a token (`sampling.NO_TOKEN`) the next step runs on any
        self.output.write(accepted.count, accepted.tokens)
        return Descended(Taken(accepted.count + 1, accepted.path, following), None)

    def _forward(self, tree: StepTree, longest: int, drafting: bool, exact: bool) -> tuple[Tensor, Tensor | None]:
        """Run all rows of a step through all layers. Return real rows (B, N, d), pseudo states (B, k, A, d) or None."""
        teacher, cache, positions, rows = self.teacher, self.cache, tree.positions, tree.positions.shape[1]
        cache.begin(rows, longest)
        tokens = tree.nodes.tokens if self._text is None else tree.nodes.tokens.clamp(min=0)  # without a draft: any
        mask: Mask | None = None
        if self.kernel:
            mask = KernelMask(tree.seen, positions, cache.lengths, longest, tree.bits)
        elif rows > 1 or self._windowed or not exact:
            assert tree.seen is not None
            slots = cache.prefix_slots(longest)
            mask = step_mask(tree.seen, positions, cache.lengths, slots, teacher.dtype, exact, self._windowed)
        return forward_rows(
            teacher,
            teacher.embed(tokens),
            positions,
            mask,
            transfer_layers=self._transfer if drafting else (),
            make_pseudo_states=self.make_pseudo_states,
            anchors=tree.anchors,
            cache=cache,
            rotary=self._rotary(positions),
        )

    def _rows(self, tree: Tree, anchors: Tensor | None, steps: int) -> StepRows:
        """Return the rows of a step with pseudo states of `steps`. They are made once where every step has the same."""
        key = (*tree.tokens.shape, steps)
        if key in self._fixed_rows:
            return self._fixed_rows[key]
        rows, offsets = step_rows(tree.ancestors, tree.depth, anchors, steps) if steps else (tree.ancestors, tree.depth)
        bits = None
        if self.kernel:
            from firp_cli.teacher.triton_attention import row_bits

            bits = row_bits(rows)
        made = StepRows(rows, offsets, bits)
        fixed = key[1] == 1 or (anchors is None and self.tree is not None and self.tree.kind == "static")
        # what a graph's capture makes only its replays fill, so no other step may read it
        if fixed and not (rows.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._fixed_rows[key] = made
        return made

    def _logits(self, normed: Tensor, pseudo: Tensor | None, drafting: bool) -> tuple[Tensor, AllDrafts | None]:
        """Return the logits (B, N, V) of the normed real rows (B, N, d), and the drafts of every anchor: states
        (B, A, k, d) and logits (B, A, k, V).

        The latter are None where one pass of the head for both does not pay.
        """
        predictor, (batch, nodes, size) = self.predictor, normed.shape
        anchors = nodes if pseudo is None else pseudo.shape[2]
        rows = nodes + anchors * (predictor.steps if predictor else 0)
        if not drafting or predictor is None or not predictor.teachers_head or batch * rows > self._one_pass:
            return self.teacher.head(normed), None
        flat = None if pseudo is None else pseudo.transpose(1, 2).flatten(0, 1)
        states = predictor.draft_hidden(self.teacher, normed.flatten(0, 1), flat)
        logits = self.teacher.head(torch.cat([normed, states.reshape(batch, -1, size)], dim=1))
        shape = (batch, anchors, predictor.steps, -1)
        return logits[:, :nodes], AllDrafts(states.view(shape), logits[:, nodes:].view(shape))

    def _rotary(self, positions: Tensor) -> list[Tensor] | None:
        """Look up position embeddings where they depend on the position alone; else None."""
        return None if self._table is None else self._table(positions, self._positions - 1)

    def _draft_next(
        self, taken: Taken, anchors: Tensor | None, normed: Tensor, pseudo: Tensor | None, drafted: AllDrafts | None
    ) -> None:
        """Make the next draft from the accepted node's rows alone. A node without pseudo rows takes the steps of its
        nearest anchor that lie ahead; steps that this anchor does not reach draft nothing.

        Args:
            drafted: the drafts of every anchor, if `_logits` made them.
        """
        predictor, teacher, following = self.predictor, self.teacher, taken.following
        assert predictor is not None and following is not None
        place, picks, floor = following
        coupled, ahead = predictor.coupling is not None, None
        if coupled and anchors is not None:  # the deepest accepted node may be no anchor
            place = taken.path.gather(1, taken.kept[:, None] - 1)[:, 0]
            ahead = picks % predictor.steps if drafted else picks // anchors.shape[1]
        final = _rows_at(normed, place[:, None])[:, 0] if coupled or pseudo is None else normed[:, 0]
        kept, logits = self._draft, None
        if drafted is not None:
            logits = _rows_at(drafted.logits.flatten(1, 2), picks)
            states = _rows_at(drafted.states.flatten(1, 2), picks) if coupled else final[:, None]
        else:
            node_pseudo = None if pseudo is None else _rows_at(pseudo.flatten(1, 2), picks)
            states = predictor.draft_hidden(teacher, final, node_pseudo)
        made = predictor.most_probable(teacher, states, kept.tokens.shape[2], self.kernel, logits)
        kept.tokens[: self.batch].copy_(made.tokens)
        if floor is None:
            kept.log_probs[: self.batch].copy_(made.log_probs)
        else:
            torch.add(made.log_probs, floor[:, :, None], out=kept.log_probs[: self.batch])
        if kept.context is not None:
            assert predictor.coupling is not None
            kept.context[: self.batch].copy_(predictor.coupling.context(states, final, made.log_probs, ahead))

    def _draft_in_kernel(
        self, kernel: DraftKernel, rows: DraftRows, normed: Tensor, pseudo: Tensor | None, drafted: AllDrafts | None
    ) -> None:
        """Make the next draft as `_draft_next` does, in one call."""
        logits = None if drafted is None else drafted.logits.flatten(1, 2)
        if drafted is not None:
            states = drafted.states.flatten(1, 2)
        elif pseudo is not None:
            states = pseudo.flatten(1, 2)
        else:  # the states need the accepted node alone
            assert self.predictor is not None
            states = self.predictor.draft_hidden(self.teacher, _rows_at(normed, rows.node[:, None])[:, 0], None)
            rows = rows._replace(picks=None)
        raw = drafted is None and pseudo is not None
        kernel.write(self._draft.map(lambda part: part[: self.batch]), rows, states, raw, normed, logits)

    def select(self, sequences: Tensor) -> None:
        """Keep only these sequences (ascending places in the batch); the others have ended."""
        count = sequences.shape[0]
        for state in (self._root, *self._draft.tensors):
            if state.numel():
                state[:count] = state[sequences]
        if self._text is not None:
            self._text.select(sequences)
        self.cache.select(sequences)

    def adopt(self, places: Tensor, source: DecodeStep, length: int) -> None:
        """Start the sequences that `source` has prefilled, of at most `length` positions, at `places` (n,) of this
        batch, which decodes autoregressively.
        """
        assert self.predictor is None
        self._root[: self.batch].index_copy_(0, places, source._root[: source.batch])
        self.cache.adopt(places, source.cache, length)

    def buffers(self) -> list[Tensor]:
        """Return what the next step reads: lengths, roots and drafts of the batch. Steps update them in place."""
        text = [] if self._text is None else [self._text.tokens]
        drafts = [] if self.predictor is None else self._draft.tensors
        return [self.cache.lengths, *(part[: self.batch] for part in (self._root, *text, *drafts))]


def _rows_at(rows: Tensor, picks: Tensor) -> Tensor:
    """Return rows[b, picks[b, i]] of rows (B, R, d): (B, k, d)."""
    return rows.gather(1, picks[:, :, None].expand(-1, -1, rows.shape[2]))
