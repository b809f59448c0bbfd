"""Conversion of data set rows to conversations, for the field layouts of public conversation sets.

Assistant turns before the first user turn are dropped (ShareGPT has them): they are no answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from firp_cli.data.messages import Message, check_users, parse_json, read_messages, read_text, read_tools
from firp_cli.data.odd_rows import OddRow
from firp_cli.data.unread import ReadRow, unread_fields

Row = Mapping[str, Any]


@dataclass
class Conversation:
    """Messages of a row, and the functions that the assistant may call (JSON schemas), if the row has any.

    `questions_only`: each user message is a turn of its own, whose answer is missing (MT-Bench, Spec-Bench).
    `input_ids`, `loss_mask`: tokens of a row that is tokenized already; it may lack messages.
    `left_out`: columns with text that have no place in the conversation.
    `unlearned`: places of the answers that are not to be learned (weight 0).
    """

    messages: list[Message]
    tools: list[Any] | None = None
    questions_only: bool = False
    input_ids: list[int] | None = None
    loss_mask: list[bool] | None = None
    left_out: tuple[str, ...] = ()
    unlearned: frozenset[int] = frozenset()

    def turns(self) -> list[list[Message]]:
        """Return what is said before each answer to the user, in order, without the given answers.

        Results of tools that follow a given answer are left out: they belong to its calls.
        """
        turns: list[list[Message]] = []
        said: list[Message] = []
        asked = False
        for message in [*self.messages, {"role": "assistant"}]:
            role = message["role"]
            if role in ("system", "user") or (role == "tool" and (asked or not turns)):
                said.append(message)
                asked |= role == "user"
            if asked and (role == "assistant" or self.questions_only):
                turns.append(said)
                said, asked = [], False
        return turns

    def row(self) -> dict[str, Any]:
        """Return a row of a data set that is read as this conversation."""
        if self.questions_only:
            return {"turns": [item["content"] for item in self.messages]}
        messages = [
            item | ({"weight": 0} if place in self.unlearned else {}) for place, item in enumerate(self.messages)
        ]
        return {"messages": messages} | ({"tools": self.tools} if self.tools else {})

    def history(self) -> list[Message]:
        """Return the messages up to the last user message and those of systems and tools that follow it, given answers
        included. Of a row that ends with a result of a tool these are all messages.
        """
        end = max((place + 1 for place, item in enumerate(self.messages) if item["role"] == "user"), default=0)
        while end < len(self.messages) and self.messages[end]["role"] != "assistant":
            end += 1
        whole = self.messages[-1:] and self.messages[-1]["role"] == "tool"
        return self.messages[: None if whole else end]

    @property
    def answered(self) -> bool:
        """True where the row has an answer to learn from."""
        places = (place for place, item in enumerate(self.messages) if item["role"] == "assistant")
        return self.input_ids is not None or any(place not in self.unlearned for place in places)


MESSAGE_FIELDS = ("messages", "conversations", "conversation")
QUESTION_FIELDS = ("question", "prompt", "instruction", "problem", "query", "input")
ANSWER_FIELDS = ("answer", "response", "output", "completion", "solution")
SOLUTION_FIRST = ("solution", *ANSWER_FIELDS)  # beside `problem`, where `answer` is only the result
PAIR = ("user", "assistant")
ID_FIELDS = ("id", "question_id", "task_id", "unique_id")
NEEDED = ("messages", "question", "answer")  # roles whose named column a row must have
SYSTEM_FIELDS = ("system", "system_prompt")
INPUT_FIELDS = ("input", "context")
TOOL_FIELDS = ("tools", "functions")
ACCEPTED = (
    "messages|conversations|conversation (role/content or from/value), turns, question|prompt|instruction|problem|"
    "query [+ input|context] with answer|response|output|completion|solution, prompt + completion as lists, chosen, "
    "input + output, prompt + canonical_solution, text|prompt + code, question_content + starter_code, article + "
    "highlights, document + summary, "
    "input_ids + loss_mask|labels"
)
SUMMARIZE = "Summarize the following article in a few sentences.\n\n{}"
COMPLETE_CODE = "Complete the following Python function. Answer with the whole function.\n\n```python\n{}```"
START_FROM = "{}\n\nSolve it in Python. Start from this code:\n\n```python\n{}\n```"
READ_AND_WRITE = "{}\n\nSolve it with a Python program that reads standard input and writes standard output."
CONTEST_FIELDS = ("question_title", "platform", "public_test_cases", "private_test_cases")  # beside `question_content`
CALCULATOR_MARKS = re.compile(r"<<[^<>\n]*>>")
TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # of Anthropic's preference sets
IGNORED_LABEL = -100
UNKNOWN_FIELDS = "no conversation in its fields"


def read_conversation(row: Row, columns: Mapping[str, str] | None = None) -> Conversation:
    """Return the conversation of a row, without an assistant turn if the row has no answer.

    Layouts are tried in the order of `ACCEPTED`. `turns` (MT-Bench, Spec-Bench) and a list of texts under `prompt`
    contain user turns without answers. A system column comes first, `input` or `context` follows its question, and of
    a preference set the chosen answer is taken. GSM8K's calculator marks (`<<48/2=24>>`) are removed from answers: no
    teacher writes them.

    Args:
        columns: names of the row's columns, by the keys of `data.columns`. Others are read only for the system text,
            tools and category. None: columns are known by their names.

    Raises OddRow.
    """
    plain = dict(_renamed(row, columns) if columns else row)
    row = ReadRow(plain)
    tools = next((row[field] for field in TOOL_FIELDS if row.get(field)), None)
    conversation = Conversation([], read_tools(tools), _questions_only(plain))
    read = next((read for matches, read in _LAYOUTS if matches(plain)), None)
    ids = _token_ids(row)
    if ids is not None:
        conversation.input_ids, conversation.loss_mask = ids
    if read is None:
        if ids is not None:
            return conversation
        if any(field in row for field in (*MESSAGE_FIELDS, "turns")):
            raise OddRow("no messages")
        if "input_ids" in row:
            given = parse_json(row["input_ids"])
            fault = "that is no list" if not isinstance(given, list) else "without loss_mask or labels"
            raise OddRow(f"input_ids {'without tokens' if given == [] else fault}")
        fields = (", ".join(map(str, row)) or "none")[:160]
        raise OddRow(f"{UNKNOWN_FIELDS} ({fields})", f"{UNKNOWN_FIELDS} ({fields})\naccepted: {ACCEPTED}")
    messages = read(row)
    check_users(messages)
    first = next((place for place, item in enumerate(messages) if item["role"] == "user"), len(messages))
    messages = [item for place, item in enumerate(messages) if item["role"] != "assistant" or place > first]
    messages, unused = _with_system(row, messages)
    conversation.unlearned = frozenset(place for place, item in enumerate(messages) if item.pop("weight", 1) == 0)
    known = [*ID_FIELDS, *(columns or {}).values(), *(("answer",) if "solution" in row.seen else ())]
    known += CONTEST_FIELDS if "question_content" in plain else ()
    conversation.messages = messages
    conversation.left_out = (*unused, *unread_fields(row, messages, known))
    return conversation


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return the named columns of a row under the names that the layouts have for them."""
    missing = [column for role, column in columns.items() if column not in row and role in NEEDED]
    if missing:
        fields = (", ".join(map(str, row)) or "none")[:160]
        raise OddRow(f"no column {missing[0]!r}", f"no column {missing[0]!r} (data.columns) among {fields}")
    asked = {"messages", "question"} & set(columns)
    kept = {field: row[field] for field in ((*SYSTEM_FIELDS, *TOOL_FIELDS) if asked else row) if field in row}
    return kept | {role: row.get(column) for role, column in columns.items()}


