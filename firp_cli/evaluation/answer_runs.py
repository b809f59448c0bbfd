"""Batches of records, and their times as tables of repeats and batches.

Shapes: R repeats (of all processes), n batches. The sequences of a batch share its time, so a batch is the unit of
every time; the turns of a conversation belong to one batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from firp_cli.records import AnswerRecord
from firp_cli.results import Generation

if TYPE_CHECKING:
    from firp_cli.evaluation.bench_prompts import Batch, BenchPrompt

ALL = "all"


@dataclass
class BatchRun:
    """Batch decoded by one method, with all repeats.

    Attributes:
        repeats: records of each repeat: one for each prompt, and for each later turn of a conversation.
        generations: the answers of the first repeat; empty where the records were read from a file.
    """

    repeats: list[list[AnswerRecord]]
    generations: list[Generation] = field(default_factory=list)

    @property
    def first(self) -> list[AnswerRecord]:
        """The records of the first repeat."""
        return self.repeats[0]

    @property
    def dataset(self) -> str:
        return self.first[0].dataset

    @property
    def category(self) -> str:
        return self.first[0].category

    @property
    def numbers(self) -> list[int]:
        """The prompt of each answer."""
        return [record.prompt for record in self.first]

    def longest_prompts(self) -> list[int]:
        """Return the tokens of the longest prompt of each turn, which are decoded together."""
        longest: dict[int, int] = {}
        for record in self.first:
            longest[record.turn] = max(record.prompt_tokens, longest.get(record.turn, 0))
        return list(longest.values())

    @property
    def repeats_alike(self) -> bool:
        """True if all repeats have the same steps: greedy decoding without a fallback."""
        lengths = [[record.accepted_lengths for record in repeat] for repeat in self.repeats]
        return all(each == lengths[0] for each in lengths)


Runs = Mapping[str, Sequence[BatchRun]]  # method name to its batches, in the same order for all methods


def batch_run(
    batch: Batch,
    repeats: Sequence[Sequence[Generation]],
    method: str = "",
    number: int = 0,
    prompts: Sequence[BenchPrompt] = (),
) -> BatchRun:
    """Return the run of a batch from the answers of each repeat, in the order of `Batch.places`.

    Args:
        number: of the batch. prompts: all that are measured, for the identity of their rows.
    """
    places = [(turn, place) for turn, asked in enumerate(batch.places()) for place in asked]
    made: list[list[AnswerRecord]] = []
    for repeat, answers in enumerate(repeats):
        records = []
        for position, ((turn, place), item) in enumerate(zip(places, answers, strict=True)):
            first = repeats[0][position]
            kept = repeat == 0 or item.token_ids != first.token_ids
            prompt = batch.numbers[place]
            record = AnswerRecord(
                method=method,
                dataset=batch.dataset,
                category=batch.category,
                prompt=prompt,
                turn=turn,
                process=0,
                repeat=repeat,
                batch=number,
                prompt_tokens=item.prompt_tokens,
                new_tokens=len(item.token_ids),
                steps=item.steps,
                accepted_lengths=list(item.accepted_lengths),
                prefill_seconds=item.prefill_seconds,
                decode_seconds=item.decode_seconds,
                finish_reason=item.finish_reason,
                loops=item.pipeline.loops if item.pipeline else None,
                autoregressive_steps=item.autoregressive_steps,
                token_ids=list(item.token_ids) if kept else None,
                text=item.text if kept else None,
            )
            if prompts:
                record.id, record.row = prompts[prompt].id, prompts[prompt].place
            records.append(record)
        made.append(records)
    return BatchRun(made, list(repeats[0]))


def runs_of_records(records: Iterable[AnswerRecord]) -> dict[str, list[BatchRun]]:
    """Return the batches of each method from records of one teacher; the repeats of all processes follow each other."""
    found: dict[str, dict[int, dict[tuple[int, int], list[AnswerRecord]]]] = {}
    for record in records:
        repeats = found.setdefault(record.method, {}).setdefault(record.batch, {})
        repeats.setdefault((record.process, record.repeat), []).append(record)
    return {
        method: [BatchRun([repeats[key] for key in sorted(repeats)]) for _, repeats in sorted(batches.items())]
        for method, batches in found.items()
    }


def teacher_labels(names: Sequence[str]) -> list[str]:
    """Return the teachers' names in reports: of a folder its last part, if no other teacher has the same. Teachers of
    the same name are numbered.
    """
    short = [Path(name).name if Path(name).is_absolute() else name for name in names]
    labels = [label if short.count(label) == 1 else name for name, label in zip(names, short, strict=True)]
    return [
        label if labels.count(label) == 1 else f"{label} ({labels[: place + 1].count(label)})"
        for place, label in enumerate(labels)
    ]


def records_of(runs: Runs) -> list[AnswerRecord]:
    """Return all records, by method."""
    return [record for batches in runs.values() for run in batches for repeat in run.repeats for record in repeat]


def runs_of(dataset: str, category: str, runs: Sequence[BatchRun]) -> list[BatchRun]:
    """Return the runs of a data set and category; ALL stands for any."""
    return [run for run in runs if dataset in (ALL, run.dataset) and category in (ALL, run.category)]


@dataclass
class Times:
    """Times of a method's batches: tables (R, n).

    Attributes:
        decode, prefill: seconds. tokens: new tokens without the first of each sequence, which prefill gives.
        written: all new tokens. passes: decoding steps of the batch, those of the longest sequence of each turn.
        processes: (R,) the process of each repeat.
    """

    decode: NDArray[np.float64]
    prefill: NDArray[np.float64]
    tokens: NDArray[np.float64]
    written: NDArray[np.float64]
    passes: NDArray[np.float64]
    processes: list[int]

    @staticmethod
    def of(runs: Sequence[BatchRun]) -> Times:
        """Return the times of a method's batches; the repeats that all of them have."""
        count = min(len(run.repeats) for run in runs)
        cells = np.array([[_cell(run.repeats[repeat]) for run in runs] for repeat in range(count)])
        processes = [runs[0].repeats[repeat][0].process for repeat in range(count)]
        decode, prefill, tokens, written, passes = (cells[:, :, place] for place in range(5))
        return Times(decode, prefill, tokens, written, passes, processes)

    @property
    def everything(self) -> NDArray[np.int64]:
        """The choice (1, R) of all repeats, for `fold`."""
        return np.arange(len(self.processes))[None]

    @property
    def groups(self) -> NDArray[np.int64]:
        """The choices (P, r) of the repeats that every process has; of the only process each repeat alone, (R, 1)."""
        owners = np.asarray(self.processes)
        own = [np.flatnonzero(owners == name) for name in np.unique(owners)]
        return np.stack([each[: min(map(len, own))] for each in own]) if len(own) > 1 else self.everything.T

    def fold(self, repeats: NDArray[np.int64]) -> Folded:
        """Return one value for each batch, from choices of repeats (S, r): tables (S, n).

        Seconds per token are medians over the repeats, since sampled answers differ in length; tokens are means. Where
        this method was repeated less often than others, all its repeats are taken: (1, n).
        """
        if repeats.max() >= len(self.processes):
            repeats = self.everything
        per_token = np.median((self.decode / np.maximum(self.tokens, 1))[repeats], axis=1)
        tokens = self.tokens[repeats].mean(axis=1)
        return Folded(
            per_token * tokens,
            np.median(self.prefill[repeats], axis=1),
            tokens,
            self.written[repeats].mean(axis=1),
            self.passes[repeats].mean(axis=1),
        )


@dataclass
class Folded:
    """Times of batches with their repeats folded into one: tables (S, n), fields as in `Times`."""

    decode: NDArray[np.float64]
    prefill: NDArray[np.float64]
    tokens: NDArray[np.float64]
    written: NDArray[np.float64]
    passes: NDArray[np.float64]

    @property
    def tables(self) -> list[NDArray[np.float64]]:
        """The tables that speedups are computed from."""
        return [self.decode, self.prefill, self.tokens, self.written]


def _cell(answers: Sequence[AnswerRecord]) -> tuple[float, float, int, int, int]:
    """Return the values of `Times` of one batch and repeat. The turns follow each other, so theirs add up."""
    turns: dict[int, list[AnswerRecord]] = {}
    for record in answers:
        turns.setdefault(record.turn, []).append(record)
    decode = sum(max(record.decode_seconds for record in turn) for turn in turns.values())
    prefill = sum(max(record.prefill_seconds for record in turn) for turn in turns.values())
    passes = sum(max(record.steps for record in turn) for turn in turns.values())
    written = sum(record.new_tokens for record in answers)
    return decode, prefill, sum(max(0, record.new_tokens - 1) for record in answers), written, passes
