"""One batch on its way through decoding steps: the host launches, reads some steps later what was emitted, writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from firp_cli.decoding.cuda_graphs import StepGraphs, bucket
from firp_cli.decoding.fallback import PlainFallback
from firp_cli.decoding.output_ring import Rows
from firp_cli.decoding.sequences import OutputSequence, Writer
from firp_cli.decoding.step import DecodeStep, Mode

Clock = Callable[[], float]


class DecodeBatch:
    """Steps of one batch.

    Args:
        guards: by batch size, who decides when to decode plainly; None: nobody, every step is drafted.
        clock: seconds.
    """

    def __init__(
        self,
        stepper: DecodeStep,
        sequences: Sequence[OutputSequence],
        writer: Writer,
        graphs: StepGraphs | None = None,
        guards: Callable[[int], PlainFallback] | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.stepper, self.live, self.writer = stepper, list(sequences), writer
        self.graphs, self.guards, self.clock = graphs, guards, clock
        self._mode: Mode = "plain"  # of the steps that were launched and not read, and of the last one
        self._drafted = False  # by the last step
        self.prefilled = self._mark = clock()  # seconds are counted from the mark
        self._idle = True  # the device had nothing to do at the mark
        self._settled = True  # all steps behind the mark cost what they will cost again

    def prefill(self, prompts: Sequence[Sequence[int]], chunk: int) -> None:
        """K/V of the prompts and the first new tokens, which belong to no step."""
        self.stepper.prefill([list(prompt) for prompt in prompts], chunk)
        self._note(self.next_mode())
        self.stepper.step(max(map(len, prompts)) - 1, self._mode)
        for held, rows in self.stepper.ring.launched(self.live, drain=True):
            self._write(held, rows, prefill=True)
        self.prefilled = self._mark = self.clock()

    def next_mode(self) -> Mode:
        """What the next step is to be."""
        guard = self._guard(len(self.live))
        if self.stepper.predictor is None or (guard is not None and not guard.speculating):
            return "plain"
        return "drafted" if self._drafted else "start"

    def advance(self) -> None:
        """Launch a step. Before steps of another mode, and where a rest may be over, read what is still out instead:
        what is read at once has one mode, and plain steps are no more than were asked for.
        """
        mode, unread, guard = self.next_mode(), self.stepper.ring.unread, self._guard(len(self.live))
        over = guard is not None and not guard.speculating and unread >= guard.rest
        if unread and (over or mode != self._mode):
            self._read(self.stepper.ring.drain(self.live), drained=True)
        else:
            self.step(mode)

    def step(self, mode: Mode) -> None:
        """Launch a step behind those that the host has not read yet; read and write what has arrived by now."""
        stepper = self.stepper
        ahead = stepper.ring.unread * stepper.width
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
        """Let finished sequences leave the batch; returns whether any is left. Graphs are captured per batch size, so
        with them the finished ones leave when half of the batch has.
        """
        keep = [place for place, item in enumerate(self.live) if not item.finish_reason]
        enough = self.graphs is None or 2 * len(keep) <= len(self.live)
        if keep and len(keep) < len(self.live) and enough:
            self.stepper.select(torch.tensor(keep, device=self.stepper.teacher.device))
            self.live = [self.live[place] for place in keep]
        return bool(keep)

    def _guard(self, batch: int) -> PlainFallback | None:
        return self.guards(batch) if self.guards else None

    def _note(self, mode: Mode) -> None:
        self._mode, self._drafted = mode, mode != "plain"

    def _read(self, groups: list[tuple[Any, Rows]], drained: bool = False) -> None:
        """Write what arrived. The guard is told the seconds of a step where nothing but these steps took them: on a
        device that runs ahead not of the first group, which two groups' launches have delayed.
        """
        if not groups:
            return
        ring, arrived = self.stepper.ring, self.clock()
        timed = self._settled and (drained or not self._idle or not ring.late)
        seconds = (arrived - self._mark) / sum(len(rows) for _, rows in groups) if timed else None
        for held, rows in groups:
            unfinished = [item for item in held if not item.finish_reason]
            rates = self._write(held, rows)
            now = self.clock()
            for item in unfinished:
                item.decode_seconds = now - self.prefilled
            self._tell(len(held), rates, seconds)
        self._idle, self._settled = drained, True
        self._mark = arrived if ring.unread else self.clock()

    def _tell(self, batch: int, rates: list[float], seconds: float | None) -> None:
        guard = self._guard(batch)
        if guard is None or self._mode == "start":
            return
        for rate in rates:
            if self._mode == "drafted":
                guard.speculated(rate, seconds)
            else:
                guard.decoded(seconds)

    def _write(self, held: list[OutputSequence], rows: Rows, prefill: bool = False) -> list[float]:
        """What steps emitted, for the sequences that the batch held then: cut, count, hand on. Returns for each step
        how many tokens it emitted per sequence; steps behind all ends are left out.
        """
        rates = []
        for step in rows:
            emitted = sequences = 0
            for item, (count, *tokens) in zip(held, step, strict=False):  # a ring's row has room for more
                item.committed += count + 1
                if item.finish_reason:
                    continue  # decoded on until it left
                kept = self.writer.write(item, tokens[: count + 1], count)
                emitted, sequences = emitted + count + 1, sequences + 1
                if not prefill:
                    item.accepted_lengths.append(count + 1)
                    item.emitted.append(kept)
                    item.plain += self._mode == "plain" and self.stepper.predictor is not None
            if sequences:
                rates.append(emitted / sequences)
        return rates
