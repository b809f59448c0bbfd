"""Spec-Bench's published categories, and its answer files, which its own `evaluation/speed.py` reads.

Spec-Bench (https://github.com/hemingkx/Spec-Bench): mean over questions of new tokens per second of wall time, prefill
included, over that of the baseline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from firp_cli.evaluation.answer_runs import BatchRun, Times, runs_of_records
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
    of each step (`accept_lengths`, without the token that prefill gives). Seconds are folded over repeats as in
    `speedup_with_prefill`, which their ratio gives.

    Args:
        written: time stamp of the lines.
    """
    records = [record for record in report.records if record.dataset in _spec_bench_sets(report.records)]
    files = {}
    teachers = list(dict.fromkeys(record.teacher for record in records))
    for teacher in teachers:
        folder = f"{FOLDER}/{_plain(teacher or 'teacher')}" if len(teachers) > 1 else FOLDER
        runs = runs_of_records(record for record in records if record.teacher == teacher)
        for method, batches in runs.items():
            if any(len(set(run.numbers)) > 1 for run in batches):
                continue
            model = f"{teacher or report.teacher.get('name', '')}-{method}"
            lines = [_line(run, model, written) for run in batches]
            if all(isinstance(line["question_id"], int) for line in lines):  # as Spec-Bench sorts its files
                lines.sort(key=lambda line: line["question_id"])
            text = "".join(f"{json.dumps(line)}\n" for line in lines)
            files[f"{folder}/{_plain(method)}.jsonl"] = text
    return files


def _spec_bench_sets(records: Iterable[AnswerRecord]) -> set[str]:
    """Return the data sets that are Spec-Bench, by name or by the categories of its tables."""
    categories: dict[str, set[str]] = {}
    for record in records:
        categories.setdefault(record.dataset, set()).add(record.category)
    return {name for name, own in categories.items() if name == NAME or own == {MT_BENCH_COLUMN, *OTHERS}}


def _line(run: BatchRun, model: str, written: float) -> dict[str, Any]:
    """Return the line of a question; tokens and texts are those of the first repeat."""
    turns = sorted(run.first, key=lambda item: item.turn)
    times = Times.of([run])
    folded = times.fold(times.everything)
    seconds = float((folded.prefill + folded.decode)[0, 0]) * sum(item.new_tokens for item in turns)
    seconds /= float(folded.written[0, 0])
    measured = sum(item.prefill_seconds + item.decode_seconds for item in turns) or 1.0
    lengths = [_lengths(item) for item in turns]
    number = turns[0].id if isinstance(turns[0].id, int | str) else turns[0].prompt
    choice = {
        "index": 0,
        "turns": [(item.text or "").strip() for item in turns],
        "decoding_steps": [len(steps) for steps in lengths],
        "new_tokens": [item.new_tokens for item in turns],
        # each turn's share of the first repeat, of the question's time over all repeats
        "wall_time": [seconds * (item.prefill_seconds + item.decode_seconds) / measured for item in turns],
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


def _plain(name: str) -> str:
    """Return a name as that of a file."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-") or "method"
