"""Markdown of `firp bench`: the file bench.md, and the main table alone for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from firp_cli.reports.cells import Cells, by_teacher, closing_markdown, markdown_table
from firp_cli.reports.notes import bench_notes, reading_notes, settings_line
from firp_cli.reports.predicted import predicted_lines
from firp_cli.reports.preset_lines import preset_lines
from firp_cli.reports.speed_tables import FIGURE, pipeline_markdown
from firp_cli.reports.tables import bench_cells, category_cells, detail_cells, execution_cells, parts_cells
from firp_cli.reports.verified import verified_cells
from firp_cli.results import BenchReport


def main_markdown(report: BenchReport) -> str:
    """Return the settings, the main table, the categories by teacher if there are any, and the notes."""
    whole = [row for row in report.rows if row.category == "all"]
    parts = [f"{line}.\n" for line in (settings_line(report), *preset_lines(report))]
    parts += [markdown_table(*bench_cells(report, whole))]
    for part in by_teacher(report):
        headers, cells = category_cells(part)
        owner = f" (teacher {part.rows[0].teacher})" if part.rows and part.rows[0].teacher else ""
        parts += [f"Speedup over ar (accepted length){owner}:\n", markdown_table(headers, cells)] if cells else []
    return "\n".join([*parts, *_list(bench_notes(report))])


def bench_markdown(report: BenchReport, figures: Sequence[str] = ()) -> str:
    """Return bench.md: tables, definitions, environment and command line. `figures`: names of PNGs in its folder."""
    parts = [
        "# firp bench\n",
        settings_line(report) + ".\n",
        *(f"{line}.\n" for line in preset_lines(report)),
        markdown_table(*bench_cells(report)),
        *_list(predicted_lines(report)),
        *_list(bench_notes(report)),
        *(f"![{name}]({name}.png)\n" for name in figures if name != FIGURE),
        *_section("Milliseconds of a step by part", *parts_cells(report)),
        *_section("Outputs against the teacher", *verified_cells(report)),
        *pipeline_markdown(report, figures),
        *_section("Details", *detail_cells(report)),
        *_section("Execution", *execution_cells(report)),
        *closing_markdown(reading_notes(report), report.environment),
    ]
    return "\n".join(parts)


def _section(title: str, headers: list[str], cells: Cells) -> list[str]:
    return [f"## {title}\n", markdown_table(headers, cells)] if cells else []


def _list(lines: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {line}" for line in lines) + "\n"] if lines else []
