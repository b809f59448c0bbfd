"""Prompts of a bench that a predictor was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from firp_cli.data.formats import Conversation
from firp_cli.data.prompt_text import PromptTexts
from firp_cli.errors import DatasetError
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.trained_prompts import prompt_key


def were_trained_on(
    conversations: Sequence[Conversation], tokenizer: Any, predictors: Iterable[Predictor]
) -> list[bool]:
    """Return for each conversation whether one of the predictors was trained on its first prompt.

    Predictors of earlier versions, which kept no prompts, count as trained on none.
    """
    keys = {key for item in predictors if item.trained_prompts is not None for key in item.trained_prompts.tolist()}
    texts = PromptTexts(tokenizer) if keys else None
    return [texts is not None and not keys.isdisjoint(_keys(item, texts)) for item in conversations]


def _keys(conversation: Conversation, texts: PromptTexts) -> set[int]:
    try:
        return {prompt_key(text) for text in texts.of_messages(conversation.turns()[0], conversation.tools)}
    except (DatasetError, IndexError):  # it is refused where it is encoded
        return set()
