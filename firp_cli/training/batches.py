"""Conversations of a training run, their order, and the threads that read them ahead of the training step.

The order is a pure function of the seed, the epoch and the number of an optimizer step: a resumed run, a run on more
ranks and one with more readers see the same data. The micro-batches of a step are distributed over the ranks, so R
ranks equal one rank with R times the gradient accumulation.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Barrier

import numpy as np
import torch
from torch import Tensor

from firp_cli.config import TrainingConfig
from firp_cli.predictors.anchors import Anchors, Sequenced, choose_anchors, collate
from firp_cli.predictors.base import SequenceBatch
from firp_cli.store.reader import FINAL, Store, decode_states, state_names
from firp_cli.training.draft_states import DraftStates

PREFETCH = 4  # micro-batches read ahead with one reader; each further reader adds one
SORTED = 8  # micro-batches among which conversations are sorted by length, at least
COUNTED = 2000  # conversations that give the frequent tokens
VALIDATION_EPOCH = 1 << 31  # takes the place of the epoch in the anchors' seeds of validation


@dataclass
class MicroBatch:
    """Conversations of one forward with their anchors; `indices` are their numbers in the store.

    `states`: draft states (B, A, k, d); None until they are computed.
    """

    batch: SequenceBatch
    anchors: Anchors
    indices: list[int]
    states: Tensor | None = None


def split_validation(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers of the training and of the validation conversations, ascending.

    The conversations with the lowest hash of (seed, number) are held out, so most stay held out when a store grows.
    With fraction > 0 and two conversations or more, each part has at least one.
    """
    held = min(count - 1, max(1, round(count * fraction))) if fraction > 0 and count > 1 else 0
    ranked = sorted(range(count), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())
    return sorted(ranked[held:]), sorted(ranked[:held])


