"""Reports of a bench: rows from the measured answers, their checks, and the facts beside the times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from firp_cli.evaluation.accuracy import add_accuracy
from firp_cli.evaluation.answer_runs import ALL, Runs, records_of, runs_of
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.evaluation.lossless import compare_tokens
from firp_cli.evaluation.measure import Measured, measure_bench
from firp_cli.evaluation.methods import BenchSettings, Method
from firp_cli.evaluation.rows import bench_rows, drift_warnings, groups_of, lossless, row_without_figures
from firp_cli.evaluation.samples import make_samples
from firp_cli.evaluation.step_parts import step_parts
from firp_cli.evaluation.token_check import verified, verify_answers
from firp_cli.records import AnswerRecord
from firp_cli.results import UNDRAFTED, BenchReport, BenchRow, Divergence, Progress, no_progress
from firp_cli.teacher.teacher import Teacher


def run_bench(
    teacher: Teacher,
    prompts: Sequence[BenchPrompt],
    methods: Sequence[Method],
    settings: BenchSettings,
    **options: Any,
) -> BenchReport:
    """Measure the methods on the prompts and return the report, without the checks of `complete_report`.

    `options`: those of `measure_bench`. Raises CapacityError, UsageError.
    """
    return bench_report(teacher, methods, measure_bench(teacher, prompts, methods, settings, **options), settings)


def bench_report(
    teacher: Teacher, methods: Sequence[Method], measured: Measured, settings: BenchSettings
) -> BenchReport:
    """Return the report of measured methods."""
    runs, prompts = measured.runs, measured.prompts
    reference = reference_method(list(runs), settings.temperature)
    return BenchReport(
        environment=measured.environment,
        teacher=teacher.describe(),
        settings={
            **asdict(settings),
            **_repeats_made(runs, settings),
            "reference": reference,
            "methods": [method.name for method in methods],
            "prompts": len(prompts),
            "turns_asked": sum(prompt.turns for prompt in prompts),
            "turns_not_asked": sum(prompt.turns_not_asked for prompt in prompts),
        },
        rows=_rows(teacher, methods, measured, settings, reference),
        skipped_long=measured.skipped,
        warnings=[*drift_warnings(runs), *_capture_warnings(measured)],
        records=records_of(runs),
    )


def _capture_warnings(measured: Measured) -> list[str]:
    """Return a warning for each method whose timed runs contain captures of graphs, which are slow."""
    return [
        f"{name}: {ran.captures} CUDA graphs were captured while times were taken: its times are too long"
        for name, ran in measured.executions.items()
        if ran.captures
    ]


def complete_report(
    report: BenchReport,
    teacher: Teacher,
    methods: Sequence[Method],
    measured: Measured,
    settings: BenchSettings,
    progress: Progress = no_progress,
) -> None:
    """Add what is found after measuring: the check of every token, the accuracy, the parts of a step, and samples.

    Args:
        progress: of the check.
    """
    prompts = measured.prompts
    _verify(report, teacher, prompts, settings, progress)
    add_accuracy(report, prompts, teacher.tokenizer, settings)
    report.samples = make_samples(report.records, prompts, teacher)
    full = max(len(batch.numbers) for batch in measured.batches)
    batches = [batch.numbers for batch in measured.batches if len(batch.numbers) == full]
    for method in methods:
        if method.name not in measured.runs:
            continue
        asked = [[prompts[number].token_ids for number in numbers] for numbers in batches]
        parts = step_parts(method.engine, asked, settings.max_new_tokens)
        for row in report.rows:
            if row.method == method.name:
                row.parts = parts


def _verify(
    report: BenchReport,
    teacher: Teacher,
    prompts: Sequence[BenchPrompt],
    settings: BenchSettings,
    progress: Progress = no_progress,
) -> None:
    """Feed every answer to the teacher, and set the rows' checks."""
    said: dict[tuple[str, int, int, int], list[int]] = {}
    for record in report.records:  # a repeat without tokens has those of the first one
        first = said.get((record.method, 0, record.prompt, record.turn), [])
        said[record.method, record.repeat, record.prompt, record.turn] = record.token_ids or first

    def prompt_of(record: AnswerRecord) -> list[int]:
        earlier = [said[record.method, record.repeat, record.prompt, turn] for turn in range(record.turn)]
        return prompts[record.prompt].after(earlier)

    def text_of(token: int) -> str:
        return str(teacher.tokenizer.decode([token])) if teacher.tokenizer else ""

    limits = (settings.temperature, settings.top_p, progress, settings.max_new_tokens)
    tolerance = verify_answers(teacher, report.records, prompt_of, *limits)
    for row in report.rows:
        own, ar = (_records(report, row, name) for name in (row.method, "ar"))
        others = None if row.method == "ar" or not ar else ar
        row.verified = verified(own, others, tolerance, lambda record: prompts[record.prompt].place, text_of)


def _records(report: BenchReport, row: BenchRow, method: str) -> list[AnswerRecord]:
    """Return a method's records of a row's group."""
    return [
        record
        for record in report.records
        if record.method == method and row.dataset in (ALL, record.dataset) and row.category in (ALL, record.category)
    ]


def _repeats_made(runs: Runs, settings: BenchSettings) -> dict[str, Any]:
    """Return the number of repeats as a setting of the report; `interrupted` where it is less than asked for."""
    made = min((len(run.repeats) for each in runs.values() for run in each), default=settings.repeats)
    cut = {"interrupted": f"interrupted after {made} of {settings.repeats} repeats"} if made < settings.repeats else {}
    return {"repeats": made, **cut}


def reference_method(names: Sequence[str], temperature: float) -> str | None:
    """Return the method whose tokens the others must reproduce: `hf`, else `ar`; None when sampling."""
    if temperature > 0:
        return None
    return next((name for name in ("hf", "ar") if name in names), None)


def _rows(
    teacher: Teacher, methods: Sequence[Method], measured: Measured, settings: BenchSettings, reference: str | None
) -> list[BenchRow]:
    """Return the rows of all methods, by data set and category."""
    rows: list[BenchRow] = []
    prompts, runs = measured.prompts, measured.runs
    datasets = list(dict.fromkeys(prompt.dataset for prompt in prompts))
    for method in methods:
        if method.reason:
            rows += [
                row_without_figures(name, method.name, method.reason, settings.batch_size, settings.temperature)
                for name in datasets
            ]
            continue
        name, own = method.name, runs[method.name]
        divergences: dict[int, Divergence | None] = {}
        if reference and name != reference:
            divergences = compare_tokens(teacher, prompts, runs[reference], own)
        made = bench_rows(name, runs, divergences, settings.temperature)
        for row in made:
            row.predictor, row.tree, row.batch_size = method.predictor, method.tree, settings.batch_size
            row.execution = measured.executions.get(name)
        # in half precision `ar` itself differs from the reference, whose products round otherwise
        if reference == "hf" and teacher.dtype != torch.float32 and "ar" in runs and name not in UNDRAFTED:
            against_ar = compare_tokens(teacher, prompts, runs["ar"], own)
            for row in made:
                row.lossless_ar = lossless(runs_of(row.dataset, row.category, own), against_ar)
        if method.add_details is not None:
            method.add_details(made, own, settings)
        rows += made
    order = {group: place for place, group in enumerate(groups_of(next(iter(runs.values()))))}
    return sorted(rows, key=lambda row: order[row.dataset, row.category])
