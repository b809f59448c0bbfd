"""References for decoding, and parameters that cover a product of cases."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from firp_cli.decoding.step import DecodeStep
from firp_cli.teacher.teacher import Teacher
from helpers.models import generate_reference, tiny_model

TOKENS = 24
READERS = ["item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "nonzero", "cpu"]


def references(teacher: Teacher, prompts: list[list[int]], tokens: int = TOKENS) -> list[list[int]]:
    """Return the texts of transformers' `generate`. They must vary: repeated tokens would prove little."""
    texts = [list(reference(family_of(teacher), tuple(prompt), tokens)) for prompt in prompts]
    check_variety(texts)
    return texts


def check_variety(texts: list[list[int]]) -> None:
    """Assert that several texts hold many different tokens."""
    assert len(texts) < 4 or len({token for text in texts for token in text}) > 8


def count_reads(patch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that records from now on every call that reads a tensor's value into Python."""
    seen: list[str] = []

    def recording(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def read(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            return original(*arguments, **options)

        return read

    for name in READERS:
        patch.setattr(torch.Tensor, name, recording(name))
    return seen


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[int]]:
    """Return the reads of tensors' values that happen inside `DecodeStep.step` from now on, and a list with an entry
    for each step.
    """
    original: Callable[..., None] = DecodeStep.step
    reads: list[str] = []
    steps: list[int] = []

    def guarded(*arguments: Any, **options: Any) -> None:
        with monkeypatch.context() as patch:
            seen = count_reads(patch)
            original(*arguments, **options)
        steps.append(1)
        reads.extend(seen)

    monkeypatch.setattr(DecodeStep, "step", guarded)
    return reads, steps


def family_of(teacher: Teacher) -> str:
    return teacher.name.removeprefix("tiny-")


@cache
def reference(family: str, prompt: tuple[int, ...], tokens: int) -> list[int]:
    return generate_reference(tiny_model(family), list(prompt), tokens)
