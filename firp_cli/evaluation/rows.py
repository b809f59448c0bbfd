"""Rows of a bench table, computed from the records of its answers.

Throughput and speedup pool seconds and tokens over batches; a batch's time is the median over its repeats. Intervals
are bootstraps over batches (times) or prompts (accepted length); those of times also have the spread of processes or
repeats. Accepted length, histogram and acceptance by step count the tokens of the output: tokens that the last step
drafted after EOS or after the limit do not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from firp_cli.evaluation.answer_runs import ALL, BatchRun, Runs, Times, runs_of
from firp_cli.metrics import bootstrap
from firp_cli.records import AnswerRecord
from firp_cli.results import BenchRow, Divergence, Interval, Lossless

Table = NDArray[np.float64]
DRIFTED = "the machine drifted"
DRIFT_PARTS = 4  # of a repeat: a slow minute within it shows
DRIFT = 1.1  # ratio of the slowest and fastest repeat of `ar` from which a reader is warned


def groups_of(runs: Sequence[BatchRun]) -> list[tuple[str, str]]:
    """Return (data set, category) of a method's rows: each data set as a whole, its categories if it has several, and
    all data sets together if there are several.
    """
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    groups = []
    for dataset in datasets:
        groups.append((dataset, ALL))
        categories = list(dict.fromkeys(run.category for run in runs if run.dataset == dataset))
        groups += [(dataset, category) for category in categories if len(categories) > 1]
    return [*groups, (ALL, ALL)] if len(datasets) > 1 else groups


def bench_rows(
    method: str, runs: Runs, divergences: Mapping[int, Divergence | None], temperature: float
) -> list[BenchRow]:
    """Return a method's rows."""
    rows = []
    for dataset, category in groups_of(runs[method]):
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
    answers = counted_answers(own)
    first = [record for run in own for record in run.first]
    repeats = len(answers) // len(first)
    times = Times.of(own)
    folded = times.fold(times.everything)
    decode_seconds, steps = float(folded.decode.sum()), sum(record.steps for record in answers)
    # a pipeline's step is a tick, one of the teacher's r loops: its accepted length is tokens per r ticks
    loops = next((record.loops for record in first if record.loops), None)
    over = {base: speedups(runs.get(base), own) for base in ("ar", "hf")}
    return BenchRow(
        dataset=dataset,
        category=category,
        method=method,
        predictor=None,
        batch_size=max(len(set(run.numbers)) for run in own),
        temperature=temperature,
        prompts=len({record.prompt for record in first}),
        new_tokens=round(float(folded.written.sum())),
        prefill_seconds=float(folded.prefill.sum()),
        decode_seconds=decode_seconds,
        tokens_per_second=_ratio(float(folded.tokens.sum()), decode_seconds),
        speedup=over["ar"].decoding,
        speedup_interval=over["ar"].decoding_interval if method != "ar" else None,
        speedup_hf=over["hf"].decoding,
        speedup_hf_interval=over["hf"].decoding_interval if method != "hf" else None,
        accepted_length=(loops or 1) * _ratio(sum(record.emitted for record in answers), steps),
        accepted_length_interval=accepted_length_interval(own),
        acceptance_by_step=[] if loops else acceptance_by_step(answers),
        accepted_histogram=[] if loops else accepted_histogram(answers),
        steps=round(steps / repeats),
        step_milliseconds=1000 * _ratio(decode_seconds, float(folded.passes.sum())),
        lossless=lossless(own, divergences),
        speedup_with_prefill=over["ar"].with_prefill,
        speedup_with_prefill_interval=over["ar"].with_prefill_interval if method != "ar" else None,
        speedup_with_prefill_hf=over["hf"].with_prefill,
        speedup_with_prefill_hf_interval=over["hf"].with_prefill_interval if method != "hf" else None,
        turns=len(first),
    )


def counted_answers(runs: Sequence[BatchRun]) -> list[AnswerRecord]:
    """Return the answers whose steps are counted: those of the first repeat, or of all repeats where they differ."""
    alike = all(run.repeats_alike for run in runs)
    return [record for run in runs for repeat in (run.repeats[:1] if alike else run.repeats) for record in repeat]


def accepted_length_interval(runs: Sequence[BatchRun]) -> Interval | None:
    """Return the 95% interval over prompts; None when every step emits one token."""
    answers = counted_answers(runs)
    loops = next((record.loops for record in answers if record.loops), None) or 1
    if not loops * sum(record.emitted for record in answers) > sum(record.steps for record in answers) > 0:
        return None
    prompts = {number: place for place, number in enumerate(dict.fromkeys(record.prompt for record in answers))}
    emitted, steps = (np.zeros((1, len(prompts))) for _ in range(2))
    for record in answers:
        emitted[0, prompts[record.prompt]] += record.emitted
        steps[0, prompts[record.prompt]] += record.steps

    def ratio(top: Table, bottom: Table) -> list[Table]:
        return [loops * top.sum(axis=1) / bottom.sum(axis=1)]

    return bootstrap(ratio, [emitted, steps])[0]


@dataclass
class Speedups:
    """Speedups over a baseline, by two definitions, with 95% intervals; None where they cannot be computed.

    Attributes:
        decoding: pooled decode seconds per token, the baseline's over the method's.
        with_prefill: Spec-Bench's definition: mean over questions of new tokens per second of wall time, prefill
            included, over the baseline's mean. A question's turns are summed; with several sequences in a batch each
            batch counts as a question.
    """

    decoding: float | None = None
    with_prefill: float | None = None
    decoding_interval: Interval | None = None
    with_prefill_interval: Interval | None = None


