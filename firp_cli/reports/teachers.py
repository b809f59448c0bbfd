"""Reports of several teachers: each teacher's part, and what names its rows. Nothing here changes a report of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from firp_cli.results import BenchReport, BenchRow

NOTE = (
    "Each teacher has its own baselines (ar, hf), measured with it; teachers were measured one after the other, and "
    "figures of different teachers must not be compared with each other"
)


def by_teacher(report: BenchReport) -> list[BenchReport]:
    """A report for each teacher; the report itself where it has one."""
    if not report.teachers:
        return [report]
    labels = dict.fromkeys(row.teacher for row in report.rows)
    return [
        replace(report, teacher=teacher, teachers=[], rows=[row for row in report.rows if row.teacher == label])
        for label, teacher in zip(labels, report.teachers, strict=True)
    ]


def row_label(row: BenchRow) -> str:
    """The method, with its teacher where the report has several: `speed (arithmetic-looped)`."""
    return f"{row.method} ({row.teacher})" if row.teacher else row.method


def teacher_column(
    rows: Sequence[BenchRow], headers: Sequence[str], cells: list[list[str]]
) -> tuple[list[str], list[list[str]]]:
    """A table of `rows`, one line each, with a leading column that names the teacher where the report has several."""
    if not any(row.teacher for row in rows):
        return list(headers), cells
    return ["teacher", *headers], [[row.teacher or "", *line] for row, line in zip(rows, cells, strict=True)]
