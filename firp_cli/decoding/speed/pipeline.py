"""SPEED's decoding loop (arXiv 2310.12072): up to r tokens in flight, each at another loop of a shared decoder.

A tick runs every layer group once for the tokens at all stages together. The predictions of the exits and the last loop
decide, on the device, which token starts and which younger ones are flushed: if a token's prediction differs from the
one that its successor was started from, all younger tokens are flushed and its new prediction starts. A token that
leaves the last loop is exact, so the output equals that of autoregressive decoding. The host reads the tokens that
left, once a tick.
Shapes: B sequences, r stages (loops), n stages of this process, d hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from firp_cli.decoding.fallback import pipeline_fallback
from firp_cli.decoding.sampling import Sampler, largest
from firp_cli.decoding.sequences import Label, OnTokens, OutputSequence, Writer, check_fits, check_prompts, prompt_label
from firp_cli.decoding.speed.stage_cache import StageCache
from firp_cli.decoding.speed.stages import PipelineStages
from firp_cli.decoding.speed.tick_log import TickLog
from firp_cli.predictors.base import ExitPredictor
from firp_cli.predictors.forward import forward_rows
from firp_cli.results import Generation
from firp_cli.teacher.looped import layer_groups
from firp_cli.teacher.masks import AttentionMask
from firp_cli.teacher.teacher import Teacher

EMPTY = -1  # position of a stage without token; expected token of a stage without successor


class PipelineEngine:
    """Decodes prompts with a teacher whose loops work on several tokens at once.

    Args:
        guard: fall back to autoregressive decoding while the pipeline is slower. Several ranks never fall back.
        stages: this process's stages; None runs them all.
        clock: seconds, for the fallback and the reported times.
    """

    def __init__(
        self,
        teacher: Teacher,
        predictor: ExitPredictor,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        prefill_chunk: int = 512,
        guard: bool = True,
        stages: PipelineStages | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        teacher.need_whole("decoding")
        self.teacher, self.predictor, self.prefill_chunk = teacher, predictor, prefill_chunk
        self.boundaries = teacher.boundaries(predictor.grouping)
        self.loops = len(self.boundaries)
        self.stages = stages or PipelineStages(self.loops)
        self.clock = clock
        self.sampler = Sampler(temperature, top_p, seed, teacher.device)
        mine, looped = self.stages.mine, teacher.looped
        groups = layer_groups(self.boundaries, teacher.num_layers, looped)
        self.groups = [part for group in groups if (part := group.within(mine))]
        guarded = guard and self.stages.size == 1
        self.fallback = pipeline_fallback(self.loops, shared=teacher.looped is not None) if guarded else None
        # stages of this process after which an exit predicts, by the exit's place among all
        exits = enumerate(predictor.exits)
        self.exit_stages = {place: loop - 1 - mine.start for place, loop in exits if loop - 1 in mine}
        predicting = [*self.exit_stages.values(), *([len(mine) - 1] if self.stages.last else [])]
        self.predicting = torch.tensor(predicting, dtype=torch.long, device=teacher.device)
        # a norm at the end of every loop (Ouro), run for several stages at once, norms the last stage's state too
        self.normed = bool(looped and looped.norm_each_loop and not looped.coda and len(mine) > 1)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        on_tokens: OnTokens | None = None,
        label: Label = prompt_label,
    ) -> list[Generation]:
        """Decode the prompts (token ids) as one batch; sequences that finish leave it. With several ranks every one
        calls this with the same arguments and gets the same result.

        The first new token comes from prefill. Then the pipe starts empty, so its filling counts as decoding. A step of
        the record is a tick; a token decoded outside the pipe counts as r ticks.

        Raises CapacityError when a prompt and its answer exceed the teacher's context, UsageError on an empty prompt,
        NumericsError where the teacher's logits are NaN or infinite.
        """
        check_prompts(self.teacher, prompts, max_new_tokens, label)
        writer = Writer(self.teacher, max_new_tokens, stop, on_tokens, label)
        began = self.clock()
        sequences = [OutputSequence(number, len(prompt), len(prompt)) for number, prompt in enumerate(prompts)]
        longest = max(map(len, prompts))
        slots = longest + max_new_tokens + self.loops
        check_fits(self.cache_bytes(len(prompts), longest, max_new_tokens), len(prompts), slots, self.teacher.device)
        run = PipelineRun(self, sequences, slots)
        tokens = run.prefill(prompts)
        for item, token in zip(sequences, tokens.tolist(), strict=True):
            writer.write(item, [token], 0)
        prefilled = self.clock()
        while run.drop_finished(self.clock() - prefilled):
            run.advance(writer)
        generations = [writer.generation(item, prefilled - began) for item in sequences]
        for made, trace in zip(generations, run.log.traces(len(prompts)), strict=True):
            trace.autoregressive_tokens = len(made.token_ids) - 1 - trace.left  # the first token is prefill's
            made.pipeline = trace
        return generations

    def cache_bytes(self, batch: int, longest_prompt: int, max_new_tokens: int) -> int:
        """Return the size of such a batch's K/V cache, which has K/V of every loop."""
        teacher, slots = self.teacher, longest_prompt + max_new_tokens + self.loops + 1
        layers = sum(len(group.layers) * len(group.stages) for group in self.groups)
        return layers * 2 * batch * teacher.kv_heads * slots * teacher.head_size * teacher.dtype.itemsize


