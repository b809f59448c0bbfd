"""Text of a sequence in pieces of whole characters, while its tokens are decided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

OnText = Callable[[str, bool], object]  # (piece of text, True where the predictor drafted it)
CONTEXT_TOKENS = 8  # tokens before a piece that decide how it is written (spaces, split characters)


class TextStream:
    """Text of one sequence in pieces of whole characters, handed to `write` as soon as its tokens are decided."""

    def __init__(self, tokenizer: Any, write: OnText) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._tokens: list[int] = []
        self._pending = 0  # last tokens whose text is not written yet: it ends inside a character
        self._written = 0  # characters

    def on_tokens(self, _: int, tokens: list[int], drafted: int) -> None:
        """Take the tokens of one step, of which the first `drafted` were drafted."""
        for number, token in enumerate(tokens):
            self._tokens.append(token)
            self._pending += 1
            start = max(0, len(self._tokens) - self._pending - CONTEXT_TOKENS)
            before = self._decode(self._tokens[start : -self._pending])
            text = self._decode(self._tokens[start:])
            if text.endswith("\ufffd"):
                continue
            self._put(text[len(before) :], number < drafted)
            self._pending = 0

    def finish(self, text: str) -> None:
        """Write the remainder of the whole `text`: an answer may end inside a character."""
        self._put(text[self._written :], False)

    def _put(self, piece: str, drafted: bool) -> None:
        if piece:
            self._written += len(piece)
            self._write(piece, drafted)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
