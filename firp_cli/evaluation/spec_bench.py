"""Spec-Bench's published categories, and its answer files, which its own `evaluation/speed.py` reads.

Spec-Bench (https://github.com/hemingkx/Spec-Bench): mean over questions of new tokens per second of wall time, prefill
included, over that of the baseline. Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import median
from typing import Any

from firp_cli.records import AnswerRecord
from firp_cli.results import BenchReport

NAME = "spec_bench"
FOLDER = "spec-bench"
MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
MT_BENCH_COLUMN = "mt_bench"
OTHERS = ("translation", "summarization", "qa", "math_reasoning", "rag")
FIRST_ID, QUESTIONS = 81, 10  # of MT-Bench's questions, which are numbered by category


def published_categories(name: str, categories: Sequence[str]) -> list[str]:
    """Return the category of each row under which results are published.

    Spec-Bench's tables have one column for MT-Bench's eight categories. The set is known by its name, or by its
    thirteen categories. Other sets keep their own.
    """
    if name != NAME and set(categories) != {*MT_BENCH, *OTHERS}:
        return list(categories)
    return [MT_BENCH_COLUMN if category in MT_BENCH else category for category in categories]


def answer_files(report: BenchReport, written: float = 0.0) -> dict[str, str]:
    """Return Spec-Bench's answer files by path (`spec-bench/METHOD.jsonl`); none where its set was not measured, or
    where several prompts shared a batch's time.

    A line is a question: `choices[0]` has the text, decoding steps, new tokens and seconds of each turn, and the tokens
    of each step (`accept_lengths`, without the token that prefill gives). Seconds are the medians over repeats.

    Args:
        written: time stamp of the lines.
    """
    names = {record.dataset for record in report.records if record.dataset == NAME}
    names |= {name for name in {record.dataset for record in report.records} if _is_published(report.records, name)}
    records = [record for record in report.records if record.dataset in names]
    if not records or report.settings.get("batch_size") != 1:
        return {}
    files = {}
    several = len({record.teacher for record in records}) > 1
    for (teacher, method), own in _grouped(records, lambda item: (item.teacher or "", item.method)):
        model = f"{teacher or report.teacher.get('name', '')}-{method}"
        lines = [_line(answers, model, written) for _, answers in _grouped(own, lambda item: item.prompt)]
        numbers = [line["question_id"] for line in lines]
        if all(isinstance(number, int) for number in numbers):  # as Spec-Bench sorts its files
            lines.sort(key=lambda line: line["question_id"])
        folder = f"{FOLDER}/{_plain(teacher)}" if several else FOLDER
        files[f"{folder}/{_plain(method)}.jsonl"] = "".join(f"{json.dumps(line)}\n" for line in lines)
    return files


def question_seconds(answers: Iterable[AnswerRecord]) -> float:
    """Return the wall seconds of one question by one method, prefill included: the median over repeats of its prefill,
    and the tokens of the first repeat at the median decode seconds per token.
    """
    repeats = [list(own) for _, own in _grouped(answers, lambda item: (item.process, item.repeat))]
    tokens = [sum(max(0, item.new_tokens - 1) for item in own) for own in repeats]
    decode = [sum(item.decode_seconds for item in own) for own in repeats]
    per_token = median(seconds / max(1, count) for seconds, count in zip(decode, tokens, strict=True))
    return median(sum(item.prefill_seconds for item in own) for own in repeats) + per_token * tokens[0]


def _is_published(records: Iterable[AnswerRecord], name: str) -> bool:
    """Return True for a data set whose categories are those of Spec-Bench's tables."""
    return {record.category for record in records if record.dataset == name} == {MT_BENCH_COLUMN, *OTHERS}


def _line(answers: list[AnswerRecord], model: str, written: float) -> dict[str, Any]:
    """Return the line of a question; tokens and texts are those of the first repeat."""
    first = min((item.process, item.repeat) for item in answers)
    turns = sorted((item for item in answers if (item.process, item.repeat) == first), key=lambda item: item.turn)
    whole = question_seconds(answers)
    measured = sum(item.prefill_seconds + item.decode_seconds for item in turns) or 1.0
    lengths = [_lengths(item) for item in turns]
    number = turns[0].id if isinstance(turns[0].id, int | str) else turns[0].prompt
    choice = {
        "index": 0,
        "turns": [(item.text or "").strip() for item in turns],
        "decoding_steps": [len(steps) for steps in lengths],
        "new_tokens": [item.new_tokens for item in turns],
        # each turn's share of the first repeat, of the median time
        "wall_time": [whole * (item.prefill_seconds + item.decode_seconds) / measured for item in turns],
        "accept_lengths": [length for steps in lengths for length in steps],
    }
    return {
        "question_id": number,
        "category": _category(turns[0].category, number),
        "answer_id": f"{model}-{number}",
        "model_id": model,
        "choices": [choice],
        "tstamp": written,
    }


def _lengths(answer: AnswerRecord) -> list[int]:
    """Return the tokens of each step; of a pipeline those of r ticks, which cost as much as a step."""
    ticks, lengths = answer.loops or 1, answer.accepted_lengths
    return [sum(lengths[place : place + ticks]) for place in range(0, len(lengths), ticks)]


def _category(category: str, number: int | str) -> str:
    """Return the category as Spec-Bench's files name it: of MT-Bench's questions, which are grouped here, by number."""
    place = (number - FIRST_ID) // QUESTIONS if isinstance(number, int) else -1
    return MT_BENCH[place] if category == MT_BENCH_COLUMN and 0 <= place < len(MT_BENCH) else category


def _grouped(records: Iterable[AnswerRecord], key: Any) -> list[tuple[Any, list[AnswerRecord]]]:
    return [(value, list(own)) for value, own in groupby(sorted(records, key=key), key=key)]


def _plain(name: str) -> str:
    """Return a name as that of a file."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-") or "method"
