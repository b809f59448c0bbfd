"""`firp compare`: paired comparison of two benches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from firp_cli.cli.terminal import Json, print_json

if TYPE_CHECKING:
    from firp_cli.records import ComparisonReport

Bench = Annotated[str, typer.Argument(help="Folder that `firp bench` wrote, or FOLDER:METHOD for one of its methods.")]


def compare(first: Bench, second: Bench, *, as_json: Json = False) -> None:
    """Compare two benches prompt by prompt: which differences are beyond noise."""
    from firp_cli.evaluation.paired import SavedBench
    from firp_cli.evaluation.paired import compare as measure
    from firp_cli.results import as_json as json_values

    report = measure(SavedBench.open(first), SavedBench.open(second))
    print_json(json_values(report)) if as_json else _show(report)


def _show(report: ComparisonReport) -> None:
    from rich.console import Console

    from firp_cli.reports.comparison import NOTE, comparison_tables

    console = Console(highlight=False, emoji=False)
    console.print(f"first: {report.first}\nsecond: {report.second}", markup=False, soft_wrap=True)
    for table in comparison_tables(report):
        console.print(table)
    for text in report.differences:
        console.print(f"not the same: {text}", markup=False)
    console.print(NOTE, markup=False)
