"""Tables of `firp compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from firp_cli.records import Comparison, ComparisonReport
from firp_cli.reports.cells import Cells, number, rich_table, with_interval

if TYPE_CHECKING:
    from rich.table import Table

HEADERS = ("", "method", "first", "second", "second / first", "verdict")
NOTE = (
    "brackets: 95% interval of the ratio, over paired prompts and over repeats or processes; noise: it contains 1. "
    "Tokens/s of different runs also differ by the state of the machine, a speedup is over its own run's ar. The "
    "spread between processes is in the intervals of benches made with --processes"
)


def comparison_cells(report: ComparisonReport, figure: str, categories: bool) -> Cells:
    """Return the cells of one figure: of whole data sets, or of their categories."""
    digits = 1 if figure == "tokens/s" else 2
    chosen = [item for item in report.comparisons if item.figure == figure and (item.category != "all") == categories]
    return [
        [
            f"{_group(item)} ({item.pairs})",
            item.method,
            number(item.first, digits),
            number(item.second, digits),
            with_interval(item.ratio, item.interval),
            item.verdict,
        ]
        for item in chosen
    ]


def _group(item: Comparison) -> str:
    return item.dataset if item.category == "all" else item.category


def comparison_tables(report: ComparisonReport) -> list[Table]:
    """Return a table for each figure, then one of the categories' speedups."""
    drawn = []
    figures = list(dict.fromkeys(item.figure for item in report.comparisons))
    for figure, categories in [*((figure, False) for figure in figures), *((figure, True) for figure in figures[:1])]:
        cells = comparison_cells(report, figure, categories)
        if cells:
            table = rich_table(HEADERS, cells, left=2)
            table.title, table.title_justify = f"{figure}{' by category' if categories else ''}", "left"
            drawn.append(table)
    return drawn
