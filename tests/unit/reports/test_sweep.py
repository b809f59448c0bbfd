"""Report of a matrix of benches: curves, break-even points, table, page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from firp_cli.api.write_report import write_sweep
from firp_cli.evaluation.answer_runs import batch_run
from firp_cli.evaluation.bench_prompts import Batch
from firp_cli.evaluation.rows import bench_rows
from firp_cli.reports.sweep import SweepCell, break_even, break_even_lines, curves, sweep_cells
from firp_cli.results import BenchReport, Generation


def cell(batch: int, speedup: float, temperature: str = "0") -> SweepCell:
    """Return the bench of a method with that speedup at a batch size."""
    runs = {}
    for name, seconds in (("ar", 1.0), ("firp", 1.0 / speedup)):
        answer = Generation(4, [1, 2, 3, 4, 5], 2, [2, 2], 0.1, seconds, "length")
        runs[name] = [batch_run(Batch("set", "", list(range(batch))), [[answer] * batch], name)]
    rows = [row for name in runs for row in bench_rows(name, runs, {}, 0.0)]
    report = BenchReport({}, {"name": "made"}, {"methods": ["ar", "firp"], "batch_size": batch}, rows)
    return SweepCell({"--batch-size": str(batch), "--temperature": temperature}, f"batch-size={batch}", report)


def test_break_even_is_interpolated_on_a_logarithmic_scale() -> None:
    cells = [cell(1, 2.0), cell(4, 1.5), cell(16, 0.5)]
    (curve,) = [item for item in curves(cells) if item.label.startswith("firp")]
    assert break_even(curve) == pytest.approx(8.0), "half-way between 4 and 16"
    assert break_even_lines(cells) == ["firp, temperature 0: break-even at a batch size of about 8.0"]
    assert "faster than ar at every measured batch size, up to 4" in break_even_lines(cells[:2])[0]
    assert "slower than ar at every measured batch size, 1 to 4" in break_even_lines([cell(1, 0.9), cell(4, 0.8)])[0]
    assert "no break-even between" in break_even_lines([cell(1, 0.9), cell(4, 1.2)])[0]


def test_settings_that_vary_have_curves_of_their_own() -> None:
    cells = [cell(1, 2.0), cell(4, 1.5), cell(1, 1.2, "1"), cell(4, 0.9, "1")]
    assert [item.label for item in curves(cells)] == [
        "ar, temperature 0",
        "firp, temperature 0",
        "ar, temperature 1",
        "firp, temperature 1",
    ]


def test_page_shows_every_cell_and_what_failed(tmp_path: Path) -> None:
    cells = [
        cell(1, 2.0),
        cell(4, 1.5),
        SweepCell({"--batch-size": "64"}, "batch-size=64", None, "failed with status 2"),
    ]
    headers, lines = sweep_cells(cells)
    assert headers[:3] == ["batch size", "temperature", "method"] and len(lines) == 5
    assert lines[1][:5] == ["1", "0", "firp", "2.00", "8.0"] and "failed with status 2" in lines[4]
    write_sweep(cells, tmp_path)
    assert {"sweep.html", "sweep.md", "sweep.json", "throughput.png"} <= {path.name for path in tmp_path.iterdir()}
    page, value = (tmp_path / "sweep.html").read_text(), json.loads((tmp_path / "sweep.json").read_text())
    assert "failed with status 2" in page and 'href="batch-size=1/bench.html"' in page
    assert [len(item["rows"]) for item in value["cells"]] == [2, 2, 0]
