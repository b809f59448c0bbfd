"""`firp generate --prompts`: answers to the prompts of a file, each written as a line of JSON as soon as it is made.

A conversation is answered after its last user message, with the history that the row gives. Rows that hold questions
only (MT-Bench) are answered turn by turn, with the method's own earlier answers as history; each turn has a line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from firp_cli.api.decoder import Decoder
from firp_cli.data.chat import encode_text
from firp_cli.data.datasets import Prompt, load_prompts
from firp_cli.data.encode_rows import SideFields, encode_prompts, encode_question
from firp_cli.data.turns import Questions
from firp_cli.decoding.sequences import check_room
from firp_cli.errors import CapacityError, DatasetError, UsageError
from firp_cli.provenance import differences, fingerprint
from firp_cli.results import Generation, Progress, no_progress

Line = dict[str, Any]


@dataclass(frozen=True)
class GenerateSettings:
    """Settings that decide the text of an answer, and `batch_size`, the prompts that are decoded together."""

    max_new_tokens: int = 256
    batch_size: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    raw: bool = False

    def made_with(self, decoder: Decoder) -> dict[str, Any]:
        """Return the decoder and the settings that answers depend on, as JSON values."""
        made_with = decoder.describe(self.temperature, self.top_p) | asdict(self) | {"stop": list(self.stop)}
        unused = {"batch_size"} | ({"chat_template"} if self.raw else set())
        unused |= set() if self.temperature else {"top_p", "seed"}
        return {name: value for name, value in made_with.items() if name not in unused}


@dataclass
class Totals:
    """Sums over answers. The times of a batch, which its answers share, are counted once."""

    tokens: int = 0
    steps: int = 0
    decoded: int = 0  # tokens of the decoding steps
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    undrafted: int = 0  # decoding steps without a draft
    pipelines: bool = False

    def add(self, batch: Sequence[Generation]) -> None:
        """Add the answers of one batch."""
        self.tokens += sum(len(item.token_ids) for item in batch)
        self.steps += sum(item.steps for item in batch)
        self.decoded += sum(sum(item.accepted_lengths) for item in batch)
        self.prefill_seconds += max(item.prefill_seconds for item in batch)
        self.decode_seconds += max(item.decode_seconds for item in batch)
        for item in batch:
            self.pipelines |= item.pipeline is not None
            self.undrafted += item.pipeline.autoregressive_tokens if item.pipeline else item.autoregressive_steps


@dataclass
class Asked:
    """Row of the file, with the answers to it so far.

    Attributes:
        prompt: token ids before the next answer; empty where nothing more is asked.
        questions: None for a row with one answer. answers: token ids of each.
    """

    row: Prompt
    prompt: list[int]
    questions: Questions | None = None
    answers: list[list[int]] = field(default_factory=list)

    @property
    def turns(self) -> int:
        """Number of answers that the row asks for."""
        return len(self.questions.turns) if self.questions else 1

    def take(self, answer: list[int], room: int) -> None:
        """Append an answer. The next turn is asked if the template takes it, in at most `room` tokens."""
        before, self.prompt = self.prompt, []
        self.answers.append(answer)
        if self.questions is None or len(self.answers) == self.turns:
            return
        try:
            following, _ = self.questions.following(before, self.answers)
        except DatasetError:
            return
        if len(following) <= room:
            self.prompt = following


@dataclass
class FileRun:
    """Answers to the prompts of a file, resolved for one decoder.

    Attributes:
        asked: rows that are answered. skipped: indices of rows whose prompt is too long. kept: answers of an
            interrupted run.
    """

    path: str
    decoder: Decoder
    rows: list[Prompt]
    settings: GenerateSettings
    totals: Totals = field(default_factory=Totals)
    skipped: list[int] = field(default_factory=list)
    kept: int = 0

    def __post_init__(self) -> None:
        teacher, stops = self.decoder.teacher, set(self.decoder.teacher.eos_token_ids)
        self.room = teacher.max_positions - self.settings.max_new_tokens
        self.made_with = self.settings.made_with(self.decoder)
        encoded = encode_prompts(self.rows, teacher.tokenizer, teacher.vocab_size, self._encode)
        self.asked: list[Asked] = []
        for row, ids in zip(self.rows, encoded, strict=True):
            if ids is not None:
                several = row.conversation.questions_only
                questions = Questions.of(row.conversation, teacher.tokenizer, stops) if several else None
                self.asked.append(Asked(row, ids, questions))

    @property
    def count(self) -> int:
        """Number of answers to make, kept ones included."""
        return sum(item.turns for item in self.asked)

    @property
    def cut(self) -> int:
        """Number of later turns that are not asked: they do not fit, or the template refuses the answers."""
        return sum(item.turns - len(item.answers) for item in self.asked if not item.prompt)

    def check_lengths(self, skip_long: bool) -> None:
        """Leave out rows that are too long, with `skip_long`. Raises CapacityError, UsageError naming the row."""
        limit, new = self.decoder.teacher.max_positions, self.settings.max_new_tokens
        check_room(new, limit)
        for item in self.asked:
            length, name = len(item.prompt), self._name(item)
            if not length:
                raise UsageError(f"{name} is empty: give at least one token")
            if length > self.room and not skip_long:
                raise CapacityError(
                    f"{name} has {length} tokens and {new} new ones are asked for, the teacher's context holds "
                    f"{limit}: {self.room} beside them\n"
                    "--skip-long skips and counts such rows, a smaller --max-new-tokens makes room"
                )
        self.skipped = [item.row.index for item in self.asked if len(item.prompt) > self.room]
        self.asked = [item for item in self.asked if len(item.prompt) <= self.room]

    def answers(self, progress: Progress = no_progress) -> Iterator[list[Line]]:
        """Yield the lines of each batch. The next turns of its rows follow before the next batch."""
        settings, pending, done = self.settings, [item for item in self.asked if item.prompt], self.kept
        decode = self.decoder.session(
            settings.max_new_tokens,
            batch=min(settings.batch_size, len(pending)),
            longest=max((len(item.prompt) for item in pending), default=0),
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed + done,
            stop=settings.stop,
        )
        for start in range(0, len(pending), settings.batch_size):
            rows = pending[start : start + settings.batch_size]
            while batch := [(item, item.prompt) for item in rows if item.prompt]:
                made = decode([ids for _, ids in batch], [self._name(item) for item, _ in batch])
                self.totals.add(made)
                done += len(made)
                yield [self._line(item, ids, result) for (item, ids), result in zip(batch, made, strict=True)]
                for (item, _), result in zip(batch, made, strict=True):
                    item.take(result.token_ids, self.room)
                progress(done, self.count)

    def read_kept(self, output: Path) -> None:
        """Take the answers in the whole lines of an interrupted run's file.

        Raises UsageError where they were made from other prompts, by another decoder or with other settings.
        """
        known = {item.row.index: item for item in self.asked}
        for number, text in enumerate(_whole_lines(output), 1):
            where = f"{output} line {number}"
            try:
                line = json.loads(text)
                index, turn, answer = int(line["index"]), line.get("turn", 0), list(map(int, line["token_ids"]))
                made_with, prompt_hash = dict(line["settings"]), line["prompt_hash"]
            except (ValueError, KeyError, TypeError, RecursionError):
                fault = (
                    "was written by another version of firp" if _is_earlier(text) else "is no answer of `firp generate`"
                )
                raise UsageError(f"{where} {fault}: give another --output") from None
            if different := differences(made_with, self.made_with, "file"):
                raise UsageError(
                    f"--resume needs what {where} was made with; different: {', '.join(different)}\n"
                    "give it as it was, another --output, or leave --resume out to start again"
                )
            item = known.get(index)
            if item is None or turn != len(item.answers) or fingerprint(item.prompt) != prompt_hash:
                raise UsageError(
                    f"{where} answers another prompt than row {index + 1} of {self.path}: give the same --prompts, or "
                    "leave --resume out to start again"
                )
            item.take(answer, self.room)
            self.kept += 1

    def _name(self, item: Asked) -> str:
        return f"{item.row.row} of {self.path}"

    def _encode(self, row: Prompt, fields: SideFields) -> list[int]:
        """Return the tokens of a row's first prompt: with the row's history for conversations."""
        if self.settings.raw:
            fields.note([], None, (*row.conversation.left_out, *(["tools"] if row.conversation.tools else [])))
            return raw_tokens(self.decoder, row.conversation.history()[-1]["content"])
        said = row.messages if row.conversation.questions_only else row.conversation.history()
        return encode_question(row, fields, said)

    def _line(self, item: Asked, prompt: list[int], generation: Generation) -> Line:
        """Return the line of the answer to `prompt`, before it is taken."""
        row = item.row
        return {
            "index": row.index,
            **({"id": row.id} if row.id is not None else {}),
            **({"turn": len(item.answers)} if row.conversation.questions_only else {}),
            **record(generation),
            "prompt_hash": fingerprint(prompt),
            "settings": self.made_with,
        }


def prompts_to_answer(path: str, limit: int | None, raw: bool) -> list[Prompt]:
    """Read the prompts of a file. Raises DatasetError, also where it has none; UsageError with `raw` for one of
    several messages.
    """
    prompts = load_prompts(path, None, limit)
    several = next((item.row for item in prompts if len(item.conversation.history()) > 1), None)
    if raw and several is not None:
        raise UsageError(f"{several} of {path} has several messages, which need a chat template: leave --raw out")
    return prompts


def record(result: Generation) -> Line:
    """Return the fields of an answer.

    `prefill_seconds` and `decode_seconds` are wall times of the batch that the answer was decoded in, from its start to
    the end of this answer; the `batch_size` answers of a batch share them. A pipeline's steps are ticks:
    `accepted_lengths` has a 0 or 1 for each.
    """
    return {
        "prompt_tokens": result.prompt_tokens,
        "token_ids": result.token_ids,
        "text": result.text,
        "steps": result.steps,
        "accepted_lengths": result.accepted_lengths,
        "finish_reason": result.finish_reason,
        "batch_size": result.batch_size,
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
    }


def raw_tokens(decoder: Decoder, text: str) -> list[int]:
    """Return the tokens of a text without the chat template."""
    return encode_text(text, decoder.teacher.tokenizer)


def _is_earlier(text: bytes) -> bool:
    """Return True for an answer in the format of another version, whose line has no `settings`."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(line, dict) and {"token_ids", "prompt_hash"} <= set(line) and "settings" not in line


def _whole_lines(path: Path) -> list[bytes]:
    """Return the lines of a file without the last one where that has no end."""
    if not path.is_file():
        return []
    return path.read_bytes().split(b"\n")[:-1]  # a text may contain other ends of lines, as U+2028
