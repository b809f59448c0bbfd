"""Host side of a batch: it launches decoding steps, reads their tokens, and writes them to the sequences.

On a CUDA device the host reads a step after it has launched the next one: it learns of an end one step late.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from firp_cli.decoding.cuda_graphs import StepGraphs, bucket
from firp_cli.decoding.fallback import AutoregressiveFallback
from firp_cli.decoding.output_buffer import Rows
from firp_cli.decoding.sequences import OutputSequence, Writer
from firp_cli.decoding.step import DecodeStep, Mode

Clock = Callable[[], float]


class Launched(NamedTuple):
    """A step that is launched. `sequences`: the batch at that time; `follows_draft`: its tree had a draft."""

    sequences: list[OutputSequence]
    mode: Mode
    follows_draft: bool


def halves(batch: int) -> list[int]:
    """Return a batch size and its halves down to 1, rounded down: the sizes that are captured."""
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


class DecodeBatch:
    """Decoding steps of one batch.

    Args:
        fallback: returns, for a batch size, what decides when to decode autoregressively; None: every step is drafted.
        clock: seconds.
    """

    def __init__(
        self,
        stepper: DecodeStep,
        sequences: Sequence[OutputSequence],
        writer: Writer,
        graphs: StepGraphs | None = None,
        fallback: Callable[[int], AutoregressiveFallback] | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.stepper, self.live, self.writer = stepper, list(sequences), writer
        self.graphs, self.fallback, self.clock = graphs, fallback, clock
        self._drafted = False  # the last step made a draft
        self.prefilled = self._mark = clock()  # `_mark`: start of the time that belongs to the next step that is read

    def prefill(self, prompts: Sequence[Sequence[int]], chunk: int) -> None:
        """Make the K/V of the prompts and the first new tokens, which belong to no step."""
        self.stepper.prefill([list(prompt) for prompt in prompts], chunk)
        mode = self.next_mode()
        self.stepper.step(max(map(len, prompts)) - 1, mode, first=True)
        for step, rows in [*self.stepper.output.launched(self._launched(mode)), *self.stepper.output.drain()]:
            self._write(step, rows, counted=False)
        self.prefilled = self._mark = self.clock()

    def next_mode(self) -> Mode:
        """Return the mode of the next step."""
        if self.stepper.predictor is None:
            return "autoregressive"
        return "drafted" if self.fallback is None or self.fallback(len(self.live)).speculating else "autoregressive"

    def step(self, mode: Mode) -> None:
        """Launch a step, and write the tokens that have arrived."""
        stepper = self.stepper
        ahead = stepper.output.unread * stepper.shape.width
        longest = min(max(item.committed for item in self.live) + ahead, stepper.capacity)
        if self.graphs is None:
            stepper.step(longest, mode, exact=not ahead and len(self.live) == 1)
        else:
            self.replay(self.graphs, mode, longest)
        for step, rows in stepper.output.launched(self._launched(mode)):
            self._read(step, rows)

    def replay(self, graphs: StepGraphs, mode: Mode, longest: int) -> None:
        """Launch a step as a graph, one for each mode and batch size: the kernel reads true lengths. Other attention
        has a graph for each bucket of the lengths.
        """
        stepper = self.stepper
        longest = stepper.capacity if stepper.kernel else min(bucket(longest), stepper.capacity)
        graphs.run((mode, stepper.batch, longest), lambda: stepper.step(longest, mode))

    def leave(self) -> bool:
        """Remove finished sequences from the batch; return True while any remains. With graphs, which are captured per
        batch size, the batch only shrinks to one of `halves`, so that some finished sequences stay.
        """
        keep = [place for place, item in enumerate(self.live) if not item.finish_reason]
        size = len(keep) if self.graphs is None else min(half for half in halves(len(self.live)) if half >= len(keep))
        if keep and size < len(self.live):
            finished = [place for place, item in enumerate(self.live) if item.finish_reason]
            keep = sorted([*keep, *finished[: size - len(keep)]])
            self.stepper.select(torch.tensor(keep, device=self.stepper.teacher.device))
            self.live = [self.live[place] for place in keep]
        return bool(keep)

    def _launched(self, mode: Mode) -> Launched:
        launched = Launched(self.live, mode, self._drafted)
        self._drafted = mode == "drafted"
        return launched

    def _read(self, step: Launched, rows: Rows) -> None:
        """Write the tokens of a step, and tell the fallback its time: the time since the last step arrived."""
        arrived = self.clock()
        seconds = arrived - self._mark
        unfinished = [item for item in step.sequences if not item.finish_reason]
        emitted = self._write(step, rows)
        now = self.clock()
        for item in unfinished:
            item.decode_seconds = now - self.prefilled
        self._mark = arrived if self.stepper.output.late else now  # a late device works on while the host writes
        if self.fallback is None or not unfinished:
            return
        fallback = self.fallback(len(step.sequences))
        if step.mode == "autoregressive":
            fallback.decoded(seconds)
        elif step.follows_draft:
            fallback.speculated(emitted / len(unfinished), seconds)

    def _write(self, step: Launched, rows: Rows, counted: bool = True) -> int:
        """Write a step's tokens to its sequences, up to their ends. Return how many it emitted, a last step's surplus
        included. `counted`: it is a step of the sequences' records.
        """
        emitted = 0
        for item, (count, *tokens) in zip(step.sequences, rows, strict=False):  # the buffer has room for more
            item.committed += count + 1
            if item.finish_reason:
                continue  # it is decoded until it leaves
            emitted += count + 1
            kept = self.writer.write(item, tokens[: count + 1], count)
            if counted:
                item.accepted_lengths.append(kept)
                item.autoregressive_steps += self.stepper.predictor is not None and step.mode == "autoregressive"
        return emitted