def _with_system(row: Row, messages: list[Message]) -> tuple[list[Message], tuple[str, ...]]:
    """Return the messages after the text of a system column, and that column where they have another one."""
    field = next((name for name in SYSTEM_FIELDS if row.get(name) not in (None, "")), None)
    text = read_text(row[field], field) if field else ""
    given = next((item["content"] for item in messages if item["role"] == "system"), None)
    if text.strip() and given is None:
        messages = [{"role": "system", "content": text}, *messages]
    return messages, ((field,) if field and text.strip() and given not in (None, text) else ())


def _questions_only(row: Row) -> bool:
    """Return True for a row that is a list of questions without answers. SPEED-Bench's prepared rows have them as
    messages.
    """
    if "multiturn" in row and (field := _message_field(row)):
        return all(isinstance(item, Mapping) and item.get("role") == "user" for item in _list(row, field) or ())
    texts = isinstance(row.get("prompt"), list) and any(isinstance(item, str) for item in row["prompt"])
    return not _message_field(row) and (_list(row, "turns") is not None or texts)


def _list(row: Row, field: str) -> list[Any] | None:
    """Return a list with items, which may be written as JSON text (CSV files have it so)."""
    value = dict(row).get(field)  # of a ReadRow: what is no list counts as not read
    value = parse_json(value) if isinstance(value, str) and value.startswith("[") else value
    return value if isinstance(value, list) and value and row.get(field) else None


