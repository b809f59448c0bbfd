"""Tables, figures and page of the papers' analyses."""

from __future__ import annotations

import io
import json
import math

from rich.console import Console

from firp_cli.reports import analyses
from firp_cli.reports.analysis_figures import analysis_figures
from firp_cli.results import Analysis, EvalReport, Panel, StepQuality, as_json
from helpers.reports import PNG, Page

TABLE = Analysis(
    "heads",
    ["drafter", "hits", "step 1", "step 2", "chain"],
    [["a [b]", "top-1", 0.51234, None, 1.5], ["c", "top-1", 1.0, math.nan, 2.25]],
    reading="c <is> longest",
    note="on equal data",
    panels=[Panel("step", "top-1", {"a [b]": [(1, 0.5), (2, 0.4)], "c": [(1, 1.0)]})],
)
MISSING = Analysis("attention", reason="a medusa predictor has no pseudo states")


def report(*found: Analysis) -> EvalReport:
    steps = [StepQuality(1, 0.5, 0.75, 1.0, 100)]
    return EvalReport(
        {"argv": ["firp", "eval"]}, {"name": "tiny"}, {}, {}, steps, 1.5, 1.7, "chain", {}, analyses=[*found]
    )


def test_terminal_shows_steps_as_one_column_and_the_reason_of_a_missing_analysis() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    for item in (TABLE, MISSING):
        console.print(analyses.analysis_table(item))
    text = console.export_text()
    assert "0.512     –" in text and "a [b]" in text and "steps 1 to 2" in text
    assert "C <is> longest." in text and "On equal data." in text and "not measured: a medusa predictor" in text


def test_page_has_tables_figures_and_reasons() -> None:
    figures = analysis_figures([TABLE, MISSING])
    assert list(figures) == ["analysis-heads"] and figures["analysis-heads"].png.startswith(PNG)
    text = analyses.eval_html(report(TABLE, MISSING), figures)
    assert "Against Medusa and early-exit heads." in Page(text).figures
    assert "C &lt;is&gt; longest." in text and "<td>0.512</td><td>–</td>" in text and "On equal data." in text
    assert "Not measured: a medusa predictor has no pseudo states." in text
    assert "<h2>" in text and "heads" not in analyses.eval_html(report(), {})


def test_json_has_no_nan() -> None:
    written = json.loads(json.dumps(as_json(report(TABLE)), allow_nan=False))
    assert written["analyses"][0]["rows"][1] == ["c", "top-1", 1.0, None, 2.25]
    assert written["analyses"][0]["panels"][0]["lines"]["c"] == [[1, 1.0]]


def test_panels_without_points_have_no_figure() -> None:
    assert analysis_figures([Analysis("rows", panels=[Panel("x", "y", {"a": []})])]) == {}
    doubling = Analysis("rows", panels=[Panel("rows", "ratio", {"t": [(1, 1.0), (64, 5.0)]}, doubling=True)])
    assert list(analysis_figures([doubling])) == ["analysis-rows"]
