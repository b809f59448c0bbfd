"""Fields of rows and messages that have no place in a conversation. They are named once in a run, apart from fields
that describe a row (ids, sources, scores) or serve to judge an answer (tests, references).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from firp_cli.data.messages import READ_KEYS, ROLE_KEYS, Message
from firp_cli.data.odd_rows import OddRow, printable

# last words of the names of fields that describe a row
DESCRIBING = """id ids uuid uid idx index hash url uri link source sources src origin dataset subset split file filename
path category categories subcategory subject topic topics domain task tasks type kind language languages lang locale
license model models author user username annotator at date time year timestamp version status level difficulty score
scores rating ratings rank quality label labels tag tags metadata meta name"""
JUDGING = (
    "rejected",
    "reference",
    "references",
    "test",
    "tests",
    "entry_point",
    "test_list",
    "challenge_test_list",
    "test_setup_code",
)
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
MEDIA_MARK = re.compile(r"<(image|img|video|audio)(_?\d+)?>")
WORDS = re.compile(r"[\W_]+|(?<=[a-z])(?=[A-Z])")
DEEPEST = 8  # levels of nested values in which text is sought
LONGEST_NAME = 60


class ReadRow(dict[str, Any]):
    """Row that keeps the names of the fields that were read, in `seen`."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.seen.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.seen.add(name)
        return super().get(name, default)


def unread_fields(row: ReadRow, messages: Sequence[Message], known: Iterable[str] = ()) -> list[str]:
    """Return the fields with text that were not read, and the unread keys of messages as `messages.KEY`.

    A field that repeats the text of a message is not named.

    Args:
        known: fields that need no name.

    Raises OddRow for a row whose text refers to an image, a video or a sound.
    """
    texts = {item["content"].strip() for item in messages}
    said = [
        (f"{field}.{key}", key, value)
        for field in row.seen
        for item in _items(dict.get(row, field))
        for key, value in item.items()
        if key not in READ_KEYS
    ]
    found = [(name, name, value) for name, value in row.items() if name not in row.seen and name not in known]
    if any(key in MEDIA and value for _, key, value in (*found, *said)) and any(map(MEDIA_MARK.search, texts)):
        raise OddRow("an image, video or sound in the text")
    names = {
        name
        for name, key, value in (*found, *said)
        if (key in MEDIA and value)
        or (not _describes(str(key)) and _has_text(value) and not (isinstance(value, str) and value.strip() in texts))
    }
    return sorted(printable(str(name))[:LONGEST_NAME] for name in names)


def _items(value: Any) -> list[Mapping[str, Any]]:
    """Return the messages of a list."""
    items = value if isinstance(value, list) else []
    return [item for item in items if isinstance(item, Mapping) and any(key in item for key in ROLE_KEYS)]


def _describes(name: str) -> bool:
    last = next((word.lower() for word in reversed(WORDS.split(name)) if word), "")
    return name in JUDGING or last in DESCRIBING.split()


def _has_text(value: Any, depth: int = 0) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return depth < DEEPEST and any(_has_text(item, depth + 1) for item in inner)
