"""Cells, tables and closing sections that all reports share."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from firp_cli.results import BenchReport, BenchRow, Interval

TEACHERS_NOTE = (
    "Each teacher has its own baselines (ar, hf); teachers were measured one after the other, and figures of different "
    "teachers must not be compared with each other"
)

if TYPE_CHECKING:
    from rich.table import Table

DASH = "–"
LONGEST_LABEL = 30
Cells = list[list[str]]


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with `digits` decimals; a dash for None and NaN."""
    return DASH if value is None or math.isnan(value) else f"{value:.{digits}f}"


def with_interval(value: float | None, interval: Interval | None, digits: int = 2) -> str:
    """Return `1.52 [1.45, 1.60]`, without brackets when there is no interval."""
    text = number(value, digits)
    return text if interval is None or text == DASH else f"{text} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def published(report: BenchReport) -> bool:
    """Return whether the run follows Spec-Bench, so that its definition of speedup belongs into the main table."""
    return (report.settings.get("preset") or {}).get("name") == "spec-bench"


def parts_of(row: BenchRow) -> dict[str, float]:
    """Return the milliseconds of a step by part, without parts of no known time."""
    return {name: value for name, value in row.parts.items() if value is not None}


def measured(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """Return the rows with figures, without those of methods that cannot run."""
    return [row for row in rows if not row.reason]


def group_name(row: BenchRow) -> str:
    """Return `gsm8k`, or `spec_bench: rag` for one category."""
    return row.dataset if row.category == "all" else f"{row.dataset}: {row.category}"


def main_rows(report: BenchReport) -> list[BenchRow]:
    """Return one row per method and teacher: over all data sets together if there are several."""
    rows = []
    for part in by_teacher(report):
        whole = [row for row in part.rows if row.category == "all"]
        rows += [row for row in whole if row.dataset == "all"] or whole
    return rows


def rich_table(headers: Sequence[str], cells: Cells, left: int = 0, fixed: bool = True, remark: bool = False) -> Table:
    """Return a table for the terminal with the first `left` columns flush left, the others flush right.

    `fixed`: figures never wrap, long texts on the left are folded to make room. `remark`: the last column is text too.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for place, header in enumerate(headers):
        text = remark and place == len(headers) - 1
        justify: Literal["left", "right"] = "left" if text or place < left else "right"
        table.add_column(header, justify=justify, no_wrap=fixed and justify == "right", overflow="fold")
    for line in cells:
        table.add_row(*map(literal, line))
    return table


def literal(text: str) -> str:
    """Return the text with brackets escaped, which are markup for rich."""
    return text.replace("[", "\\[")


def markdown_table(headers: Sequence[str], cells: Cells) -> str:
    """Return a Markdown table; pipes in cells are escaped."""
    lines = [headers, ["---"] * len(headers), *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def closing_markdown(notes: Sequence[str], environment: dict[str, Any]) -> list[str]:
    """Return the last sections of every Markdown report: definitions, environment, command line."""
    return [
        "## How to read this\n",
        "\n".join(f"- {line}" for line in notes) + "\n",
        "## Environment\n",
        "\n".join(f"- {key}: {value}" for key, value in environment_items(environment)) + "\n",
        "## Reproduce\n",
        f"```\n{command_line(environment)}\n```\n",
    ]


def environment_items(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the environment as printable pairs, without argv (see `command_line`)."""
    items = []
    for key, value in environment.items():
        if key == "argv" or value in (None, "", [], {}):
            continue
        items.append((key.replace("_", " "), _printed(value)))
    return items


def _printed(value: Any) -> str:
    """Return `torch 2.13.0, numpy 2.4.6` for a dictionary; entries of a list are separated by semicolons."""
    if isinstance(value, dict):
        return ", ".join(f"{str(name).replace('_', ' ')} {_printed(item)}" for name, item in value.items())
    return "; ".join(map(_printed, value)) if isinstance(value, (list, tuple)) else str(value)


def command_line(environment: dict[str, Any]) -> str:
    """Return argv as a user would type it."""
    argv = [str(item) for item in environment.get("argv") or []]
    if not argv:
        return ""
    return shlex.join(["firp" if argv[0].rpartition("/")[2] in ("firp", "__main__.py") else argv[0], *argv[1:]])


def by_teacher(report: BenchReport) -> list[BenchReport]:
    """Return a report for each teacher; the report itself if it has one teacher."""
    if not report.teachers:
        return [report]
    labels = dict.fromkeys(row.teacher for row in report.rows)
    return [
        replace(report, teacher=teacher, teachers=[], rows=[row for row in report.rows if row.teacher == label])
        for label, teacher in zip(labels, report.teachers, strict=True)
    ]


def one_line(text: str) -> str:
    """Return a message of several lines in one, without its period."""
    return " ".join(text.split()).rstrip(".")


def row_label(row: BenchRow) -> str:
    """Return the method, with its teacher in a report of several: `speed (arithmetic-looped)`."""
    return f"{row.method} ({row.teacher})" if row.teacher else row.method


def short_label(row: BenchRow) -> str:
    """Return the label of a row, of at most LONGEST_LABEL characters, for figures."""
    label = row_label(row)
    head, tail = LONGEST_LABEL // 3, LONGEST_LABEL - LONGEST_LABEL // 3 - 1
    return label if len(label) <= LONGEST_LABEL else f"{label[:head]}…{label[-tail:]}"


def teacher_column(rows: Sequence[BenchRow], headers: Sequence[str], cells: Cells) -> tuple[list[str], Cells]:
    """Add a leading column with the teacher to a table of `rows`, one line each, in a report of several teachers."""
    if not any(row.teacher for row in rows):
        return list(headers), cells
    return ["teacher", *headers], [[row.teacher or "", *line] for row, line in zip(rows, cells, strict=True)]
