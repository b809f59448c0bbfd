"""References for decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from firp_cli.teacher.teacher import Teacher
from helpers.models import generate_reference, tiny_model

TOKENS = 24
READERS = ["item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero", "cpu"]


def references(teacher: Teacher, prompts: list[list[int]], tokens: int = TOKENS) -> list[list[int]]:
    return [list(reference(family_of(teacher), tuple(prompt), tokens)) for prompt in prompts]


def count_reads(patch: pytest.MonkeyPatch) -> list[str]:
    """From here on, every call that hands a tensor's value to Python is noted in the list that comes back."""
    seen: list[str] = []

    def noting(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def read(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            return original(*arguments, **options)

        return read

    for name in READERS:
        patch.setattr(torch.Tensor, name, noting(name))
    return seen


def family_of(teacher: Teacher) -> str:
    return teacher.name.removeprefix("tiny-")


@cache
def reference(family: str, prompt: tuple[int, ...], tokens: int) -> list[int]:
    return generate_reference(tiny_model(family), list(prompt), tokens)
