"""Hashes of the prompts that a predictor was trained on, by which a bench leaves them out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def prompt_key(text: str) -> int:
    """Return a signed 64-bit hash of a prompt's text (`firp_cli.data.prompt_text`)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "little", signed=True)


def trained_keys(texts: Iterable[str]) -> Tensor:
    """Return the sorted hashes (n,) int64 of prompts."""
    return torch.tensor(sorted({prompt_key(text) for text in texts}), dtype=torch.long)
