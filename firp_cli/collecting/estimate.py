"""Estimate of a store before it is collected: bytes per token, tokens, disk and time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from firp_cli.collecting.corpus import Corpus, build_corpus, load_messages, longest_sequence
from firp_cli.collecting.dialogues import start_dialogues
from firp_cli.collecting.responders import Responder
from firp_cli.collecting.teacher_states import capture, plan_batches
from firp_cli.config import DataConfig
from firp_cli.errors import CapacityError, TeacherError, first_line
from firp_cli.machine import readable_bytes
from firp_cli.store.reader import bytes_per_token
from firp_cli.store.shard_file import free_bytes
from firp_cli.teacher.teacher import Teacher

SAMPLE_CONVERSATIONS = 256
TIMED_TOKENS = 8192  # most positions of the timed forwards
TIMED_STEPS = 16  # tokens of the timed answers


@dataclass(frozen=True)
class Amount:
    """Conversations and tokens of a collection; `answers`: those that the teacher writes itself.

    Attributes:
        tokens: an upper bound where answers are written. sampled: conversations that were tokenized, of `rows`.
        given: the data set has answers of its own. sample: the tokenized conversations.
    """

    conversations: int
    tokens: int
    answers: int
    rows: int
    sampled: int = 0
    given: bool = False
    sample: Corpus | None = None


@dataclass(frozen=True)
class Way:
    """A way to come by answers: a responder's name, or `given` for those of the data set.

    `seconds`: of the whole collection, None where it is unknown. `note`: how they were found, or why they are unknown.
    """

    name: str
    seconds: float | None
    note: str


@dataclass(frozen=True)
class CollectEstimate:
    """Size and duration of a store that is not collected yet.

    Attributes:
        layers: those stored beside the final state. dtype: of the stored states.
        conversations, tokens: counted when `exact`, an upper bound when `upper_bound` (the teacher writes the answers),
            else extrapolated from `sampled_conversations`.
        bytes_per_token, total_bytes, free_bytes: of the store; free on its disk.
        rank_tokens_per_second: measured in this process. tokens_per_second: of all `ranks`.
        answering_seconds: part of `seconds` for writing answers.
        ways: with answers that the teacher writes, the ways to come by them; the first is that of `seconds`.
        computed: why and by which assumptions the times are computed; empty where they are measured.
    """

    dataset: str
    teacher: str
    layers: list[int]
    dtype: str
    conversations: int
    tokens: int
    sampled_conversations: int
    exact: bool
    upper_bound: bool
    bytes_per_token: int
    total_bytes: int
    free_bytes: int
    ranks: int
    rank_tokens_per_second: float
    tokens_per_second: float
    answering_seconds: float
    seconds: float
    ways: list[Way]
    computed: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def estimate(
    teacher: Teacher,
    data: DataConfig,
    layers: Sequence[int],
    dtype: str,
    folder: Path,
    responders: Sequence[Responder] = (),
    ranks: int = 1,
) -> CollectEstimate:
    """Estimate the collection of `data` into `folder` with `ranks` ranks. Writes nothing.

    Tokens are counted in an evenly spaced sample and extrapolated. An answer that the teacher writes itself counts
    `max_new_tokens`, an upper bound. Times are measured with short forwards of this process and, with
    `data.regenerate`, with short answers of all `responders`; N ranks are assumed to be N times as fast.

    Raises TeacherError when the first responder, which the recipe chooses, cannot answer.
    """
    amount = count(teacher, data)
    assert amount.sample is not None
    rate = _forward_rate(teacher, amount.sample, layers, data.pack_tokens)
    reading, written = amount.tokens / rate / ranks, amount.answers * data.max_new_tokens
    ways: list[Way] = []
    for responder in responders:
        try:
            answering = written / _answering_rate(amount.sample, data, responder) / max(1, ranks // responder.devices)
            ways.append(Way(responder.name, reading + answering, "measured"))
        except TeacherError as error:
            if not ways:
                raise
            ways.append(Way(responder.name, None, first_line(error)))
    return fill(amount, teacher, data, layers, dtype, folder, ranks, rate, ways)


def fill(
    amount: Amount,
    teacher: Teacher,
    data: DataConfig,
    layers: Sequence[int],
    dtype: str,
    folder: Path,
    ranks: int,
    rate: float,
    ways: list[Way],
) -> CollectEstimate:
    """Return the estimate of an amount at `rate` tokens/s of a rank. `ways`: those whose answers the teacher writes."""
    token_bytes, reading = bytes_per_token(teacher.hidden_size, len(layers), dtype), amount.tokens / rate / ranks
    if ways and amount.given:
        ways = [*ways, Way("given", reading, "the data set's answers: not the teacher's text, drafts suit it less")]
    seconds = ways[0].seconds if ways and ways[0].seconds is not None else reading
    return CollectEstimate(
        dataset=data.dataset,
        teacher=teacher.name,
        layers=list(layers),
        dtype=dtype,
        conversations=amount.conversations,
        tokens=amount.tokens,
        sampled_conversations=amount.sampled,
        exact=amount.sampled == amount.rows and not data.regenerate,
        upper_bound=data.regenerate,
        bytes_per_token=token_bytes,
        total_bytes=amount.tokens * token_bytes,
        free_bytes=free_bytes(folder),
        ranks=ranks,
        rank_tokens_per_second=rate,
        tokens_per_second=rate * ranks,
        answering_seconds=seconds - reading,
        seconds=seconds,
        ways=ways,
    )


def count(teacher: Teacher, data: DataConfig) -> Amount:
    """Count conversations and tokens in an evenly spaced sample, and extrapolate. Raises DatasetError."""
    rows = load_messages(data)
    step = max(1, len(rows) // SAMPLE_CONVERSATIONS)
    sample = build_corpus(rows[::step][:SAMPLE_CONVERSATIONS], teacher, data)
    sampled = len(sample.input_ids) + sum(sample.skipped.values())
    scale = len(rows) / sampled
    longest = longest_sequence(teacher, data)
    turns = _turns(sample, teacher, data)
    return Amount(
        conversations=round(len(sample.input_ids) * scale),
        tokens=round(sum(min(longest, length + data.max_new_tokens * asked) for length, asked in turns) * scale),
        answers=round(sum(asked for _, asked in turns) * scale),
        rows=len(rows),
        sampled=sampled,
        given=any(row.conversation.answered for row in rows),
        sample=sample,
    )


def check_space(folder: Path, hidden_size: int, layers: int, dtype: str, tokens: int) -> None:
    """Raise CapacityError when `tokens` more tokens do not fit on the disk of `folder`."""
    needed, free = tokens * bytes_per_token(hidden_size, layers, dtype), free_bytes(folder)
    if needed > free:
        raise CapacityError(
            f"the store needs {readable_bytes(needed)} and {folder} has {readable_bytes(free)} free\n"
            "lower data.limit, collect fewer layers, store in int8 (data.store_dtype=int8), or give another --output"
        )


def _turns(sample: Corpus, teacher: Teacher, data: DataConfig) -> list[tuple[int, int]]:
    """Return for each sequence its tokens without the answers that the teacher writes, and their number."""
    if not data.regenerate:
        return [(length, 0) for length in sample.lengths]
    questions = [item.questions for item in start_dialogues(sample, teacher, data.turns == "all")]
    lengths = [
        [length, *(asked.lengths() if asked else ())] for length, asked in zip(sample.lengths, questions, strict=True)
    ]
    return [(each[-1], len(each)) for each in lengths]


def _forward_rate(teacher: Teacher, sample: Corpus, layers: Sequence[int], pack_tokens: int) -> float:
    """Measure the tokens per second of collecting, with forwards of conversations of middle length."""
    batches = plan_batches(sample.lengths, pack_tokens)
    count = max(1, min(len(batches), TIMED_TOKENS // pack_tokens))
    middle = (len(batches) - count) // 2
    picks = [sample.input_ids[index] for batch in batches[middle : middle + count] for index in batch]
    capture(teacher, picks[:1], layers, pack_tokens, lambda *_: None)  # warm-up
    began = time.perf_counter()
    capture(teacher, picks, layers, pack_tokens, lambda *_: None)
    return sum(map(len, picks)) / (time.perf_counter() - began)


def _answering_rate(sample: Corpus, data: DataConfig, responder: Responder) -> float:
    """Measure the responder's tokens per second, with short answers to a batch of prompts of middle length."""
    order = sorted(range(len(sample.input_ids)), key=sample.lengths.__getitem__)
    start = max(0, (len(order) - data.batch_size) // 2)
    prompts = [sample.input_ids[index].tolist() for index in order[start : start + data.batch_size]]

    def answer(limit: int) -> int:
        replies = list(responder.reply(prompts, [limit] * len(prompts)))
        for reply in replies:
            if reply.failure:
                raise TeacherError(f"{responder.name} cannot answer: {reply.failure}")
        return sum(len(reply.token_ids) for reply in replies)

    try:
        answer(1)  # warm-up
        began = time.perf_counter()
        written = answer(min(TIMED_STEPS, data.max_new_tokens))
        return written / (time.perf_counter() - began)
    finally:
        responder.close()
