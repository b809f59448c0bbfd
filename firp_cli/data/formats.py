"""Conversion of data set rows to messages, for the field layouts of public conversation sets.

Messages are `{"role": "system" | "user" | "assistant" | "tool", "content": text}`. Assistant turns before the first
user turn are dropped (ShareGPT has them): they are no answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from firp_cli.errors import DatasetError

Message = dict[str, Any]
Row = Mapping[str, Any]


@dataclass
class Conversation:
    """Messages of a row, and the functions that the assistant may call (JSON schemas), if the row has any.

    `questions_only`: each user message is a turn of its own, whose answer is missing (MT-Bench, Spec-Bench).
    """

    messages: list[Message]
    tools: list[Any] | None = None
    questions_only: bool = False

    def turns(self) -> list[list[Message]]:
        """Return what is said before each answer, in order, without the given answers: system and user messages.

        Results of tools are left out: they belong to calls in the given answers.
        """
        turns: list[list[Message]] = []
        said: list[Message] = []
        for message in [*self.messages, {"role": "assistant"}]:
            if message["role"] in ("system", "user"):
                said.append(message)
            if said and said[-1]["role"] == "user" and (message["role"] == "assistant" or self.questions_only):
                turns.append(said)
                said = []
        return turns

    def row(self) -> dict[str, Any]:
        """Return a row of a data set that is read as this conversation."""
        if self.questions_only:
            return {"turns": [item["content"] for item in self.messages]}
        return {"messages": self.messages} | ({"tools": self.tools} if self.tools else {})

    def history(self) -> list[Message]:
        """Return the messages up to the last user message, given answers included."""
        last = max((place for place, item in enumerate(self.messages) if item["role"] == "user"), default=-1)
        return self.messages[: last + 1]


ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "tool": "tool",
}
QUESTION_LISTS = ("turns", "prompt")
QUESTION_FIELDS = ("question", "prompt", "instruction")
ANSWER_FIELDS = ("answer", "response", "output", "completion")
SYSTEM_FIELDS = ("system", "system_prompt")
ACCEPTED = (
    "messages (role/content), conversations (from/value), turns, question|prompt|instruction [+ input] with "
    "answer|response|output|completion, prompt + canonical_solution, text + code, article + highlights, "
    "document + summary"
)
SUMMARIZE = "Summarize the following article in a few sentences.\n\n{}"
COMPLETE_CODE = "Complete the following Python function. Answer with the whole function.\n\n```python\n{}```"
CALCULATOR_MARKS = re.compile(r"<<[^<>\n]*>>")


def to_conversation(row: Row, where: str) -> Conversation:
    """Return the conversation of a row. `turns` (MT-Bench, Spec-Bench) and a list under `prompt` contain user turns
    without answers. Raises DatasetError as `to_messages` does.
    """
    layout = next((field for field in ("messages", "conversations", *QUESTION_LISTS) if _is_list(field)(row)), None)
    if layout in QUESTION_LISTS:
        return Conversation(_questions(layout)(row, where), questions_only=True)
    return Conversation(to_messages(row, where))


def to_messages(row: Row, where: str) -> list[Message]:
    """Return the messages of a row, without an assistant turn if the row has no answer.

    Layouts are tried in the order of `ACCEPTED`. Of user turns without answers (`to_conversation` reads them all) only
    the first one is returned. GSM8K's calculator marks (`<<48/2=24>>`) are removed from
    answers: no teacher writes them.

    Raises DatasetError naming the row (`where`), its fields and the accepted ones.
    """
    for matches, read in _LAYOUTS:
        if matches(row):
            messages = read(row, where)
            first = next((place for place, item in enumerate(messages) if item["role"] == "user"), len(messages))
            return [item for place, item in enumerate(messages) if item["role"] != "assistant" or place > first]
    fields = ", ".join(map(str, row)) or "none"
    raise DatasetError(f"{where}: no conversation in its fields ({fields})\naccepted: {ACCEPTED}")


def prompt_of(messages: list[Message]) -> list[Message]:
    """Return the messages before the first assistant turn."""
    first = next((place for place, item in enumerate(messages) if item["role"] == "assistant"), len(messages))
    return messages[:first]


def _speakers(field: str, role_key: str, text_key: str) -> Callable[[Row, str], list[Message]]:
    def read(row: Row, where: str) -> list[Message]:
        return [_turn(item, role_key, text_key, f"{where}, {field}[{place}]") for place, item in enumerate(row[field])]

    return read


def _turn(item: Any, role_key: str, text_key: str, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise DatasetError(f"{where}: expected a mapping with role and content, got {type(item).__name__}")
    role, text = item.get(role_key, item.get("role")), item.get(text_key, item.get("content"))
    if role not in ROLES:
        raise DatasetError(f"{where}: unknown role {role!r}; accepted: {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": _text(text, where)}


def _text(value: Any, where: str) -> str:
    """Return a text, or the concatenated text of a list of content parts."""
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text", "")) for part in value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DatasetError(f"{where}: expected text, got {type(value).__name__}")
    return value


def _questions(field: str) -> Callable[[Row, str], list[Message]]:
    """Return a reader of user turns without answers."""

    def read(row: Row, where: str) -> list[Message]:
        if not row[field]:
            raise DatasetError(f"{where}: {field} is empty")
        texts = [_text(text, f"{where}, {field}[{place}]") for place, text in enumerate(row[field])]
        return [{"role": "user", "content": text} for text in texts]

    return read


def _first_turn(field: str) -> Callable[[Row, str], list[Message]]:
    return lambda row, where: _questions(field)(row, where)[:1]


def _pair(row: Row, where: str) -> list[Message]:
    """Read a question under one of several names, with an answer, an input and a system text if present."""
    question = _first_of(row, QUESTION_FIELDS)
    answer = _first_of(row, ANSWER_FIELDS)
    system = _first_of(row, SYSTEM_FIELDS)
    assert question is not None
    text = _text(row[question], f"{where}, {question}")
    if question != "question" and row.get("input"):
        text += "\n\n" + _text(row["input"], f"{where}, input")
    messages = [{"role": "user", "content": text}]
    if system is not None and row[system]:
        messages.insert(0, {"role": "system", "content": _text(row[system], f"{where}, {system}")})
    if answer is not None and row[answer] is not None:
        written = _text(row[answer], f"{where}, {answer}")
        messages.append({"role": "assistant", "content": CALCULATOR_MARKS.sub("", written)})
    return messages


def _wrapped(question: str, answer: str, wording: str) -> Callable[[Row, str], list[Message]]:
    def read(row: Row, where: str) -> list[Message]:
        return [
            {"role": "user", "content": wording.format(_text(row[question], f"{where}, {question}"))},
            {"role": "assistant", "content": _text(row[answer], f"{where}, {answer}")},
        ]

    return read


def _tested(row: Row, where: str) -> list[Message]:
    """Read MBPP: the task with its tests is the question, the code the answer."""
    tests = "".join(f"\n{_text(test, f'{where}, test_list')}" for test in row.get("test_list") or ())
    question = _text(row["text"], f"{where}, text") + (
        f"\nYour code should satisfy these tests:{tests}" if tests else ""
    )
    answer = f"```python\n{_text(row['code'], f'{where}, code')}\n```"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _solution(row: Row, where: str) -> list[Message]:
    """Read HumanEval: the function's head is the question, head and body in a code block the answer."""
    head = _text(row["prompt"], f"{where}, prompt")
    body = _text(row["canonical_solution"], f"{where}, canonical_solution")
    return [
        {"role": "user", "content": COMPLETE_CODE.format(head)},
        {"role": "assistant", "content": f"```python\n{head}{body}```"},
    ]


def _first_of(row: Row, fields: tuple[str, ...]) -> str | None:
    return next((field for field in fields if field in row), None)


def _is_list(field: str) -> Callable[[Row], bool]:
    return lambda row: isinstance(row.get(field), list)


def _has(*fields: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row.get(field), str) for field in fields)


_LAYOUTS: tuple[tuple[Callable[[Row], bool], Callable[[Row, str], list[Message]]], ...] = (
    (_is_list("messages"), _speakers("messages", "role", "content")),
    (_is_list("conversations"), _speakers("conversations", "from", "value")),
    (_is_list("turns"), _first_turn("turns")),
    (_is_list("prompt"), _first_turn("prompt")),
    (_has("prompt", "canonical_solution"), _solution),
    (_has("text", "code"), _tested),
    (_has("article", "highlights"), _wrapped("article", "highlights", SUMMARIZE)),
    (_has("document", "summary"), _wrapped("document", "summary", SUMMARIZE)),
    (lambda row: _first_of(row, QUESTION_FIELDS) is not None, _pair),
)
