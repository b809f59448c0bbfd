"""Reports of several teachers: each teacher has its own tables, baselines and headline, and labels in shared tables."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

import pytest

from firp_cli.reports import figures, html, pipeline_figures, speed_tables, tables
from firp_cli.reports.bench_csv import bench_csv
from firp_cli.reports.cells import main_rows
from firp_cli.reports.markdown import bench_markdown
from firp_cli.reports.notes import settings_line
from firp_cli.reports.verified import lossless_note
from firp_cli.results import BenchReport, Divergence, Lossless
from helpers.reports import PNG, Page, bench_report, bench_row, speed_report, speed_row


def two_teachers(groups: tuple[tuple[str, str], ...] = (("arithmetic", "all"),)) -> BenchReport:
    """Return a report with draft trees on one teacher and SPEED on a looped one."""
    report = bench_report(groups)
    rows = [replace(row, teacher="arithmetic") for row in report.rows]
    for dataset, category in groups:
        own = [bench_row("ar"), bench_row("hf"), speed_row()]
        rows += [replace(row, teacher="looped", dataset=dataset, category=category) for row in own]
    looped = {**report.teacher, "name": "looped", "dtype": "bfloat16", "fingerprint": "cd" * 8}
    return replace(report, rows=rows, teachers=[report.teacher, looped])


SEVERAL_GROUPS = (("arithmetic", "all"), ("arithmetic", "qa"), ("arithmetic", "rag"), ("gsm8k", "all"), ("all", "all"))


def test_terminal_tables_are_per_teacher() -> None:
    from rich.console import Console

    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(tables.bench_tables(two_teachers()))
    text = console.export_text()
    first, second = text.split("teacher looped")
    assert first.startswith("teacher arithmetic ") and "medusa" in first and "speed " not in first.split()
    second, flow = second.split("pipeline")
    names = [line.split()[0] for line in second.splitlines() if line.strip()]
    assert names[-3:] == ["ar", "hf", "speed"] and "firp" not in names and "speed (looped)" in flow
    console.print(tables.bench_tables(two_teachers(SEVERAL_GROUPS)))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    titles = [line for line in lines if line.startswith("teacher ")]
    sets = ("arithmetic", "gsm8k", "all")
    of = {name: [f"teacher {name}, data set {each}" for each in sets] for name in ("arithmetic", "looped")}
    assert titles == [*of["arithmetic"], *of["looped"]]
    assert lines.count("rag: n=40") == 2, "each teacher has the category"


def test_markdown_and_csv_name_the_teacher() -> None:
    report = two_teachers()
    text = bench_markdown(report)
    assert "| arithmetic | firp | 2.41 [2.35, 2.47] | 360.0 | 1.44 [1.38, 1.51] | 1.86 | 40/40 |" in text
    assert "| looped | hf | 1.00 | 250.0 | 0.78 [0.75, 0.80] | 1.00 | reference |" in text
    assert "| looped | speed | 4 | 3472 |" in text and "| speed (looped) | 256 |" in text
    assert "teachers arithmetic (float32, cpu) and looped (bfloat16, cpu), 40 prompts each, greedy" in text
    assert "must not be compared with each other" in text
    for cells in (tables.bench_cells, tables.detail_cells, speed_tables.pipeline_cells):
        headers, lines = cells(report)
        assert headers[0] == "teacher" and {len(line) for line in lines} == {len(headers)}
        assert "teacher" not in cells(speed_report())[0]
    headers, lines = tables.bench_cells(two_teachers(SEVERAL_GROUPS))
    assert headers[:3] == ["teacher", "prompts", "method"] and lines[-1][:3] == ["looped", "all", "speed"]
    one = csv.DictReader(io.StringIO(bench_csv(report)))
    assert [(line["teacher"], line["method"]) for line in one][-2:] == [("looped", "hf"), ("looped", "speed")]
    assert bench_csv(report).startswith("teacher,") and "teacher" not in bench_csv(bench_report())
    report.settings["prompts_by_teacher"] = {"arithmetic": 40, "looped": 38}
    assert "40 and 38 prompts, greedy" in settings_line(report)


def test_html_has_a_headline_per_teacher() -> None:
    report = two_teachers(SEVERAL_GROUPS)
    page = html.bench_html(report, {})
    Page(page)
    headlines = re.findall(r'<p class="headline">(.*?)</p>', page)
    assert [re.sub("<.*?>", "", line)[:38] for line in headlines] == [
        "Teacher arithmetic: firp decodes 1.44 ",
        "Teacher looped: speed decodes 2.04 tim",
    ]
    assert "weights abababababababab" in page and "weights cdcdcdcdcdcdcdcd" in page
    assert "speed (looped) 40 of 40" in page and "must not be compared" in page
    assert "<th class=left>teacher</th><th class=left>prompts</th><th class=left>method</th><th>accepted" in page
    alone = html.bench_html(bench_report(), {})
    assert alone.count('class="headline"') == 1 and "Teacher arithmetic" not in alone


def test_lossless_note_uses_the_dtype_of_each_teacher() -> None:
    report = two_teachers()
    firp, speed = report.rows[2], report.rows[-1]
    firp.lossless = Lossless(40, 39, [Divergence(7, 31, 100, 200, 0.03)])
    speed.lossless = Lossless(40, 39, [Divergence(8, 3, 100, 200, 0.03)])
    note = lossless_note(report)
    assert note
    exact, near = note.split("; please report this; ")
    assert exact.startswith("1 output (firp (arithmetic)) differs") and "float32 rounding explains" in exact
    assert near.startswith("1 output (speed (looped)) differs") and "bfloat16 rounding decides" in near
    page = html.bench_html(report, {})
    assert "<td class=left>looped</td><td class=left>speed</td><td class=left>arithmetic</td><td>8</td>" in page


def test_figures_label_methods_with_their_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    texts: dict[str, list[str]] = {}

    def collect(figure: Figure) -> bytes:
        handles = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
        ticks = [tick.get_text() for axes in figure.axes for tick in axes.get_yticklabels()]
        texts[figure.axes[0].get_xlabel()] = handles + ticks
        return PNG

    monkeypatch.setattr(figures, "picture", collect)
    monkeypatch.setattr(pipeline_figures, "picture", collect)
    report = two_teachers(SEVERAL_GROUPS)
    for row in report.rows:
        row.method = "firp" if row.method == "speed" else row.method  # one method of both teachers
    drawn = figures.bench_figures(report)
    assert list(drawn) == ["speedup", "speedup_by_group", "acceptance", "histogram", "occupancy"]
    labels = [label for found in texts.values() for label in found]
    assert {"ar (arithmetic)", "ar (looped)", "firp (arithmetic)", "firp (looped)"} <= set(labels)
    assert "firp" not in labels and "firp (looped) (0.72 tokens per tick)" in labels
    assert [(row.teacher, row.dataset) for row in main_rows(report)] == [("arithmetic", "all")] * 5 + [
        ("looped", "all")
    ] * 3
