"""Text that exists on any machine: arithmetic problems, GSM8K if it is given, Python sources of the installed packages.
The same machine and limits give the same text, in the same order.
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

from build_embedded import SPECIAL_TOKENS

from arithmetic_corpus import generate
from firp_cli.data.datasets import Selection, load_prompts, load_rows
from firp_cli.data.formats import Message
from firp_cli.errors import DatasetError

PAD, USER, ASSISTANT, END = SPECIAL_TOKENS
SEED = 11
PIECE = 1800  # characters of a source file in one conversation
SHOWN = 0.4  # share of a piece that is the question
FILE_BYTES = (500, 200_000)  # smaller and larger files are skipped
HELD_OUT = 20  # one in this many source files is not trained on
CODE = "python"


@dataclass
class Corpus:
    """Conversations to train on, by source, and questions that no training text answers, by source."""

    conversations: dict[str, list[list[Message]]] = field(default_factory=dict)
    questions: dict[str, list[list[Message]]] = field(default_factory=dict)

    def mixed(self, most: int | None = None) -> list[list[Message]]:
        """Return the conversations of all sources, shuffled; at most a given number of each."""
        every = [item for source in self.conversations.values() for item in source[:most]]
        random.Random(SEED).shuffle(every)
        return every


def gather(
    problems: int, code_bytes: int, questions: int, data_dir: str | None, packages: Path | None = None
) -> Corpus:
    """Return all text. `problems` and `questions`: their numbers for each source. `packages`: a folder in place of the
    installed ones.

    Raises DatasetError if a given data folder has no GSM8K.
    """
    corpus = Corpus()
    made = (item for item in generate(SEED) if not item.held_out)
    corpus.conversations["arithmetic"] = [turn(item.question, item.answer) for item in islice(made, problems)]
    corpus.questions["arithmetic"] = [prompt.messages for prompt in load_prompts("arithmetic", None, questions)]
    if data_dir:
        rows = load_rows("gsm8k", Selection(data_dir=data_dir))
        corpus.conversations["gsm8k"] = [row.conversation.messages for row in rows]
        try:
            corpus.questions["gsm8k"] = [prompt.messages for prompt in load_prompts("gsm8k", data_dir, questions)]
        except DatasetError:  # only the training questions are given
            kept = corpus.conversations["gsm8k"]
            corpus.questions["gsm8k"] = [item[:1] for item in kept[:questions]]
            corpus.conversations["gsm8k"] = kept[questions:]
    folder = packages or Path(sysconfig.get_paths()["purelib"])
    pieces = {False: code_bytes, True: questions * 4 * PIECE}
    for held_out, limit in pieces.items():
        found = [item for text in sources(folder, limit, held_out) for item in code_turns(text)]
        if held_out:
            corpus.questions[CODE] = [item[:1] for item in found[:: max(1, len(found) // questions)][:questions]]
        else:
            corpus.conversations[CODE] = found
    return corpus


def turn(question: str, answer: str) -> list[Message]:
    """Return a conversation of one question."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sources(folder: Path, limit: int, held_out: bool) -> Iterator[str]:
    """Yield texts of the Python files below a folder, `limit` bytes in all, in an order that mixes the packages."""
    for rank, name in _ranked(folder):
        if limit <= 0:
            return
        if (rank[0] % HELD_OUT == 0) != held_out:
            continue
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        if FILE_BYTES[0] <= len(text) <= FILE_BYTES[1]:
            yield text[:limit]
            limit -= len(text)


@lru_cache
def _ranked(folder: Path) -> list[tuple[bytes, str]]:
    """Return the Python files below a folder, with the hashes that order them."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.py")]
    return sorted((hashlib.sha256(name.encode()).digest(), name) for name in names)


def code_turns(text: str) -> Iterator[list[Message]]:
    """Return a file as conversations: some lines, and the lines that follow."""
    lines = text.splitlines(keepends=True)
    while lines:
        size, count = 0, 0
        while count < len(lines) and size < PIECE:
            size += len(lines[count])
            count += 1
        piece, lines = lines[:count], lines[count:]
        shown = max(1, int(count * SHOWN))
        if count >= 3 and size <= 3 * PIECE:
            yield turn("Continue:\n" + "".join(piece[:shown]), "".join(piece[shown:]))


def render(conversation: Sequence[Message]) -> str:
    """Return a conversation as the tokenizer's chat template renders it."""
    tags = {"user": USER, "assistant": ASSISTANT}
    return "".join(f"{tags[message['role']]}\n{message['content']}{END}\n" for message in conversation)


def sample(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Return the first texts, `limit` characters in all."""
    for text in texts:
        if limit <= 0:
            return
        yield text
        limit -= len(text)
