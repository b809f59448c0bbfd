"""Rows of a bench table, computed from decoded batches.

Throughput and speedup pool seconds and tokens over batches. Intervals are bootstraps over batches (speedup) and over
prompts (accepted length). Accepted length, histogram and acceptance by step count the tokens of the output: tokens that
the last step drafted after EOS or after the limit do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from firp_cli.metrics import bootstrap_ratio, bootstrap_ratio_of_ratios
from firp_cli.results import BenchRow, Divergence, Generation, Interval, Lossless

ALL = "all"


@dataclass
class BatchRun:
    """Batch decoded by one method, its repeats folded into one.

    Attributes:
        generations: one for each prompt, and for each later turn of a conversation.
        numbers, turns: for each generation its prompt, and its turn from 0; no `turns`: all are first ones.
        decode_tokens: new tokens without the first of each sequence, which prefill gives.
        repeats: number of them.
    """

    dataset: str
    category: str
    numbers: list[int]
    generations: list[Generation]
    prefill_seconds: float
    decode_seconds: float
    decode_tokens: int
    turns: list[int] = field(default_factory=list)
    repeats: int = 1

    def by_turn(self) -> list[list[Generation]]:
        """Return the generations that were decoded together: those of each turn."""
        found: dict[int, list[Generation]] = {}
        for turn, item in zip(self.turns or [0] * len(self.generations), self.generations, strict=True):
            found.setdefault(turn, []).append(item)
        return list(found.values())

    @property
    def steps(self) -> int:
        """Decoding steps of the batch: those of the longest sequence of each turn."""
        return sum(max(item.steps for item in turn) for turn in self.by_turn())


Runs = Mapping[str, Sequence[BatchRun]]  # method name to its batches, in the same order for all methods


def runs_of(dataset: str, category: str, runs: Sequence[BatchRun]) -> list[BatchRun]:
    """Return the runs of a data set and category; ALL stands for any."""
    return [run for run in runs if dataset in (ALL, run.dataset) and category in (ALL, run.category)]


def bench_rows(
    method: str, runs: Runs, divergences: Mapping[int, Divergence | None], temperature: float
) -> list[BenchRow]:
    """Return a method's rows: each data set as a whole, its categories if it has several, and all data sets together
    if there are several.
    """
    datasets = list(dict.fromkeys(run.dataset for run in runs[method]))
    groups = []
    for dataset in datasets:
        groups.append((dataset, ALL))
        categories = list(dict.fromkeys(run.category for run in runs[method] if run.dataset == dataset))
        groups += [(dataset, category) for category in categories if len(categories) > 1]
    if len(datasets) > 1:
        groups.append((ALL, ALL))
    rows = []
    for dataset, category in groups:
        chosen = {name: runs_of(dataset, category, batches) for name, batches in runs.items()}
        rows.append(bench_row(dataset, category, method, chosen, divergences, temperature))
    return rows


def bench_row(
    dataset: str,
    category: str,
    method: str,
    runs: Runs,
    divergences: Mapping[int, Divergence | None],
    temperature: float,
) -> BenchRow:
    """Return one row from the batches in `runs`; `divergences` is empty for the reference and when sampling."""
    own = runs[method]
    generations = [item for run in own for item in run.generations]
    emitted, steps = Counter[int](), Counter[int]()  # by prompt, over its turns
    for number, item in (
        (number, item) for run in own for number, item in zip(run.numbers, run.generations, strict=True)
    ):
        emitted[number] += sum(item.accepted_lengths)
        steps[number] += item.steps
    decode_seconds = sum(run.decode_seconds for run in own)
    passes = sum(run.steps for run in own)
    # a pipeline's step is a tick, one of the teacher's r loops: its accepted length is tokens per r ticks
    loops = next((item.pipeline.loops for item in generations if item.pipeline), None)
    ratio = loops or 1
    base = runs.get("ar")
    return BenchRow(
        dataset=dataset,
        category=category,
        method=method,
        predictor=None,
        batch_size=max(len(set(run.numbers)) for run in own),
        temperature=temperature,
        prompts=len(steps),
        new_tokens=sum(len(item.token_ids) for item in generations),
        prefill_seconds=sum(run.prefill_seconds for run in own),
        decode_seconds=decode_seconds,
        tokens_per_second=_ratio(sum(run.decode_tokens for run in own), decode_seconds),
        speedup=speedup(base, own),
        speedup_interval=speedup_interval(base, own) if method != "ar" else None,
        speedup_hf=speedup(runs.get("hf"), own),
        accepted_length=ratio * _ratio(emitted.total(), steps.total()),
        accepted_length_interval=_accepted_interval(list(emitted.values()), list(steps.values()), ratio),
        acceptance_by_step=[] if loops else acceptance_by_step(generations),
        accepted_histogram=[] if loops else accepted_histogram(generations),
        steps=steps.total(),
        step_milliseconds=1000 * _ratio(decode_seconds, passes),
        lossless=lossless(own, divergences),
        speedup_with_prefill=speedup_with_prefill(base, own),
        turns=len(generations),
    )


def _accepted_interval(emitted: list[int], steps: list[int], ratio: int) -> Interval | None:
    """Return the 95% interval over prompts; None when every step emits one token."""
    if not ratio * sum(emitted) > sum(steps) > 0:
        return None
    low, high = bootstrap_ratio(emitted, steps)
    return ratio * low, ratio * high


def speedup(base: Sequence[BatchRun] | None, own: Sequence[BatchRun]) -> float | None:
    """Return the ratio of pooled decode seconds per token: the baseline's over this method's."""
    if not base or not (sum(run.decode_tokens for run in base) and sum(run.decode_tokens for run in own)):
        return None
    return _seconds_per_token(base) / _seconds_per_token(own)


def speedup_interval(base: Sequence[BatchRun] | None, own: Sequence[BatchRun]) -> Interval | None:
    """Return the 95% bootstrap interval of `speedup` over batches."""
    if speedup(base, own) is None or base is None or len(own) < 2:
        return None
    return bootstrap_ratio_of_ratios(
        [run.decode_seconds for run in base],
        [run.decode_tokens for run in base],
        [run.decode_seconds for run in own],
        [run.decode_tokens for run in own],
    )


def speedup_with_prefill(base: Sequence[BatchRun] | None, own: Sequence[BatchRun]) -> float | None:
    """Return the speedup by Spec-Bench's definition: mean over questions of new tokens per second of wall time, prefill
    included, over the baseline's mean. A question's turns are summed; with several sequences in a batch, each batch
    counts as a question.
    """
    if not base:
        return None
    return fmean(_tokens_per_wall_second(run) for run in own) / fmean(_tokens_per_wall_second(run) for run in base)


def accepted_histogram(generations: Sequence[Generation]) -> list[int]:
    """Return a histogram: entry a is the number of decoding steps that emitted a tokens."""
    counts = Counter(length for item in generations for length in item.accepted_lengths)
    return [counts[length] for length in range(max(counts, default=0) + 1)]


def acceptance_by_step(generations: Sequence[Generation]) -> list[float]:
    """Return the share of decoding steps that emitted at least i drafted tokens, i = 1..k; empty without drafts."""
    histogram = accepted_histogram(generations)
    steps = sum(histogram)
    return [sum(histogram[drafted + 1 :]) / steps for drafted in range(1, len(histogram) - 1)] if steps else []


def lossless(runs: Sequence[BatchRun], divergences: Mapping[int, Divergence | None]) -> Lossless:
    """Count the prompts that were compared and the identical outputs, and list the divergences of the others."""
    compared = list(dict.fromkeys(number for run in runs for number in run.numbers if number in divergences))
    marks = [mark for number in compared if (mark := divergences[number]) is not None]
    return Lossless(len(compared), len(compared) - len(marks), marks)


def _seconds_per_token(runs: Sequence[BatchRun]) -> float:
    return sum(run.decode_seconds for run in runs) / sum(run.decode_tokens for run in runs)


def _tokens_per_wall_second(run: BatchRun) -> float:
    tokens = sum(len(item.token_ids) for item in run.generations)
    return tokens / (run.prefill_seconds + run.decode_seconds)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