def _message_field(row: Row) -> str | None:
    return next((field for field in MESSAGE_FIELDS if _list(row, field)), None)


def _messages(row: Row) -> list[Message]:
    field = _message_field(row)
    assert field is not None
    return read_messages(_list(row, field), field)


def _questions(field: str) -> Callable[[Row], list[Message]]:
    def read(row: Row) -> list[Message]:
        return [
            {"role": "user", "content": read_text(text, f"{field}[{place}]")}
            for place, text in enumerate(_list(row, field) or ())
        ]

    return read


def _said(value: Any, field: str, role: str) -> list[Message]:
    """Return the messages of a list, or one message of a text; none for null or an empty text."""
    if isinstance(value, list) and any(isinstance(item, Mapping) and "type" not in item for item in value):
        return read_messages(value, field)
    if isinstance(value, Mapping) and ("role" in value or "from" in value):
        return read_messages([value], field)
    text = read_text(value, field)
    return [{"role": role, "content": text}] if text.strip() or role == "user" else []


def _prompt_and_completion(row: Row) -> list[Message]:
    """Read a prompt that is a list of messages, with the completion or the chosen answer (TRL)."""
    asked = _said(row["prompt"], "prompt", "user")
    answer = next((field for field in ("completion", "chosen", *ANSWER_FIELDS) if row.get(field) is not None), None)
    answered = _said(row[answer], answer, "assistant") if answer else []
    whole = any(item["role"] == "user" for item in answered)
    return answered if whole and answer == "chosen" else asked + answered


def _chosen(row: Row) -> list[Message]:
    """Read a preference set: the chosen answer after its prompt, or the chosen conversation."""
    if not isinstance(row["chosen"], str):
        asked = _said(row["prompt"], "prompt", "user") if row.get("prompt") is not None else []
        answered = _said(row["chosen"], "chosen", "assistant")
        return answered if any(item["role"] == "user" for item in answered) else asked + answered
    text = read_text(row["chosen"], "chosen")
    if _first_of(row, QUESTION_FIELDS):
        return [item for item in _pair(row) if item["role"] != "assistant"] + _said(text, "chosen", "assistant")
    parts = TRANSCRIPT.split(text)[1:]
    names = {"Human": "user", "Assistant": "assistant"}
    return [{"role": names[name], "content": said.strip()} for name, said in zip(parts[::2], parts[1::2], strict=True)]


def _input_and_output(row: Row) -> list[Message]:
    """Read messages under `input` and the answer under `output`."""
    return read_messages(_list(row, "input"), "input") + _said(parse_json(row.get("output")), "output", "assistant")


def _pair(row: Row) -> list[Message]:
    """Read a question under one of several names, with an answer and an input or context if present."""
    question = _first_of(row, QUESTION_FIELDS)
    if question is None:
        raise OddRow("an empty user turn")
    answer = _first_of(row, SOLUTION_FIRST if question == "problem" else ANSWER_FIELDS)
    fields = [question, *(field for field in INPUT_FIELDS if field != question and row.get(field) is not None)]
    texts = [read_text(row[field], field) for field in fields]
    messages: list[Message] = [{"role": "user", "content": "\n\n".join(text for text in texts if text.strip())}]
    if answer is not None:
        value = row[answer]  # a number is the answer of arithmetic
        number = isinstance(value, int | float) and not isinstance(value, bool)
        messages += _said(str(value) if number else value, answer, "assistant")
    for item in messages[1:]:
        item["content"] = CALCULATOR_MARKS.sub("", item["content"])
    return _earlier(row) + messages


def _earlier(row: Row) -> list[Message]:
    """Return the earlier turns of a question: pairs of question and answer (LLaMA-Factory), or messages."""
    history = _list(row, "history") or []
    if not any(isinstance(item, list) for item in history):
        return read_messages(history, "history")
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise OddRow("a history that is no list of questions and answers", place="history")
    texts = [(read_text(text, "history"), role) for pair in history for text, role in zip(pair, PAIR, strict=True)]
    return [{"role": role, "content": text} for text, role in texts]


