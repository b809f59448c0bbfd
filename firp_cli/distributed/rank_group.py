"""Messages between the ranks of a run: small values and token tensors, sent over gloo.

A rank may wait for hours while another one works, so nothing here times out. A rank that dies closes its connections,
which ends the wait of the others at once.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from firp_cli.distributed.launch import start
from firp_cli.errors import FirpError, PeerLostError
from firp_cli.machine import rank, world_size

T = TypeVar("T")
TIMEOUT = timedelta(days=365)
CHUNK = 1 << 26  # bytes of a tensor in one message
POLL_SECONDS = 0.001, 0.2  # between two checks in `wait`: the first pause, and the longest


class RankGroup:
    """The ranks of a run; this process is number `rank` of `size`. A group of one rank sends nothing.

    Every method is collective: all ranks call it, in the same order. Each raises PeerLostError when a rank has died.
    """

    def __init__(self) -> None:
        """Make a group of this process alone."""
        self.rank, self.size = 0, 1
        self._group: Any = None

    @classmethod
    def join(cls) -> RankGroup:
        """Return the group of all ranks that a launcher started; without a launcher, of this process alone."""
        joined = cls()
        if world_size() > 1:
            start()
            joined.rank, joined.size = rank(), world_size()
            with peer_loss_reported():
                joined._group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
        return joined

    @property
    def main(self) -> bool:
        """Return True on rank 0, which writes shared files and prints messages."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the small values of all ranks, in the order of the ranks."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        self.wait()
        with peer_loss_reported():
            torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Call `work()` on every rank and return this rank's result.

        When it raises a FirpError on some ranks, all ranks raise that of the lowest one.
        """
        value, error = _attempt(work)
        raise_on_all_ranks(*self.gather(error))
        return value  # type: ignore[return-value]  # None only where an error was raised

    def run_on_main(self, work: Callable[[], T]) -> T:
        """Call `work()` on rank 0 only and return its result on every rank. All ranks raise its FirpError."""
        outcome: list[Any] = list(_attempt(work)) if self.main else [None, None]
        if self._group is not None:
            self.wait()
            with peer_loss_reported():
                torch.distributed.broadcast_object_list(outcome, src=0, group=self._group)
        raise_on_all_ranks(outcome[1])
        return outcome[0]

    def gather_rows(self, mine: Tensor) -> Tensor:
        """Return the tensors (n, ...) of all ranks, concatenated in the order of the ranks.

        `n` may differ between ranks. The tensors are on the CPU and have the same dtype.
        """
        if self._group is None:
            return mine
        counts = self.gather(len(mine))
        rows = mine.new_empty(sum(counts), *mine.shape[1:])
        place = 0
        for source, count in enumerate(counts):
            part = rows[place : place + count]
            if source == self.rank:
                part.copy_(mine)
            with peer_loss_reported():
                for piece in part.view(torch.uint8).split(CHUNK) if count else ():
                    torch.distributed.broadcast(piece, src=source, group=self._group)
            place += count
        return rows

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until every rank has called this, and call `meanwhile()` from time to time.

        Signals are handled while it waits; a blocking collective would delay them until it ends.
        """
        if self._group is None:
            return
        with peer_loss_reported():
            work = torch.distributed.barrier(group=self._group, async_op=True)
            pause, most = POLL_SECONDS
            while not work.is_completed():
                meanwhile()
                time.sleep(pause)
                pause = min(2 * pause, most)
            work.wait()


def _attempt(work: Callable[[], T]) -> tuple[T | None, FirpError | None]:
    try:
        return work(), None
    except FirpError as error:
        return None, error


def raise_on_all_ranks(*errors: FirpError | None) -> None:
    """Raise the first error that is not None. All ranks call this with the same errors, so it is printed once."""
    for error in errors:
        if error is not None:
            error.agreed = True
            raise error


@contextlib.contextmanager
def peer_loss_reported() -> Iterator[None]:
    """Turn the backend's error about a lost rank into PeerLostError."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(
            "another rank ended early (killed, out of memory, or its machine failed); "
            "what was finished is kept: run again with --resume"
        ) from error
