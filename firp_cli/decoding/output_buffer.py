"""The tokens that a decoding step emitted: a row on the device, and its copies on the host.

A step writes the row in place; its copy to the host is queued after it. On a CUDA device the host reads a copy
after it has launched the next step, so that the device never waits for the host.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

Rows = list[list[int]]  # by sequence: accepted drafted tokens, then emitted ones


class OutputBuffer:
    """Tokens of up to `batch` sequences, of up to `width` tokens a step.

    Attributes:
        row: (batch, 1 + width) counts and tokens of the last step.
    """

    def __init__(self, batch: int, width: int, device: torch.device) -> None:
        self.row = torch.zeros(batch, 1 + width, dtype=torch.long, device=device)
        self.late = device.type == "cuda"  # the host reads a step after it has launched the next one
        self._copies = [torch.empty(self.row.shape, dtype=torch.long, pin_memory=True) for _ in range(2 * self.late)]
        self._unread: deque[tuple[Any, Tensor, torch.cuda.Event]] = deque()

    @property
    def unread(self) -> int:
        """Steps that are launched and not read."""
        return len(self._unread)

    def write(self, count: Tensor, tokens: Tensor) -> None:
        """Write counts (B,) and tokens (B, P), as part of a step."""
        batch, width = tokens.shape
        torch.cat([count[:, None], tokens], dim=1, out=self.row[:batch, : 1 + width])

    def launched(self, tag: Any) -> list[tuple[Any, Rows]]:
        """Start the copy of a step that was just launched; return the steps that can be read now, with their tags."""
        if not self.late:
            return [(tag, self.row.tolist())]
        copy = self._copies[0]
        self._copies.reverse()
        copy.copy_(self.row, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unread.append((tag, copy, event))
        return [self._arrived()] if len(self._unread) > 1 else []

    def drain(self) -> list[tuple[Any, Rows]]:
        """Wait for all steps that are not read, and return them, oldest first."""
        return [self._arrived() for _ in range(len(self._unread))]

    def _arrived(self) -> tuple[Any, Rows]:
        tag, copy, event = self._unread.popleft()
        event.synchronize()
        return tag, copy.tolist()