def anchor_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed of the anchors drawn from conversation `index` in an epoch."""
    state = np.random.SeedSequence([seed & 0xFFFFFFFF, epoch, index]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


class Order:
    """Endless sequence of optimizer steps over the training conversations, each of `per_step` micro-batches.

    An epoch is a new shuffle cut into steps. The remainder that fills no step is omitted; a store too small for one
    step is repeated within it. With `lengths` (tokens by conversation number) the conversations of a step, or of
    several small steps, are sorted by length before they are cut into micro-batches: a forward then needs little
    padding, and ranks take equally long.
    """

    def __init__(
        self,
        indices: Sequence[int],
        micro_batch_size: int,
        per_step: int,
        seed: int,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.indices = list(indices)
        self.size = min(micro_batch_size, len(self.indices))
        self.per_step = per_step  # micro-batches of one optimizer step, over all ranks
        self.seed = seed
        self.lengths = lengths
        self.micro_batches = len(self.indices) // self.size
        self.steps_per_epoch = max(1, self.micro_batches // per_step)
        self._shuffled: tuple[int, list[int]] = (-1, [])
        self._step: tuple[int, list[list[int]]] = (-1, [])

    def epoch(self, number: int) -> list[int]:
        """Return the conversations in the order of an epoch."""
        if self._shuffled[0] != number:
            generator = np.random.default_rng([self.seed & 0xFFFFFFFF, number])
            shuffled = [self.indices[place] for place in generator.permutation(len(self.indices))]
            if self.lengths is not None and self.per_step < SORTED:
                shuffled = self._of_similar_length(shuffled, generator)
            self._shuffled = (number, shuffled)
        return self._shuffled[1]

    def _of_similar_length(self, shuffled: list[int], generator: np.random.Generator) -> list[int]:
        """Return the conversations with those of similar length in the same step, and the steps in random order."""
        size = self.per_step * self.size
        whole = len(shuffled) // size * size
        together = -(-SORTED // self.per_step) * size
        steps: list[list[int]] = []
        for start in range(0, whole, together):
            part = self._longest_first(shuffled[start : min(start + together, whole)])
            steps += [part[place : place + size] for place in range(0, len(part), size)]
        ordered = [index for place in generator.permutation(len(steps)) for index in steps[place]]
        return ordered + shuffled[whole:]

    def _longest_first(self, indices: list[int]) -> list[int]:
        lengths = self.lengths
        return indices if lengths is None else sorted(indices, key=lambda index: (-lengths[index], index))

    def conversations(self, step: int, place: int) -> tuple[list[int], int]:
        """Return conversations and epoch of micro-batch `place` (0..per_step-1) of optimizer step `step` (from 0)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if self._step[0] != step:
            self._step = (step, self._micro_batches(self.epoch(epoch), step_in_epoch))
        return self._step[1][place], epoch

    def _micro_batches(self, order: list[int], step_in_epoch: int) -> list[list[int]]:
        starts = [
            (step_in_epoch * self.per_step + place) % self.micro_batches * self.size for place in range(self.per_step)
        ]
        chosen = self._longest_first([index for start in starts for index in order[start : start + self.size]])
        return [chosen[start : start + self.size] for start in range(0, len(chosen), self.size)]

    def place(self, micro: int, rank: int, ranks: int) -> int:
        """Return the micro-batch of a step that `rank` of `ranks` takes as its micro-batch `micro`.

        Every second round goes through the ranks backwards, so that no rank always gets the longer ones.
        """
        return micro * ranks + (ranks - 1 - rank if micro % 2 else rank)

    def of_rank(self, first: int, last: int, rank: int, ranks: int) -> Iterator[tuple[list[int], int]]:
        """Yield conversations and epoch of a rank's micro-batches in optimizer steps first..last-1, in order."""
        for step in range(first, last):
            for micro in range(self.per_step // ranks):
                yield self.conversations(step, self.place(micro, rank, ranks))


def data_order(
    settings: TrainingConfig,
    indices: Sequence[int],
    ranks: int,
    lengths: Sequence[int] | None = None,
    per_step: int | None = None,
) -> Order:
    """Return the order in which a group of `ranks` reads the training conversations.

    Args:
        lengths: in tokens, by conversation number.
        per_step: micro-batches of an optimizer step, over all ranks; None: as the settings define it.
    """
    per_step = per_step or settings.gradient_accumulation * ranks
    return Order(indices, settings.micro_batch_size, per_step, settings.seed, lengths if settings.balance else None)


def planned_steps(settings: TrainingConfig, order: Order) -> int:
    """Return the number of optimizer steps of a run."""
    steps = settings.epochs * order.steps_per_epoch
    return steps if settings.max_steps is None else min(steps, settings.max_steps)


def sequence_lengths(store: Sequence[Sequenced]) -> Sequence[int]:
    """Return the tokens of every conversation, without reading states where the store knows the lengths."""
    known: Sequence[int] | None = getattr(store, "lengths", None)
    return [len(item.input_ids) for item in store] if known is None else known


def frequent_tokens(store: Sequence[Sequenced], indices: Sequence[int], count: int, vocabulary: int) -> Tensor:
    """Return the `count` most frequent tokens (S,) of conversations spread over `indices`, most frequent first.

    Spread, since a store of several data sets holds one after the other.
    """
    counts = torch.zeros(vocabulary, dtype=torch.long)
    counted = min(COUNTED, len(indices))
    for index in (indices[place * len(indices) // counted] for place in range(counted)):
        counts += torch.bincount(token_pair(store, index)[0], minlength=vocabulary)
    return counts.argsort(descending=True, stable=True)[:count]


def token_pair(store: Sequence[Sequenced], index: int) -> tuple[Tensor, Tensor]:
    """Return tokens (T,) and loss mask (T,) of a conversation, without reading or computing states where the store
    keeps them apart.
    """
    if isinstance(store, Store):
        rows = store.stored(index)
        return rows["input_ids"].long(), rows["loss_mask"]
    corpus = getattr(store, "corpus", None)
    if corpus is None:
        return store[index].input_ids, store[index].loss_mask
    return corpus.input_ids[index].long(), corpus.loss_mask[index]


class Reader:
    """Reader of micro-batches: padded conversations with their anchors, on the teacher's device.

    `kept`: draft states of earlier epochs. The anchors are then the same in every epoch.
    """

    def __init__(
        self,
        store: Sequence[Sequenced],
        steps: int | Sequence[int],
        anchors_per_sequence: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.kept: DraftStates | None = None
        self.store, self.steps, self.limit, self.seed = store, steps, anchors_per_sequence, seed
        self.device, self.dtype = device, dtype

    def read(self, indices: list[int], epoch: int) -> MicroBatch:
        """Return the micro-batch of these conversations in an epoch."""
        batch = read_batch(self.store, indices)
        if self.kept is not None:
            epoch = 0
        seeds = [anchor_seed(self.seed, epoch, index) for index in indices]
        anchors = choose_anchors(batch, self.steps, self.limit, seeds)
        on_device = Anchors(anchors.index.to(self.device), anchors.valid.to(self.device))
        item = MicroBatch(batch.to(self.device, self.dtype), on_device, indices)
        self.complete(item)
        return item

    def complete(self, item: MicroBatch) -> None:
        """Read draft states that were kept since the micro-batch was read.

        A micro-batch may be read ahead of the steps that compute its states. To compute them again, beside other
        conversations, would round them differently, so that a resumed run would not equal an uninterrupted one.
        """
        states = None if self.kept is None or item.states is not None else self.kept.read(item.indices)
        if states is not None:
            item.states = states.to(self.device, self.dtype)

    def keep(self, item: MicroBatch) -> None:
        """Keep the draft states of a micro-batch for later epochs."""
        if self.kept is not None and item.states is not None:
            self.kept.write(item.indices, item.states, item.anchors.valid[:, :, 0].sum(dim=1).tolist())


def read_batch(store: Sequence[Sequenced], indices: Sequence[int]) -> SequenceBatch:
    """Return conversations of a store, right-padded.

    A store with `fetch` gets all of them in one call: one that computes states then runs one forward.
    """
    if isinstance(store, Store):
        return _read_mapped(store, indices)
    fetch: Callable[[Sequence[int]], list[Sequenced]] | None = getattr(store, "fetch", None)
    return collate([store[index] for index in indices] if fetch is None else fetch(indices))


def _read_mapped(store: Store, indices: Sequence[int]) -> SequenceBatch:
    """Return the batch of `collate` without new memory for each conversation: its pages cost more time than reading."""
    found = [store.stored(index) for index in indices]
    lengths = [len(rows["input_ids"]) for rows in found]

    def padded(name: str) -> Tensor:
        scale = f"{name}.scale"
        first = found[0][name]
        dtype = torch.float32 if scale in found[0] else first.dtype
        batch = torch.empty(len(found), max(lengths), *first.shape[1:], dtype=dtype)
        for rows, length, target in zip(found, lengths, batch, strict=True):
            decode_states(rows[name], rows.get(scale), out=target[:length])
            target[length:] = 0
        return batch

    hidden = {layer: padded(name) for name, layer in state_names(store.layers).items() if layer is not None}
    return SequenceBatch(
        input_ids=padded("input_ids").long(),
        lengths=torch.tensor(lengths),
        loss_mask=padded("loss_mask"),
        final=padded(FINAL),
        hidden=hidden,
    )


def _single_threaded_pool(readers: int) -> ThreadPoolExecutor:
    """Return a pool whose threads compute on one core each.

    A second team of workers would take cores from the training step for longer than reading lasts: idle workers spin.
    """
    pool, barrier = ThreadPoolExecutor(readers, thread_name_prefix="reader"), Barrier(readers)

    def use_one_core(_: int) -> None:
        torch.get_num_threads()  # the first call in a thread takes over the number of all others
        torch.set_num_threads(1)
        barrier.wait()  # each thread of the pool runs this function once

    before = torch.get_num_threads()
    list(pool.map(use_one_core, range(readers)))
    torch.set_num_threads(before)  # torch's number is per thread, that of the matrix library is per process
    return pool


class Prefetcher:
    """Iterator over micro-batches in order, read ahead in `readers` threads. `waited`: seconds of waiting so far."""

    def __init__(self, reader: Reader, wanted: Iterator[tuple[list[int], int]], readers: int = 1) -> None:
        self.waited = 0.0
        self._reader, self._wanted = reader, wanted
        computes = hasattr(reader.store, "fetch")  # computing states needs all cores
        self._pool = ThreadPoolExecutor(readers) if computes else _single_threaded_pool(readers)
        self._ahead: deque[Future[MicroBatch]] = deque()
        self._submit(PREFETCH + readers - 1)

    def _submit(self, count: int) -> None:
        for indices, epoch in islice(self._wanted, count):
            self._ahead.append(self._pool.submit(self._reader.read, indices, epoch))

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        if not self._ahead:
            raise StopIteration
        began = time.perf_counter()
        item = self._ahead.popleft().result()
        self._reader.complete(item)
        self.waited += time.perf_counter() - began
        self._submit(1)
        return item

    def close(self) -> None:
        """Stop reading and drop what was read ahead."""
        self._pool.shutdown(wait=True, cancel_futures=True)
