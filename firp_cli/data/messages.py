"""Messages of data set rows: roles, texts, tool calls and functions, in one form for all layouts.

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": text}`, with `tool_calls`, the keys of
`KEPT` where the row has them, `weight` 0 where an answer is not to be learned, and no others. An assistant message that
only calls tools has an empty text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from firp_cli.data.odd_rows import PLACEHOLDER, OddRow

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")  # roles of messages whose text is a call in JSON
ROLE_KEYS, TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
KEPT = ("reasoning_content", "reasoning", "thinking", "name", "tool_call_id")
LEARNED = ("weight", "train", "loss")  # 0 or false (OpenAI, axolotl, ms-swift): an answer that is not to be learned
READ_KEYS = {*ROLE_KEYS, *TEXT_KEYS, *KEPT, *LEARNED, "tool_calls", "function_call", "input", "output"}
TEXT_PARTS = ("text", "input_text", "output_text")
SURROGATE = re.compile("[\ud800-\udfff]")
DEEPEST = 40  # levels of nested values in tool calls and functions
UNREADABLE_CALLS, UNREADABLE_TOOLS = "tool calls that cannot be read", "tools that cannot be read"
# Notes in place of a text that a set may not distribute. SPEED-Bench's also precedes a longer frame of a prompt.
SPEED_BENCH_NOTE = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
FETCH_NOTE = re.compile(
    r"\b(data|dataset|text|prompt|content|question)s?\b.{0,40}\b(should|must|has to|have to|needs? to) be "
    r"(fetched|downloaded|obtained|retrieved|loaded) from (the |its |their )?(original )?source",
    re.IGNORECASE | re.DOTALL,
)
NOTE_CHARACTERS = 240  # a longer text is no note of this kind


def read_messages(items: Any, field: str) -> list[Message]:
    """Return the messages of a list under `field`. Raises OddRow."""
    if not isinstance(items, list):
        raise OddRow(f"{field} that is no list", f"expected a list, got {type(items).__name__}", field)
    return [message for place, item in enumerate(items) for message in _read_item(item, f"{field}[{place}]")]


def read_text(value: Any, place: str) -> str:
    """Return a text, or the concatenated text of a list of content parts; '' for None. Raises OddRow."""
    if isinstance(value, list):
        parts = [part for part in value if part is not None]
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind not in TEXT_PARTS:
                raise OddRow(f"a part of type {str(kind)[:40]!r} in place of text", place=place)
        return "".join(read_text(part.get("text"), place) for part in parts)
    if value is None:
        return ""
    if not isinstance(value, str):
        name = type(value).__name__
        raise OddRow(f"a value of type {name} in place of text", f"expected text, got {name}", place)
    _check_characters(value, place)
    return value


def check_users(messages: list[Message]) -> None:
    """Raise OddRow for a conversation without user turn, and for a user turn that is empty or a placeholder."""
    users = [message["content"] for message in messages if message["role"] == "user"]
    if not users:
        raise OddRow("no user turn" if messages else "no messages")
    for text in users:
        if not text.strip():
            raise OddRow("an empty user turn")
        if SPEED_BENCH_NOTE in text or (len(text) <= NOTE_CHARACTERS and FETCH_NOTE.search(text)):
            raise OddRow(PLACEHOLDER, repr(text[:80]))


def read_tools(value: Any) -> list[Any] | None:
    """Return the functions of a row, a list of mappings or JSON text of one; None for an empty value. Raises OddRow."""
    tools = parse_json(value)
    if not tools:
        return None
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) and tool for tool in tools):
        raise OddRow(UNREADABLE_TOOLS, place="tools")
    _check_values(tools, "tools")
    return tools


def parse_json(value: Any) -> Any:
    """Return the value of a JSON text that holds a list or mapping; other values as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _read_item(item: Any, place: str) -> list[Message]:
    """Return the message of a list item; two for a pair of `input` and `output`."""
    if not isinstance(item, Mapping):
        raise OddRow(
            "an item that is no message", f"expected a mapping with role and content, got {type(item).__name__}", place
        )
    written, text = _first(item, ROLE_KEYS), _first(item, TEXT_KEYS)
    if written is None and isinstance(item.get("input"), str) and isinstance(item.get("output"), str):
        return [
            {"role": "user", "content": read_text(item["input"], place)},
            {"role": "assistant", "content": read_text(item["output"], place)},
        ]
    name = written.strip().lower() if isinstance(written, str) else ""
    if name in CALLS:
        return [{"role": "assistant", "content": "", "tool_calls": _read_calls(text, place)}]
    if name not in ROLES:
        shown = repr(written)[:40]
        raise OddRow(
            f"an unknown role {shown}", f"unknown role {shown}; accepted: {', '.join((*ROLES, *CALLS))}", place
        )
    message: Message = {"role": ROLES[name], "content": read_text(text, place)}
    for key in KEPT:
        if isinstance(item.get(key), str) and item[key]:
            _check_characters(item[key], place)
            message[key] = item[key]
    calls = item.get("tool_calls") or item.get("function_call")
    if calls and ROLES[name] == "assistant":
        message["tool_calls"] = _read_calls(calls, place)
    if ROLES[name] == "assistant" and not _is_learned(item, place):
        message["weight"] = 0
    return [message]


def _is_learned(item: Mapping[str, Any], place: str) -> bool:
    """Return False for an answer that is not to be learned. Raises OddRow for a weight between."""
    given = [item[key] for key in LEARNED if isinstance(item.get(key), int | float | str)]
    if any(isinstance(value, str) or value not in (0, 1) for value in given):
        raise OddRow("an answer of another weight than 0 and 1", place=place)
    return all(given)


def _read_calls(value: Any, place: str) -> list[Message]:
    """Return tool calls as `{"type": "function", "function": {"name", "arguments"}}`, arguments as a mapping.

    OpenAI writes the arguments as JSON text, which templates would quote once more.
    """
    calls = parse_json(value)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list) or not calls:
        raise OddRow(UNREADABLE_CALLS, place=place)
    read = []
    for call in map(parse_json, calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise OddRow(UNREADABLE_CALLS, place=place)
        given: Any = next((function[key] for key in ("arguments", "parameters") if function.get(key) is not None), {})
        arguments = parse_json(given)
        if not isinstance(arguments, Mapping):
            if not isinstance(arguments, str) or arguments.strip():
                raise OddRow(UNREADABLE_CALLS, place=place)
            arguments = {}
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        read.append({**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    _check_values(read, place)
    return read


def _check_values(value: Any, place: str, depth: int = 0) -> None:
    """Raise OddRow for values that are nested too deeply, and for texts that cannot be encoded."""
    if depth > DEEPEST:
        raise OddRow("values nested too deeply", place=place)
    if isinstance(value, str):
        _check_characters(value, place)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _check_values(key, place, depth + 1)
            _check_values(inner, place, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_values(inner, place, depth + 1)


def _check_characters(text: str, place: str) -> None:
    if SURROGATE.search(text):
        raise OddRow("a lone surrogate, which is no character", place=place)


def _first(item: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """Return the first value that is not null; null values are common in rows of Parquet files."""
    return next((item[key] for key in keys if item.get(key) is not None), None)
