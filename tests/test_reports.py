"""Report files: they exist, parse, and say what the records say."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

from firp_cli.records import (
    BenchReport,
    BenchRow,
    Divergence,
    EvalReport,
    Lossless,
    PipelineReport,
    StepQuality,
    TickCost,
    plain,
)
from firp_cli.reports import figures, html, pipeline, tables

PNG = b"\x89PNG\r\n\x1a\n"
DRAFTED = {
    "firp": (1.44, (1.38, 1.51), 1.86, 2.41, [0.62, 0.39, 0.25, 0.15], [0, 380, 230, 140, 100, 150]),
    "hidden_transfer": (1.31, (1.25, 1.36), 1.69, 2.22, [0.58, 0.33, 0.2, 0.11], [0, 420, 250, 130, 90, 110]),
    "medusa": (1.22, (1.17, 1.27), 1.58, 2.05, [0.52, 0.28, 0.16, 0.09], [0, 480, 240, 120, 70, 90]),
}


def bench_row(method: str, dataset: str = "arithmetic", category: str = "all") -> BenchRow:
    speedup, interval, over_hf, length, by_step, histogram = DRAFTED.get(
        method, (1.0, None, 1.29 if method == "ar" else 1.0, 1.0, [], [0, 2500])
    )
    return BenchRow(
        dataset=dataset,
        category=category,
        method=method,
        predictor=f"data/predictors/{method}" if method in DRAFTED else None,
        batch_size=1,
        temperature=0.0,
        prompts=40,
        new_tokens=2540,
        prefill_seconds=1.2,
        decode_seconds=10.0 / speedup,
        tokens_per_second=250.0 * speedup,
        speedup=speedup if method != "hf" else 0.78,
        speedup_interval=interval if method != "hf" else (0.75, 0.8),
        speedup_hf=over_hf,
        accepted_length=length,
        accepted_length_interval=(length - 0.06, length + 0.06) if length > 1 else None,
        acceptance_by_step=by_step,
        accepted_histogram=histogram,
        steps=sum(histogram),
        step_milliseconds=4.0,
        lossless=Lossless(0, 0) if method == "hf" else Lossless(40, 40),
        tree="dynamic:8" if method in DRAFTED else None,
        speedup_with_prefill=speedup * 0.97,
    )


def bench_report(groups: tuple[tuple[str, str], ...] = (("arithmetic", "all"),)) -> BenchReport:
    rows = [bench_row(method, *group) for group in groups for method in ("ar", "hf", *DRAFTED)]
    return BenchReport(
        environment={
            "argv": ["/somewhere/bin/firp", "bench", "--dataset", "a b"],
            "python": "3.11",
            "versions": {"torch": "2.13.0"},
            "cuda": None,
        },
        teacher={
            "name": "arithmetic",
            "dtype": "float32",
            "device": "cpu",
            "layers": 6,
            "hidden_size": 256,
            "parameters": 5200000,
            "fingerprint": "ab" * 8,
        },
        settings={
            "max_new_tokens": 128,
            "batch_size": 1,
            "temperature": 0.0,
            "top_p": 1.0,
            "repeats": 3,
            "warmup": 1,
            "reference": "hf",
            "prompts": 40,
        },
        rows=rows,
    )


def pipeline_report(shared: bool = True, cost: bool = True) -> PipelineReport:
    """40 answers through 4 loops: 0.72 tokens per tick at 1.33 loops a tick, so 0.72 x 4 / 1.33 = 2.17."""
    occupancy = [1.0, 1.9, 2.7, 3.4, *(3.1 + 0.4 * math.sin(tick / 3) for tick in range(90))]
    return PipelineReport(
        loops=4,
        exits=[1, 2, 3],
        shared=shared,
        ranks=1,
        ticks=3472,
        tokens=2500,
        plain_tokens=0,
        tokens_per_tick=0.72,
        idle=0.28,
        flushes=310,
        flushed=0.19,
        corrected=0.12,
        exit_accuracy=[0.81, 0.93, 0.97],
        occupancy=occupancy,
        cost=TickCost(256, 2.32, 6.98, 1.745, 1.95, 0.21, 0.15, [1.6, 1.7, 1.8, 1.95]) if cost else None,
        predicted_speedup=2.17 if cost else None,
    )


def speed_row(method: str = "speed", dataset: str = "arithmetic", shared: bool = True, cost: bool = True) -> BenchRow:
    row = replace(bench_row("ar", dataset), method=method, speedup=2.04, speedup_interval=(1.97, 2.11), speedup_hf=2.6)
    row.steps, row.step_milliseconds, row.decode_seconds, row.tokens_per_second = 3472, 1.4, 4.9, 510.0
    row.accepted_length, row.accepted_length_interval, row.accepted_histogram = 2.88, (2.8, 2.96), []
    return replace(row, pipeline=pipeline_report(shared, cost))


def speed_report(*rows: BenchRow) -> BenchReport:
    """Plain decoding and SPEED; nothing of FIRP's kind."""
    report = bench_report()
    report.rows = [bench_row("ar"), *(rows or [speed_row()])]
    return report


