"""Prompts that the teacher writes itself, for teachers whose users have few prompts of their own.

A chat model continues the opening of a user's turn with a user's message (Magpie, arXiv 2406.08464, section 2.1). Its
answers to such messages are training data without any data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

from firp_cli.data.chat import around_user_text, special_tokens
from firp_cli.decoding.engine import Engine
from firp_cli.errors import DatasetError, TeacherError
from firp_cli.results import Generation, Progress, no_progress
from firp_cli.teacher.teacher import Teacher

ATTEMPTS = 4  # messages that are tried for each wanted prompt, at most


@dataclass(frozen=True)
class PromptSettings:
    """Settings of writing.

    Attributes:
        max_new_tokens: of a prompt. batch_size: messages that are decoded at once.
        system: a system message, such as one that names a subject, for the teacher to write user messages to. It is no
            part of the prompts.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 64
    system: str | None = None


def own_prompts(
    teacher: Teacher, count: int, settings: PromptSettings, progress: Progress = no_progress
) -> Iterator[str]:
    """Yield `count` user messages that the teacher writes, no two the same; fewer where too many were not usable.

    Messages that the length limit cuts, and empty ones, are left out. Raises TeacherError for a teacher without
    tokenizer or chat template; DatasetError when none of the messages is usable, or when the template refuses a system
    message; CapacityError.
    """
    opening, stop, writer = _user_turn(teacher, settings.system)
    engine = Engine(writer, temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed)
    seen: set[str] = set()
    tried = 0
    while len(seen) < count and tried < ATTEMPTS * max(count, settings.batch_size):
        tried += settings.batch_size
        for item in engine.generate([opening] * settings.batch_size, settings.max_new_tokens, stop):
            text = _message(item, teacher.tokenizer, stop)
            if text and text.casefold() not in seen and len(seen) < count:
                seen.add(text.casefold())
                yield text
        progress(len(seen), count)
    if not seen:
        raise DatasetError(
            f"none of {tried} messages that {teacher.name} wrote has an end within {settings.max_new_tokens} tokens: "
            "raise --max-new-tokens, or give prompts of your own"
        )


def _user_turn(teacher: Teacher, system: str | None) -> tuple[list[int], list[str], Teacher]:
    """Return the tokens before a user's text, the strings that end it, and the teacher with the token that ends it: a
    template marks the end by a special token or by words. Raises TeacherError.
    """
    tokenizer = teacher.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        raise TeacherError(f"{teacher.name} has no chat template, so it writes no user messages: give prompts")
    before, after = around_user_text(tokenizer, system)
    opening, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after.lstrip()))
    if not opening or not end:
        raise TeacherError(f"the chat template of {teacher.name} does not mark a user's turn: give prompts")
    writer = copy(teacher)
    if end[0] not in special_tokens(tokenizer):
        return opening, [after.strip()], writer
    writer.eos_token_ids = (*teacher.eos_token_ids, end[0])
    return opening, [], writer


def _message(item: Generation, tokenizer: Any, stop: list[str]) -> str:
    """Return the text of a message that ended by itself and contains no special token; else an empty one."""
    ids = item.token_ids[:-1]
    if item.finish_reason == "length" or special_tokens(tokenizer).intersection(ids):
        return ""
    text = str(tokenizer.decode(ids if item.finish_reason == "eos" else item.token_ids))
    for end in stop:
        text = text.partition(end)[0]
    return text.strip()
