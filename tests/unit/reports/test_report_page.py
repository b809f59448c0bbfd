"""Page and tables of a bench with every part that it can have, and with hardly any; the page in a browser."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
from rich.console import Console

from firp_cli.cli.bench import _show
from firp_cli.records import Sample
from firp_cli.reports import figures, html, latex, markdown, notes, tables, verified
from firp_cli.reports import sample_outputs as samples
from firp_cli.reports.bench_csv import bench_csv
from firp_cli.results import BenchReport, BenchRow, Lossless, as_json
from helpers.browser import CHROMIUM, Browser
from helpers.commands import invoke
from helpers.reports import Page, bench_report, full_report, speed_row

GROUPS = (("spec_bench", "all"), ("spec_bench", "qa"), ("spec_bench", "rag"))


@pytest.fixture(scope="module")
def report() -> BenchReport:
    return full_report()


@pytest.fixture(scope="module")
def page(report: BenchReport) -> str:
    return html.bench_html(report, figures.bench_figures(report))


@pytest.fixture(scope="module")
def spec_bench() -> BenchReport:
    """Several categories, in Spec-Bench's definition."""
    made = full_report(GROUPS)
    told = {"name": "spec-bench", "definition": "480 questions", "departures": ["float32"], "prompts": 480}
    made.settings["preset"] = told
    return made


