"""Reports of `firp bench` and `firp eval`: files parse, and show the values of the results."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace

from firp_cli.reports import figures, html, speed_tables, tables
from firp_cli.reports.bench_csv import bench_csv
from firp_cli.reports.cells import DASH
from firp_cli.reports.eval_figures import eval_figures
from firp_cli.reports.markdown import bench_markdown
from firp_cli.reports.verified import lossless_note
from firp_cli.results import (
    BenchReport,
    Divergence,
    EvalReport,
    Lossless,
    StepQuality,
    as_json,
)
from helpers.reports import PNG, Page, bench_report, pipeline_report, speed_report, speed_row


def eval_report() -> EvalReport:
    steps = [StepQuality(i + 1, 0.42 - 0.08 * i, 0.7 - 0.06 * i, 1.4 + 0.4 * i, 4000 - i) for i in range(4)]
    similarity: dict[int, list[float | None]] = {
        layer: [0.9 - 0.1 * layer / 6 - 0.08 * step if layer >= step + 2 else None for step in range(4)]
        for layer in range(2, 7)
    }
    return EvalReport({}, {}, {}, {}, steps, 1.71, 2.1, "dynamic:8", similarity)


def with_divergence(gap: float, dtype: str) -> BenchReport:
    report = bench_report()
    report.teacher["dtype"] = dtype
    firp = next(row for row in report.rows if row.method == "firp")
    firp.lossless = Lossless(40, 39, [Divergence(7, 31, 100, 200, gap)])
    return report


def test_json_round_trip_keeps_rows() -> None:
    report = bench_report()
    report.rows[0].lossless.divergences.append(Divergence(1, 2, 3, 4, 0.5))
    assert BenchReport.from_json(json.loads(json.dumps(as_json(report)))).rows[0] == report.rows[0]


def test_csv_has_all_rows_and_values() -> None:
    lines = list(csv.DictReader(io.StringIO(bench_csv(bench_report()))))
    firp = next(line for line in lines if line["method"] == "firp")
    assert len(lines) == 5 and float(firp["speedup"]) == 1.44 and float(firp["speedup_low"]) == 1.38
    assert firp["lossless_identical"] == "40" and firp["accepted_histogram"] == "0 380 230 140 100 150"


def test_markdown_shows_tables_and_command() -> None:
    text = bench_markdown(bench_report())
    assert "| firp | 2.41 [2.35, 2.47] | 360.0 | 1.44 [1.38, 1.51] | 1.86 | 40/40 |" in text
    assert "| hf | 1.00 | 250.0 | 0.78 [0.75, 0.80] | 1.00 | reference |" in text
    assert "firp bench --dataset 'a b'" in text and "/somewhere" not in text
    several = bench_report((("spec_bench", "all"), ("spec_bench", "rag")))
    headers, cells = tables.bench_cells(several)
    assert headers[0] == "prompts" and cells[-1][0] == "spec_bench: rag"


def test_terminal_tables_show_intervals_and_categories() -> None:
    from rich.console import Console

    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(tables.bench_tables(bench_report()))
    text = console.export_text()
    assert "1.44 [1.38, 1.51]" in text and "40/40" in text
    groups = (("spec_bench", "all"), ("spec_bench", "rag"), ("spec_bench", "translation"))
    console.print(tables.bench_tables(bench_report(groups)))
    text = console.export_text()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert [line for line in lines if "n=" in line] == ["rag: n=40", "translation: n=40"]
    assert sum(line.startswith("firp ") and "1.44 [1.38, 1.51]" in line for line in lines) == 3
    console.print(tables.eval_table(eval_report()))
    assert "0.420" in console.export_text()


def test_lossless_note_depends_on_gap_and_dtype() -> None:
    assert lossless_note(bench_report()) is None
    near = lossless_note(with_divergence(0.03, "bfloat16"))
    far = lossless_note(with_divergence(3.0, "bfloat16"))
    exact = lossless_note(with_divergence(0.03, "float32"))
    assert near and "bfloat16 rounding decides" in near and "1 outputs" not in near
    assert far and "report this" in far
    assert exact and "report this" in exact


def test_note_compares_with_ar_in_half_precision() -> None:
    report = with_divergence(0.03, "bfloat16")
    firp = next(row for row in report.rows if row.method == "firp")
    firp.lossless_ar = Lossless(40, 38, [Divergence(7, 31, 1, 2, 0.03, -1.5), Divergence(8, 3, 1, -1, math.nan)])
    note = lossless_note(report)
    assert note and "identical to ar's outputs: firp 38/40" in note and "at most 1.5 units in the last place" in note
    again = BenchReport.from_json(json.loads(json.dumps(as_json(report))))
    assert [row.lossless_ar and row.lossless_ar.identical for row in again.rows].count(38) == 1
    line = next(line for line in csv.DictReader(io.StringIO(bench_csv(report))) if line["method"] == "firp")
    assert (line["lossless_ar_compared"], line["lossless_ar_identical"]) == ("40", "38")


def test_html_embeds_figures_and_needs_no_network() -> None:
    report = with_divergence(0.03, "bfloat16")
    drawn = figures.bench_figures(report)
    page = html.bench_html(report, drawn)
    assert Page(page).figures == [html.CAPTIONS[name] for name in drawn] and len(drawn) == 3
    assert "firp (2.41)" in Page(page).texts  # the text of a figure
    assert "near-tie" in page and "<td class=left>firp</td>" in page and "firp bench --dataset" in page


def test_html_lists_no_differences_where_there_are_none() -> None:
    report = bench_report()
    plain = html.bench_html(report, {})
    next(row for row in report.rows if row.method == "firp").lossless_ar = Lossless(40, 40)
    page = html.bench_html(report, {})
    assert "logit gap" not in plain + page and "identical to ar" in page and "identical to ar" not in plain


def test_html_escapes_names() -> None:
    report = bench_report()
    report.rows = [replace(row, method="<b>" if row.method == "firp" else row.method) for row in report.rows]
    assert "<b>" not in html.bench_html(report, {})


def test_bench_figures_depend_on_the_results() -> None:
    drawn = figures.bench_figures(bench_report())
    assert list(drawn) == ["speedup", "acceptance", "histogram"]
    assert all(image.png.startswith(PNG) for image in drawn.values())
    groups = tuple(("spec_bench", name) for name in ("all", "qa", "rag", "translation"))
    assert "speedup_by_group" in figures.bench_figures(bench_report(groups))
    sets = (("arithmetic", "all"), ("gsm8k", "all"), ("all", "all"))
    assert "speedup_by_group" in figures.bench_figures(bench_report(sets))
    only = bench_report()
    only.rows = [replace(row, speedup=None, speedup_hf=None) for row in only.rows if row.method == "ar"]
    assert figures.bench_figures(only) == {}


def test_eval_figures_depend_on_the_results() -> None:
    report = eval_report()
    drawn = eval_figures(report)
    assert list(drawn) == ["quality", "similarity"] and all(image.png.startswith(PNG) for image in drawn.values())
    report.similarity = {}
    assert list(eval_figures(report)) == ["quality"]


def test_pipeline_cells_show_statistics_and_tick_costs() -> None:
    headers, [cells] = speed_tables.pipeline_cells(speed_report())
    assert headers[0] == "method" and len(headers) == len(cells)
    line = dict(zip(headers, cells, strict=True))
    assert line["tokens per tick"] == "0.72" and line["flushed tokens"] == "0.19" and line["ar tokens"] == "0"
    assert (line["exit loops"], line["exit accuracy"]) == ("1 2 3", "0.81 0.93 0.97")
    assert line["tick ms / loop ms"] == "2.32 / 1.75 (1.33)"
    assert (line["predicted speedup"], line["measured speedup"]) == ("2.17", "2.04")
    several = speed_report(speed_row(dataset="gsm8k"), speed_row(dataset="all"))
    headers, lines = speed_tables.pipeline_cells(several)
    assert headers[:2] == ["prompts", "method"] and [line[0] for line in lines] == ["gsm8k", "all"]
    headers, [ticks] = speed_tables.tick_cells(several)
    assert len(headers) == len(ticks) and ticks[-1] == "1.60 1.70 1.80 1.95"
    cost = several.rows[1].pipeline and several.rows[1].pipeline.cost
    assert cost and "decision 0.15; one loop of one token 1.75 (a tick costs 1.33 x" in speed_tables.tick_line(cost)
    unmeasured = speed_report(speed_row(cost=False))
    assert speed_tables.tick_cells(unmeasured)[1] == [] and speed_tables.pipeline_cells(unmeasured)[1][0][-3] == DASH
    assert speed_tables.pipeline_cells(bench_report())[1] == [] == speed_tables.pipeline_tables(bench_report())


def test_pipeline_note_warns_about_unshared_loops() -> None:
    assert speed_tables.pipeline_note(bench_report()) is None and speed_tables.pipeline_note(speed_report()) is None
    alone = speed_report(speed_row(shared=False))
    note = speed_tables.pipeline_note(alone)
    assert note and note.startswith("speed: ") and "no gain" in note and "--gpus N" in note
    assert note in bench_markdown(alone) and "no gain is to be expected" in html.bench_html(alone, {})
    spread = speed_row(shared=False)
    assert spread.pipeline
    assert speed_tables.pipeline_note(speed_report(replace(spread, pipeline=replace(spread.pipeline, ranks=4)))) is None


def test_pipeline_survives_json_and_csv() -> None:
    report = speed_report(speed_row(), speed_row("speed_2", cost=False))
    again = BenchReport.from_json(json.loads(json.dumps(as_json(report))))
    assert [row.pipeline for row in again.rows] == [row.pipeline for row in report.rows]
    assert bench_csv(again) == bench_csv(report)
    plain_decoding, speed, unmeasured = csv.DictReader(io.StringIO(bench_csv(report)))
    own = [name for name in speed if name.startswith("pipeline")]
    assert speed["pipeline_exits"] == "1 2 3" and speed["pipeline_exit_accuracy"] == "0.81 0.93 0.97"
    assert float(speed["pipeline_cost_loop"]) == 1.745 and speed["pipeline_cost_rows"] == "1.6 1.7 1.8 1.95"
    assert "pipeline" not in own and not any("occupancy" in name for name in own)
    assert all(plain_decoding[name] == "" for name in own) and unmeasured["pipeline_cost_tick"] == ""
    assert "pipeline" not in bench_csv(bench_report())


def test_markdown_and_html_have_a_pipeline_section() -> None:
    report = speed_report()
    drawn = figures.bench_figures(report)
    text = bench_markdown(report, list(drawn))
    section = text[text.index("## Pipeline") : text.index("## Details")]
    assert "| speed | 4 | 3472 | 0.72 |" in section and "| speed | 256 | 2.32 |" in section
    assert "![occupancy](occupancy.png)" in section and text.count("occupancy.png") == 1
    assert "tokens per r ticks" in text and "Predicted speedup" in text
    page = html.bench_html(report, drawn)
    assert Page(page).figures == [html.CAPTIONS["speedup"], html.CAPTIONS["occupancy"]]
    assert "2.32 / 1.75 (1.33)" in page and "at 2.88 tokens per 4 ticks" in page
    without = bench_markdown(bench_report()) + html.bench_html(bench_report(), {})
    assert "ipeline" not in without and not re.search(r"\btick", without)


def test_pipeline_terminal_table_fits_80_columns() -> None:
    from rich.console import Console

    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(tables.bench_tables(speed_report(speed_row(), speed_row("speed_2", cost=False))))
    text = console.export_text()
    assert "tokens per tick" in text and "tick 2.32 ms: layers 1.95" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "exit accuracy 0.81 0.93 0.97 0.81 0.93 0.97" in lines and "predicted speedup 2.17 –" in lines


def test_eval_report_of_early_exits() -> None:
    steps = [StepQuality(loop, 0.7 + 0.08 * loop, 0.85 + 0.04 * loop, 1.1 - 0.3 * loop, 4000) for loop in (1, 2, 3)]
    report = replace(eval_report(), steps=steps, similarity={}, pipeline=pipeline_report())
    assert tables.eval_headers(report)[0] == "exit" and tables.eval_headers(eval_report())[0] == "step"
    text = "\n".join(speed_tables.eval_pipeline_lines(report))
    assert "tokens per tick: 0.72" in text and "corrected early: 0.12" in text and "no gain" not in text
    assert "tick 2.32 ms" in text and "predicted speedup: 2.17 (0.72 tokens per tick x 4 / 1.33)" in text
    assert "no gain" in speed_tables.eval_pipeline_lines(replace(report, pipeline=pipeline_report(shared=False)))[-1]
    assert speed_tables.eval_pipeline_lines(eval_report()) == []
    drawn = eval_figures(report)
    assert list(drawn) == ["quality", "occupancy"] and all(image.png.startswith(PNG) for image in drawn.values())


def test_bench_figures_show_pipeline_occupancy() -> None:
    drawn = figures.bench_figures(speed_report())
    assert list(drawn) == ["speedup", "occupancy"] and all(image.png.startswith(PNG) for image in drawn.values())
    both = bench_report()
    both.rows += [speed_row(), speed_row("speed_2")]
    assert list(figures.bench_figures(both)) == ["speedup", "acceptance", "histogram", "occupancy"]
