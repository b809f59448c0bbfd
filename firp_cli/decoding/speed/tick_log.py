"""Record of a pipeline's ticks, from which its statistics are computed after decoding.

Shapes: T ticks, r stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from firp_cli.results import PipelineTrace


class TickLog:
    """Positions, expected tokens and predictions of all stages in each tick. Only `traces` reads from the device."""

    def __init__(self, loops: int, exits: Sequence[int]) -> None:
        self.loops, self.exits = loops, list(exits)
        self._runs: list[tuple[list[int], list[Tensor]]] = []  # (sequences in flight, (3, r, B) of each tick)

    def begin(self, sequences: Sequence[int]) -> None:
        """Start ticks of these sequences."""
        self._runs.append((list(sequences), []))

    def add(self, tick: Tensor) -> None:
        """Record a tick: (3, r, B) of positions, expected and predicted tokens."""
        self._runs[-1][1].append(tick)

    def traces(self, sequences: int) -> list[PipelineTrace]:
        """Return the records of all sequences."""
        parts = [[torch.empty(3, 0, self.loops, dtype=torch.long)] for _ in range(sequences)]
        for numbers, ticks in self._runs:
            if ticks:
                for number, part in zip(numbers, torch.stack(ticks, dim=1).cpu().unbind(-1), strict=True):
                    parts[number].append(part)
        return [self._trace(*torch.cat(part, dim=1)) for part in parts]

    def _trace(self, position: Tensor, expected: Tensor, predicted: Tensor) -> PipelineTrace:
        """Return a sequence's record from its positions, expected and predicted tokens, (T, r) each."""
        valid, stages = position >= 0, torch.arange(self.loops)
        changed = valid & (expected >= 0) & (predicted != expected)
        deepest = torch.where(changed, stages, -1).amax(dim=1, keepdim=True)
        left = valid[:, -1]
        hits = []
        wrong = torch.zeros_like(left)
        for loop in self.exits:
            # the last loop confirms this exit's prediction r - loop ticks later
            hit = predicted[:, loop - 1].roll(self.loops - loop) == predicted[:, -1]
            hits.append(int((hit & left).sum()))
            wrong |= left & ~hit
        return PipelineTrace(
            self.loops,
            list(self.exits),
            ticks=len(valid),
            left=int(left.sum()),
            started=int(valid[:, 0].sum()),
            flushes=int((deepest >= 0).sum()),
            flushed=int((valid & (stages < deepest)).sum()),
            corrected=int(wrong.sum()),
            hits=hits,
            occupancy=valid.sum(dim=1).tolist(),
        )


def total(traces: Sequence[PipelineTrace]) -> PipelineTrace | None:
    """Return the sum of several records, occupancy tick by tick from each one's first; None without records."""
    if not traces:
        return None
    names = ("ticks", "left", "autoregressive_tokens", "started", "flushes", "flushed", "corrected")
    return PipelineTrace(
        traces[0].loops,
        list(traces[0].exits),
        **{name: sum(getattr(trace, name) for trace in traces) for name in names},
        hits=[sum(column) for column in zip(*(trace.hits for trace in traces), strict=True)],
        occupancy=[sum(tick) for tick in zip_longest(*(trace.occupancy for trace in traces), fillvalue=0)],
    )
