"""Hashes of the prompts that a predictor was trained on, by which a bench leaves them out.

A prompt is the tokens before the first answer of a conversation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


def prompt_key(token_ids: Sequence[int] | Tensor) -> int:
    """Return a signed 64-bit hash of a prompt's tokens (T,)."""
    ids = np.asarray(token_ids, dtype="<i4")
    return int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:8], "little", signed=True)


def prompt_keys(conversations: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sorted hashes (n,) int64 of the prompts of conversations, given their token ids (T,) and loss masks
    (T,). Conversations that begin with an answer have no prompt.
    """
    keys = set()
    for input_ids, loss_mask in conversations:
        start = int(loss_mask.int().argmax()) if bool(loss_mask.any()) else 0
        if start:
            keys.add(prompt_key(input_ids[:start]))
    return torch.tensor(sorted(keys), dtype=torch.long)
