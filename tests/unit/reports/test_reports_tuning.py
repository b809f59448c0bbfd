"""Reports of `firp tune`, and its predictions beside the measurements of `firp bench`."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import struct
from dataclasses import replace
from itertools import pairwise

import pytest
from rich.console import Console, RenderableType

from firp_cli.reports import html, predicted, tables, tuning
from firp_cli.reports.bench_csv import bench_csv
from firp_cli.reports.canvas import Picture
from firp_cli.reports.cells import DASH
from firp_cli.reports.markdown import bench_markdown
from firp_cli.reports.tuning_figures import near_checks, nearest_curve, shortened
from firp_cli.reports.tuning_tree import drawable, ordinal, tree_layout
from firp_cli.results import BenchReport, Prediction, as_json
from firp_cli.tune_results import (
    CandidateRate,
    CostCheck,
    CostCurve,
    CostReport,
    Reliability,
    Trial,
    TunedTree,
    TuneReport,
)
from helpers.reports import PNG, Page, bench_report, bench_row

ROWS = [1, 2, 4, 8, 16, 24, 32, 48, 64]
PARTS = (0.61, 0.29, 0.1)  # shares of a pass: lower layers, upper layers, head
RATES = [[0.62 * 0.8**step * 0.36**rank for rank in range(10)] for step in range(4)]


def cost_report(batches: tuple[int, ...] = (1, 4, 16), contexts: tuple[int, ...] = (128, 1024)) -> CostReport:
    curves = [
        CostCurve(batch, context, ROWS, *([part * _pass(batch, context, rows) for rows in ROWS] for part in PARTS))
        for batch in batches
        for context in contexts
    ]
    checks = [
        CostCheck(batch, 128, rows, _pass(batch, 128, rows), _pass(batch, 128, rows) / (1 + error))
        for batch in batches
        for rows, error in ((3, 0.012), (6, -0.018), (12, 0.031), (40, -0.008))
    ]
    return CostReport({}, {}, {}, 20, 28, curves, checks, 41.7)


def _pass(batch: int, context: int, rows: int) -> float:
    return 7.2 + 0.0006 * context * batch + 0.02 * rows * batch + max(0.0, 0.05 * (rows * batch - 32))


def grown(nodes: int) -> tuple[list[list[int]], list[float]]:
    """Return the most probable tree: its paths in order of depth, and each node's probability, the root first."""
    kept: dict[tuple[int, ...], float] = {(): 1.0}
    while len(kept) < nodes:
        open_ends = {
            (*node, rank): chance * RATES[len(node)][rank]
            for node, chance in kept.items()
            if len(node) < len(RATES)
            for rank in range(10)
            if (*node, rank) not in kept
        }
        best = max(open_ends, key=lambda node: open_ends[node])
        kept[best] = open_ends[best]
    ordered = sorted(kept, key=lambda node: (len(node), node))
    return [list(node) for node in ordered if node], [kept[node] for node in ordered]


def prediction_of(nodes: int, batch: int = 1) -> Prediction:
    length, ar_step = sum(grown(nodes)[1]), _pass(batch, 128, 1)
    step = _pass(batch, 128, 2 * nodes)
    return Prediction(length, step, ar_step, length * ar_step / step)


def decoded(prediction: Prediction, off: float) -> Prediction:
    """Return the measurement from which a prediction differs by `off`."""
    return replace(
        prediction, accepted_length=prediction.accepted_length / (1 - off), speedup=prediction.speedup / (1 + off)
    )


def entry(nodes: int, batch: int = 1, tree: str | None = None) -> TunedTree:
    paths, chances = grown(nodes)
    machine = {"device": "NVIDIA H200", "dtype": "bfloat16"}
    name = tree or f"static:{nodes}"
    return TunedTree(
        machine, "ab" * 8, batch, 200, 0.0, name, prediction_of(nodes, batch), paths, 4, None, nodes, 2 * nodes, chances
    )


