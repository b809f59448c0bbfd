"""Host side of a batch: it launches decoding steps, reads their tokens some steps later, and writes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from firp_cli.decoding.cuda_graphs import StepGraphs, bucket
from firp_cli.decoding.fallback import AutoregressiveFallback
from firp_cli.decoding.output_ring import Rows
from firp_cli.decoding.sequences import OutputSequence, Writer
from firp_cli.decoding.step import DecodeStep, Mode

Clock = Callable[[], float]


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
        self._mode: Mode = "autoregressive"  # of the last step and of all unread ones
        self._drafted = False  # the last step made a draft
        self.prefilled = self._mark = clock()  # start of the time that is not assigned to steps yet
        self._idle = True  # the device was idle at the mark
        self._settled = True  # every step since the mark takes its usual time: none is captured or compiled

    def prefill(self, prompts: Sequence[Sequence[int]], chunk: int) -> None:
        """Make the K/V of the prompts and the first new tokens, which belong to no step."""
        self.stepper.prefill([list(prompt) for prompt in prompts], chunk)
        self._note(self.next_mode())
        self.stepper.step(max(map(len, prompts)) - 1, self._mode)
        for sequences, rows in self.stepper.ring.launched(self.live, drain=True):
            self._write(sequences, rows, prefill=True)
        self.prefilled = self._mark = self.clock()

    def next_mode(self) -> Mode:
        """Return the mode of the next step."""
        fallback = self._fallback_of(len(self.live))
        if self.stepper.predictor is None or (fallback is not None and not fallback.speculating):
            return "autoregressive"
        return "drafted" if self._drafted else "start"

    def advance(self) -> None:
        """Launch a step. Before a step of another mode, and where a pause may be over, read all unread steps instead:
        steps that are read together have one mode, and a pause is no longer than the fallback asks for.
        """
        mode, unread, fallback = self.next_mode(), self.stepper.ring.unread, self._fallback_of(len(self.live))
        over = fallback is not None and not fallback.speculating and unread >= fallback.pause
        if unread and (over or mode != self._mode):
            self._read(self.stepper.ring.drain(self.live), drained=True)
        else:
            self.step(mode)

    def step(self, mode: Mode) -> None:
        """Launch a step after the unread ones; read and write the tokens that have arrived."""
        stepper = self.stepper
        ahead = stepper.ring.unread * stepper.shape.width
        longest = min(max(item.committed for item in self.live) + ahead, stepper.capacity)
        self._note(mode)
        if self.graphs is None:
            stepper.step(longest, mode, exact=not ahead and len(self.live) == 1)
        else:
            longest = stepper.capacity if stepper.kernel else min(bucket(longest), stepper.capacity)
            key = (mode, stepper.batch, longest)
            self._settled = self._settled and self.graphs.settled(key)
            self.graphs.run(key, lambda: stepper.step(longest, mode))
        self._read(stepper.ring.launched(self.live))

    def leave(self) -> bool:
        """Remove finished sequences from the batch; return True while any remains. Graphs are captured per batch size:
        with them the finished ones leave when half of the batch has finished.
        """
        keep = [place for place, item in enumerate(self.live) if not item.finish_reason]
        enough = self.graphs is None or 2 * len(keep) <= len(self.live)
        if keep and len(keep) < len(self.live) and enough:
            self.stepper.select(torch.tensor(keep, device=self.stepper.teacher.device))
            self.live = [self.live[place] for place in keep]
        return bool(keep)

    def _fallback_of(self, batch: int) -> AutoregressiveFallback | None:
        return self.fallback(batch) if self.fallback else None

    def _note(self, mode: Mode) -> None:
        self._mode, self._drafted = mode, mode != "autoregressive"

    def _read(self, groups: list[tuple[Any, Rows]], drained: bool = False) -> None:
        """Write the tokens that arrived. The fallback gets the seconds of a step only if these steps alone took them.
        On a device that runs ahead this excludes the first group, which the launches of two groups have delayed.
        """
        if not groups:
            return
        ring, arrived = self.stepper.ring, self.clock()
        timed = self._settled and (drained or not self._idle or not ring.late)
        seconds = (arrived - self._mark) / sum(len(rows) for _, rows in groups) if timed else None
        for sequences, rows in groups:
            unfinished = [item for item in sequences if not item.finish_reason]
            rates = self._write(sequences, rows)
            now = self.clock()
            for item in unfinished:
                item.decode_seconds = now - self.prefilled
            self._report(len(sequences), rates, seconds)
        self._idle, self._settled = drained, True
        self._mark = arrived if ring.unread else self.clock()

    def _report(self, batch: int, rates: list[float], seconds: float | None) -> None:
        fallback = self._fallback_of(batch)
        if fallback is None or self._mode == "start":
            return
        for rate in rates:
            if self._mode == "drafted":
                fallback.speculated(rate, seconds)
            else:
                fallback.decoded(seconds)

    def _write(self, sequences: list[OutputSequence], rows: Rows, prefill: bool = False) -> list[float]:
        """Write the tokens of steps to the sequences of the batch at that time, up to their ends. Return for each step
        the tokens that it emitted per sequence; steps after all ends are left out.
        """
        rates = []
        for step in rows:
            emitted = unfinished = 0
            for item, (count, *tokens) in zip(sequences, step, strict=False):  # a row of the ring has room for more
                item.committed += count + 1
                if item.finish_reason:
                    continue  # it is decoded until it leaves
                kept = self.writer.write(item, tokens[: count + 1], count)
                emitted, unfinished = emitted + count + 1, unfinished + 1
                if not prefill:
                    item.accepted_lengths.append(kept)
                    paused = self._mode == "autoregressive" and self.stepper.predictor is not None
                    item.autoregressive_steps += paused
            if unfinished:
                rates.append(emitted / unfinished)
        return rates
