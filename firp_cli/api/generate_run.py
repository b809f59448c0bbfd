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
from firp_cli.data.encode_rows import encode_prompts
from firp_cli.data.formats import Message
from firp_cli.decoding.sequences import check_room
from firp_cli.errors import CapacityError, UsageError
from firp_cli.provenance import fingerprint
from firp_cli.results import Generation, Progress, no_progress

Line = dict[str, Any]
Key = tuple[int, int]  # index of the row, number of the turn


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

    def mark(self, decoder: Decoder) -> str:
        """Return 16 hex digits over the teacher and these settings. Greedy text does not depend on the sampling."""
        values = asdict(self) | {"batch_size": 0, "teacher": decoder.teacher.fingerprint}
        if not self.temperature:
            values |= {"top_p": 1.0, "seed": 0}
        return fingerprint(values)


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
class FileRun:
    """Answers to the prompts of a file, resolved for one decoder.

    Attributes:
        skipped: rows whose prompt is too long. cut: later turns that have no room beside their history.
    """

    path: str
    decoder: Decoder
    prompts: list[Prompt]
    settings: GenerateSettings
    totals: Totals = field(default_factory=Totals)
    skipped: list[int] = field(default_factory=list)
    cut: int = 0

    def __post_init__(self) -> None:
        self.mark = self.settings.mark(self.decoder)
        teacher = self.decoder.teacher
        first = encode_prompts(self.prompts, teacher.tokenizer, teacher.vocab_size, lambda item: self._encode(item, []))
        self.first = {item.index: ids for item, ids in zip(self.prompts, first, strict=True) if ids is not None}
        self.prompts = [item for item in self.prompts if item.index in self.first]
        self.room = self.decoder.teacher.max_positions - self.settings.max_new_tokens

    @property
    def count(self) -> int:
        """Number of answers to make, kept ones included."""
        return sum(_turns(item) for item in self.prompts)

    def check_lengths(self, skip_long: bool) -> None:
        """Leave out rows that are too long, with `skip_long`. Raises CapacityError, UsageError naming the row."""
        check_room(self.settings.max_new_tokens, self.decoder.teacher.max_positions)
        fitting = []
        for item in self.prompts:
            length = len(self.first[item.index])
            if not length:
                raise UsageError(f"{item.row} of {self.path} is empty: give at least one token")
            if length <= self.room:
                fitting.append(item)
            elif skip_long:
                self.skipped.append(item.index)
            else:
                limit, new = self.decoder.teacher.max_positions, self.settings.max_new_tokens
                raise CapacityError(
                    f"{item.row} of {self.path} has {length} tokens and {new} new ones are asked for, the "
                    f"teacher's context holds {limit}: {self.room} beside them\n"
                    "--skip-long skips and counts such rows, a smaller --max-new-tokens makes room"
                )
        self.prompts = fitting

    def answers(self, kept: dict[Key, Line], progress: Progress = no_progress) -> Iterator[list[Line]]:
        """Yield the lines of each batch. Turns in `kept` are not decoded again, and serve as history."""
        settings, pending = self.settings, [item for item in self.prompts if (item.index, _turns(item) - 1) not in kept]
        done = len(kept)
        decode = self.decoder.session(
            settings.max_new_tokens,
            batch=min(settings.batch_size, len(pending)),
            longest=max((len(self.first[item.index]) for item in pending), default=0),
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed + done,
            stop=settings.stop,
        )
        texts: dict[int, list[str]] = {item.index: [] for item in pending}
        for start in range(0, len(pending), settings.batch_size):
            rows = pending[start : start + settings.batch_size]
            for turn in range(max(map(_turns, rows))):
                asked = self._asked([row for row in rows if len(texts[row.index]) == turn], turn, texts, kept)
                if not asked:
                    continue
                names = [f"{item.row} of {self.path}" for item, _ in asked]
                made = decode([ids for _, ids in asked], names.__getitem__)
                self.totals.add(made)
                for (item, _), generation in zip(asked, made, strict=True):
                    texts[item.index].append(generation.text)
                done += len(made)
                yield [self._line(*each, generation, turn) for each, generation in zip(asked, made, strict=True)]
                progress(done, self.count)

    def _asked(
        self, rows: Sequence[Prompt], turn: int, texts: dict[int, list[str]], kept: dict[Key, Line]
    ) -> list[tuple[Prompt, list[int]]]:
        """Return the rows whose turn is to be answered, with its prompt. Kept answers are added to `texts`."""
        asked = []
        for item in rows:
            if turn >= _turns(item):
                continue
            if (item.index, turn) in kept:
                texts[item.index].append(kept[item.index, turn]["text"])
                continue
            ids = self.encode(item, texts[item.index])
            if len(ids) <= self.room:
                asked.append((item, ids))
            else:
                self.cut += _turns(item) - turn
        return asked

    def encode(self, item: Prompt, answers: list[str]) -> list[int]:
        """Return the tokens of a row's next prompt after `answers`, its own earlier ones."""
        return self._encode(item, answers) if answers else self.first[item.index]

    def read_kept(self, output: Path) -> dict[Key, Line]:
        """Return the whole lines of an interrupted run's file by row and turn.

        Raises UsageError where they were made from other prompts or with other settings.
        """
        kept: dict[Key, Line] = {}
        known = {item.index: item for item in self.prompts}
        for number, text in enumerate(_whole_lines(output), 1):
            where = f"{output} line {number}"
            try:
                line = json.loads(text)
                key = line["index"], line.get("turn", 0)
                marks = line["settings_hash"], line["prompt_hash"], line["text"]
            except (ValueError, KeyError, TypeError):
                raise UsageError(f"{where} is no answer of `firp generate`: give another --output") from None
            if marks[0] != self.mark:
                raise UsageError(
                    f"{where} was made by another teacher or with other settings (--max-new-tokens, --stop, --raw, "
                    "sampling): repeat them, or leave --resume out to start again"
                )
            item = known.get(key[0])
            earlier = [kept[key[0], turn]["text"] for turn in range(key[1]) if (key[0], turn) in kept]
            if item is None or key in kept or fingerprint(self.encode(item, earlier)) != marks[1]:
                raise UsageError(
                    f"{where} answers another prompt than row {key[0] + 1} of {self.path}: give the same --prompts, or "
                    "leave --resume out to start again"
                )
            kept[key] = line
        return kept

    def _encode(self, item: Prompt, answers: list[str]) -> list[int]:
        """Return the tokens of the next prompt after `answers`; row's history for conversations."""
        conversation = item.conversation
        if self.settings.raw and not answers:
            asked = conversation.turns()[0] if conversation.questions_only else conversation.history()
            return raw_tokens(self.decoder, asked[-1]["content"])
        if not conversation.questions_only:
            return self.decoder.encode(conversation.history(), tools=conversation.tools)
        turns = conversation.turns()
        said: list[Message] = []
        for turn, answer in zip(turns, answers, strict=False):
            said += [*turn, {"role": "assistant", "content": answer}]
        return self.decoder.encode([*said, *turns[len(answers)]], tools=conversation.tools)

    def _line(self, item: Prompt, ids: list[int], generation: Generation, turn: int) -> Line:
        head: Line = {"index": item.index}
        if item.id is not None:
            head["id"] = item.id
        if item.conversation.questions_only:
            head["turn"] = turn
        return {
            **head,
            **record(generation),
            "prompt_hash": fingerprint(ids),
            "settings_hash": self.mark,
        }


def prompts_to_answer(path: str, limit: int | None, raw: bool) -> list[Prompt]:
    """Read the prompts of a file. Raises DatasetError, also where it has none; UsageError for turns with `raw`."""
    prompts = load_prompts(path, None, limit)
    several = next((item.row for item in prompts if _turns(item) > 1), None)
    if raw and several is not None:
        raise UsageError(f"{several} of {path} has several turns, which need a chat template: leave --raw out")
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


def _turns(item: Prompt) -> int:
    """Return the number of answers that a row asks for."""
    return len(item.conversation.turns()) if item.conversation.questions_only else 1


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a file without the last one where that has no end."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    return data[: data.rfind(b"\n") + 1].decode("utf-8", errors="replace").splitlines()
