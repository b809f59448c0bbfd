"""Draft states of a frozen predictor, computed once and kept for later epochs.

    folder/states-R.bin     the states of rank R's conversations, (A, k, d) each, one after the other
    folder/index-R.jsonl    a line for each: conversation, offset in bytes, anchors A, checksum
    folder/key.json         what the states depend on

A conversation is in the index once its states are written whole, so a killed run continues with what it has. States
that a crash of the machine has lost fail their checksum and are missing. Ranks read each other's files where they share
the folder.
"""

from __future__ import annotations

import json
import os
import zlib
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

DTYPE = torch.bfloat16  # as the final states of most stores


def rounded(states: Tensor) -> Tensor:
    """Return states with the values that they have once they are kept, so that a resumed run computes the same."""
    return states.to(DTYPE).to(states.dtype)


class _Place(NamedTuple):
    """Place of a conversation's states: file, offset in bytes, number of anchors, checksum."""

    file: Path
    offset: int
    anchors: int
    checksum: int


class DraftStates:
    """Draft states by conversation, in a folder or, without one, in memory.

    Args:
        shape: (k, d). key: JSON values that the states depend on. Files with another key are removed.
        rank: number of this process among those that write to the folder.
    """

    def __init__(self, shape: tuple[int, int], folder: Path | None = None, key: Any = None, rank: int = 0) -> None:
        self.shape, self.folder = shape, folder
        self._memory: dict[int, Tensor] = {}
        self._places: dict[int, _Place] = {}
        self._read_until: dict[Path, int] = {}
        self._lock = Lock()
        self._own = f"{rank}"
        self.failed: OSError | None = None
        if folder is not None:
            self._open(folder, {"shape": list(shape), "dtype": str(DTYPE), "checksum": "crc32", "key": key})

    def read(self, indices: list[int]) -> Tensor | None:
        """Return the states (B, A, k, d) of conversations, padded to the most anchors; None where one is missing."""
        rows = []
        for index in indices:
            found = self._find(index)
            if found is None:
                return None
            rows.append(found)
        return pad_sequence(rows, batch_first=True)

    def write(self, indices: list[int], states: Tensor, anchors: list[int]) -> None:
        """Keep states (B, A, k, d) of conversations with so many `anchors` each, unless they are kept already.

        After a failure to write nothing more is kept; `failed` is the error.
        """
        for index, rows, count in zip(indices, states, anchors, strict=True):
            if self._known(index) or self.failed is not None:
                continue
            kept = rows[:count].to("cpu", DTYPE).contiguous()
            if self.folder is None:
                self._memory[index] = kept
                continue
            try:
                self._append(self.folder, index, kept)
            except OSError as error:
                self.failed = error

    def _known(self, index: int) -> bool:
        return index in self._memory or index in self._places

    def _open(self, folder: Path, key: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "key.json"
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == key
        except (OSError, ValueError):
            same = False
        if not same:
            for stale in (*folder.glob("states-*.bin"), *folder.glob("index-*.jsonl")):
                stale.unlink(missing_ok=True)
            path.write_text(json.dumps(key), encoding="utf-8")
        index = folder / f"index-{self._own}.jsonl"
        if index.is_file():  # a line that a kill has cut would spoil the next one
            whole = index.read_bytes()
            index.write_bytes(whole[: whole.rfind(b"\n") + 1])
        self._refresh()

    def _append(self, folder: Path, index: int, rows: Tensor) -> None:
        path, content = folder / f"states-{self._own}.bin", rows.view(torch.uint8).numpy().tobytes()
        with path.open("ab") as stream:
            place = _Place(path, stream.tell(), len(rows), zlib.crc32(content))
            stream.write(content)
        line = {"conversation": index, "offset": place.offset, "anchors": place.anchors, "checksum": place.checksum}
        with (folder / f"index-{self._own}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        with self._lock:
            self._places[index] = place

    def _find(self, index: int) -> Tensor | None:
        if index in self._memory:
            return self._memory[index]
        if self.folder is not None and index not in self._places:
            self._refresh()
        place = self._places.get(index)
        if place is None:
            return None
        if not place.anchors:
            return torch.empty(0, *self.shape, dtype=DTYPE)
        wanted = prod(self.shape) * place.anchors * DTYPE.itemsize
        with place.file.open("rb") as stream:
            content = os.pread(stream.fileno(), wanted, place.offset)
        if len(content) < wanted:  # not on this machine yet
            return None
        if zlib.crc32(content) != place.checksum:  # lost, and perhaps overwritten since: to be written again
            with self._lock:
                self._places.pop(index, None)
            return None
        return torch.frombuffer(bytearray(content), dtype=DTYPE).view(place.anchors, *self.shape)

    def _refresh(self) -> None:
        """Read the lines that were added to the index files."""
        assert self.folder is not None
        with self._lock:
            for path in self.folder.glob("index-*.jsonl"):
                start = self._read_until.get(path, 0)
                if path.stat().st_size <= start:
                    continue
                with path.open("rb") as stream:
                    stream.seek(start)
                    added = stream.read()
                whole = added[: added.rfind(b"\n") + 1]
                self._read_until[path] = start + len(whole)
                states = path.with_name(path.name.replace("index-", "states-").replace(".jsonl", ".bin"))
                for line in whole.splitlines():
                    entry = json.loads(line)
                    where = entry["offset"], entry["anchors"], entry["checksum"]
                    self._places[entry["conversation"]] = _Place(states, *where)
