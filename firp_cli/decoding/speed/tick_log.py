"""Record of a pipeline's ticks, from which its statistics are computed after decoding.

Shapes: T ticks, r stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from firp_cli.results import PipelineTrace


class TickLog:
    """Positions, expected tokens and predictions of all stages in each tick. Only `traces` reads from the device."""

    def __init__(self, loops: int, exits: Sequence[int], sequences: int) -> None:
        self.loops, self.exits = loops, list(exits)
        self.autoregressive_tokens = [0] * sequences
        self._runs: list[tuple[list[int], list[Tensor]]] = []  # (sequences in flight, (3, r, B) of each tick)

    def begin(self, sequences: Sequence[int]) -> None:
        """Start ticks of these sequences that continue no earlier tick."""
        self._runs.append((list(sequences), []))

    def select(self, kept: Sequence[int]) -> None:
        """Continue with these places of the batch only."""
        numbers = self._runs[-1][0]
        self._runs.append(([numbers[place] for place in kept], []))

    def add(self, tick: Tensor) -> None:
        """Record a tick: (3, r, B) of positions, expected and predicted tokens."""
        self._runs[-1][1].append(tick)

    def traces(self) -> list[PipelineTrace]:
        """Return the records of all sequences."""
        runs = [(numbers, torch.stack(ticks, dim=1).cpu()) for numbers, ticks in self._runs if ticks]  # (3, T, r, B)
        return [self._trace(number, runs) for number in range(len(self.autoregressive_tokens))]

    def _trace(self, sequence: int, runs: list[tuple[list[int], Tensor]]) -> PipelineTrace:
        ticks = [ticks[..., numbers.index(sequence)] for numbers, ticks in runs if sequence in numbers]
        trace = PipelineTrace(
            self.loops,
            self.exits,
            hits=[0] * len(self.exits),
            autoregressive_tokens=self.autoregressive_tokens[sequence],
        )
        if ticks:
            _count(trace, *torch.cat(ticks, dim=1))
        return trace


def _count(trace: PipelineTrace, position: Tensor, expected: Tensor, predicted: Tensor) -> None:
    """Fill a record from positions, expected and predicted tokens, (T, r) each."""
    valid = position >= 0
    changed = valid & (expected >= 0) & (predicted != expected)
    stages = torch.arange(valid.shape[1])
    deepest = torch.where(changed, stages, -1).amax(dim=1, keepdim=True)
    last = trace.loops - 1
    left = valid[:, last]
    trace.ticks, trace.left, trace.started = valid.shape[0], int(left.sum()), int(valid[:, 0].sum())
    trace.flushes = int((deepest >= 0).sum())
    trace.flushed = int((valid & (stages < deepest)).sum())
    trace.occupancy = valid.sum(dim=1).tolist()
    wrong = torch.zeros_like(left)
    for place, loop in enumerate(trace.exits):
        back = trace.loops - loop  # ticks between this exit and the last loop
        early = predicted[:, loop - 1].roll(back, dims=0)
        hit = early == predicted[:, last]
        trace.hits[place] = int((hit & left).sum())
        wrong |= left & ~hit
    trace.corrected = int(wrong.sum())


def total(traces: Sequence[PipelineTrace]) -> PipelineTrace | None:
    """Return the sum of several records, occupancy tick by tick from each one's first; None without records."""
    if not traces:
        return None
    whole = PipelineTrace(traces[0].loops, list(traces[0].exits), hits=[0] * len(traces[0].exits))
    for name in ("ticks", "left", "autoregressive_tokens", "started", "flushes", "flushed", "corrected"):
        setattr(whole, name, sum(getattr(trace, name) for trace in traces))
    whole.hits = [sum(column) for column in zip(*(trace.hits for trace in traces), strict=True)]
    longest = max(len(trace.occupancy) for trace in traces)
    whole.occupancy = [
        sum(trace.occupancy[tick] for trace in traces if tick < len(trace.occupancy)) for tick in range(longest)
    ]
    return whole
