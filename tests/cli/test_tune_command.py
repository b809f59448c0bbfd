"""`firp tune`: writes trees and a report; generate and bench use the trees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from firp_cli.errors import OutputError
from helpers.commands import PROMPT, firp, invoke, succeed

SHORT = ["--batch-sizes", "1,2", "--limit", "8", "--max-new-tokens", "24", "--max-rows", "8", "--repeats", "1"]
SHORT += ["--timing-rounds", "1"]
THREADS = ["--threads", "1"]  # trees are kept by machine and threads


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Restore torch's threads, which `--threads` sets for this process too."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tree.json`, the report in `report`, and what was printed in `printed`."""
    folder = tmp_path_factory.mktemp("tuned")
    where = ["--tree-file", str(folder / "tree.json"), "--output", str(folder / "report")]
    done = firp("tune", "firp", *SHORT, *THREADS, *where, cwd=folder, FIRP_CACHE_DIR=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    (folder / "printed").write_text(done.stdout + done.stderr)
    return folder


def test_tune_writes_trees_and_a_report(tuned: Path) -> None:
    trees = json.loads((tuned / "tree.json").read_text())
    assert [entry["batch_size"] for entry in trees["entries"]] == [1, 2]
    assert trees["tree"] == "chain"  # the default, for other machines, is the predictor's own
    report = {path.name for path in (tuned / "report").iterdir()}
    assert {"tune.json", "tune.md", "tune.html", "cost.png", "nodes.png", "batch.png", "acceptance.png"} <= report
    written = json.loads((tuned / "report" / "tune.json").read_text())
    assert written["schema"] == "firp.tune/1" and written["environment"]["argv"][1] == "tune"
    assert written["cost"]["curves"] and written["ladder"] and written["batches"]
    printed = (tuned / "printed").read_text()
    assert "calibration: " in printed and "cost of passes: " in printed and "tree.json" in printed


def test_costs_are_measured_once_for_a_machine(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRP_CACHE_DIR", str(tuned / "cache"))
    where = ["--tree-file", tuned / "again.json", "--output", tuned / "again"]
    done = succeed("tune", "firp", *SHORT, *THREADS, *where, "--no-trial")
    assert "kept from an earlier run" in done.stderr
    written = json.loads((tuned / "again" / "tune.json").read_text())
    assert all(trial["measured"] is None for trial in written["ladder"])


def test_trees_that_cannot_be_written_are_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of costs cannot be written either, which is only noted."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("firp_cli.tuning.cost.saved_cost", lambda *_: Path("/proc/none/costs/x.json"))
    monkeypatch.setattr("firp_cli.api.tune_run.write_json", full)
    given = ["--batch-sizes", "1", "--limit", "4", "--max-new-tokens", "8", "--max-rows", "4", "--no-trial", *THREADS]
    where = ["--tree-file", tmp_path / "tree.json", "--output", tmp_path / "report"]
    done = invoke("tune", "firp", *given, "--timing-rounds", 1, *where)
    assert isinstance(done.exception, OutputError) and done.exception.exit_code == 1
    assert str(done.exception).endswith(
        "tree.json cannot be written (No space left on device): the trees are only in the report"
    )
    assert "/proc/none/costs cannot be written (No such file or directory): the next tuning" in done.stderr
    entries = json.loads((tmp_path / "report" / "tune.json").read_text())["entries"]
    assert [entry["batch_size"] for entry in entries] == [1] and entries[0]["tree"]
    assert "break-even" in done.stdout and "trees: " not in done.stdout and not (tmp_path / "tree.json").exists()


def test_generate_uses_tuned_trees(tuned: Path) -> None:
    done = succeed("generate", "firp", "--tree", tuned / "tree.json", "--prompt", PROMPT)
    assert done.stdout == succeed("generate", "--method", "ar", "--prompt", PROMPT).stdout


def test_bench_reports_the_prediction_of_a_tuned_tree(tuned: Path) -> None:
    options = ["--dataset", "arithmetic", "--limit", "2", "--repeats", "1", "--max-new-tokens", "24"]
    where = ["--tree", tuned / "tree.json", "--output", tuned / "bench"]
    done = succeed("bench", "firp", *options, *THREADS, *where, "--methods", "ar,firp")
    entry = json.loads((tuned / "tree.json").read_text())["entries"][0]
    report = json.loads((tuned / "bench" / "bench.json").read_text())
    row = next(row for row in report["rows"] if row["method"] == "firp")
    assert row["tree"] == entry["tree"]
    if entry["tree"] != "none":
        assert row["predicted"] == entry["predicted"]
        assert "predicted" in done.stdout


def test_tree_of_another_machine_is_not_used(tuned: Path) -> None:
    trees = json.loads((tuned / "tree.json").read_text())
    for entry in trees["entries"]:
        entry["machine"]["device"] = "another machine"
    (tuned / "other.json").write_text(json.dumps(trees))
    done = succeed("generate", "firp", "--tree", tuned / "other.json", "--prompt", PROMPT)
    assert "firp tune" in done.stderr
