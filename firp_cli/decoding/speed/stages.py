"""Stages of a pipeline on one or several ranks: their assignment, and the states and predictions sent each tick.

Every rank runs its own stages and receives all predictions, so all ranks take the same decisions without a master.
Shapes: B sequences, M rows, n stages of this rank, r stages, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from firp_cli.errors import UsageError


class PipelineStages:
    """Stages `mine` of this rank, of a pipeline of `loops` stages. A single rank runs them all and sends nothing."""

    def __init__(self, loops: int, rank: int = 0, size: int = 1) -> None:
        if size > loops:
            raise UsageError(f"{size} ranks are too many: the pipeline has {loops} stages, so at most {loops}")
        self.rank, self.size = rank, size
        self.first, self.last = rank == 0, rank == size - 1
        length, longer = divmod(loops, size)
        starts = [length * place + min(place, longer) for place in range(size + 1)]
        self._parts = [range(first, last) for first, last in pairwise(starts)]
        self.mine = self._parts[rank]

    def layers(self, boundaries: Sequence[int], num_layers: int) -> range:
        """Return the layers that this rank's stages run, of a teacher whose loops end at `boundaries`."""
        ends = (0, *boundaries[:-1], num_layers)
        return range(ends[self.mine.start], ends[self.mine.stop])

    def pass_on(self, state: Tensor) -> Tensor | None:
        """Send a state to the next rank and return the previous rank's of the same shape; None on the first rank."""
        received = None
        waiting = []
        if not self.last:
            waiting.append(dist.isend(state.contiguous(), self.rank + 1))
        if not self.first:
            received = torch.empty_like(state)
            waiting.append(dist.irecv(received, self.rank - 1))
        for work in waiting:
            assert work is not None
            work.wait()
        return received

    def receive(self, like: Tensor) -> Tensor:
        """Return the state that the previous rank sends with `send`, in the shape of `like`."""
        state = torch.empty_like(like)
        dist.recv(state, self.rank - 1)
        return state

    def send(self, state: Tensor) -> None:
        """Send a state to the next rank, which waits for it in `receive`."""
        dist.send(state.contiguous(), self.rank + 1)

    def share(self, predictions: Tensor) -> Tensor:
        """Return the predictions of all stages (r, B), given this rank's (n, B)."""
        if self.size == 1:
            return predictions
        widest = len(self._parts[0])
        padded = predictions.new_zeros(widest, predictions.shape[1])
        padded[: predictions.shape[0]] = predictions
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        return torch.cat([part[: len(stages)] for part, stages in zip(gathered, self._parts, strict=True)])

    def from_last(self, tokens: Tensor) -> Tensor:
        """Return the last rank's tokens, on every rank."""
        if self.size > 1:
            dist.broadcast(tokens, self.size - 1)
        return tokens