def brightness(colour: str) -> float:
    """Return the mean of the channels of `rgb(1, 2, 3)`."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3


def terminal(report: BenchReport) -> list[str]:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(tables.bench_tables(report))
    return console.export_text().splitlines()


def test_page_has_every_part_in_order(page: str) -> None:
    parts = re.findall(r"<h2>(.*?)</h2>|class=\"(headline|warning|lead)\"|<figure>.*?aria-label=\"(.*?)\"", page)
    assert [next(filter(None, found)) for found in parts] == [
        *("lead", "headline", "warning", "Speedup", html.CAPTIONS["speedup"]),
        *("Acceptance", html.CAPTIONS["acceptance"], html.CAPTIONS["histogram"]),
        *("Time of a step", html.CAPTIONS["parts"], "Same output?", "warning", "Sample outputs", "Details"),
        *("How to read this", "Environment", "Reproduce"),
    ]
    Page(page)
    assert "<td>1.44 [1.38, 1.51]</td><td>1.86 [1.77, 1.93]</td><td>all 2,540</td><td>33/40 = 0.82" in page
    assert "<td>0.60</td><td>2.90</td><td>0.30</td><td>0.20</td><td>4.00</td>" in page
    assert "<dd>sm mhz 1980, memory mhz 2619</dd>" in page and "<dt>driver</dt>" in page and "<dt>none</dt>" not in page
    assert "<td>lean, compiled kernels</td><td>sdpa</td><td>0</td><td>not captured: no CUDA device</td>" in page


def test_methods_that_cannot_run_have_their_reason(report: BenchReport, page: str) -> None:
    reason = "the &lt;teacher&gt; has no exit_layer &amp; no head for it"
    cell = f'<td class=left>early-exit:3</td><td class=across colspan="7"><span>not measured: {reason}</span></td>'
    assert cell in page and page.count("early-exit:3") == 1
    line = "early-exit:3 is not measured: the <teacher> has no exit_layer & no head for it"
    assert line in notes.bench_notes(report) and not any("early-exit:3" in text for text in terminal(report))
    text = markdown.main_markdown(report)
    assert "| early-exit:3 | – | – |" in text and f"- {line}" in text
    rows = list(csv.DictReader(io.StringIO(bench_csv(report))))
    assert [row["method"] for row in rows if row["reason"]] == ["early-exit:3"]


def test_page_of_a_report_with_hardly_any_value() -> None:
    """Reports of older versions lack the newer fields; figures that were not finite are None."""
    known = {item.name for item in fields(BenchRow)}
    newer = {"speedup_hf_interval", "verified", "accuracy", "execution", "parts", "reason", "turns", "lossless_ar"}
    value = as_json(bench_report(GROUPS))
    for row in value["rows"]:
        for name in newer & known:
            del row[name]
    for name in ("samples", "warnings", "teachers"):
        del value[name]
    value["rows"][2] |= dict.fromkeys(("tokens_per_second", "speedup", "speedup_interval", "step_milliseconds"))
    old = BenchReport.from_json(value)
    Page(html.bench_html(old, figures.bench_figures(old)))
    assert "verified" not in "".join([*terminal(old), markdown.bench_markdown(old), latex.bench_latex(old)])
    none = replace(old, rows=[replace(row, reason="no", accepted_length=math.nan) for row in old.rows])
    assert figures.bench_figures(none) == {} and 'class="headline"' not in html.bench_html(none, {})
    Page(html.bench_html(replace(old, rows=[]), {}))
    assert terminal(none) and latex.bench_latex(none) and markdown.main_markdown(replace(old, rows=[]))


def test_page_of_several_categories_in_a_published_definition(spec_bench: BenchReport, page: str) -> None:
    drawn = figures.bench_figures(spec_bench)
    assert list(drawn) == ["speedup", "speedup_by_group", "acceptance", "histogram", "parts"]
    text = html.bench_html(spec_bench, drawn)
    made = Page(text)
    assert {"over hf, as Spec-Bench defines it", "over hf (Spec-Bench)", "spec_bench: qa"} <= set(made.texts)
    line = "departures from the published definition: 40 of 480 questions were measured; float32"
    assert f"{line}." in made.texts and f"{line}." in latex.bench_latex(spec_bench)
    assert f"{line}." in markdown.main_markdown(spec_bench) and f"{line}." in markdown.bench_markdown(spec_bench)
    assert "Spec-Bench)" not in page and "as Spec-Bench defines it" not in page
    assert "<td class=left>spec_bench: rag</td><td>40</td><td>1.44 (2.41)</td>" in text
    body = text[text.index("<main>") :]
    assert not re.search(r"stroke: #[0-9a-f]", body) and body.count("<details><summary>All figures by data set") == 1


def test_figures_are_the_same_for_the_same_report() -> None:
    made = bench_report()
    made.rows = made.rows[:3]
    one, other = (figures.bench_figures(made) for _ in range(2))
    assert one == other and len(one) == 3


def test_samples_colour_the_runs_of_each_step() -> None:
    pieces = [("The", 1), (" 12\n\n  x", 3), ("<i>&\x00\ud800", 9)]
    shown = [Sample(name, "set", "qa", 4, "a <b>?", pieces) for name in ("ar", "firp")]
    text = samples.samples_part(shown)
    Page(text.replace("title=", "data-title="))
    run = '<span class="run n3" title="3 tokens"> 12\n\n  x</span>'
    assert run in text and '<span class="run n6" title="9 tokens">&lt;i&gt;&amp;\u2400?</span>' in text
    assert text.count("<details") == 1 and text.count("a &lt;b&gt;?") == 1 and "set, qa, prompt 4" in text
    assert text.count("13 tokens in 2 steps after prefill, 6.00 a step") == 2 and samples.samples_part([]) == ""
    assert "<summary>set, prompt 4</summary>" in samples.samples_part([replace(shown[0], category="")])


def test_verification_names_the_place_of_the_worst_token(report: BenchReport) -> None:
    headers, cells = verified.verified_cells(report)
    line = dict(zip(headers, next(line for line in cells if line[0] == "medusa"), strict=True))
    assert line["above it"] == "3 (0.12%)" and line["tolerance"] == "0.001"
    assert line["worst token"] == "prompt 7, turn 2, token 31: token id 100, teacher token id 200"
    note = verified.verified_note(report)
    start = "not the teacher's output: medusa (arithmetic): prompt 7, turn 2, token 31: token id 100"
    assert note and note.startswith(start) and "the worst of 3 such tokens" in note and "firp" not in note
    sampled = full_report(sampled=True)
    headers, cells = verified.verified_cells(sampled)
    assert dict(zip(headers, cells[0], strict=True)) | {"p against ar": "0.62", "log-prob.": "-0.81"} == dict(
        zip(headers, cells[0], strict=True)
    )
    assert verified.verified_note(sampled) == "verified against the teacher: all 12,700 tokens of 5 methods"
    assert verified.verified_note(bench_report()) is None and verified.verified_cells(bench_report())[1] == []


def test_terminal_tables_fit_80_columns(report: BenchReport) -> None:
    wide = replace(report, rows=[replace(row) for row in report.rows])
    wide.rows[1].speedup_hf, wide.rows[1].speedup_hf_interval = 9.91, (9.5, 10.22)
    lines = [" ".join(line.split()) for line in terminal(wide)]
    assert "hidden_transfer 2.22 327.5 1.31 [1.25, 1.36] 1.69 [1.61, 1.76] yes 33/40" in lines
    assert "hf 1.00 250.0 0.78 [0.75, 0.80] 9.9 [9.5, 10.2] yes 33/40" in lines
    assert "medusa 2.05 305.0 1.22 [1.17, 1.27] 1.58 [1.50, 1.64] 3 off 33/40" in lines
    shown = notes.bench_notes(report)
    assert shown[:2] == [f"warning: {warning}" for warning in report.warnings]
    assert any(note.startswith("outputs identical to hf's: ar 40/40, firp 40/40") for note in shown)


def test_note_says_why_intervals_are_missing() -> None:
    few = bench_report()
    assert notes.interval_note(few) is None
    for row in few.rows:
        row.speedup_interval = None
    note = notes.interval_note(few)
    assert note and "at least 8 prompts" in note
    text = [*notes.bench_notes(few), latex.bench_latex(few), html.bench_html(few, {}), markdown.bench_markdown(few)]
    assert sum(note in part for part in text) == 4
    assert "interval" not in (notes.headline(few) or ("", ""))[1]
    unclear = bench_report()
    unclear.rows[2].speedup_interval = (0.97, 1.9)
    assert "(95% interval 0.97 to 1.90)" in (notes.headline(unclear) or ("", ""))[1]
    assert "a gain is not shown" in html.bench_html(unclear, {})


def test_csv_flattens_every_part(report: BenchReport) -> None:
    lines = list(csv.DictReader(io.StringIO(bench_csv(report))))
    line = next(line for line in lines if line["method"] == "medusa")
    assert (line["verified_above"], line["verified_worst_position"], line["verified_tail"]) == ("3", "31", "")
    assert (line["accuracy_right"], line["accuracy_low"], line["parts_draft"]) == ("33", "0.68", "0.6")
    assert (line["execution_layers"], line["speedup_hf_low"]) == ("lean, compiled kernels", str(0.95 * 1.58))
    assert not {"verified", "accuracy", "execution", "parts", "lossless_divergences"} & line.keys()


def test_latex_is_balanced_and_escaped() -> None:
    made = full_report(GROUPS)
    text = latex.bench_latex(made)
    assert text.count("{") == text.count("}") and text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    for body in re.findall(r"(?s)\\begin{tabular}{(l+r+)}\n\\toprule\n(.*?)\\bottomrule", text):
        rows = [line for line in body[1].splitlines() if line != r"\midrule"]
        assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {len(body[0])}
        assert all(row.endswith(r" \\") for row in rows)
    assert r"firp & 2.41 {\scriptsize [2.35, 2.47]} & 360.0 & 1.44 {\scriptsize [1.38, 1.51]}" in text
    assert r"SmolLM2-135M\_Instruct \$2 \& 100\%" in text and r"\textless{}teacher\textgreater{}" in text
    assert r"\caption{Teacher arithmetic (float32, cpu), 40 prompts, gre" in text and r"\label{tab:firp-bench}" in text
    assert latex.escaped(r"\~^") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}"
    two = replace(made, rows=[*(replace(row, teacher="a_b") for row in made.rows), replace(speed_row(), teacher="c")])
    text = latex.bench_latex(replace(two, teachers=[made.teacher, made.teacher]))
    assert "a\\_b & spec\\_bench & medusa" in text and text.count(r"\midrule") == 3


@pytest.mark.parametrize(("form", "start"), [("markdown", "teacher"), ("latex", "% needs"), ("table", "teacher")])
def test_bench_prints_the_form_that_is_asked(
    form: str, start: str, report: BenchReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bench.html").touch()
    _show(report, tmp_path, form)
    printed = capsys.readouterr()
    assert printed.out.startswith(start) and printed.out.count("medusa") >= 1
    assert f"report: {tmp_path / 'bench.html'}" in (printed.out if form == "table" else printed.err)


def test_forms_of_the_table_exclude_each_other() -> None:
    refused = invoke("bench", "--dataset", "arithmetic", "--json", "--latex").exception
    assert getattr(refused, "exit_code", 0) == 2 and "--json and --latex exclude each other" in str(refused)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("no Chromium")
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1200])
def test_page_fits_phones_and_follows_the_dark_scheme(
    width: int, dark: bool, page: str, browser: Browser, tmp_path: Path
) -> None:
    path = tmp_path / "bench.html"
    path.write_text(page, encoding="utf-8")
    browser.open(path, width, dark)
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.requests == [path.as_uri()], "the page fetches something"
    browser.requests.clear()
    picture = browser.screenshot()
    assert picture.width == width and picture.height == browser.value("document.documentElement.scrollHeight")
    pixels = picture.convert("L")
    ground = [pixels.getpixel((x, y)) for x in (2, width - 3) for y in range(2, picture.height, 50)]
    assert max(ground) < 40 if dark else min(ground) > 220
    for elements, colour in (("h1, h2, td, th, figcaption, li, dd, .text", "color"), ("svg text", "fill")):
        inks = browser.value(f"[...document.querySelectorAll('{elements}')].map(x => getComputedStyle(x).{colour})")
        assert len(inks) > 40 and all((brightness(ink) > 120) == dark for ink in inks)
    heights = "[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height)"
    assert min(browser.value(heights)) > 9.9, "the text of a figure is too small to read"
    scrolls = "['auto', 'scroll'].includes(getComputedStyle(item.closest('figure, .card')).overflowX)"
    assert browser.value(f"[...document.querySelectorAll('svg, table')].every(item => {scrolls})")


def test_lossless_counts_of_methods_that_cannot_run_are_left_out() -> None:
    made = bench_report()
    made.rows.append(replace(made.rows[2], method="early-exit:3", reason="no", lossless=Lossless(40, 40)))
    assert "early-exit" not in (verified.identical_line(made) or "early-exit")
    assert "early-exit" not in json.dumps(verified.verified_cells(made))
