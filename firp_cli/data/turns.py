"""Prompts of the later turns of a conversation, with the teacher's own earlier answers as history.

A prompt continues the tokens of the prompt before it and of its answer as the teacher read and wrote them; only the
text that the template writes between the answer and the next one is tokenized. Spaces and line breaks around an answer
stay as written. Where the template renders earlier turns in another way than it asked for them (Qwen3 drops their
thinking), the prompt is rendered and tokenized as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from firp_cli.data.chat import render_prompt, text_tokens
from firp_cli.data.formats import Conversation, Message
from firp_cli.errors import DatasetError

SHORTEST_ANSWER = "."  # one token


@dataclass(frozen=True)
class Questions:
    """Turns of a conversation that the teacher answers one after the other, and how its prompts are rendered.

    Attributes:
        turns: `Conversation.turns`. stops: ids that end an answer. tools: functions that the template gets.
    """

    turns: list[list[Message]]
    tokenizer: Any
    stops: Collection[int]
    tools: list[Any] | None = None

    @staticmethod
    def of(conversation: Conversation, tokenizer: Any, stops: Collection[int]) -> Questions | None:
        """Return the questions of a conversation with several turns; None for others."""
        turns = conversation.turns()
        return Questions(turns, tokenizer, stops, conversation.tools) if len(turns) > 1 else None

    def following(self, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> tuple[list[int], bool]:
        """Return the tokens of the prompt after `answers`, and True if it continues `prompt` and the last answer.

        Args:
            prompt: tokens of the prompt of the last answer. answers: tokens of all answers, stop tokens included.

        Raises DatasetError when the template refuses the conversation, also without special tokens in the answers.
        """
        try:
            return self._following(prompt, answers, special=True)
        except DatasetError:  # some templates refuse their own marks in an answer
            return self._following(prompt, answers, special=False)

    def lengths(self) -> list[int]:
        """Return the tokens of each later turn's prompt with answers of one token, up to a turn that the template
        refuses.
        """
        lengths = []
        for turn in range(1, len(self.turns)):
            try:
                lengths.append(len(text_tokens(self._render(self._said([SHORTEST_ANSWER] * turn)), self.tokenizer)))
            except DatasetError:
                break
        return lengths

    def text(self, answer: Sequence[int], special: bool = True) -> str:
        """Return the text of an answer without the token that ends it; `special`: with special tokens before it."""
        ids = list(answer[:-1] if answer and answer[-1] in self.stops else answer)
        return str(self.tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    def _following(
        self, prompt: Sequence[int], answers: Sequence[Sequence[int]], special: bool
    ) -> tuple[list[int], bool]:
        said = self._said([self.text(answer, special) for answer in answers[:-1]])
        written = self.text(answers[-1], special)
        before = self._render(said)
        after = self._render([*said, {"role": "assistant", "content": written}, *self.turns[len(answers)]])
        between = self._between(before, written, after, answers[-1])
        if between is None:
            return text_tokens(after, self.tokenizer), False
        return [*prompt, *answers[-1], *between], True

    def _said(self, answers: Sequence[str]) -> list[Message]:
        """Return the messages before the answer that follows `answers`."""
        said = list(self.turns[0])
        for answer, turn in zip(answers, self.turns[1:], strict=False):
            said += [{"role": "assistant", "content": answer}, *turn]
        return said

    def _render(self, messages: Sequence[Message]) -> str:
        return render_prompt(messages, self.tokenizer, self.tools)

    def _between(self, before: str, written: str, after: str, answer: Sequence[int]) -> list[int] | None:
        """Return the tokens of the text in `after` that follows the answer `written`; None where `after` does not
        continue `before` and the answer.
        """
        rest = after[len(before) :].lstrip()
        if not after.startswith(before) or not rest.startswith(written.strip()):
            return None
        rest = rest[len(written.strip()) :].removeprefix(written[len(written.rstrip()) :])
        if not answer or answer[-1] not in self.stops:
            return text_tokens(rest, self.tokenizer)
        tokens = text_tokens(rest.lstrip(), self.tokenizer)
        return tokens[1:] if tokens[:1] == [answer[-1]] else None
