"""Sentences of bench reports: settings, definitions of the columns, what a reader must know."""

from __future__ import annotations

from typing import Any

from firp_cli.metrics import FEWEST_UNITS
from firp_cli.reports import predicted, verified
from firp_cli.reports.cells import (
    TEACHERS_NOTE,
    by_teacher,
    group_name,
    main_rows,
    measured,
    one_line,
    published,
    row_label,
)
from firp_cli.reports.speed_tables import NOTES, pipeline_note, pipeline_rows
from firp_cli.results import UNDRAFTED, BenchReport

NO_STEP = "; every answer ended with its first token, which prefill gives: there is no decoding step to compare"


def settings_line(report: BenchReport) -> str:
    """Return the settings in one sentence."""
    settings, parts = report.settings, by_teacher(report)
    temperature = settings.get("temperature", 0.0)
    how = "greedy" if not temperature else f"temperature {temperature:g}, top-p {settings.get('top_p', 1.0):g}"
    skipped = f" ({report.skipped_long} longer than the context skipped)" if report.skipped_long else ""
    if report.left_out_trained:
        skipped += f" ({report.left_out_trained} left out: a predictor was trained on them)"
    repeats = settings.get("repeats")
    taken = "measured once" if repeats == 1 else f"medians over {repeats} repeats"
    taken += f" in each of {settings['processes']} processes" if settings.get("processes") else ""
    taken += f", {settings['interrupted']}" if settings.get("interrupted") else ""
    names = [
        f"{part.teacher.get('name')} ({part.teacher.get('dtype')}, {part.teacher.get('device')})" for part in parts
    ]
    counts = [str(count) for count in (settings.get("prompts_by_teacher") or {"": settings.get("prompts")}).values()]
    same = len(set(counts)) == 1
    prompts = f"{counts[0] if same else ' and '.join(counts)} prompts{' each' if same and len(parts) > 1 else ''}"
    prompts += _turns(settings)
    return (
        f"{'teachers' if len(parts) > 1 else 'teacher'} {' and '.join(names)}, "
        f"{prompts}{skipped}, {how}, up to {settings.get('max_new_tokens')} new tokens, "
        f"batch size {settings.get('batch_size')}, {taken}{NO_STEP if _no_step(report) else ''}"
    )


def _turns(settings: dict[str, Any]) -> str:
    """Return the turns that were asked, where conversations have several; reports of older versions do not say."""
    asked = list((settings.get("turns_by_teacher") or {"": settings.get("turns_asked")}).values())
    prompts = list((settings.get("prompts_by_teacher") or {"": settings.get("prompts")}).values())
    text = ""
    if settings.get("turns") == "first":
        text = ", first turns only"
    elif asked != prompts and None not in asked:
        text = f", {' and '.join(map(str, dict.fromkeys(asked)))} turns"
    missed = settings.get("turns_not_asked")
    return f"{text} ({missed} more do not fit the context or the chat template)" if missed else text


def _no_step(report: BenchReport) -> bool:
    return bool(report.rows) and not any(row.steps for row in report.rows)


def reading_notes(report: BenchReport) -> list[str]:
    """Return the definitions of the columns, for the written reports."""
    warmup = report.settings.get("warmup")
    times = "once" if warmup == 1 else f"{warmup} times"
    return [
        "Accepted length: tokens emitted per decoding step, bonus token included; 1 for autoregressive decoding.",
        "Speedup: pooled decode seconds per token, the baseline's over the method's. Prefill and the first token "
        "(which prefill gives) do not count.",
        "Brackets: 95% interval, from a bootstrap over prompts (speedup: over batches, if the batch size is above 1) "
        "and, for speedups, from the spread of the processes, or of one process's repeats, with Student's t. A single "
        "repeat shows no spread.",
        "ar: autoregressive decoding in the same engine. hf: transformers' own generate.",
        "Speedup with prefill, as defined by Spec-Bench: mean over prompts of tokens per second of wall time, over "
        f"that of ar{', or of hf' if published(report) else ''}.",
        *(
            [
                "Turns: each method answers a conversation's user turns in order, after its own earlier answers; a "
                "prompt sums its turns. Outputs are compared up to the first turn that differs, which is part of the "
                "later turns' prompts."
            ]
            if any(row.turns not in (None, row.prompts) for row in report.rows)
            else []
        ),
        f"Before measuring, each method decoded the longest batch {times}, uncounted; methods then took turns within "
        "each batch.",
        *([f"{TEACHERS_NOTE}."] if report.teachers else []),
        *verified.definitions(report),
        *([predicted.NOTE] if any(row.predicted for row in report.rows) else []),
        *(NOTES if pipeline_rows(report.rows) else ()),
    ]


def headline(report: BenchReport) -> tuple[str, str] | None:
    """Return the best method of a report's one teacher, and what it does: `firp`, `decodes 1.44 times as fast ...`."""
    rows = [row for row in measured(main_rows(report)) if row.method not in UNDRAFTED and row.speedup]
    if not rows:
        return None
    best = max(rows, key=lambda row: row.speedup or 0.0)
    low, high = best.speedup_interval or (0.0, 0.0)
    interval = f" (95% interval {low:.2f} to {high:.2f})" if best.speedup_interval else ""
    over_hf = f" and {best.speedup_hf:.2f} times transformers' generate" if best.speedup_hf else ""
    length = f"{best.accepted_length:.2f} tokens per {f'{best.pipeline.loops} ticks' if best.pipeline else 'step'}"
    clear = "; the interval contains 1, so that a gain is not shown" if interval and low <= 1.0 <= high else ""
    return (
        row_label(best) if not best.teacher else best.method,
        f"decodes {best.speedup:.2f} times as fast as autoregressive decoding in the same engine{interval}{over_hf}, "
        f"at {length} ({group_name(best)}){clear}",
    )


def reason_lines(report: BenchReport) -> list[str]:
    """Return a line for each method that cannot run."""
    rows = [row for row in report.rows if row.reason]
    return list(dict.fromkeys(f"{row_label(row)} is not measured: {one_line(row.reason or '')}" for row in rows))


def interval_note(report: BenchReport) -> str | None:
    """Return why speedups have no interval; None if they have."""
    rows = [row for row in measured(main_rows(report)) if row.method != "ar" and row.speedup is not None]
    if not rows or all(row.speedup_interval for row in rows):
        return None
    return (
        f"speedups without brackets: an interval needs at least {FEWEST_UNITS} prompts (batches, if the batch size is "
        "above 1)"
    )


def process_line(report: BenchReport) -> str | None:
    """Return the speedups that each process measured; None of one process."""
    rows = [row for row in main_rows(report) if row.speedup_by_process and row.method != "ar"]
    if not rows:
        return None
    figures = [f"{row_label(row)} {', '.join(f'{value:.2f}' for value in row.speedup_by_process)}" for row in rows]
    return f"speedup over ar in each of {report.settings.get('processes')} processes: {'; '.join(figures)}"


def bench_notes(report: BenchReport) -> list[str]:
    """Return what a reader of the tables must know, in lines: warnings, methods that cannot run, missing intervals,
    verification.
    """
    checked = any(row.verified for row in report.rows)
    notes = (
        *(f"warning: {warning}" for warning in report.warnings),
        *reason_lines(report),
        TEACHERS_NOTE if report.teachers else None,
        interval_note(report),
        process_line(report),
        pipeline_note(report),
        verified.verified_note(report),
        verified.identical_line(report) if checked else None,
        verified.lossless_note(report),
    )
    return [note for note in notes if note]
