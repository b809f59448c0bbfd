"""Kept draft states: other ranks read them, kills and crashes are survived, a full disk stops only the keeping."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firp_cli.training.draft_states import DraftStates, rounded

SHAPE = (3, 8)  # steps, hidden size
COUNTS = [4, 2, 5, 1]  # anchors of each conversation


def states(index: int, batch: int = 1) -> Tensor:
    """Return states (A, k, d) of a conversation, as half precision keeps them."""
    generator = torch.Generator().manual_seed(index)
    return rounded(torch.randn(COUNTS[index], *SHAPE, generator=generator))


def write(kept: DraftStates, *indices: int) -> None:
    """Write conversations as one micro-batch: padded with numbers that must not be kept."""
    most = max(COUNTS[index] for index in indices)
    padded = torch.full((len(indices), most, *SHAPE), 77.0)
    for row, index in zip(padded, indices, strict=True):
        row[: COUNTS[index]] = states(index)
    kept.write(list(indices), padded, [COUNTS[index] for index in indices])


def check(kept: DraftStates, *indices: int) -> None:
    """Assert that a micro-batch is read as it was written, padded with zeros."""
    found = kept.read(list(indices))
    assert found is not None
    assert found.shape == (len(indices), max(COUNTS[index] for index in indices), *SHAPE)
    for row, index in zip(found, indices, strict=True):
        assert torch.equal(row[: COUNTS[index]].float(), states(index))
        assert not row[COUNTS[index] :].any()


@pytest.mark.parametrize("on_disk", [True, False])
def test_states_are_read_as_written(on_disk: bool, tmp_path: Path) -> None:
    """In other micro-batches too; a conversation that is missing makes the whole micro-batch missing."""
    kept = DraftStates(SHAPE, tmp_path / "kept" if on_disk else None, "key")
    assert kept.read([0]) is None
    write(kept, 0, 1, 2)
    check(kept, 0, 1, 2)
    check(kept, 2, 0)
    check(kept, 1)
    assert kept.read([1, 3]) is None
    write(kept, 3, 1)
    check(kept, 1, 3)
    assert kept.failed is None
    if on_disk:
        files = sorted(path.name for path in (tmp_path / "kept").iterdir())
        assert files == ["index-0.jsonl", "key.json", "states-0.bin"]
        size = sum(COUNTS) * SHAPE[0] * SHAPE[1] * 2
        assert (tmp_path / "kept" / "states-0.bin").stat().st_size == size, "each conversation is written once"


@pytest.mark.parametrize("on_disk", [True, False])
def test_known_conversations_keep_their_first_states(on_disk: bool, tmp_path: Path) -> None:
    kept = DraftStates(SHAPE, tmp_path if on_disk else None, "key")
    write(kept, 0)
    kept.write([0], torch.zeros(1, COUNTS[0], *SHAPE), [COUNTS[0]])
    check(kept, 0)


@pytest.mark.parametrize("on_disk", [True, False])
def test_conversations_without_anchors_are_kept(on_disk: bool, tmp_path: Path) -> None:
    kept = DraftStates(SHAPE, tmp_path if on_disk else None, "key")
    kept.write([7], torch.full((1, 4, *SHAPE), 77.0), [0])
    alone = kept.read([7])
    assert alone is not None and alone.shape == (1, 0, *SHAPE)
    write(kept, 1)
    found = kept.read([7, 1])
    assert found is not None and found.shape == (2, COUNTS[1], *SHAPE)
    assert not found[0].any() and torch.equal(found[1].float(), states(1))


def test_rounded_states_are_those_that_are_read(tmp_path: Path) -> None:
    whole = torch.randn(1, 4, *SHAPE)
    kept = DraftStates(SHAPE, tmp_path, "key")
    kept.write([0], whole, [4])
    found = kept.read([0])
    assert found is not None and torch.equal(found.to(whole.dtype), rounded(whole))
    assert rounded(whole).dtype == whole.dtype and torch.equal(rounded(rounded(whole)), rounded(whole))


@pytest.mark.parametrize(
    ("changed", "survives"),
    [({}, True), ({"key": ["a", 2]}, False), ({"shape": (2, 12)}, False), ({"key": None}, False)],
)
def test_other_key_empties_the_folder(changed: dict[str, Any], survives: bool, tmp_path: Path) -> None:
    write(DraftStates(SHAPE, tmp_path, ["a", 1]), 0, 1)
    options: dict[str, Any] = {"shape": SHAPE, "folder": tmp_path, "key": ["a", 1]} | changed
    again = DraftStates(**options)
    assert (again.read([0, 1]) is not None) == survives
    assert (tmp_path / "states-0.bin").exists() == survives
    if survives:
        check(again, 1, 0)


def test_damaged_key_empties_the_folder(tmp_path: Path) -> None:
    write(DraftStates(SHAPE, tmp_path, "key"), 0)
    (tmp_path / "key.json").write_text('{"shape": [3,')
    again = DraftStates(SHAPE, tmp_path, "key")
    assert again.read([0]) is None
    write(again, 0)
    check(DraftStates(SHAPE, tmp_path, "key"), 0)


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_cut_last_line_of_the_index_is_forgotten(cut: int, tmp_path: Path) -> None:
    """A kill cut the line: its conversation is written again, after the bytes that the kill left."""
    write(DraftStates(SHAPE, tmp_path, "key"), 0, 1)
    index = tmp_path / "index-0.jsonl"
    index.write_bytes(index.read_bytes()[:-cut])
    again = DraftStates(SHAPE, tmp_path, "key")
    check(again, 0)
    assert again.read([1]) is None
    write(again, 2, 1)
    for kept in (again, DraftStates(SHAPE, tmp_path, "key")):
        check(kept, 0, 1, 2)
    assert [json.loads(line)["conversation"] for line in index.read_text().splitlines()] == [0, 2, 1]


@pytest.mark.parametrize("cut", [1, 40])
def test_torn_states_file_is_survived(cut: int, tmp_path: Path) -> None:
    """The index line arrived, the states did not: the conversation is missing, and later ones are right."""
    write(DraftStates(SHAPE, tmp_path, "key"), 0, 1)
    path = tmp_path / "states-0.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    again = DraftStates(SHAPE, tmp_path, "key")
    check(again, 0)
    assert again.read([1]) is None
    write(again, 2)
    check(again, 0, 2)
    found = again.read([1])
    assert found is None or torch.equal(found[0].float(), states(1)), "no states of another conversation"
    write(again, 1)
    for kept in (again, DraftStates(SHAPE, tmp_path, "key")):
        check(kept, 0, 1, 2)


def test_unfinished_states_without_a_line_are_skipped(tmp_path: Path) -> None:
    write(DraftStates(SHAPE, tmp_path, "key"), 0)
    with (tmp_path / "states-0.bin").open("ab") as stream:
        stream.write(b"torn!")
    again = DraftStates(SHAPE, tmp_path, "key")
    write(again, 1)
    check(again, 0, 1)


def test_ranks_read_each_others_states(tmp_path: Path) -> None:
    first, second = (DraftStates(SHAPE, tmp_path, "key", rank) for rank in (0, 1))
    write(first, 0)
    write(second, 1)
    check(first, 0, 1)
    check(second, 1, 0)
    write(first, 2)
    check(second, 2)
    write(second, 0)
    assert len((tmp_path / "index-1.jsonl").read_text().splitlines()) == 1, "known from the other rank"
    check(DraftStates(SHAPE, tmp_path, "key", rank=5), 0, 1, 2)


def test_other_ranks_unfinished_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    first, second = (DraftStates(SHAPE, tmp_path, "key", rank) for rank in (0, 1))
    write(second, 1, 3)
    whole = (tmp_path / "index-1.jsonl").read_bytes()
    (tmp_path / "index-1.jsonl").write_bytes(whole[:-4])
    check(first, 1)
    assert first.read([3]) is None
    (tmp_path / "index-1.jsonl").write_bytes(whole)
    check(first, 3, 1)


def test_failure_to_write_stops_keeping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = DraftStates(SHAPE, tmp_path, "key")
    write(kept, 0)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    write(kept, 1, 2)
    monkeypatch.undo()
    assert kept.failed is not None and kept.failed.errno == errno.ENOSPC
    write(kept, 3)
    assert all(kept.read([index]) is None for index in (1, 2, 3))
    check(kept, 0)
