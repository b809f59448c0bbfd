"""Answers kept on disk while they are made, so that a run that was killed never asks again for what it had.

Every rank appends to a file of its own, `answers-<rank>.jsonl`: a line per answer, with the prompt's key and the token
ids. A key says everything that the answer depends on, so any number of ranks may go on with what others left, and
answers to another question, of another teacher or under another limit stay unread.
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
SYNC_SECONDS = 5.0  # how long an answer waits at most for the others of its batch, while answers come


def prompt_keys(maker: str, prompts: Sequence[Tensor], limits: Sequence[int]) -> list[str]:
    """16 hex digits for each prompt (T,) int32 and the limit of its answer; `maker` says who answers."""
    start = hashlib.sha256(maker.encode())
    keys = []
    for prompt, limit in zip(prompts, limits, strict=True):
        digest = start.copy()
        digest.update(limit.to_bytes(8, "little"))
        digest.update(prompt.numpy().tobytes())
        keys.append(digest.hexdigest()[:16])
    return keys


def read_answers(folder: Path) -> dict[str, list[int]]:
    """All answers that are kept in `folder`, by key. Lines that a kill left torn are cut off: no rank may be writing.

    Raises StoreError when the disk refuses.
    """
    found: dict[str, list[int]] = {}
    try:
        for path in sorted(folder.glob(FILES)):
            whole = 0
            with path.open("rb+") as stream:
                for line in stream:
                    entry = _entry(line)
                    if entry is None:
                        break
                    found[entry[0]] = entry[1]
                    whole += len(line)
                stream.truncate(whole)
    except OSError as error:
        raise StoreError(f"cannot read the answers in {folder}: {error}") from error
    return found


def _entry(line: bytes) -> tuple[str, list[int]] | None:
    """Key and token ids, or None for a line that is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
        return str(entry["prompt"]), [int(token) for token in entry["token_ids"]]
    except (ValueError, TypeError, KeyError):
        return None


class AnswerLog:
    """Appends this rank's answers, and sees them on the disk batch by batch.

    All methods raise StoreError when the disk refuses; what was written before is kept.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"answers-{rank:05d}.jsonl"
        self._waiting: list[str] = []
        self._synced = time.monotonic()

    def add(self, key: str, token_ids: Sequence[int]) -> None:
        """Keep an answer; it is on the disk once its batch is full."""
        self._waiting.append(json.dumps({"prompt": key, "token_ids": list(token_ids)}, separators=(",", ":")) + "\n")
        if len(self._waiting) >= SYNC_ANSWERS or time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Write what waits and wait for the disk."""
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
