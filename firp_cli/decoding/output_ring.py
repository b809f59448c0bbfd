"""Ring buffer on the device with the tokens that steps emit. The host reads it while the device works on.

A step writes a row per sequence: the number of accepted drafted tokens, then the emitted tokens. The host reads rows in
groups. On a CUDA device it starts the copy of a group when its last step is launched and reads the group before, whose
copy has arrived, so that the device never waits for the host.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

Rows = list[list[list[int]]]  # by step, by sequence: accepted drafted tokens, then emitted ones


class OutputRing:
    """Ring of two groups of `every` rows, for up to `batch` sequences of up to `width` tokens a step."""

    def __init__(self, batch: int, width: int, every: int, device: torch.device) -> None:
        self.every = every
        self._rows = torch.zeros(2 * every, batch, 1 + width, dtype=torch.long, device=device)
        self._cursor = torch.zeros(1, dtype=torch.long, device=device)
        self.late = device.type == "cuda"  # the host reads a group while the device works on the next one
        self._host = torch.empty(0)
        if self.late:
            self._host = torch.empty(self._rows.shape, dtype=torch.long, pin_memory=True)
        self._copies: deque[tuple[Any, slice, torch.cuda.Event]] = deque()
        self._first = self._written = 0

    @property
    def unread(self) -> int:
        """Steps that are launched and not read."""
        copied = sum(part.stop - part.start for _, part, _ in self._copies)
        return self._written + copied

    def push(self, count: Tensor, tokens: Tensor) -> None:
        """Write counts (B,) and tokens (B, P) to the next row, as part of a step."""
        row = torch.cat([count[:, None], tokens], dim=1)
        place = self._rows[:, : row.shape[0], : row.shape[1]]
        place.index_copy_(0, self._cursor, row[None])
        self._cursor.add_(1).remainder_(len(self._rows))

    def launched(self, tag: Any, drain: bool = False) -> list[tuple[Any, Rows]]:
        """Count a launched step and return the rows that can be read now, oldest first.

        Args:
            tag: returned with this step's rows (the sequences of the batch); the same for all steps of a group.
            drain: wait for all rows.
        """
        self._written += 1
        return self._read(tag, drain) if drain or self._written == self.every else []

    def drain(self, tag: Any) -> list[tuple[Any, Rows]]:
        """Return all rows that are launched and not read, oldest first. `tag`: returned with the last group's rows."""
        return self._read(tag, drain=True) if self.unread else []

    def _read(self, tag: Any, drain: bool) -> list[tuple[Any, Rows]]:
        part = slice(self._first, self._first + self._written)
        self._written, self._first = 0, 0 if drain else (part.stop % len(self._rows))
        ready = []
        if not self.late:
            ready.append((tag, self._rows[part].tolist()))
        else:
            if part.stop > part.start:
                self._host[part].copy_(self._rows[part], non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                self._copies.append((tag, part, event))
            while len(self._copies) > (0 if drain else 1):
                ready.append(self._arrived())
        if drain:
            self._cursor.zero_()
        return ready

    def _arrived(self) -> tuple[Any, Rows]:
        tag, part, event = self._copies.popleft()
        event.synchronize()
        return tag, self._host[part].tolist()

    def reset(self) -> None:
        """Drop all unread rows. The next step writes the first row."""
        while self._copies:
            self._arrived()
        self._cursor.zero_()
        self._first = self._written = 0
