"""SPEED pipelines for tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from firp_cli.decoding.reference import greedy
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.teacher.teacher import Teacher
from helpers.decoding import check_variety
from helpers.models import FakeExits, OwnLoops, generate_reference, make_predictor, pipe_teacher, random_prompts

RULES: dict[str, Callable[[int, int], bool]] = {
    "always": lambda position, loop: True,
    "never": lambda position, loop: False,
    "sometimes": lambda position, loop: (position * 7 + 2 * loop) % 3 > 0,
}

TOKENS = 14


def references(name: str, prompts: list[list[int]], tokens: int = TOKENS, **options: Any) -> list[list[int]]:
    """Return the texts of transformers' `generate`, or of the reference for models without it. They must vary."""
    key = name.split("/")[0] + "/1" if "/" in name else name
    texts = [list(_reference(key, tuple(prompt), tokens, **options)) for prompt in prompts]
    check_variety(texts)
    return texts


def some_prompts(seed: int = 0) -> list[list[int]]:
    """Return five prompts, one of them of a single token, shorter than any pipe."""
    return [[7 + seed], *random_prompts(4, seed=seed)]


def random_exits(teacher: Teacher, loops: int | None, **section: Any) -> SpeedPredictor:
    predictor = make_predictor(teacher, kind="speed", loops=loops, **section)
    assert isinstance(predictor, SpeedPredictor)
    return predictor


def fake_exits(name: str, prompts: list[list[int]], mode: str, **section: Any) -> FakeExits:
    """Return exits that know the texts after the prompts, and some tokens more."""
    teacher, loops = pipe_teacher(name)
    texts = references(name, prompts, TOKENS + 6, eos_token_id=-1)  # tokens in flight pass an EOS
    known = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
    return FakeExits(teacher, known, RULES[mode], loops=loops, **section)


@cache
def _reference(name: str, prompt: tuple[int, ...], tokens: int, **options: Any) -> list[int]:
    teacher = pipe_teacher(name)[0]
    if isinstance(teacher.model, OwnLoops):  # it has no `generate`, and no EOS
        return greedy(teacher, list(prompt), tokens)
    return generate_reference(teacher.model, list(prompt), tokens, **options)
