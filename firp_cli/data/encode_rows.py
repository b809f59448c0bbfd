"""Tokens of many rows: those that a template or a teacher refuses are skipped and counted, as odd rows are.

Fields that a chat template does not write (functions, tool calls, reasoning, a system message) are found by rendering
with and without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from firp_cli.data.chat import EncodedConversation, encode, encode_prompt
from firp_cli.data.datasets import Prompt
from firp_cli.data.formats import Conversation
from firp_cli.data.messages import Message
from firp_cli.data.odd_rows import (
    BEYOND_EMBEDDING,
    CALLS_LEFT_OUT,
    EMPTY_ANSWER,
    LOG,
    NO_ANSWER,
    NO_ANSWER_WITHIN,
    NOT_LEARNED,
    NOT_WRITTEN,
    REFUSED,
    OddRow,
    OddRows,
)
from firp_cli.errors import DatasetError

SIDE_KEYS = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # of messages
ROLES = ("system", "tool")  # messages that a template may leave out
PROBES = 8  # rows with a field that are rendered without it: Qwen3 writes the reasoning of some turns only


class SideFields:
    """Fields beside role and text that rows have, and whether the chat template writes them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._tried: dict[str, int] = {}
        self._written: set[str] = set()
        self.no_place: set[str] = set()  # columns that have no place in a conversation

    def unused(self) -> set[str]:
        """Return the fields that were left out of all rows that were looked at."""
        return self.no_place | (set(self._tried) - self._written)

    def note(self, messages: Sequence[Message], tools: Sequence[Any] | None, left_out: Iterable[str] = ()) -> None:
        """Look at the fields of a row."""
        self.no_place.update(left_out)
        fields = [key for key in SIDE_KEYS if any(key in item for item in messages)]
        fields += [role for role in ROLES if any(item["role"] == role for item in messages)]
        fields += ["tools"] if tools else []
        for name in fields:
            if name not in self._written and self._tried.get(name, 0) < PROBES:
                self._tried[name] = self._tried.get(name, 0) + 1
                if name == "tools":
                    other, functions = list(messages), None
                elif name in ROLES:
                    other, functions = [item for item in messages if item["role"] != name], tools
                else:
                    other, functions = [_without(item, (name,)) for item in messages], tools
                rendered = self._render(messages, tools)
                if rendered is None or rendered != self._render(other, functions):
                    self._written.add(name)

    def check_answers(self, conversation: Conversation) -> None:
        """Raise OddRow for an answer of which the template writes nothing but its end: a predictor would learn it."""
        messages, tools = conversation.messages, conversation.tools
        for place, item in enumerate(messages):
            if item["role"] != "assistant" or item["content"].strip() or place in conversation.unlearned:
                continue
            bare = _without(item, SIDE_KEYS)
            if bare == item:
                raise OddRow(EMPTY_ANSWER)
            other = [*messages[:place], bare, *messages[place + 1 :]]
            rendered = self._render(messages, tools)
            if rendered is not None and rendered == self._render(other, tools):
                raise OddRow(CALLS_LEFT_OUT if "tool_calls" in item else EMPTY_ANSWER)

    def _render(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> list[int] | None:
        """Return the tokens, None where the template refuses the messages."""
        try:
            return encode_prompt(messages, self.tokenizer, tools)
        except DatasetError:
            return None


def tell_left_out(names: Iterable[str]) -> None:
    """Log the columns and fields that do not reach the teacher."""
    if listed := ", ".join(sorted(names)):
        LOG.warning(f"columns left out: {listed} (no place in the conversations, or the chat template leaves them out)")


def encode_row(row: Prompt, fields: SideFields, max_length: int, vocabulary: int) -> EncodedConversation:
    """Return the tokens and the mask of a row with given answers. Raises OddRow, and DatasetError of the template."""
    conversation = row.conversation
    if conversation.input_ids is not None:
        assert conversation.loss_mask is not None
        encoded = EncodedConversation(conversation.input_ids[:max_length], conversation.loss_mask[:max_length])
        check_ids(conversation.input_ids, vocabulary)
    else:
        fields.note(conversation.messages, conversation.tools, conversation.left_out)
        if not conversation.answered:
            raise OddRow(NOT_LEARNED if conversation.unlearned else NO_ANSWER)
        fields.check_answers(conversation)
        whole = encode(conversation.messages, fields.tokenizer, None, conversation.tools, conversation.unlearned)
        if not any(whole.loss_mask):
            raise OddRow(NOT_WRITTEN)
        encoded = EncodedConversation(whole.input_ids[:max_length], whole.loss_mask[:max_length])
        check_ids(encoded.input_ids, vocabulary)
    if not any(encoded.loss_mask):
        raise OddRow(NO_ANSWER_WITHIN)
    return encoded


def encode_question(row: Prompt, fields: SideFields, messages: Sequence[Message] | None = None) -> list[int]:
    """Return the tokens of a row's prompt, or of other `messages` of the row. Raises DatasetError of the template."""
    asked = row.messages if messages is None else messages
    said = [item for turn in row.conversation.turns() for item in turn] if messages is None else messages
    results = [sum(item["role"] == "tool" for item in each) for each in (row.conversation.messages, said)]
    left_out = ("tool messages",) if results[0] > results[1] else ()  # results of the calls of given answers
    fields.note(asked, row.conversation.tools, (*row.conversation.left_out, *left_out))
    return encode_prompt(asked, fields.tokenizer, row.conversation.tools)


def encode_prompts(
    rows: Sequence[Prompt],
    tokenizer: Any,
    vocabulary: int,
    encoder: Callable[[Prompt, SideFields], list[int]] = encode_question,
) -> list[list[int] | None]:
    """Return the tokens of each prompt, None for those that the template refuses; these are counted and logged.

    Args:
        vocabulary: number of token ids that the teacher has. encoder: returns the tokens of a prompt.

    Raises DatasetError when too many are refused, or all.
    """
    fields = SideFields(tokenizer)
    odd = OddRows(", ".join(dict.fromkeys(row.dataset for row in rows)), len(rows))
    encoded: list[list[int] | None] = []
    for row in rows:
        try:
            ids = encoder(row, fields)
            check_ids(ids, vocabulary)
            encoded.append(ids)
        except DatasetError as error:
            odd.add(error.reason if isinstance(error, OddRow) else REFUSED, row.row, str(error))
            encoded.append(None)
    if rows and not any(ids is not None for ids in encoded):
        raise DatasetError(f"no prompt can be used: {odd.line()}")
    odd.check()
    odd.tell()
    tell_left_out(fields.unused())
    return encoded


def check_ids(ids: Sequence[int], vocabulary: int) -> None:
    """Raise OddRow for token ids that the teacher's embedding lacks."""
    if ids and (min(ids) < 0 or max(ids) >= vocabulary):
        raise OddRow(BEYOND_EMBEDDING)


def _without(item: Message, keys: Sequence[str]) -> Message:
    return {key: value for key, value in item.items() if key not in keys}
