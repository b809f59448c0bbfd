"""Autoregressive greedy decoding of many prompts: the next prompt takes a finished sequence's place in the batch.

A batch that waits for its longest answer decodes fewer and fewer rows, and a step of few rows takes hardly less time
than one of many. Here the batch stays full until no prompt remains (continuous batching: Yu et al., Orca, OSDI 2022).
The K/V of a new prompt are made in a small cache and copied to the free place, so that steps keep their shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from firp_cli.decoding.batch import DecodeBatch
from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.sequences import OutputSequence, Writer, check_prompts, prompt_label
from firp_cli.decoding.step import DecodeStep
from firp_cli.decoding.step_shape import DraftSetup
from firp_cli.teacher.teacher import Teacher

ADMITTED = 8  # prompts whose K/V are made in one forward


@dataclass(frozen=True)
class Decoded:
    """Answer to prompt `number`. `finite`: False where the teacher's states or logits are NaN or infinite."""

    number: int
    token_ids: list[int]
    finite: bool = True


class ContinuousBatcher:
    """Decodes any number of prompts in one full batch.

    Args:
        options: execution of the steps; the tokens do not depend on it.
    """

    def __init__(self, teacher: Teacher, options: EngineOptions | None = None) -> None:
        self.teacher = teacher
        self.engine = Engine(teacher, options=options)

    def forget(self) -> None:
        """Free the cache and the graphs that are kept for the next call."""
        self.engine.forget()

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], batch_size: int) -> Iterator[Decoded]:
        """Yield each prompt's greedy continuation (EOS included) of at most its own limit, in the order of their ends.

        Prompts are taken in order; neighbours of similar lengths waste least. The sequences in the batch when an error
        is raised are among the first `batch_size` missing ones.

        Raises UsageError on an invalid prompt or limit, CapacityError when a prompt and its answer exceed the teacher's
        context or the batch exceeds the device's memory.
        """
        if not prompts:
            return
        longest = max(map(len, prompts))
        positions = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        batch = min(batch_size, len(prompts))
        # makes the K/V of new prompts
        admission = DecodeStep(self.teacher, DraftSetup(), self.engine.sampler, min(batch, ADMITTED), longest)
        stepper = self.engine.stepper(DraftSetup(), batch, positions)
        stepper.cache.use(batch)
        stepper.output.drain()
        run = DecodeBatch(stepper, [], Writer(self.teacher, max(limits), fails=True), self.engine.graphs)
        waiting, free = iter(range(len(prompts))), list(range(batch))
        live: dict[int, OutputSequence] = {}
        while True:
            taken = list(zip(free, waiting, strict=False))  # without a free place no prompt is taken
            for start in range(0, len(taken), ADMITTED):
                places, numbers = zip(*taken[start : start + ADMITTED], strict=True)
                rows = [self._checked(prompts, number, limits[number]) for number in numbers]
                admission.prefill(rows, self.engine.options.prefill_chunk)
                stepper.adopt(torch.tensor(places, device=self.teacher.device), admission, max(map(len, rows)) - 1)
                for place, number, row in zip(places, numbers, rows, strict=True):
                    live[place] = OutputSequence(number, len(row), len(row) - 1, limit=limits[number])
            run.live = [live[place] for place in range(len(live))]  # unread steps keep the previous list
            if not run.leave():
                return
            known = {item.number for item in run.live if item.finish_reason}  # with graphs they stay for a while
            free = []
            while not free:
                run.step("autoregressive")
                free = [at for at, item in enumerate(run.live) if item.finish_reason and item.number not in known]
            live = dict(enumerate(run.live))
            for place in free:
                item = live[place]
                failed = item.finish_reason == "failed"
                yield Decoded(item.number, item.tokens, not failed and stepper.cache.finite(place, item.committed))

    def _checked(self, prompts: Sequence[Sequence[int]], number: int, limit: int) -> list[int]:
        """Return prompt `number`. Raises UsageError, CapacityError."""
        prompt = list(prompts[number])
        check_prompts(self.teacher, [prompt], limit, lambda _: prompt_label(number))
        return prompt