def speedups(base: Sequence[BatchRun] | None, own: Sequence[BatchRun]) -> Speedups:
    """Return the speedups of a method over a baseline that decoded the same batches in the same repeats."""
    found = Speedups()
    if not base:
        return found
    times = Times.of(base), Times.of(own)

    def fold(repeats: NDArray[np.int64]) -> list[Table]:
        return [table for each in times for table in each.fold(repeats).tables]

    whole = fold(times[1].everything)
    decoding, with_prefill = (float(values[0]) for values in _two_speedups(*whole))
    intervals: list[Interval | None] = [None, None]
    if base is not own:
        groups = max((each.groups for each in times), key=len)
        intervals = bootstrap(_two_speedups, whole, [fold(groups)])
    found.with_prefill, found.with_prefill_interval = with_prefill, intervals[1]
    if times[0].tokens.any() and times[1].tokens.any():
        found.decoding, found.decoding_interval = decoding, intervals[0]
    return found


def _two_speedups(*tables: Table) -> list[Table]:
    """Return both speedups (S,) from `Folded.tables` of the baseline and of the method, (S, n) each."""
    base, own = tables[:4], tables[4:]
    with np.errstate(divide="ignore", invalid="ignore"):
        seconds = [decode.sum(axis=1) / tokens.sum(axis=1) for decode, _, tokens, _ in (base, own)]
        rates = [(written / (prefill + decode)).mean(axis=1) for decode, prefill, _, written in (base, own)]
        return [seconds[0] / seconds[1], rates[1] / rates[0]]


def speedup(base: Sequence[BatchRun] | None, own: Sequence[BatchRun]) -> float | None:
    """Return the ratio of pooled decode seconds per token: the baseline's over this method's."""
    if not base or not own:
        return None
    tables = [table for runs in (base, own) for table in _folded(runs)]
    value = float(_two_speedups(*tables)[0][0])
    return value if np.isfinite(value) else None


def _folded(runs: Sequence[BatchRun]) -> list[Table]:
    times = Times.of(runs)
    return times.fold(times.everything).tables


def accepted_histogram(answers: Sequence[AnswerRecord]) -> list[int]:
    """Return a histogram: entry a is the number of decoding steps that emitted a tokens."""
    counts = Counter(length for record in answers for length in record.accepted_lengths)
    return [counts[length] for length in range(max(counts, default=0) + 1)]


def acceptance_by_step(answers: Sequence[AnswerRecord]) -> list[float]:
    """Return the share of decoding steps that emitted at least i drafted tokens, i = 1..k; empty without drafts."""
    histogram = accepted_histogram(answers)
    steps = sum(histogram)
    return [sum(histogram[drafted + 1 :]) / steps for drafted in range(1, len(histogram) - 1)] if steps else []


def lossless(runs: Sequence[BatchRun], divergences: Mapping[int, Divergence | None]) -> Lossless:
    """Count the prompts that were compared and the identical outputs, and list the divergences of the others."""
    compared = list(dict.fromkeys(number for run in runs for number in run.numbers if number in divergences))
    marks = [mark for number in compared if (mark := divergences[number]) is not None]
    return Lossless(len(compared), len(compared) - len(marks), marks)


def seconds_per_token(runs: Sequence[BatchRun]) -> list[float]:
    """Return the pooled decode seconds per token of each repeat, to see a drift of the machine."""
    times = Times.of(runs)
    return [
        _ratio(float(decode.sum()), float(tokens.sum()))
        for decode, tokens in zip(times.decode, times.tokens, strict=True)
    ]


def drift_warnings(runs: Runs) -> list[str]:
    """Return a warning where `ar` took clearly longer in one repeat than in another one."""
    own = runs.get("ar", [])
    times = [seconds_per_token(part) for part in _consecutive(own, DRIFT_PARTS)]
    spreads = [(min(each), max(each)) for each in times if min(each) > 0]
    low, high = max(spreads, key=lambda pair: pair[1] / pair[0], default=(1.0, 1.0))
    if high < DRIFT * low:
        return []
    return [
        f"{DRIFTED}: ar took {1000 * low:.3g} ms a token in one repeat and {1000 * high:.3g} ms in another "
        f"for the same prompts ({100 * (high / low - 1):.0f}% more); speedups compare neighbouring measurements, "
        "tokens/s do not. Other minutes may give other speedups: --processes 3 or more samples them"
    ]


def _consecutive(runs: Sequence[BatchRun], count: int) -> list[Sequence[BatchRun]]:
    """Return at most `count` parts of neighbouring batches."""
    size = -(-len(runs) // count)
    return [runs[start : start + size] for start in range(0, len(runs), size)] if runs else []


def row_without_figures(dataset: str, method: str, reason: str, batch_size: int, temperature: float) -> BenchRow:
    """Return the row of a method that cannot run, with the reason."""
    nothing = float("nan")
    return BenchRow(
        dataset=dataset,
        category=ALL,
        method=method,
        predictor=None,
        batch_size=batch_size,
        temperature=temperature,
        prompts=0,
        new_tokens=0,
        prefill_seconds=nothing,
        decode_seconds=nothing,
        tokens_per_second=nothing,
        speedup=None,
        speedup_interval=None,
        speedup_hf=None,
        accepted_length=nothing,
        accepted_length_interval=None,
        acceptance_by_step=[],
        accepted_histogram=[],
        steps=0,
        step_milliseconds=nothing,
        lossless=Lossless(),
        reason=reason,
    )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
