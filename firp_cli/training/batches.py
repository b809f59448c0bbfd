"""Which conversations a run learns from, in which order, and the thread that reads them ahead of the training step.

Everything here is a pure function of the seed, the epoch and the number of a micro-batch: a resumed run and a run on
more ranks see the same data. Micro-batch m * R + r of the epoch goes to rank r of R at its micro-step m, so R ranks
equal one rank with R times the gradient accumulation.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from firp_cli.predictors.anchors import Anchors, Sequenced, choose_anchors, collate
from firp_cli.predictors.base import SequenceBatch

PREFETCH = 4  # micro-batches read ahead
VALIDATION_EPOCH = 1 << 31  # stands for the epoch in the anchors' seeds of validation
POLL_SECONDS = 0.1


@dataclass
class MicroBatch:
    """One forward's worth of conversations; `indices` are their numbers in the store."""

    batch: SequenceBatch
    anchors: Anchors
    indices: list[int]


def split_validation(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the training and of the validation conversations, ascending.

    The conversations with the lowest hash of (seed, number) are held out, so most stay held out when a store grows. At
    least one is, and at least one is trained on, wherever fraction > 0 and there are two.
    """
    held = min(count - 1, max(1, round(count * fraction))) if fraction > 0 and count > 1 else 0
    ranked = sorted(range(count), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())
    return sorted(ranked[held:]), sorted(ranked[:held])


def anchor_seed(seed: int, epoch: int, index: int) -> int:
    """Seed of the anchors drawn from conversation `index` in an epoch."""
    state = np.random.SeedSequence([seed & 0xFFFFFFFF, epoch, index]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


class Order:
    """The training conversations as an endless row of micro-batches.

    An epoch is a fresh shuffle cut into micro-batches; the remainder that fills no optimizer step is left out, and a
    store too small for one step is gone round more than once within it.
    """

    def __init__(self, indices: Sequence[int], micro_batch_size: int, per_step: int, seed: int) -> None:
        self.indices = list(indices)
        self.size = min(micro_batch_size, len(self.indices))
        self.per_step = per_step  # micro-batches of one optimizer step, over all ranks
        self.seed = seed
        self.micro_batches = len(self.indices) // self.size
        self.steps_per_epoch = max(1, self.micro_batches // per_step)
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def epoch(self, number: int) -> list[int]:
        """The conversations in the order of an epoch."""
        if self._shuffled[0] != number:
            generator = np.random.default_rng([self.seed & 0xFFFFFFFF, number])
            self._shuffled = (number, [self.indices[place] for place in generator.permutation(len(self.indices))])
        return self._shuffled[1]

    def conversations(self, step: int, place: int) -> tuple[list[int], int]:
        """Conversations and epoch of micro-batch `place` (0..per_step-1) of optimizer step `step` (from 0)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = (step_in_epoch * self.per_step + place) % self.micro_batches * self.size
        return self.epoch(epoch)[start : start + self.size], epoch


class Reader:
    """Makes micro-batches: reads conversations, pads them, draws their anchors, moves them to the teacher's device."""

    def __init__(
        self,
        store: Sequence[Sequenced],
        steps: int | Sequence[int],
        anchors_per_sequence: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.store, self.steps, self.limit, self.seed = store, steps, anchors_per_sequence, seed
        self.device, self.dtype = device, dtype

    def read(self, indices: list[int], epoch: int) -> MicroBatch:
        batch = collate([self.store[index] for index in indices])
        seeds = [anchor_seed(self.seed, epoch, index) for index in indices]
        anchors = choose_anchors(batch, self.steps, self.limit, seeds)
        on_device = Anchors(anchors.index.to(self.device), anchors.valid.to(self.device))
        return MicroBatch(batch.to(self.device, self.dtype), on_device, indices)


class Prefetcher:
    """Reads micro-batches in a thread; iterate to get them in order. `waited` sums the seconds spent waiting."""

    def __init__(self, reader: Reader, wanted: Iterator[tuple[list[int], int]]) -> None:
        self.waited = 0.0
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=PREFETCH)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(reader, wanted), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, reader: Reader, wanted: Iterator[tuple[list[int], int]]) -> None:
        try:
            for indices, epoch in wanted:
                if not self._put(reader.read(indices, epoch)):
                    return
            self._put(None)
        except BaseException as error:  # raised again where the micro-batch is asked for
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        began = time.perf_counter()
        item = self._queue.get()
        self.waited += time.perf_counter() - began
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop reading; what was read ahead is dropped."""
        self._stopped.set()
        self._thread.join()
