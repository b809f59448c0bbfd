"""Report folders: a report's JSON, its tables and pages, and its figures."""

from __future__ import annotations

from pathlib import Path

from firp_cli.errors import OutputError
from firp_cli.files import os_reason, write_atomically, write_json
from firp_cli.reports.analyses import eval_html
from firp_cli.reports.analysis_figures import analysis_figures
from firp_cli.reports.figures import bench_figures, eval_figures
from firp_cli.reports.html import bench_html
from firp_cli.reports.tables import bench_csv, bench_markdown
from firp_cli.reports.tuning import tune_figures, tune_html, tune_markdown
from firp_cli.results import BenchReport, EvalReport, as_json
from firp_cli.tune_results import TuneReport


def write_report(report: BenchReport | EvalReport | TuneReport, folder: str | Path) -> None:
    """Write NAME.json, NAME.html and the figures as PNG; of a bench also CSV and Markdown, of tuning Markdown.

    Each file appears whole or not at all. Raises OutputError where one cannot be written.
    """
    folder = Path(folder)
    try:
        _write(report, folder)
    except OSError as error:
        raise OutputError(
            f"the report cannot be written to {folder} ({os_reason(error)}): its figures are only in what was printed"
        ) from error


def _write(report: BenchReport | EvalReport | TuneReport, folder: Path) -> None:
    if isinstance(report, BenchReport):
        name, figures = "bench", bench_figures(report)
        pages = {"csv": bench_csv(report), "md": bench_markdown(report, list(figures))}
        pages["html"] = bench_html(report, figures)
    elif isinstance(report, EvalReport):
        name, figures = "eval", eval_figures(report) | analysis_figures(report.analyses)
        pages = {"html": eval_html(report, figures)}
    else:
        name, figures = "tune", tune_figures(report)
        pages = {"md": tune_markdown(report, list(figures)), "html": tune_html(report, figures)}
    write_json(folder / f"{name}.json", as_json(report))
    files = {f"{figure}.png": image for figure, image in figures.items()}
    files |= {f"{name}.{suffix}": text.encode() for suffix, text in pages.items()}
    for file, content in files.items():
        write_atomically(folder / file, lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]
