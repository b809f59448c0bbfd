"""Text of a prompt without what a chat template writes around it: a prompt has the same text under every template."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from firp_cli.data.chat import around_user_text, prompt_forms
from firp_cli.data.formats import Message
from firp_cli.errors import DatasetError

SHORTEST = 3  # characters of what follows a user's text, by which its end is recognised


def squeezed(text: str) -> str:
    """Return a text without white space, in one form of its characters and in lower case."""
    return "".join(unicodedata.normalize("NFKC", text).split()).casefold()


class PromptTexts:
    """Texts of prompts that were rendered by a tokenizer's chat template, and of those that are to be."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        try:
            self._before, self._after = map(squeezed, around_user_text(tokenizer))
        except DatasetError:
            self._before = self._after = ""

    def of_tokens(self, token_ids: Sequence[int]) -> str:
        """Return the user's text in a prompt of one user message; of other prompts all that is rendered."""
        whole = squeezed(self.tokenizer.decode(token_ids))
        if not whole.startswith(self._before):
            return whole
        text = whole[len(self._before) :]
        # before a given answer a template may write less than before one that is to be generated
        for length in range(len(self._after), SHORTEST - 1, -1):
            if text.endswith(self._after[:length]):
                return text[:-length]
        return whole if self._after else text

    def of_messages(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> set[str]:
        """Return the texts that `of_tokens` may give for a prompt. Raises DatasetError as `encode` does."""
        texts = {self.of_tokens(form) for form in prompt_forms(messages, self.tokenizer, tools)}
        if len(messages) == 1:
            texts.add(squeezed(messages[0]["content"]))
        return texts