def _wrapped(question: str, answer: str, wording: str) -> Callable[[Row], list[Message]]:
    def read(row: Row) -> list[Message]:
        text = read_text(row[question], question)
        asked = [{"role": "user", "content": wording.format(text) if text.strip() else ""}]
        return asked + _said(row[answer], answer, "assistant")

    return read


def _tested(row: Row) -> list[Message]:
    """Read MBPP: the task with its tests is the question, the code the answer."""
    field = "text" if isinstance(row.get("text"), str) else "prompt"
    listed = row.get("test_list")
    tests = "".join(f"\n{read_text(test, 'test_list')}" for test in (listed if isinstance(listed, list) else ()))
    question = read_text(row[field], field)
    if tests and question.strip():
        question += f"\nYour code should satisfy these tests:{tests}"
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": f"```python\n{read_text(row['code'], 'code')}\n```"},
    ]


def _solution(row: Row) -> list[Message]:
    """Read HumanEval: the function's head is the question, head and body in a code block the answer."""
    head = read_text(row["prompt"], "prompt")
    body = read_text(row["canonical_solution"], "canonical_solution")
    return [
        {"role": "user", "content": COMPLETE_CODE.format(head) if head.strip() else ""},
        {"role": "assistant", "content": f"```python\n{head}{body}```"},
    ]


def _contest(row: Row) -> list[Message]:
    """Read LiveCodeBench: the problem, with the code to start from if it has any; else a whole program is asked for."""
    text, code = (read_text(row.get(field), field) for field in ("question_content", "starter_code"))
    asked = START_FROM.format(text, code.rstrip()) if code.strip() else READ_AND_WRITE.format(text)
    return [{"role": "user", "content": asked if text.strip() else ""}]


def _token_ids(row: Row) -> tuple[list[int], list[bool]] | None:
    """Return token ids and mask of a row that has both; None for other rows. Raises OddRow where they do not fit."""
    ids = parse_json(row.get("input_ids"))
    mask, labels = (parse_json(row.get(field)) for field in ("loss_mask", "labels"))
    if not isinstance(ids, list) or not ids or not (isinstance(mask, list) or isinstance(labels, list)):
        return None
    seen = parse_json(row.get("attention_mask"))
    if isinstance(seen, list) and any(value != 1 for value in seen):
        raise OddRow("padding among the tokens (attention_mask)")
    name, values = ("loss_mask", mask) if isinstance(mask, list) else ("labels", labels)
    if any(type(number) is not int for number in ids):
        raise OddRow("token ids that are no whole numbers", place="input_ids")
    if len(values) != len(ids):
        raise OddRow(f"input_ids and {name} of different lengths", f"{len(ids)} and {len(values)}")
    if name == "labels":
        if any(label not in (IGNORED_LABEL, token) for label, token in zip(values, ids, strict=True)):
            raise OddRow("labels that differ from input_ids")
        return ids, [label != IGNORED_LABEL for label in values]
    if any(value not in (0, 1) for value in values):
        raise OddRow("a loss_mask of other values than 0 and 1")
    return ids, [bool(value) for value in values]


def _first_of(row: Row, fields: tuple[str, ...]) -> str | None:
    return next((field for field in fields if row.get(field) is not None), None)


def _is_list(field: str) -> Callable[[Row], bool]:
    return lambda row: _list(row, field) is not None


def _has(*fields: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row.get(field), str) for field in fields)


def _of_messages(field: str) -> Callable[[Row], bool]:
    """Return a test for a list of messages, and not of texts or content parts, under `field`."""
    return lambda row: any(isinstance(item, Mapping) and "type" not in item for item in _list(row, field) or ())


_LAYOUTS: tuple[tuple[Callable[[Row], bool], Callable[[Row], list[Message]]], ...] = (
    (lambda row: _message_field(row) is not None, _messages),
    (_is_list("turns"), _questions("turns")),
    (_of_messages("prompt"), _prompt_and_completion),
    (_questions_only, _questions("prompt")),
    (lambda row: isinstance(row.get("chosen"), str | list) and bool(row["chosen"]), _chosen),
    (_has("prompt", "canonical_solution"), _solution),
    (_has("text", "code"), _tested),
    (_has("prompt", "code"), _tested),
    (_has("article", "highlights"), _wrapped("article", "highlights", SUMMARIZE)),
    (_has("question_content", "starter_code"), _contest),
    (_has("document", "summary"), _wrapped("document", "summary", SUMMARIZE)),
    (_of_messages("input"), _input_and_output),
    (lambda row: any(field in row for field in QUESTION_FIELDS), _pair),
)
