"""The decoding loop: plain, or by draft trees; greedy or sampled; one or several sequences; any device.

Plain decoding (`ar`) is the same loop with a tree of one node, so a speedup compares like with like. Nothing inside a
step waits for the device except the one read of what was emitted.
Shapes: B sequences, N nodes, k steps, M = N(1+k) rows, d hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from firp_cli.decoding.accept import Accepted, Sampler, accept, accept_root
from firp_cli.decoding.sequences import OnTokens, Writer, Written, check_prompts
from firp_cli.decoding.tree import Tree, TreeSpec, build, default_tree, root_tree
from firp_cli.predictors.base import Draft, Predictor, forward_rows
from firp_cli.records import Generation
from firp_cli.teacher.attention import AttentionMask, behind_prefix, causal_allowed, pseudo_positions, rows_allowed
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.stack import Teacher


class Engine:
    """Decodes prompts with a teacher and, if given, a predictor's draft trees.

    Args:
        tree: None takes `dynamic:8`. temperature: 0 is greedy. top_p: applied after temperature, as transformers does.
        prefill_chunk: prompt tokens per forward.
    """

    def __init__(
        self,
        teacher: Teacher,
        predictor: Predictor | None = None,
        tree: TreeSpec | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        prefill_chunk: int = 512,
    ) -> None:
        self.teacher = teacher
        self.predictor = predictor
        self.tree = tree or (default_tree(None, predictor) if predictor else None)
        self.prefill_chunk = prefill_chunk
        self.sampler = Sampler(temperature, top_p, seed, teacher.device)
        self._transfer = predictor.transfer_layers if predictor else ()
        self._breadth = self.tree.breadth(teacher.vocab_size) if self.tree else 1
        self._windowed = any(window is not None for window in teacher.windows)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        on_tokens: OnTokens | None = None,
    ) -> list[Generation]:
        """Decode the prompts (token ids) as one batch; sequences that finish leave it.

        A sequence ends with an EOS token (kept), once its text holds a string of `stop`, or after `max_new_tokens`.
        `decode_seconds` runs from the end of the batch's prefill to the sequence's end.

        Raises CapacityError when a prompt and its answer exceed the teacher's context, UsageError on an empty prompt.
        """
        check_prompts(self.teacher, prompts, max_new_tokens)
        writer = Writer(self.teacher, max_new_tokens, stop, on_tokens)
        began = time.perf_counter()
        live = [Written(number, len(prompt)) for number, prompt in enumerate(prompts)]
        sequences = list(live)
        cache = KVCache(self.teacher.num_layers, len(live), self._slots(prompts, max_new_tokens), self.teacher.device)
        self._prefill(cache, prompts, live)
        root = torch.tensor([prompt[-1] for prompt in prompts], device=self.teacher.device)
        accepted, draft = self._step(cache, root, None)
        self._read(accepted, live, writer, prefill=True)
        prefilled = time.perf_counter()
        while True:
            now = time.perf_counter()
            for item in live:
                item.decode_seconds = now - prefilled
            keep = [index for index, item in enumerate(live) if not item.finish_reason]
            if not keep:
                break
            root = accepted.bonus
            if len(keep) < len(live):
                live = [live[index] for index in keep]
                index = torch.tensor(keep, device=self.teacher.device)
                cache.select(index)
                root = root.index_select(0, index)
                if draft is not None:
                    draft = Draft(draft.tokens.index_select(0, index), draft.log_probs.index_select(0, index))
            cache.longest = max(item.committed for item in live)
            accepted, draft = self._step(cache, root, draft)
            self._read(accepted, live, writer)
        return [writer.generation(item, prefilled - began) for item in sequences]

    def _slots(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
        """Cache slots: the longest sequence, the overshoot of its last step, and the scratch rows."""
        nodes = self.tree.nodes if self.tree else 1
        steps = self.predictor.steps if self.predictor else 0
        longest = max(map(len, prompts))
        scratch = nodes * (1 + len(self._transfer))
        return max(longest + max_new_tokens + steps + 1 + scratch, longest + self.prefill_chunk)

    def _prefill(self, cache: KVCache, prompts: Sequence[Sequence[int]], live: list[Written]) -> None:
        """K/V of every prompt but its last token, in chunks; the last token is the first step's root."""
        device = self.teacher.device
        counts = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        width = max(len(prompt) - 1 for prompt in prompts)
        ids = torch.tensor([[*prompt[:-1], *[0] * (width + 1 - len(prompt))] for prompt in prompts], device=device)
        for start in range(0, width, self.prefill_chunk):
            chunk = ids[:, start : start + self.prefill_chunk].long()
            rows = chunk.shape[1]
            cache.longest = start
            view = cache.begin(rows)
            positions = cache.lengths[:, None] + torch.arange(rows, device=device)
            allowed = causal_allowed(torch.full_like(counts, rows), rows)
            mask = self._mask(cache, allowed, positions, view)
            self.teacher.run(self.teacher.embed(chunk), positions, mask, cache=cache)
            cache.advance((counts - cache.lengths).clamp(0, rows))
        cache.longest = width
        for item in live:
            item.committed = item.prompt_tokens - 1

    def _mask(self, cache: KVCache, rows: Tensor, positions: Tensor, view: int) -> AttentionMask:
        """Mask of rows (B, M, M) behind the committed prefix; `positions` (B, M)."""
        allowed = behind_prefix(rows, cache.lengths, view)
        if not self._windowed:
            return AttentionMask(allowed, self.teacher.dtype)
        slots = torch.arange(view, device=rows.device)[None] - cache.lengths[:, None]
        behind = positions.gather(1, slots.clamp(0, positions.shape[1] - 1))
        key_positions = torch.where(slots < 0, slots + cache.lengths[:, None], behind)
        return AttentionMask(allowed, self.teacher.dtype, positions, key_positions)

    def _step(self, cache: KVCache, root: Tensor, draft: Draft | None) -> tuple[Accepted, Draft | None]:
        """One decoding step (DESIGN section 2): draft tree, one forward, acceptance, K/V compaction, next draft."""
        teacher, predictor = self.teacher, self.predictor
        depth = 0
        if draft is None or predictor is None or self.tree is None:
            tree = root_tree(root)
        else:
            tree, depth = build(self.tree, predictor, draft, root), self.tree.depth(predictor.steps)
        real, pseudo = self._forward(cache, tree)
        normed = teacher.norm(real)
        targets = self.sampler(teacher.head(normed))
        if depth:
            accepted = accept(tree, targets, depth)
            cache.commit(accepted.path, accepted.count + 1)
        else:
            accepted = accept_root(targets)
            cache.advance(torch.ones_like(root))  # the root's K/V stands where it belongs
        if predictor is None:
            return accepted, None
        index = accepted.node[:, None, None]
        node_final = normed.gather(1, index.expand(-1, 1, normed.shape[2]))[:, 0]
        node_pseudo = None
        if pseudo is not None:
            index = index[:, None].expand(-1, pseudo.shape[1], 1, pseudo.shape[3])
            node_pseudo = pseudo.gather(2, index)[:, :, 0]
        states = predictor.finish(teacher, node_final, node_pseudo)
        return accepted, predictor.draft(teacher, states, self._breadth)

    def _forward(self, cache: KVCache, tree: Tree) -> tuple[Tensor, Tensor | None]:
        """All rows of a step through all layers: real rows (B, N, d) and pseudo states (B, k, N, d) or None."""
        teacher = self.teacher
        batch, nodes = tree.tokens.shape
        steps = len(self._transfer)
        positions = cache.lengths[:, None] + tree.depth
        view = cache.begin(nodes * (1 + steps))
        mask, rows = None, tree.ancestors
        if steps:
            rows = rows_allowed(rows, None, steps)
            positions = torch.cat([positions, pseudo_positions(positions, None, steps)], dim=1)
        if batch > 1 or nodes > 1 or steps or self._windowed:
            mask = self._mask(cache, rows, positions, view)
        return forward_rows(
            teacher,
            teacher.embed(tree.tokens),
            positions,
            mask,
            transfer_layers=self._transfer,
            spawn=self.predictor.spawn if self.predictor else None,
            cache=cache,
        )

    def _read(self, accepted: Accepted, live: list[Written], writer: Writer, prefill: bool = False) -> None:
        """The step's one read from the device: what was emitted; then cut, count, hand on."""
        rows = torch.cat([accepted.count[:, None], accepted.tokens], dim=1).tolist()
        for item, (count, *emitted) in zip(live, rows, strict=True):
            item.committed += count + 1
            kept = writer.write(item, emitted[: count + 1], count)
            if not prefill:
                item.accepted_lengths.append(count + 1)
                item.emitted.append(kept)