def no_tree(batch: int) -> TunedTree:
    step = _pass(batch, 128, 1)
    return TunedTree({}, "ab" * 8, batch, 200, 0.0, "none", Prediction(1.0, step, step, 1.0))


def tune_report(*entries: TunedTree, measured: bool = True, break_even: int | None = None) -> TuneReport:
    chosen = list(entries) or [entry(16), entry(8, 4), no_tree(16)]
    ladder = [
        Trial(f"static:{nodes}", 1, nodes, 2 * nodes, prediction_of(nodes)) for nodes in (2, 4, 6, 8, 12, 16, 32, 64)
    ]
    batches = [Trial(item.tree, item.batch_size, item.nodes, item.rows, item.predicted) for item in chosen]
    if measured:
        for place, trial in enumerate(ladder[1::2]):
            trial.measured = decoded(trial.predicted, (0.02, -0.03, 0.01, 0.04)[place % 4])
        for trial in batches[:2]:
            trial.measured = decoded(trial.predicted, 0.025)
    reliability = [
        Reliability(step, round(4000 * 0.7**place), 0.05 + 0.1 * place, (0.05 + 0.1 * place) ** (1 + 0.08 * step))
        for step in range(1, 5)
        for place in range(10)
    ]
    acceptance = [
        CandidateRate(step, rank, round(12000 * 0.6 ** (step - 1)), RATES[step - 1][rank])
        for step in range(1, 5)
        for rank in range(10)
    ]
    report = bench_report()
    predictor = {"folder": "data/predictors/firp", "kind": "firp", "steps": 4}
    calibration = {"dataset": "gsm8k", "prompts": 64, "tokens": 12345, "anchors": 9876}
    cost = cost_report()
    return TuneReport(
        {**report.environment, "argv": ["/somewhere/bin/firp", "tune", "--dataset", "a b"]},
        report.teacher,
        predictor,
        {},
        calibration,
        acceptance,
        reliability,
        cost,
        chosen,
        ladder,
        batches,
        break_even,
    )


