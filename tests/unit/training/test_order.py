"""Data order: the same for every number of ranks and readers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from firp_cli.store.reader import Store
from firp_cli.store.tools import merge_stores
from firp_cli.training.batches import Order, Prefetcher, Reader
from firp_cli.training.draft_states import DraftStates
from helpers.stores import LENGTHS, fill

MICRO, PER_STEP, STEPS = 2, 4, 7  # 24 conversations: 3 steps to an epoch, so three epochs are begun

Read = tuple[int, tuple[float, ...], tuple[int, ...]]  # a conversation: its number, states and anchors


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Store of 24 conversations of six lengths."""
    folder = tmp_path_factory.mktemp("order")
    for name in "abcd":
        fill(folder / name)
    merge_stores(folder / "all", [folder / name for name in "abcd"])
    return Store.open(folder / "all")


def read(store: Store, seed: int, ranks: int, readers: int, balance: bool, first: int = 0) -> list[Counter[Read]]:
    """Return by step the conversations that all ranks read, with so many reader threads each."""
    order_of = [
        Order(range(len(store)), MICRO, PER_STEP, seed, store.lengths if balance else None) for _ in range(ranks)
    ]
    steps: list[Counter[Read]] = [Counter() for _ in range(STEPS - first)]
    for rank, order in enumerate(order_of):
        reader = Reader(store, 2, 3, seed, torch.device("cpu"), torch.float32)
        prefetcher = Prefetcher(reader, order.of_rank(first, STEPS, rank, ranks), readers)
        for number, item in enumerate(prefetcher):
            batch = item.batch
            for row, index in enumerate(item.indices):
                used = item.anchors.index[row][item.anchors.valid[row].any(-1)].tolist()
                states = batch.final[row, : LENGTHS[index % 6]].flatten().tolist()
                steps[number // (PER_STEP // ranks)][index, tuple(states), tuple(used)] += 1
        prefetcher.close()
    return steps


@pytest.mark.parametrize("balance", [False, True], ids=["as shuffled", "balanced"])
def test_order_is_independent_of_ranks_and_readers(store: Store, balance: bool) -> None:
    expected = read(store, 3, 1, 1, balance)
    assert [step.total() for step in expected] == [MICRO * PER_STEP] * STEPS
    for ranks in (1, 2, 4):
        for readers in (1, 2, 3):
            assert read(store, 3, ranks, readers, balance) == expected, (ranks, readers)
    assert read(store, 3, 2, 3, balance, first=4) == expected[4:]  # taken up within an epoch


def test_epochs_are_shuffled_by_the_seed(store: Store) -> None:
    steps = [Counter(index for index, *_ in step) for step in read(store, 3, 2, 2, True)]
    epochs = [sum(steps[start : start + 3], Counter()) for start in (0, 3)]
    assert epochs == [Counter(range(24))] * 2 and steps[:3] != steps[3:6]
    other = [Counter(index for index, *_ in step) for step in read(store, 4, 2, 2, True)]
    assert other != steps and sum(other[:3], Counter()) == Counter(range(24))
    orders = [Order(range(24), MICRO, PER_STEP, 3) for _ in range(2)]
    assert orders[0].epoch(5) == orders[1].epoch(5) != orders[0].epoch(6)


def test_states_that_are_kept_after_a_batch_was_read_ahead_reach_it(store: Store) -> None:
    """The second of two equal micro-batches is read before the first one's draft states are computed."""
    reader = Reader(store, 2, 3, 0, torch.device("cpu"), torch.float32)
    reader.kept = DraftStates((2, 4))
    prefetcher = Prefetcher(reader, iter([([0, 1], 0), ([0, 1], 1)]))
    for ahead in prefetcher._ahead:
        assert ahead.result().states is None
    first = next(prefetcher)
    assert first.states is None
    valid = first.anchors.valid[:, :, 0]
    numbers = torch.arange(valid.numel() * 8, dtype=torch.float32).view(*valid.shape, 2, 4)
    first.states = numbers * valid[:, :, None, None]
    reader.keep(first)
    second = next(prefetcher)
    kept = valid.sum(dim=1).max()
    assert second.states is not None and torch.equal(second.states, first.states[:, :kept])
    prefetcher.close()


@pytest.mark.parametrize("per_step", [1, 3, 7])
def test_small_steps_hold_conversations_of_similar_length(per_step: int) -> None:
    lengths = torch.randint(20, 640, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    orders = [Order(range(1000), 8, per_step, 3, known) for known in (None, lengths)]
    padded = []
    for order in orders:
        size = order.steps_per_epoch
        steps = [[order.conversations(step, place)[0] for place in range(per_step)] for step in range(2 * size)]
        read = [index for step in steps[:size] for micro in step for index in micro]
        assert len(read) == len(set(read)) == size * 8 * per_step
        assert steps[:5] != steps[size : size + 5], "epochs differ"
        firsts = [max(lengths[index] for index in step[0]) for step in steps[:size]]
        assert firsts != sorted(firsts, reverse=True), "steps are in random order"
        rows = sum(max(lengths[index] for index in micro) * 8 for step in steps[:size] for micro in step)
        padded.append(rows / sum(lengths[index] for index in read))
    assert padded[1] < 1.15 and padded[0] > 1.5
