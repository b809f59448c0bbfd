"""Tables of `firp bench` and `firp eval`: cells that all written forms share, and rich tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from firp_cli.reports.cells import (
    DASH,
    Cells,
    by_teacher,
    group_name,
    literal,
    main_rows,
    measured,
    number,
    parts_of,
    published,
    rich_table,
    row_label,
    teacher_column,
    with_interval,
)
from firp_cli.reports.predicted import predicted_cells, predicted_lines
from firp_cli.reports.speed_tables import pipeline_tables
from firp_cli.reports.verification import verified_cell
from firp_cli.reports.verified import accuracy_cell, lossless_cell, right_cell, verified_word
from firp_cli.results import UNDRAFTED, BenchReport, BenchRow, EvalReport, Interval

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

EVAL_HEADERS = ("step", "top-1", "top-5", "KL (nats)", "anchors")
Columns = dict[str, Callable[[BenchRow], str]]  # by header


def _columns(report: BenchReport) -> Columns:
    """Return the columns of the main table after the method; those that no row has are left out."""
    columns: Columns = {
        "accepted length": lambda row: with_interval(row.accepted_length, row.accepted_length_interval),
        "tokens/s": lambda row: number(row.tokens_per_second, 1),
        "speedup over ar": lambda row: with_interval(row.speedup, row.speedup_interval),
        "over hf": lambda row: with_interval(row.speedup_hf, row.speedup_hf_interval),
    }
    if published(report):
        columns["over hf (Spec-Bench)"] = lambda row: with_interval(
            row.speedup_with_prefill_hf, row.speedup_with_prefill_hf_interval
        )
    if any(row.verified for row in report.rows):
        columns["verified"] = lambda row: verified_cell(row.verified)
    if any(row.accuracy for row in report.rows):
        columns["accuracy"] = lambda row: accuracy_cell(row.accuracy)
    return columns | {"lossless": lambda row: lossless_cell(row, report.settings.get("reference"))}


def _terminal_columns(report: BenchReport) -> Columns:
    """Return the same in the words and widths of a terminal of 80 columns."""
    columns: Columns = {
        "accept\nlength": lambda row: number(row.accepted_length),
        "tokens\n/s": lambda row: number(row.tokens_per_second, 1 if (row.tokens_per_second or 0.0) < 1000 else 0),
        "speedup\nover ar": lambda row: _ratio(row.speedup, row.speedup_interval),
        "speedup\nover hf": lambda row: _ratio(row.speedup_hf, row.speedup_hf_interval),
    }
    if any(row.verified for row in report.rows):
        columns["\nverified"] = lambda row: verified_word(row.verified)
    else:
        columns["\nlossless"] = lambda row: lossless_cell(row, report.settings.get("reference"))
    if any(row.accuracy for row in report.rows):
        columns["\nright"] = lambda row: right_cell(row.accuracy)
    return columns


def _ratio(value: float | None, interval: Interval | None) -> str:
    """Return a ratio with its interval in at most 17 characters, up to 99."""
    return with_interval(value, interval, 2 if (interval[1] if interval else value or 0.0) < 9.995 else 1)


def bench_cells(report: BenchReport, rows: Sequence[BenchRow] | None = None) -> tuple[list[str], Cells]:
    """Return headers and cells of the main table, of all rows or of some; leading columns name the teacher, and the
    data set or category, if there are several. A method that cannot run has dashes.
    """
    rows, columns = report.rows if rows is None else rows, _columns(report)
    headers = ["method", *columns]
    cells = [[row.method, *(DASH if row.reason else cell(row) for cell in columns.values())] for row in rows]
    if len({group_name(row) for row in rows}) > 1:
        headers = ["prompts", *headers]
        cells = [[group_name(row), *line] for row, line in zip(rows, cells, strict=True)]
    return teacher_column(rows, headers, cells)


def detail_cells(report: BenchReport, rows: Sequence[BenchRow] | None = None) -> tuple[list[str], Cells]:
    """Return headers and cells of the second table of the written reports, of all rows or of some: totals of the main
    table, and predictions if there are any.
    """
    headers = ["prompts", "method", "tree", "n", "new tokens", "prefill s", "decode s", "steps", "ms/step"]
    headers += ["speedup with prefill", "over hf with prefill", "steps accepting at least 1, 2, ... drafts"]
    rows = measured(report.rows if rows is None else rows)
    cells = [
        [
            group_name(row),
            row.method,
            row.tree or DASH,
            str(row.prompts) if row.turns in (None, row.prompts) else f"{row.prompts} ({row.turns} turns)",
            str(row.new_tokens),
            number(row.prefill_seconds),
            number(row.decode_seconds),
            str(row.steps),
            number(row.step_milliseconds),
            with_interval(row.speedup_with_prefill, row.speedup_with_prefill_interval),
            with_interval(row.speedup_with_prefill_hf, row.speedup_with_prefill_hf_interval),
            " ".join(number(share) for share in row.acceptance_by_step) or DASH,
        ]
        for row in rows
    ]
    added_headers, added_cells = predicted_cells(rows)
    cells = [[*line, *added] for line, added in zip(cells, added_cells, strict=True)]
    return teacher_column(rows, [*headers, *added_headers], cells)


def execution_cells(report: BenchReport) -> tuple[list[str], Cells]:
    """Return headers and cells on how steps ran, one line per method."""
    rows = [row for row in measured(main_rows(report)) if row.execution]
    cells = []
    for row in rows:
        assert row.execution is not None
        ran = row.execution
        cells.append([row_label(row), ran.layers or DASH, ran.attention or DASH, str(ran.captures), ran.graphs or DASH])
    lines = [list(line) for line in dict.fromkeys(map(tuple, cells))]  # data sets without a total repeat a method
    return ["method", "layers", "attention", "captures in timed runs", "graphs"], lines


def parts_cells(report: BenchReport) -> tuple[list[str], Cells]:
    """Return headers and cells of the milliseconds of a step by part, one line per method."""
    rows = [row for row in measured(main_rows(report)) if parts_of(row)]
    names = list(dict.fromkeys(name for row in rows for name in parts_of(row)))
    cells = [
        [
            row_label(row),
            *(number(row.parts.get(name)) for name in names),
            number(sum(parts_of(row).values())),
            number(row.step_milliseconds),
        ]
        for row in rows
    ]
    return ["method", *names, "sum", "step in the timed runs"], cells


def bench_tables(report: BenchReport) -> Group:
    """Return the main tables for the terminal, one for each teacher and data set, at most 80 columns wide. Predictions
    and pipelines follow.
    """
    from rich.console import Group
    from rich.text import Text

    drawn = [item for part in by_teacher(report) for table in _teacher_tables(part) for item in (table, Text())]
    return Group(*drawn, *map(Text, predicted_lines(report)), *pipeline_tables(report))


def _teacher_tables(report: BenchReport) -> list[Table]:
    """Return a teacher's main tables, with the categories below; titles name the teacher if the rows do."""
    owner = f"teacher {report.rows[0].teacher}" if report.rows and report.rows[0].teacher else ""
    datasets = list(dict.fromkeys(row.dataset for row in report.rows))
    columns, drawn = _terminal_columns(report), []
    for dataset in datasets:
        rows = [row for row in measured(report.rows) if row.dataset == dataset]
        cells = []
        for category in dict.fromkeys(row.category for row in rows):
            alike = [row for row in rows if row.category == category]
            if category != "all":
                cells.append([f"{category}:", f"n={alike[0].prompts}", *[""] * (len(columns) - 1)])
            cells += [[row.method, *(cell(row) for cell in columns.values())] for row in alike]
        table = rich_table(["\nmethod", *columns], cells, left=1)
        table.show_edge = False
        table.padding = (0, 0 if any(row.accuracy for row in rows) else 1, 0, 0)
        name = dataset if len(datasets) > 1 else ""
        drawn.append(_titled(table, owner, f"data set {name}" if owner and name else name))
    return drawn


