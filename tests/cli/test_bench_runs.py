"""`firp bench` in several processes, and over a matrix of settings; `firp compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from firp_cli.cli import bench_runs
from firp_cli.errors import INTERRUPTED, UsageError
from helpers.commands import invoke

FAST = ["--dataset", "arithmetic", "--limit", "8", "--repeats", "1", "--max-new-tokens", "8", "--methods", "ar,firp"]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Run children in this process, which has loaded torch; return their arguments."""
    calls: list[list[str]] = []

    def run(arguments: list[str]) -> int:
        calls.append(list(arguments))
        monkeypatch.setattr("sys.argv", ["__main__.py", *arguments])
        return invoke(*arguments).exit_code

    monkeypatch.setattr(bench_runs, "run_child", run)
    return calls


def test_bench_in_two_processes_pools_their_repeats(tmp_path: Path, in_process: list[list[str]]) -> None:
    result = invoke("bench", *FAST, "--processes", "2", "--output", str(tmp_path / "out"))
    assert result.exit_code == 0, (result.output, result.exception)
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    rows = {row["method"]: row for row in report["rows"]}
    assert report["settings"]["processes"] == 2 and len(rows["firp"]["speedup_by_process"]) == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert {line["process"] for line in lines} == {0, 1} and len(lines) == 2 * 2 * 8
    assert all("--processes" not in " ".join(call) for call in in_process)


def test_matrix_is_measured_once_and_resumed(tmp_path: Path, in_process: list[list[str]]) -> None:
    out = tmp_path / "out"
    command = ["bench", *FAST, "--batch-size", "1,4", "--tree", "chain,dynamic:4", "--output", str(out)]
    result = invoke(*command)
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(in_process) == 4 and "sweep.html" in result.stdout
    value = json.loads((out / "sweep.json").read_text())
    assert [cell["values"] for cell in value["cells"]][1] == {"--batch-size": "1", "--tree": "dynamic:4"}
    assert {row["batch_size"] for row in value["cells"][2]["rows"]} == {4}
    refused = invoke(*command)
    assert isinstance(refused.exception, UsageError) and "--resume goes on" in str(refused.exception)
    (out / "batch-size=4,tree=chain" / "bench.json").unlink()
    assert invoke(*command, "--resume").exit_code == 0
    assert len(in_process) == 5 and "--tree=chain" in in_process[4]
    changed = ["bench", *FAST, "--batch-size", "1,4", "--tree", "chain,dynamic:4", "--seed", "5", "--output", str(out)]
    assert invoke(*changed, "--resume").exit_code == 0
    assert len(in_process) == 9, "cells of another command are measured again"


def test_interrupted_matrix_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_runs, "run_child", lambda _: INTERRUPTED)
    result = invoke("bench", *FAST, "--batch-size", "1,2", "--output", str(tmp_path / "out"))
    assert result.exit_code == INTERRUPTED and "--resume goes on" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "1,x"], "--batch-size takes whole numbers, not 'x'"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--temperature", "0,hot"], "--temperature takes numbers, not 'hot'"),
        (["--max-new-tokens", "64,1"], "one new token comes from prefill"),
        (["--resume"], "--resume goes on with a matrix of settings in --output"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_loaded(options: list[str], message: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("firp_cli.api.bench_run.bench", lambda *_, **__: pytest.fail("the bench began"))
    result = invoke("bench", "--dataset", "arithmetic", *options)
    assert isinstance(result.exception, UsageError) and message in str(result.exception)


def test_compare_prints_pairs_and_refuses_other_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert invoke("bench", *FAST, "--output", str(tmp_path / name)).exit_code == 0
    result = invoke("compare", str(tmp_path / "a"), str(tmp_path / "b"))
    assert result.exit_code == 0 and "arithmetic (8)" in result.stdout and "same" in result.stdout
    value = json.loads(invoke("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json").stdout)
    assert value["schema"] == "firp.compare/1" and {item["pairs"] for item in value["comparisons"]} == {8}
    assert isinstance(invoke("compare", str(tmp_path / "a"), str(tmp_path)).exception, UsageError)