def size_of(picture: Picture) -> tuple[int, int]:
    """Return the width and height of a complete PNG."""
    image = picture.png
    assert image.startswith(PNG) and image[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", image[16:24])
    return width, height


def printed(*drawn: RenderableType, width: int = 100) -> list[str]:
    """Return the lines on a terminal with spaces folded; none is wider than the terminal or cut."""
    console = Console(width=width, file=io.StringIO(), record=True)
    for item in drawn:
        console.print(item)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    return [" ".join(line.split()) for line in lines]


def test_figures_are_complete_and_readable() -> None:
    drawn = tuning.tune_figures(tune_report(break_even=16))
    assert list(drawn) == ["cost", "nodes", "batch", "tree", "acceptance"] == list(tuning.CAPTIONS)
    for width, height in map(size_of, drawn.values()):
        assert 800 <= width <= 1600 and 400 <= height <= 1000


@pytest.mark.parametrize(
    ("report", "omitted"),
    [
        (tune_report(no_tree(1), no_tree(4), measured=False, break_even=1), {"tree"}),
        (tune_report(entry(8), measured=False), {"batch"}),
        (tune_report(replace(entry(24, tree="dynamic:24@8"), paths=None, probabilities=None)), {"batch", "tree"}),
        (tune_report(entry(24, tree="dynamic:24"), entry(64, 8)), set()),
        (tune_report(replace(entry(16), probabilities=None), no_tree(2)), set()),
        (replace(tune_report(), ladder=[], acceptance=[]), {"nodes", "acceptance"}),
        (replace(tune_report(), cost=replace(cost_report(), curves=[])), {"cost"}),
    ],
)
def test_empty_figures_are_omitted(report: TuneReport, omitted: set[str]) -> None:
    drawn = tuning.tune_figures(report)
    assert set(drawn) == set(tuning.CAPTIONS) - omitted
    assert all(size_of(image) for image in drawn.values())
    Page(tuning.tune_html(report, drawn))
    printed(tuning.tune_tables(report))


@pytest.mark.parametrize("nodes", [2, 8, 16, 64])
@pytest.mark.parametrize("shape", ["grown", "chain", "star", "ragged"])
def test_tree_layout_keeps_nodes_apart(nodes: int, shape: str) -> None:
    paths = {
        "grown": grown(nodes)[0],
        "chain": [[0] * depth for depth in range(1, nodes)],
        "star": [[rank] for rank in range(nodes - 1)],
        "ragged": [[rank, *[0] * (5 * rank % 7)] for rank in range(nodes // 4 + 1)],  # parents are added
    }[shape]
    places = tree_layout(paths)
    assert places.keys() == {(), *(tuple(path[:depth]) for path in paths for depth in range(len(path) + 1))}
    assert min(x for x, _ in places.values()) == 0
    children: dict[tuple[int, ...], list[float]] = {}
    levels: dict[float, list[tuple[tuple[int, ...], float]]] = {}
    for node, (x, y) in places.items():
        assert y == -len(node)
        levels.setdefault(y, []).append((node, x))
        if node:
            children.setdefault(node[:-1], []).append(x)
    for level in levels.values():
        ordered = [x for _, x in sorted(level)]
        assert all(right - left >= 1 - 1e-9 for left, right in pairwise(ordered))
    for node, below in children.items():
        assert places[node][0] == pytest.approx((min(below) + max(below)) / 2)


def test_ordinal_names_positions() -> None:
    assert [ordinal(rank) for rank in (0, 1, 2, 3, 10, 11, 12, 20, 21, 110)] == (
        ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "22nd", "111th"]
    )


def test_drawable_is_the_first_tree_with_a_known_shape() -> None:
    without = replace(entry(24, tree="dynamic:24"), paths=None)
    assert drawable([no_tree(1), without, entry(8, 4), entry(16, 8)]) == entry(8, 4)
    assert drawable([no_tree(1), without, replace(entry(2), paths=[[]])]) is None


def test_tree_figure_labels_nodes_and_title(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    from firp_cli.reports import tuning_tree

    found: list[str] = []

    def collect(figure: Figure) -> bytes:
        found.extend(text.get_text() for text in figure.axes[0].texts)
        found.append(figure.get_suptitle())
        return PNG

    monkeypatch.setattr(tuning_tree, "picture", collect)
    tuning_tree.tree_figure(entry(8))
    assert found[-1] == "static:8 at batch size 1: 8 nodes, 3 drafts deep"
    assert "root" in found and "1st\n0.62" in found and "2nd\n0.22" in found and len(found) == 9
    tuning_tree.tree_figure(replace(entry(4, tree="dynamic:4"), probabilities=[1.0, 0.6, 0.004, 0.0001]))
    assert found[-1].endswith("4 nodes, 2 drafts deep (dynamic: typical shape)")
    assert {"1st\n0.60", "2nd\n0.004", "1st\n<.001"} <= set(found[-5:])
    tuning_tree.tree_figure(replace(entry(4), probabilities=None))
    assert sorted(found[-5:-1]) == ["1st", "1st", "2nd", "root"]


def test_cost_figure_draws_the_nearest_curve_and_checks() -> None:
    report = tune_report(replace(entry(8, 4), context=900), no_tree(8))
    assert (nearest_curve(report).batch_size, nearest_curve(report).context) == (4, 1024)
    assert [check.rows for check in near_checks(report, nearest_curve(report))] == [3, 6, 12, 40]
    report.cost.checks.append(CostCheck(4, 1000, 20, 9.0, 9.1))
    assert [check.rows for check in near_checks(report, nearest_curve(report))] == [20]
    assert near_checks(replace(report, cost=replace(report.cost, checks=[])), nearest_curve(report)) == []


def test_shortened_cuts_long_tree_names() -> None:
    assert shortened("static:16") == "static:16" and len(shortened("a" * 80)) == 28


def test_disagreement_is_relative_to_the_measurement() -> None:
    assert predicted.disagreement(1.1, 1.0) == pytest.approx(0.1)
    assert predicted.disagreement(0.9, 1.2) == pytest.approx(-0.25)
    assert [predicted.disagreement(*pair) for pair in ((None, 1.0), (1.0, None), (1.0, 0.0), (math.nan, 1.0))] == (
        [None] * 4
    )


def test_off_formats_the_relative_error() -> None:
    assert (predicted.off(1.41, 1.44), predicted.off(1.44, 1.41), predicted.off(1.0, None)) == ("2% off", "2% off", "–")
    assert (tuning.percent_off(1.41, 1.44), tuning.percent_off(1.44, 1.41)) == ("-2.1", "+2.1")
    assert tuning.percent_off(1.0, None) == DASH


def test_check_error_is_relative_to_the_measurement() -> None:
    assert max(abs(check.error) for check in cost_report().checks) == pytest.approx(0.031)


def test_terminal_tables_show_choices_ladder_and_summary() -> None:
    lines = printed(tuning.tune_tables(tune_report(break_even=16)))
    assert "1 static:16 32 2.89 7.92 7.30 2.67 2.60 +2.5" in lines
    assert "4 static:8 16 2.57 10.39 7.59 1.88 1.83 +2.5" in lines
    assert "16 none 1 1.00 8.75 8.75 1.00 – –" in lines
    assert "4 static:4 2.15 2.19 -2.0 2.11 2.07 +2.0" in lines and "2 static:2 1.62 – – 1.61 – –" in lines
    assert lines[-3:] == [
        "cost curves: 54 points in 42 s, largest residual 3.1% at 12 checks",
        "calibration: 64 prompts, 12,345 tokens, 9,876 anchors of gsm8k; tuned for 200 tokens in the cache",
        "break-even: 16 is the smallest batch size tried at which no tree pays",
    ]


def test_summary_handles_missing_values() -> None:
    report = tune_report(entry(8), measured=False)
    report.cost.checks, report.calibration = [], {"prompts": 1}
    assert tuning.summary_lines(report) == [
        "cost curves: 54 points in 42 s, unchecked",
        "calibration: 1 prompt; tuned for 200 tokens in the cache",
        "break-even: a tree pays at batch size 1, the only one tried",
    ]
    assert tuning.summary_lines(tune_report(entry(8), entry(4, 2)))[2].endswith("at every batch size tried (1, 2)")


def test_terminal_tables_fit_80_columns() -> None:
    narrow = printed(tuning.tune_tables(tune_report(entry(24, tree="dynamic:24@8"))), width=80)
    assert any("dynamic:24@8" in line for line in narrow)
    assert any("2.44" in line and "+2.5" in line for line in narrow)  # no figure is cut


def test_headline_is_none_when_no_tree_pays() -> None:
    assert tuning.headline(tune_report(no_tree(1), break_even=1)) is None


def test_markdown_shows_tables_figures_and_command() -> None:
    text = tuning.tune_markdown(tune_report(break_even=16), ["cost", "tree"])
    assert "teacher arithmetic (float32, cpu), predictor firp (firp), greedy." in text
    assert "static:16 is predicted to decode 2.67 times as fast" in text and "measured: 2.60 times" in text
    assert "| 1 | static:16 | 32 | 2.89 | 7.92 | 7.30 | 2.67 | 2.60 | +2.5 |" in text
    assert "| 4 | static:4 | 2.15 | 2.19 | -2.0 | 2.11 | 2.07 | +2.0 |" in text
    assert "| 1 | 128 | 12 | 7.52 | 7.29 | +3.1 |" in text
    assert "![cost](cost.png)" in text and "![tree](tree.png)" in text and "nodes.png" not in text
    assert "- cost curves: 54 points" in text and "firp tune --dataset 'a b'" in text and "/somewhere" not in text


def test_html_embeds_figures_and_escapes_names() -> None:
    report = tune_report(entry(64), entry(8, 4), break_even=16)
    drawn = tuning.tune_figures(report)
    page = tuning.tune_html(report, drawn)
    assert Page(page).figures == [tuning.CAPTIONS[name] for name in drawn]
    assert "<td>static:64</td>" in page and "<title>firp tune</title>" in page and "firp tune --dataset" in page
    assert all(caption.replace("'", "&#x27;") in page for caption in tuning.CAPTIONS.values())
    widths = dict(zip(drawn, map(int, re.findall(r"min-width: (\d+)px; max-width", page)), strict=True))
    assert widths["tree"] > 1000 > max(width for name, width in widths.items() if name != "tree")  # 64 nodes scroll
    assert "<b>" not in tuning.tune_html(tune_report(entry(8, tree="<b>")), {})


def predicted_report(groups: tuple[tuple[str, str], ...] = (("arithmetic", "all"),)) -> BenchReport:
    report = bench_report(groups)
    for row in report.rows:
        if row.method == "firp":
            row.predicted = Prediction(2.35, 5.5, 3.3, 1.41)
    return report


def test_json_round_trip_keeps_predictions() -> None:
    report = predicted_report()
    again = BenchReport.from_json(json.loads(json.dumps(as_json(report))))
    assert [row.predicted for row in again.rows] == [row.predicted for row in report.rows]
    assert again.rows[2].predicted == Prediction(2.35, 5.5, 3.3, 1.41) and again.rows[0].predicted is None
    assert bench_csv(again) == bench_csv(report)


def test_json_round_trip_keeps_tuned_trees() -> None:
    tuned = as_json(entry(8))
    assert TunedTree.from_json(json.loads(json.dumps(tuned))) == entry(8)


def test_bench_reports_show_predictions() -> None:
    report = predicted_report()
    line = "firp: predicted 1.41 x, 2% off; accepted length 2.35, 2% off"
    assert line in printed(tables.bench_tables(report), width=80)
    text = bench_markdown(report)
    assert f"- {line}\n" in text and "| 2.35 (2% off) | 1.41 (2% off) |" in text and predicted.NOTE in text
    headers, cells = tables.detail_cells(report)
    assert headers[-2:] == ["predicted accepted length", "predicted speedup"]
    assert {len(line) for line in cells} == {len(headers)} and cells[0][-2:] == ["–", "–"]
    page = html.bench_html(report, {})
    Page(page)
    assert f"<p>{line}.</p>" in page and "<td>1.41 (2% off)</td>" in page
    none, *_, firp, _, _ = csv.DictReader(io.StringIO(bench_csv(report)))
    assert (none["predicted_speedup"], float(firp["predicted_speedup"])) == ("", 1.41)
    assert float(firp["predicted_accepted_length"]) == 2.35 and "predicted" not in firp
    assert (float(firp["predicted_step_milliseconds"]), float(firp["predicted_ar_milliseconds"])) == (5.5, 3.3)


def test_predicted_lines_name_data_set_and_teacher_of_several() -> None:
    lines = predicted.predicted_lines(predicted_report((("arithmetic", "all"), ("gsm8k", "all"))))
    assert [line.partition(" predicted")[0] for line in lines] == ["arithmetic: firp:", "gsm8k: firp:"]
    row = replace(bench_row("firp"), teacher="looped", predicted=Prediction(2.41, 5.5, 3.3, 1.44))
    report = replace(bench_report(), rows=[row])
    assert predicted.predicted_lines(report) == [
        "firp (looped): predicted 1.44 x, 0% off; accepted length 2.41, 0% off"
    ]


def test_reports_without_predictions_omit_them() -> None:
    report = bench_report()
    written = bench_markdown(report) + html.bench_html(report, {}) + bench_csv(report)
    assert "redicted" not in written and "redicted" not in " ".join(printed(tables.bench_tables(report), width=80))