def eval_report() -> EvalReport:
    steps = [StepQuality(i + 1, 0.42 - 0.08 * i, 0.7 - 0.06 * i, 1.4 + 0.4 * i, 4000 - i) for i in range(4)]
    similarity: dict[int, list[float | None]] = {
        layer: [0.9 - 0.1 * layer / 6 - 0.08 * step if layer >= step + 2 else None for step in range(4)]
        for layer in range(2, 7)
    }
    return EvalReport({}, {}, {}, {}, steps, 1.71, 2.1, "dynamic:8", similarity)


class Page(HTMLParser):
    """Collects tags and refuses pages that leave one open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(values["src"] or "")
        self.links += [value for key, value in attrs if key in ("href", "src") and value]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def with_divergence(gap: float, dtype: str) -> BenchReport:
    report = bench_report()
    report.teacher["dtype"] = dtype
    firp = next(row for row in report.rows if row.method == "firp")
    firp.lossless = Lossless(40, 39, [Divergence(7, 31, 100, 200, gap)])
    return report


def test_json_round_trip() -> None:
    report = bench_report()
    report.rows[0].lossless.divergences.append(Divergence(1, 2, 3, 4, 0.5))
    assert BenchReport.from_plain(json.loads(json.dumps(plain(report)))).rows[0] == report.rows[0]


def test_csv_has_every_row_and_figure() -> None:
    lines = list(csv.DictReader(io.StringIO(tables.bench_csv(bench_report()))))
    firp = next(line for line in lines if line["method"] == "firp")
    assert len(lines) == 5 and float(firp["speedup"]) == 1.44 and float(firp["speedup_low"]) == 1.38
    assert firp["lossless_identical"] == "40" and firp["accepted_histogram"] == "0 380 230 140 100 150"


def test_markdown_and_cells() -> None:
    text = tables.bench_markdown(bench_report())
    assert "| firp | 2.41 [2.35, 2.47] | 360.0 | 1.44 [1.38, 1.51] | 1.86 | 40/40 |" in text
    assert "| hf | 1.00 | 250.0 | 0.78 [0.75, 0.80] | 1.00 | reference |" in text
    assert "firp bench --dataset 'a b'" in text and "/somewhere" not in text
    several = bench_report((("spec_bench", "all"), ("spec_bench", "rag")))
    headers, cells = tables.bench_cells(several)
    assert headers[0] == "prompts" and cells[-1][0] == "spec_bench: rag"


def test_terminal_table_keeps_brackets() -> None:
    from rich.console import Console

    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(tables.bench_tables(bench_report()))
    text = console.export_text()
    assert "1.44 [1.38, 1.51]" in text and "40/40" in text
    groups = (("spec_bench", "all"), ("spec_bench", "rag"), ("spec_bench", "translation"))
    console.print(tables.bench_tables(bench_report(groups)))
    text = console.export_text()
    assert "spec_bench: rag" in text and "1.44 (2.41)" in text
    console.print(tables.eval_table(eval_report()))
    assert "0.420" in console.export_text()


def test_the_note_on_differences_depends_on_the_gap() -> None:
    assert tables.lossless_note(bench_report()) is None
    near = tables.lossless_note(with_divergence(0.03, "bfloat16"))
    far = tables.lossless_note(with_divergence(3.0, "bfloat16"))
    exact = tables.lossless_note(with_divergence(0.03, "float32"))
    assert near and "bfloat16 rounding decides" in near and "1 outputs" not in near
    assert far and "report this" in far
    assert exact and "report this" in exact


def test_html_holds_the_figures_and_needs_no_network() -> None:
    report = with_divergence(0.03, "bfloat16")
    drawn = figures.bench_figures(report)
    page = html.bench_html(report, drawn)
    images = Page(page).images
    assert [base64.b64decode(image.partition(",")[2]) for image in images] == list(drawn.values())
    assert all(link.startswith("data:") for link in Page(page).links)
    assert not re.search(r"https?://", page)
    assert "near-tie" in page and "<td class=left>firp</td>" in page and "firp bench --dataset" in page


def test_html_escapes_names() -> None:
    report = bench_report()
    report.rows = [replace(row, method="<b>" if row.method == "firp" else row.method) for row in report.rows]
    assert "<b>" not in html.bench_html(report, {})


def test_bench_figures() -> None:
    drawn = figures.bench_figures(bench_report())
    assert list(drawn) == ["speedup", "acceptance"] and all(image.startswith(PNG) for image in drawn.values())
    groups = tuple(("spec_bench", name) for name in ("all", "qa", "rag", "translation"))
    assert "speedup_by_group" in figures.bench_figures(bench_report(groups))
    sets = (("arithmetic", "all"), ("gsm8k", "all"), ("all", "all"))
    assert "speedup_by_group" in figures.bench_figures(bench_report(sets))
    only = bench_report()
    only.rows = [replace(row, speedup=None, speedup_hf=None) for row in only.rows if row.method == "ar"]
    assert figures.bench_figures(only) == {}


def test_eval_figures() -> None:
    report = eval_report()
    drawn = figures.eval_figures(report)
    assert list(drawn) == ["quality", "similarity"] and all(image.startswith(PNG) for image in drawn.values())
    report.similarity = {}
    assert list(figures.eval_figures(report)) == ["quality"]


def test_pipeline_cells_and_tick() -> None:
    headers, [cells] = pipeline.pipeline_cells(speed_report())
    assert headers[0] == "method" and len(headers) == len(cells)
    line = dict(zip(headers, cells, strict=True))
    assert line["tokens per tick"] == "0.72" and line["flushed tokens"] == "0.19" and line["plain tokens"] == "0"
    assert (line["exit loops"], line["exit accuracy"]) == ("1 2 3", "0.81 0.93 0.97")
    assert line["tick ms / loop ms"] == "2.32 / 1.75 (1.33)"
    assert (line["predicted speedup"], line["measured speedup"]) == ("2.17", "2.04")
    several = speed_report(speed_row(dataset="gsm8k"), speed_row(dataset="all"))
    headers, lines = pipeline.pipeline_cells(several)
    assert headers[:2] == ["prompts", "method"] and [line[0] for line in lines] == ["gsm8k", "all"]
    headers, [ticks] = pipeline.tick_cells(several)
    assert len(headers) == len(ticks) and ticks[-1] == "1.60 1.70 1.80 1.95"
    cost = several.rows[1].pipeline and several.rows[1].pipeline.cost
    assert cost and "decision 0.15; one loop of one token 1.75 (a tick costs 1.33 x" in pipeline.tick_line(cost)
    unmeasured = speed_report(speed_row(cost=False))
    assert pipeline.tick_cells(unmeasured)[1] == [] and pipeline.pipeline_cells(unmeasured)[1][0][-3] == tables.DASH
    assert pipeline.pipeline_cells(bench_report())[1] == [] == pipeline.pipeline_tables(bench_report())


def test_the_note_on_loops_that_share_nothing() -> None:
    assert pipeline.pipeline_note(bench_report()) is None and pipeline.pipeline_note(speed_report()) is None
    alone = speed_report(speed_row(shared=False))
    note = pipeline.pipeline_note(alone)
    assert note and note.startswith("speed: ") and "no gain" in note and "--gpus N" in note
    assert note in tables.bench_markdown(alone) and "no gain is to be expected" in html.bench_html(alone, {})
    spread = speed_row(shared=False)
    assert spread.pipeline
    assert pipeline.pipeline_note(speed_report(replace(spread, pipeline=replace(spread.pipeline, ranks=4)))) is None


def test_pipeline_round_trip_and_csv() -> None:
    report = speed_report(speed_row(), speed_row("speed_2", cost=False))
    again = BenchReport.from_plain(json.loads(json.dumps(plain(report))))
    assert [row.pipeline for row in again.rows] == [row.pipeline for row in report.rows]
    assert tables.bench_csv(again) == tables.bench_csv(report)
    plain_decoding, speed, unmeasured = csv.DictReader(io.StringIO(tables.bench_csv(report)))
    own = [name for name in speed if name.startswith("pipeline")]
    assert speed["pipeline_exits"] == "1 2 3" and speed["pipeline_exit_accuracy"] == "0.81 0.93 0.97"
    assert float(speed["pipeline_cost_loop"]) == 1.745 and speed["pipeline_cost_rows"] == "1.6 1.7 1.8 1.95"
    assert "pipeline" not in own and not any("occupancy" in name for name in own)
    assert all(plain_decoding[name] == "" for name in own) and unmeasured["pipeline_cost_tick"] == ""
    assert "pipeline" not in tables.bench_csv(bench_report())


def test_pipeline_in_markdown_and_html() -> None:
    report = speed_report()
    drawn = figures.bench_figures(report)
    text = tables.bench_markdown(report, list(drawn))
    section = text[text.index("## Pipeline") : text.index("## Details")]
    assert "| speed | 4 | 3472 | 0.72 |" in section and "| speed | 256 | 2.32 |" in section
    assert "![occupancy](occupancy.png)" in section and text.count("occupancy.png") == 1
    assert "tokens per r ticks" in text and "Predicted speedup" in text
    page = html.bench_html(report, drawn)
    images = [base64.b64decode(image.partition(",")[2]) for image in Page(page).images]
    assert images == list(drawn.values()) and html.CAPTIONS["occupancy"] in page
    assert "2.32 / 1.75 (1.33)" in page and "at 2.88 tokens per 4 ticks" in page
    without = tables.bench_markdown(bench_report()) + html.bench_html(bench_report(), {})
    assert "ipeline" not in without and "tick" not in without


def test_terminal_table_of_pipelines_is_narrow() -> None:
    from rich.console import Console

    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(tables.bench_tables(speed_report(speed_row(), speed_row("speed_2", cost=False))))
    text = console.export_text()
    assert "tokens per tick" in text and "tick 2.32 ms: layers 1.95" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "exit accuracy 0.81 0.93 0.97 0.81 0.93 0.97" in lines and "predicted speedup 2.17 –" in lines


def test_eval_of_a_pipeline() -> None:
    steps = [StepQuality(loop, 0.7 + 0.08 * loop, 0.85 + 0.04 * loop, 1.1 - 0.3 * loop, 4000) for loop in (1, 2, 3)]
    report = replace(eval_report(), steps=steps, similarity={}, pipeline=pipeline_report())
    assert tables.eval_headers(report)[0] == "exit" and tables.eval_headers(eval_report())[0] == "step"
    text = "\n".join(pipeline.eval_pipeline_lines(report))
    assert "tokens per tick: 0.72" in text and "corrected early: 0.12" in text and "no gain" not in text
    assert "tick 2.32 ms" in text and "predicted speedup: 2.17 (0.72 tokens per tick x 4 / 1.33)" in text
    assert "no gain" in pipeline.eval_pipeline_lines(replace(report, pipeline=pipeline_report(shared=False)))[-1]
    assert pipeline.eval_pipeline_lines(eval_report()) == []
    drawn = figures.eval_figures(report)
    assert list(drawn) == ["quality", "occupancy"] and all(image.startswith(PNG) for image in drawn.values())


def test_pipeline_figures() -> None:
    drawn = figures.bench_figures(speed_report())
    assert list(drawn) == ["speedup", "occupancy"] and all(image.startswith(PNG) for image in drawn.values())
    both = bench_report()
    both.rows += [speed_row(), speed_row("speed_2")]
    assert list(figures.bench_figures(both)) == ["speedup", "acceptance", "occupancy"]