def _titled(table: Table, *parts: str) -> Table:
    """Return the table with the non-empty `parts` as its title."""
    title = ", ".join(part for part in parts if part)
    if title:
        table.title, table.title_justify = literal(title), "left"
    return table


def category_cells(report: BenchReport, datasets: bool = False) -> tuple[list[str], Cells]:
    """Return headers and cells of a teacher's categories: prompts, then `speedup (accepted length)` of each drafting
    method. `datasets`: data sets too, if there are several.
    """
    main = {group_name(row) for row in main_rows(report)}
    several = datasets and len({group_name(row) for row in report.rows if row.category == "all"}) > 1
    rows = [
        row
        for row in measured(report.rows)
        if row.category != "all" or (several and (len(main) > 1 or group_name(row) not in main))
    ]
    methods = [name for name in dict.fromkeys(row.method for row in rows) if name not in UNDRAFTED]
    by_method = {(group_name(row), row.method): row for row in rows}
    cells = []
    for group in dict.fromkeys(group_name(row) for row in rows):
        drafting = [by_method.get((group, method)) for method in methods]
        prompts = next(row.prompts for row in rows if group_name(row) == group)
        speedups = [f"{number(row.speedup)} ({number(row.accepted_length)})" if row else DASH for row in drafting]
        cells.append([group, str(prompts), *speedups])
    return ["", "prompts", *methods], cells if methods else []


def eval_cells(report: EvalReport) -> Cells:
    """Return cells under `eval_headers`."""
    return [
        [str(item.step), number(item.top1, 3), number(item.top5, 3), number(item.kl, 3), str(item.anchors)]
        for item in report.steps
    ]


def eval_headers(report: EvalReport) -> list[str]:
    """Return EVAL_HEADERS; the rows of early exits are exits, by loop, not draft steps."""
    return ["exit" if report.pipeline else EVAL_HEADERS[0], *EVAL_HEADERS[1:]]


def eval_table(report: EvalReport) -> Table:
    """Return the table of draft quality by step for the terminal."""
    return rich_table(eval_headers(report), eval_cells(report))