class PipelineRun:
    """One batch in the pipeline.

    `position` and `expected` (r, B) are each stage's token's position and the token that its successor was started from
    (EMPTY: none). `hidden` (n, B, d) enters this process's stages in the next tick.
    """

    position: Tensor
    expected: Tensor
    hidden: Tensor

    def __init__(self, engine: PipelineEngine, sequences: list[OutputSequence], slots: int) -> None:
        self.engine, self.teacher, self.stages = engine, engine.teacher, engine.stages
        self.live = sequences
        device = self.teacher.device
        self.cache = StageCache(engine.groups, len(sequences), slots, device)
        self.log = TickLog(engine.loops, engine.predictor.exits)
        self.filled = False
        self.slots = torch.arange(slots, device=device)
        self.stage_numbers = torch.arange(engine.loops, device=device)[:, None]
        self.onward = torch.tensor([1, 0], device=device)[:, None, None]  # from a token to the next: position, token
        self.table = self.teacher.rotary_table(slots)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Make the K/V of all prompts at every loop, in chunks; return the tokens after them (B,)."""
        device, engine, stages = self.teacher.device, self.engine, self.stages
        counts = torch.tensor([len(prompt) for prompt in prompts], device=device)
        width = max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
        layers = stages.layers(engine.boundaries, self.teacher.num_layers)
        final = torch.empty(0)
        for start in range(0, width, engine.prefill_chunk):
            chunk = ids[:, start : start + engine.prefill_chunk]
            rows = chunk.shape[1]
            positions = torch.arange(start, start + rows, device=device).expand(len(prompts), rows)
            hidden = self.teacher.embed(chunk)
            if not stages.first:
                hidden = stages.receive(hidden)
            self.cache.begin_rows(positions, start + rows)
            mask = self._mask(positions, start + rows)
            hidden = self.teacher.run(hidden, positions, mask, layers.start, layers.stop, self.cache)
            if not stages.last:
                stages.send(hidden)
            # the last token of a prompt may lie in any chunk
            place = counts - 1 - start
            row = hidden.gather(1, place.clamp(0, rows - 1)[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
            final = row if not start else torch.where((place >= 0)[:, None], row, final)
        if not stages.last:
            return stages.from_last(torch.empty_like(counts))
        return stages.from_last(engine.sampler(self.teacher.head(self.teacher.norm(final))[:, None])[:, 0])

    def _mask(self, positions: Tensor, view: int) -> AttentionMask:
        """Return the mask of rows (B, M), which see all slots up to their own position."""
        slots = self.slots[:view]
        allowed = slots <= positions[:, :, None]
        return AttentionMask(allowed, self.teacher.dtype, positions, slots.expand(positions.shape[0], view))

    def drop_finished(self, seconds: float) -> bool:
        """Remove finished sequences from the batch; return True while any remains."""
        for item in self.live:
            item.decode_seconds = seconds
        kept = [place for place, item in enumerate(self.live) if not item.finish_reason]
        if kept and len(kept) < len(self.live):
            index = torch.tensor(kept, device=self.teacher.device)
            self.cache.select(index)
            self.live = [self.live[place] for place in kept]
            if self.filled:
                self.position, self.expected = self.position[:, index], self.expected[:, index]
                self.hidden = self.hidden[:, index]
                self.log.begin([item.number for item in self.live])
        return bool(kept)

    def advance(self, writer: Writer) -> None:
        """Run one tick, or one autoregressive step while the fallback pauses the pipeline."""
        fallback, clock = self.engine.fallback, self.engine.clock
        began = clock()
        if fallback is None or fallback.speculating:
            if not self.filled:
                self.fill()
            rate = self.tick(writer)
            if fallback is not None:
                fallback.speculated(rate, clock() - began)
        else:
            self.filled = False  # tokens in flight are dropped
            self.step(writer)
            fallback.decoded(clock() - began)

    def fill(self) -> None:
        """Put the last exact tokens into the first stage of an empty pipe."""
        device, batch = self.teacher.device, len(self.live)
        tokens = torch.tensor([item.tokens[-1] for item in self.live], device=device)
        self.position = torch.full((self.engine.loops, batch), EMPTY, device=device)
        self.position[0] = torch.tensor([item.committed for item in self.live], device=device)
        self.expected = torch.full_like(self.position, EMPTY)
        self.hidden = self.teacher.embed(tokens).repeat(len(self.stages.mine), 1, 1)  # one stage has a token
        self.log.begin([item.number for item in self.live])
        self.filled = True

    def tick(self, writer: Writer) -> float:
        """Run every stage's loop once and read the tokens that left; return their number per sequence."""
        emitted = 0
        for item, position, expected, token in zip(self.live, *self.work().tolist(), strict=True):
            left = position != EMPTY
            item.accepted_lengths.append(int(left))
            if left:
                emitted += 1
                item.committed += 1
                writer.write(item, [token], int(expected == token))
        return emitted / len(self.live)

    def work(self) -> Tensor:
        """Do a tick's work, without waiting for the host. Return for the last stage (3, B): its token's position (EMPTY
        where no token leaves), the token that its successor was started from, and the exact one.
        """
        out = self.layers()
        predicted, sure = self.predict(out)
        arrived = self.stages.pass_on(out[-1])
        predicted = self.stages.share(predicted)
        tick = torch.stack([self.position, self.expected, predicted])
        self.log.add(tick)
        started = self._decide(tick, None if sure is None else self.stages.share(sure))
        first = self.teacher.embed(started) if arrived is None else arrived
        self.hidden = torch.cat([first[None], out[:-1]])
        return tick[:, -1]

    def layers(self) -> Tensor:
        """Run the layer groups over this process's stages; return the states after their loops (n, B, d)."""
        teacher, mine, batch = self.teacher, self.stages.mine, len(self.live)
        position = self.position[mine.start : mine.stop]
        # no token in flight is further than r - 1 positions from the oldest one, which follows what was committed
        view = max(item.committed for item in self.live) + self.engine.loops
        self.cache.begin_tick(position, view, mine.start)
        rows = position.flatten()[:, None]
        mask = self._mask(rows, view)
        rows = rows.clamp(min=0)
        hidden = self.hidden.flatten(0, 1)[:, None]
        rotary = teacher.rotary(hidden, rows) if self.table is None else self.table(rows, len(self.slots) - 1)
        for group in self.engine.groups:
            first, stop = ((stage - mine.start) * batch for stage in (group.stages.start, group.stages.stop))
            part = slice(first, stop)
            angles, places, states = [table[part] for table in rotary], rows[part], hidden[part]
            for layer in group.layers:
                seen = mask.additive(teacher.windows[layer])[part]
                states = teacher.layer(layer, states, angles, places, seen, self.cache)
            hidden = states if len(states) == len(hidden) else torch.cat([hidden[:first], states, hidden[stop:]])
        return hidden.view(len(mine), batch, -1)

    def predict(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what this process's stages predict after their tokens (n, B) and, with a threshold, which of these
        predictions are probable enough to start a token (n, B). A stage without exit repeats its last prediction.
        """
        engine, mine, threshold = self.engine, self.stages.mine, self.engine.predictor.threshold
        predicted = self.expected[mine.start : mine.stop]
        sure = None if threshold is None else torch.ones_like(predicted)
        if not len(engine.predicting):
            return predicted, sure
        states = out.unbind()
        final = states[-1] if self.stages.last else None
        exits = {place: states[stage] for place, stage in engine.exit_stages.items()}
        logits = engine.predictor.pipeline_logits(self.teacher, exits, final, engine.normed)
        chosen = largest(logits)  # without a token an exit starts none
        if final is not None and not engine.sampler.greedy:
            chosen[-1] = engine.sampler(logits[-1][:, None])[:, 0]
        if sure is not None:  # the last loop's predictions are exact
            assert threshold is not None
            early = len(engine.exit_stages)
            probable = logits[:early].softmax(-1).amax(-1) >= threshold
            sure.index_copy_(0, engine.predicting[:early], probable.long())
        if len(engine.predicting) < len(mine):
            chosen = predicted.index_copy(0, engine.predicting, chosen)
        return chosen, sure

    def _decide(self, tick: Tensor, sure: Tensor | None) -> Tensor:
        """Set the next tick's positions and expected tokens from this one's, and from its predictions (3, r, B); return
        the new tokens (B,).

        The oldest token whose prediction differs from the one that its successor was started from decides: it has no
        successor yet, or all younger tokens are flushed.
        """
        stages, predicted = self.stage_numbers, tick[2]
        changed = (predicted != self.expected) & (self.position >= 0)
        oldest = torch.where(changed, stages, EMPTY).amax(0)
        place = oldest.clamp(min=0)[None]
        starts = oldest >= 0
        if sure is not None:
            starts = starts & (sure.gather(0, place)[0] > 0)
        both = tick[::2].gather(1, place.expand(2, -1, -1)) + self.onward
        young = torch.where(starts, both, EMPTY)  # (2, 1, B): the new token's position, and the token
        kept = torch.where(stages >= oldest, self.position, EMPTY)
        expected = torch.where(stages == oldest, young[1], self.expected)
        self.position = torch.cat([young[0], kept[:-1]])
        self.expected = torch.cat([self.expected[:1], expected[:-1]])  # the first stage's token has no successor yet
        return young[1, 0].clamp(min=0)

    def step(self, writer: Writer) -> None:
        """Decode one token per sequence without the pipeline: one row through one layer after the other."""
        teacher, device = self.teacher, self.teacher.device
        positions = torch.tensor([[item.committed] for item in self.live], device=device)
        tokens = torch.tensor([[item.tokens[-1]] for item in self.live], device=device)
        view = max(item.committed for item in self.live) + 1
        self.cache.begin_rows(positions, view)
        alone = len(self.live) == 1 and set(teacher.windows) == {None}
        mask = None if alone else self._mask(positions, view)
        hidden, _ = forward_rows(teacher, teacher.embed(tokens), positions, mask, cache=self.cache)
        chosen = self.engine.sampler(teacher.head(teacher.norm(hidden)))[:, 0]
        for item, token in zip(self.live, chosen.tolist(), strict=True):
            item.committed += 1
            item.accepted_lengths += [0] * (self.engine.loops - 1) + [1]
            writer.write(item, [token], 0)
