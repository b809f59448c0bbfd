"""Task accuracy in the report of `firp bench`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from firp_cli.evaluation.run_code import sandbox_fault
from helpers.commands import succeed
from helpers.models import ROOT

FUNCTION = {
    "prompt": 'def root(number):\n    """Return the whole root."""\n',
    "canonical_solution": "    return int(number ** 0.5)\n",
    "test": "def check(candidate):\n    assert candidate(16) == 4\n",
    "entry_point": "root",
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, Any]]:
    """Return reports of the same bench without and with --run-code."""
    folder = tmp_path_factory.mktemp("accuracy")
    numbers = (ROOT / "data/datasets/arithmetic/test.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    wrong = json.loads(numbers[2]) | {"answer": "#### 1234"}
    (folder / "numbers.jsonl").write_text("\n".join([*numbers[:2], json.dumps(wrong)]) + "\n", encoding="utf-8")
    (folder / "code.jsonl").write_text(json.dumps(FUNCTION) + "\n", encoding="utf-8")
    made = {}
    for run_code in (False, True):
        output = folder / f"report-{run_code}"
        options = ["--methods", "ar", "--repeats", "1", "--max-new-tokens", "128", "--output", output]
        datasets = f"{folder / 'numbers.jsonl'},{folder / 'code.jsonl'}"
        succeed("bench", "--dataset", datasets, *options, *(["--run-code"] if run_code else []))
        made[run_code] = json.loads((output / "bench.json").read_text(encoding="utf-8"))
    return made


def accuracies(report: dict[str, Any]) -> dict[str, Any]:
    return {row["dataset"]: row["accuracy"] for row in report["rows"]}


def test_bench_reports_the_share_of_right_numbers(reports: dict[bool, dict[str, Any]]) -> None:
    for report in reports.values():
        found = accuracies(report)
        assert (found["numbers"]["right"], found["numbers"]["judged"]) == (2, 3)
        assert found["numbers"]["interval"] == pytest.approx([0.2077, 0.9385], abs=1e-4)
        assert found["all"] is None, "data sets are judged in different ways"


def test_bench_runs_code_only_when_asked(reports: dict[bool, dict[str, Any]]) -> None:
    waiting = "accuracy on code: --run-code runs the tests on the answers' code"
    assert not reports[False]["settings"]["run_code"] and waiting in reports[False]["warnings"]
    assert accuracies(reports[False])["code"] == {"right": 0, "judged": 0, "interval": None}
    assert reports[True]["settings"]["run_code"] and waiting not in reports[True]["warnings"]
    if fault := sandbox_fault():
        assert any(fault in text for text in reports[True]["warnings"])
        pytest.skip(fault)
    found = accuracies(reports[True])["code"]
    assert (found["right"], found["judged"]) == (0, 1)
