"""Report folders: a report's JSON, its tables and pages, and its figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from firp_cli.errors import OutputError
from firp_cli.evaluation.spec_bench import answer_files
from firp_cli.files import os_reason, write_atomically, write_json
from firp_cli.records import ANSWERS, answer_lines
from firp_cli.reports.analyses import eval_html
from firp_cli.reports.analysis_figures import analysis_figures
from firp_cli.reports.bench_csv import bench_csv
from firp_cli.reports.eval_figures import eval_figures
from firp_cli.reports.figures import bench_figures
from firp_cli.reports.html import bench_html
from firp_cli.reports.latex import bench_latex
from firp_cli.reports.markdown import bench_markdown
from firp_cli.reports.sweep import SWEEP, SweepCell, sweep_figure, sweep_html, sweep_json, sweep_markdown
from firp_cli.reports.tuning import tune_figures, tune_html, tune_markdown
from firp_cli.results import BenchReport, EvalReport, as_json
from firp_cli.tune_results import TuneReport


def write_report(report: BenchReport | EvalReport | TuneReport, folder: str | Path) -> None:
    """Write NAME.json, NAME.html and the figures as PNG; of a bench also the records of its answers, CSV, LaTeX,
    Markdown and on Spec-Bench its answer files, of tuning Markdown.

    Each file appears whole or not at all. Raises OutputError where one cannot be written.
    """
    folder = Path(folder)
    try:
        _write(report, folder)
    except OSError as error:
        raise OutputError(
            f"the report cannot be written to {folder} ({os_reason(error)}): its figures are only in what was printed"
        ) from error


def write_sweep(cells: Sequence[SweepCell], folder: Path) -> None:
    """Write sweep.json, .md and .html, and the figure of throughput as PNG. Raises OutputError."""
    image = sweep_figure(cells)
    files = {"sweep.md": sweep_markdown(cells).encode(), "sweep.html": sweep_html(cells).encode()}
    files |= {"throughput.png": image.png} if image else {}
    try:
        _write_files(files, folder)
        write_json(folder / SWEEP, sweep_json(cells))
    except OSError as error:
        raise OutputError(f"the report cannot be written to {folder} ({os_reason(error)})") from error


def _write_files(files: dict[str, bytes], folder: Path) -> None:
    for file, content in files.items():
        write_atomically(folder / file, lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]


def _write(report: BenchReport | EvalReport | TuneReport, folder: Path) -> None:
    if isinstance(report, BenchReport):
        name, figures = "bench", bench_figures(report)
        pages = {"csv": bench_csv(report), "md": bench_markdown(report, list(figures))}
        pages |= {"html": bench_html(report, figures), "tex": bench_latex(report)}
    elif isinstance(report, EvalReport):
        name, figures = "eval", eval_figures(report) | analysis_figures(report.analyses)
        pages = {"html": eval_html(report, figures)}
    else:
        name, figures = "tune", tune_figures(report)
        pages = {"md": tune_markdown(report, list(figures)), "html": tune_html(report, figures)}
    write_json(folder / f"{name}.json", as_json(report))
    files = {f"{figure}.png": picture.png for figure, picture in figures.items()}
    files |= {f"{name}.{suffix}": text.encode() for suffix, text in pages.items()}
    if isinstance(report, BenchReport):
        files[ANSWERS] = answer_lines(report.records).encode()
        files |= {file: text.encode() for file, text in answer_files(report, time.time()).items()}
    _write_files(files, folder)
