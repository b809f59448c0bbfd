"""Answers on disk while a run makes them: a killed run does not ask for them again.

Every rank appends to its own file, `answers-<rank>.jsonl`: one line per answer, with the prompt's key and token ids.
The key covers everything that the answer depends on, so any number of ranks can continue from the files of others, and
answers to another prompt, of another teacher or under another limit are ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from firp_cli.errors import StoreError

FILES = "answers-*.jsonl"
SYNC_ANSWERS = 32
SYNC_SECONDS = 5.0  # longest time that an answer waits for its batch, while answers arrive


def prompt_keys(maker: str, prompts: Sequence[Tensor], limits: Sequence[int]) -> list[str]:
    """Return 16 hex digits for each prompt (T,) int32 and its answer's limit. `maker`: teacher and responder."""
    start = hashlib.sha256(maker.encode())
    keys = []
    for prompt, limit in zip(prompts, limits, strict=True):
        digest = start.copy()
        digest.update(limit.to_bytes(8, "little"))
        digest.update(prompt.numpy().tobytes())
        keys.append(digest.hexdigest()[:16])
    return keys


def read_answers(folder: Path) -> dict[str, list[int]]:
    """Return all answers in `folder`, by key. Call it while no rank writes: incomplete lines of a kill are cut off.

    Raises StoreError when a file cannot be read.
    """
    answers: dict[str, list[int]] = {}
    try:
        for path in sorted(folder.glob(FILES)):
            whole = 0
            with path.open("rb+") as stream:
                for line in stream:
                    entry = _entry(line)
                    if entry is None:
                        break
                    answers[entry[0]] = entry[1]
                    whole += len(line)
                stream.truncate(whole)
    except OSError as error:
        raise StoreError(f"cannot read the answers in {folder}: {error}") from error
    return answers


def _entry(line: bytes) -> tuple[str, list[int]] | None:
    """Return key and token ids, or None for an incomplete line."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
        return str(entry["prompt"]), [int(token) for token in entry["token_ids"]]
    except (ValueError, TypeError, KeyError):
        return None


class AnswerLog:
    """This rank's file of answers, synced to disk batch by batch.

    All methods raise StoreError when the file cannot be written; answers written before are kept.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"answers-{rank:05d}.jsonl"
        self._waiting: list[str] = []
        self._synced = time.monotonic()

    def add(self, key: str, token_ids: Sequence[int]) -> None:
        """Add an answer. It is written when its batch is full."""
        self._waiting.append(json.dumps({"prompt": key, "token_ids": list(token_ids)}, separators=(",", ":")) + "\n")
        if len(self._waiting) >= SYNC_ANSWERS or time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Write the waiting answers and sync the file."""
        self._synced = time.monotonic()
        if not self._waiting:
            return
        lines, self._waiting = "".join(self._waiting), []
        try:
            with self.path.open("a", encoding="ascii") as stream:
                stream.write(lines)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise StoreError(
                f"cannot write {self.path}: {error}\n"
                "the answers written so far are kept; make room and run again with --resume"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not isinstance(error, StoreError):
            self.sync()
