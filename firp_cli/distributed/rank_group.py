"""Messages between the ranks of a run: small values and token tensors over gloo, whatever the states travel over.

A rank may wait for hours until the others have done their share; that is no fault, so nothing here times out. A peer
that died closes its connections, which ends the wait at once.
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
PATIENCE = timedelta(days=365)
PIECE = 1 << 26  # entries of a tensor that travel at once
POLL_SECONDS = 0.001, 0.2  # between two looks whether all are here: at first, and after a while


class RankGroup:
    """The ranks of a run as one rank sees them: itself is number `rank` of `size`. Alone, nothing is sent.

    Every method but the constructor is collective: all ranks call it, in the same order. All raise PeerLostError when
    a rank has died.
    """

    def __init__(self) -> None:
        """A group of this process alone."""
        self.rank, self.size = 0, 1
        self._group: Any = None

    @classmethod
    def join(cls) -> RankGroup:
        """The ranks that this process was started among; alone where it was not."""
        joined = cls()
        if world_size() > 1:
            start()
            joined.rank, joined.size = rank(), world_size()
            with talking():
                joined._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
        return joined

    @property
    def main(self) -> bool:
        """True on rank 0, which writes what there is one of and talks to the user."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's small value, by rank, on every rank."""
        if self._group is None:
            return [value]
        found: list[Any] = [None] * self.size
        self.wait()
        with talking():
            torch.distributed.all_gather_object(found, value, group=self._group)
        return found

    def run_on_all(self, work: Callable[[], T]) -> T:
        """Each rank's own `work()`. A FirpError of one is raised by all: the one of the lowest rank."""
        value, error = _attempt(work)
        _raise_first(self.gather(error))
        return value  # type: ignore[return-value]  # None only where an error was raised

    def run_on_main(self, work: Callable[[], T]) -> T:
        """What `work()` returns on rank 0, the only one to call it. Its FirpError is raised by all."""
        outcome: list[Any] = list(_attempt(work)) if self.main else [None, None]
        if self._group is not None:
            self.wait()
            with talking():
                torch.distributed.broadcast_object_list(outcome, src=0, group=self._group)
        _raise_first([outcome[1]])
        return outcome[0]

    def gather_rows(self, mine: Tensor) -> Tensor:
        """The ranks' tensors (n, ...) one behind the other, by rank, on every rank; of one type, on the CPU."""
        if self._group is None:
            return mine
        counts = self.gather(len(mine))
        found = mine.new_empty(sum(counts), *mine.shape[1:])
        place = 0
        for source, count in enumerate(counts):
            part = found[place : place + count]
            if source == self.rank:
                part.copy_(mine)
            with talking():
                for piece in part.view(torch.uint8).split(PIECE) if count else ():
                    torch.distributed.broadcast(piece, src=source, group=self._group)
            place += count
        return found

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Until every rank is here; `meanwhile()` is called now and then, and signals are heard, which a collective
        alone would keep until it is done.
        """
        if self._group is None:
            return
        with talking():
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


def _raise_first(errors: list[FirpError | None]) -> None:
    for error in errors:
        if error is not None:
            error.agreed = True
            raise error


@contextlib.contextmanager
def talking() -> Iterator[None]:
    """Turn what the backend says about a lost peer into a line for the user."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(
            "another rank ended before its time (killed, out of memory, or its machine failed); "
            "what was finished is kept: run again with --resume"
        ) from error
