"""K/V cache against lists of numbers: each key contains the number of the row that wrote it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from firp_cli.teacher.kv_cache import KVCache

LAYERS, HEADS, SIZE = 2, 3, 4
FIRST_ROW = 1000  # rows of steps are numbered from here, positions of prompts from 0


def new_cache(batch: int, scratch: int, capacity: int, spread: int = 1) -> KVCache:
    shape: dict[str, Any] = {"heads": HEADS, "head_size": SIZE, "dtype": torch.float32, "device": torch.device("cpu")}
    return KVCache(LAYERS, batch, scratch, capacity, spread=spread, **shape)


def numbered(numbers_BM: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Return keys (B, H, M, D) with a number of their row, sequence, head and layer, and values with its negative."""
    batch, rows = numbers_BM.shape
    sequence = 10_000.0 * torch.arange(batch)[:, None, None]
    head = 100_000.0 * torch.arange(HEADS)[None, :, None]
    keys = (numbers_BM[:, None] + sequence + head + 1_000_000.0 * layer)[..., None].expand(batch, HEADS, rows, SIZE)
    return keys.contiguous(), -keys


def write(cache: KVCache, numbers_BM: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values that every layer gets for these rows."""
    return [cache.update(*numbered(numbers_BM, layer), layer) for layer in range(LAYERS)]


def prefill(cache: KVCache, lengths: list[int]) -> None:
    """Write positions 0..longest - 1 of every sequence, and commit its length."""
    numbers = torch.arange(max(lengths)).expand(len(lengths), -1)
    cache.begin_chunk(0, max(lengths))
    write(cache, numbers)
    cache.set_lengths(torch.tensor(lengths))


def step(cache: KVCache, rows: int, longest: int, first: int = FIRST_ROW) -> list[tuple[Tensor, Tensor]]:
    cache.begin(rows, longest)
    return write(cache, torch.arange(first, first + rows).expand(cache.batch, rows))


def prefix(cache: KVCache, sequence: int, layer: int = 0) -> list[int]:
    """Return the numbers of the committed rows after a check that heads, dimensions, keys and values agree."""
    count = int(cache.lengths[sequence])
    cache.begin(0, max(1, count))
    nothing = torch.zeros(cache.batch, HEADS, 0, SIZE)
    keys, values = cache.update(nothing, nothing, layer)
    kept = keys[sequence, :, :count] - 100_000.0 * torch.arange(HEADS)[:, None, None] - 1_000_000.0 * layer
    assert torch.equal(keys, -values)
    assert (kept == kept[:1, :, :1]).all()
    return [int(number) % 10_000 for number in kept[0, :, 0]]


@pytest.mark.parametrize("batch", [1, 3])
def test_update_returns_step_rows_then_prefix(batch: int) -> None:
    cache = new_cache(batch, scratch=6, capacity=9)
    prefill(cache, [5, 3, 4][:batch])
    for rows in (1, 4, 6):
        for layer, (keys, values) in enumerate(step(cache, rows, longest=5)):
            expected, _ = numbered(torch.tensor([[*range(FIRST_ROW, FIRST_ROW + rows), *range(5)]] * batch), layer)
            assert torch.equal(keys, expected)
            assert torch.equal(values, -expected)
    assert cache.lengths.tolist() == [5, 3, 4][:batch], "a step commits nothing"


def test_update_accepts_first_rows_only() -> None:
    """Rows that join at a later layer follow the earlier ones, in the slots announced for them."""
    cache = new_cache(2, scratch=5, capacity=4)
    prefill(cache, [3, 2])
    cache.begin(5, 3)
    first, second = torch.arange(2).expand(2, 2), torch.arange(5).expand(2, 5)
    keys, _ = cache.update(*numbered(first + 7, 0), 0)
    assert keys.shape[2] == 5 + 3
    assert keys[0, 0, [0, 1, 5, 6, 7], 0].tolist() == [7, 8, 0, 1, 2]
    keys, _ = cache.update(*numbered(second + 7, 1), 1)
    assert (keys[0, 0, :, 0] - 1_000_000).tolist() == [7, 8, 9, 10, 11, 0, 1, 2]


@pytest.mark.parametrize("rows", [2, 5])
def test_written_and_seen_equal_update(rows: int) -> None:
    """`written` and `seen` return the slots that `update` writes and returns."""
    caches = [new_cache(2, scratch=5, capacity=4) for _ in range(2)]
    for cache in caches:
        prefill(cache, [3, 2])
        cache.begin(5, 3)
    keys, values = numbered(torch.arange(rows).expand(2, rows) + 7, 1)
    expected = caches[0].update(keys, values, 1)
    for place, numbers in zip(caches[1].written(1, rows), (keys, values), strict=True):
        assert place.shape == numbers.shape
        place.copy_(numbers)
    for got, want in zip(caches[1].seen(1), expected, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(caches[0]._store, caches[1]._store)


def test_begin_chunk_writes_prompt_slots() -> None:
    cache = new_cache(2, scratch=3, capacity=8)
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        cache.begin_chunk(start, stop - start)
        for layer, (keys, values) in enumerate(write(cache, torch.arange(start, stop).expand(2, -1))):
            expected, _ = numbered(torch.arange(stop).expand(2, -1), layer)
            assert torch.equal(keys, expected)
            assert torch.equal(values, -expected)
    cache.set_lengths(torch.tensor([7, 2]))
    assert [prefix(cache, 0), prefix(cache, 1)] == [[*range(7)], [0, 1]]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_commit_keeps_accepted_rows_in_order(batch: int) -> None:
    """Commit paths of different lengths and nodes in several steps, and compare every layer."""
    cache = new_cache(batch, scratch=7, capacity=30, spread=4)
    lengths = [5, 1, 8][:batch]
    prefill(cache, lengths)
    expected = [list(range(length)) for length in lengths]
    generator = torch.Generator().manual_seed(batch)
    for number in range(5):
        rows = [7, 5, 7, 1, 4][number]
        first = FIRST_ROW + 10 * number
        step(cache, rows, longest=max(map(len, expected)), first=first)
        width = min(4, rows)
        picks = [torch.randperm(rows, generator=generator)[:width].sort().values for _ in range(batch)]
        counts = torch.randint(1, width + 1, (batch,), generator=generator)
        cache.commit(torch.stack(picks), counts)
        for text, pick, count in zip(expected, picks, counts.tolist(), strict=True):
            text += [first + row for row in pick[:count].tolist()]
        for sequence in range(batch):
            assert cache.lengths[sequence] == len(expected[sequence])
            for layer in range(LAYERS):
                assert prefix(cache, sequence, layer) == expected[sequence]


@pytest.mark.parametrize("batch", [1, 2])
def test_lengths_stop_at_the_capacity(batch: int) -> None:
    """A finished sequence that is decoded on changes neither other sequences' rows nor its own prefix."""
    cache = new_cache(batch, scratch=4, capacity=6, spread=4)
    prefill(cache, [5, 1][:batch])
    paths = torch.tensor([[0, 1, 2, 3]] * batch)
    for number in range(3):
        step(cache, 4, longest=6, first=FIRST_ROW + 10 * number)
        cache.commit(paths, torch.tensor([4, 1][:batch]))
    assert cache.lengths.tolist() == [6, 4][:batch]
    assert prefix(cache, 0)[:5] == [0, 1, 2, 3, 4]
    if batch == 2:
        assert prefix(cache, 1) == [0, FIRST_ROW, FIRST_ROW + 10, FIRST_ROW + 20]
    cache.set_lengths(torch.tensor([99, 2][:batch]))
    assert cache.lengths.tolist() == [6, 2][:batch]


def test_begin_refuses_too_large_step() -> None:
    cache = new_cache(1, scratch=4, capacity=6)
    for rows, longest in ((5, 3), (4, 7)):
        with pytest.raises(AssertionError):
            cache.begin(rows, longest)


def test_select_keeps_remaining_sequences() -> None:
    cache = new_cache(4, scratch=3, capacity=9, spread=2)
    prefill(cache, [4, 2, 6, 3])
    step(cache, 3, longest=6)
    cache.commit(torch.tensor([[0, 1], [0, 2], [0, 2], [1, 2]]), torch.tensor([1, 2, 2, 2]))
    before = [prefix(cache, sequence, layer) for layer in range(LAYERS) for sequence in (1, 2)]
    cache.select(torch.tensor([1, 2]))
    assert (cache.batch, cache.lengths.tolist()) == (2, [4, 8])
    assert [prefix(cache, place, layer) for layer in range(LAYERS) for place in (0, 1)] == before
    step(cache, 1, longest=8, first=FIRST_ROW + 50)
    cache.commit(torch.tensor([[0], [0]]), torch.tensor([1, 1]))
    assert prefix(cache, 1) == [*before[1], FIRST_ROW + 50]
    cache.select(torch.tensor([1]))
    assert (cache.batch, prefix(cache, 0)) == (1, [*before[1], FIRST_ROW + 50])


def test_repeat_gives_every_sequence_the_first_ones_prefix() -> None:
    cache = new_cache(3, scratch=2, capacity=6)
    cache.use(1)
    prefill(cache, [4])
    kept = [cache.seen(layer)[0][0, :, :4].clone() for layer in range(LAYERS)]
    cache.repeat(3, 4)
    cache.set_lengths(torch.tensor([4, 4, 4]))
    assert (cache.batch, cache.lengths.tolist()) == (3, [4, 4, 4])
    cache.begin(0, 4)
    for layer, first in enumerate(kept):
        keys, values = cache.seen(layer)
        assert torch.equal(keys, first.expand(3, -1, -1, -1)) and torch.equal(values, -keys)
    step(cache, 1, longest=4)
    cache.commit(torch.zeros(3, 1, dtype=torch.long), torch.tensor([1, 0, 1]))
    assert cache.lengths.tolist() == [5, 4, 5]


def test_use_empties_cache() -> None:
    cache = new_cache(3, scratch=2, capacity=5)
    prefill(cache, [5, 4, 3])
    cache.select(torch.tensor([2]))
    cache.use(2)
    assert (cache.batch, cache.lengths.tolist()) == (2, [0, 0])
    prefill(cache, [1, 2])
    assert [prefix(cache, 0), prefix(cache, 1)] == [[0], [0, 1]]
    cache.use(3)
    assert cache.lengths.tolist() == [0, 0, 0], "the removed sequence too"


def addresses(cache: KVCache) -> list[int]:
    """Return the addresses of the lengths and of the first slot of every layer's keys and values."""
    cache.begin(1, 3)
    return [cache.lengths.data_ptr(), *(part.data_ptr() for pair in write(cache, torch.zeros(1, 1)) for part in pair)]


def test_tensors_keep_addresses() -> None:
    """Captured CUDA graphs read and write these addresses."""
    cache = new_cache(3, scratch=4, capacity=5, spread=3)
    prefill(cache, [3, 3, 3])
    first = addresses(cache)
    step(cache, 4, longest=3)
    cache.commit(torch.tensor([[0, 1, 3]] * 3), torch.tensor([1, 2, 3]))
    assert addresses(cache) == first
    cache.select(torch.tensor([0, 2]))
    assert addresses(cache) == first
    cache.select(torch.tensor([1]))
    assert addresses(cache) == first
    cache.use(3)
    assert addresses(cache) == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_needed_equals_bytes(dtype: torch.dtype) -> None:
    shape: dict[str, Any] = {"layers": 3, "batch": 2, "scratch": 5, "capacity": 11, "heads": 2, "head_size": 8}
    shape["dtype"] = dtype
    cache = KVCache(**shape, device=torch.device("cpu"))
    assert cache.bytes() == KVCache.bytes_needed(**shape) == 3 * 2 * 2 * 2 * (5 + 11 + 1) * 8 * dtype.itemsize
    wider = KVCache(**shape, device=torch.device("cpu"), spread=4)
    assert wider.bytes() == KVCache.bytes_needed(**shape, spread=4) == 3 * 2 * 2 * 2 * (5 + 11 + 4) * 8 * dtype.itemsize
