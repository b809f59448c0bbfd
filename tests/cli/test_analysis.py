"""`firp eval --analysis` on the embedded teacher: tables, figures, JSON and page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from firp_cli.results import ANALYSES
from firp_cli.tuning import cost
from helpers.commands import invoke, succeed
from helpers.reports import Page


def test_eval_analyses_print_and_write_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "ROUNDS", 2)
    out = tmp_path / "eval"
    options = ["--dataset", "arithmetic", "--limit", "6", "--analysis", "all", "--against", "medusa"]
    done = succeed("eval", "firp", *options, "--output", out)
    report = json.loads((out / "eval.json").read_text())
    assert [item["name"] for item in report["analyses"]] == list(ANALYSES)
    images = {path.name for path in out.glob("*.png")}
    page = (out / "eval.html").read_text()
    for item in report["analyses"]:
        assert item["reason"] is None and item["reading"] and item["note"]
        assert all(len(row) == len(item["headers"]) for row in item["rows"])
        assert f"analysis-{item['name']}.png" in images and f"({item['name']})" in done.stdout
    assert len(Page(page).figures) == len(images) - 1  # the heat map of cosines is a table there
    found = {item["name"]: item for item in report["analyses"]}
    assert "medusa (against)" in [row[0] for row in found["heads"]["rows"]]
    cosines = {row[1]: row[2:] for row in found["similarity"]["rows"] if row[0] == "cosine"}
    for layer, values in report["similarity"].items():
        assert cosines[int(layer)] == pytest.approx(values)
    assert "medusa (against)" in page and found["rows"]["reading"][1:] in page


def test_eval_refuses_unknown_analyses_before_it_loads_a_teacher() -> None:
    error = invoke("eval", "firp", "--teacher", "no/such", "--analysis", "row").exception
    assert "no analysis 'row'; did you mean 'rows'?" in str(error) and error.exit_code == 2  # type: ignore[union-attr]
    error = invoke("eval", "firp", "--analysis", "rows", "--against", "medusa").exception
    assert "--against is for the analysis heads" in str(error)


def test_eval_names_the_reason_of_a_missing_analysis(tmp_path: Path) -> None:
    options = ["--dataset", "arithmetic", "--limit", "2", "--analysis", "attention"]
    done = succeed("eval", "medusa", *options, "--output", tmp_path / "eval")
    assert "not measured: a medusa predictor has no pseudo states" in done.stdout
    assert "Not measured: a medusa predictor" in (tmp_path / "eval" / "eval.html").read_text()
