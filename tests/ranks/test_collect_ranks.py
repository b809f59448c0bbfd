"""`firp collect` on several ranks, started by firp, torchrun and srun: signals, kills, resuming."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from firp_cli.store.reader import Store
from helpers.faults import check_store, collecting, make_place, shard_bytes
from helpers.models import ROOT
from helpers.rank_pool import RankPool

CONVERSATIONS = 500
INTERRUPTED = 130
PROMPT_SECONDS = 20.0  # also where the machine is busy


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("ranks"), CONVERSATIONS)


@pytest.fixture(scope="module")
def reference(ranks: RankPool, place: Path) -> dict[str, bytes]:
    assert ranks.run(collecting(place, place / "store"), 1, place / "log") == [0], (place / "log").read_text()
    found = shard_bytes(place / "store")
    assert len(found) > 35
    return found


def shards(folder: Path) -> int:
    return len(list(folder.glob("shard-*.safetensors")))


def entered(folder: Path) -> set[str]:
    return {shard["file"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]}


@pytest.mark.parametrize(("count", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_interrupted_collect_keeps_whole_shards(
    ranks: RankPool, place: Path, reference: dict[str, bytes], tmp_path: Path, count: int, number: signal.Signals
) -> None:
    folder = tmp_path / "store"
    group = ranks.start(collecting(place, folder), count, tmp_path / "log")
    until(lambda: shards(folder) >= 6)
    began = time.monotonic()
    for pid in group.pids:  # as a terminal and a scheduler do
        with contextlib.suppress(ProcessLookupError):  # the others' end may have come first
            os.kill(pid, number)
    codes = group.wait()
    assert time.monotonic() - began < PROMPT_SECONDS
    printed = (tmp_path / "log").read_text()
    assert codes == [INTERRUPTED] * count, printed
    assert printed.count("--resume goes on") == 1 and "Traceback" not in printed
    kept = check_store(folder, reference)
    assert 6 <= kept < len(reference)
    if count == 1:
        assert entered(folder) == set(shard_bytes(folder))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*.safetensors")}
    assert ranks.run([*collecting(place, folder), "--resume"], 3 - count, tmp_path / "log") == [0] * (3 - count)
    assert shard_bytes(folder) == reference
    assert before == {path: path.stat().st_mtime_ns for path in before}  # written once


def test_collect_with_srun(ranks: RankPool, place: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    command = [*collecting(place, tmp_path / "store"), "--json"]
    assert ranks.run(command, 2, tmp_path / "log", slurm=1) == [0, 0], (tmp_path / "log").read_text()
    assert shard_bytes(tmp_path / "store") == reference
    summary = json.loads(re.sub(r"^teacher: .*\n", "", (tmp_path / "log").read_text()))  # one object
    assert summary["ranks"] == 2 and sum(summary["rank_tokens"]) == summary["tokens"]
    assert max(summary["rank_tokens"]) < 1.05 * min(summary["rank_tokens"])


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["--dataset", "absent.jsonl"], 2, "no such file: absent.jsonl"),
        (["data.limt=3"], 2, "did you mean 'limit'"),
        (["--layers", "99"], 2, "can be collected"),
        (["--output", "STORE"], 1, "already holds a complete store"),
    ],
)
def test_error_of_all_ranks_is_printed_once(
    ranks: RankPool, place: Path, reference: dict[str, bytes], tmp_path: Path, change: list[str], code: int, words: str
) -> None:
    change = [str(place / "store") if item == "STORE" else item for item in change]
    command = collecting(place, tmp_path / "store")
    if change[0] in command:  # an option that is given once
        start = command.index(change[0])
        command[start : start + 2] = []
    codes = ranks.run([*command, *change], 2, tmp_path / "log", slurm=1)
    printed = (tmp_path / "log").read_text()
    assert codes[0] == code and codes[1] != 0
    assert printed.count("firp:") == 1 and words in printed and len(printed.splitlines()) <= 2, printed
    assert not (tmp_path / "store").exists()


def test_estimate_counts_the_ranks_and_starts_none(ranks: RankPool, place: Path, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("one slots=4\ntwo slots=2\n")
    for asked, count in ((["--gpus", "2"], 2), (["--hostfile", str(tmp_path / "hosts")], 6)):
        log = tmp_path / f"log-{count}"
        command = [*collecting(place, tmp_path / "store"), *asked, "--estimate"]
        assert ranks.run([*command, "--json"], 1, log) == [0], log.read_text()
        found = json.loads(re.sub(r"^teacher: .*\n", "", log.read_text()))
        assert found["ranks"] == count
        assert found["tokens_per_second"] == pytest.approx(count * found["rank_tokens_per_second"])
        assert found["seconds"] == pytest.approx(found["tokens"] / found["tokens_per_second"])
    assert ranks.run(command, 1, tmp_path / "log") == [0]
    printed = " ".join((tmp_path / "log").read_text().split())
    assert "measured on a sample, times 6 ranks: an estimate" in printed and "nothing was started" in printed
    assert not (tmp_path / "store").exists()


def environment() -> dict[str, str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "WORLD"))}
    return outside | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def until(reached: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`firp` in a process of its own; what it and its ranks print goes to `log`."""
    command = [sys.executable, "-m", "firp_cli", *arguments]
    with log.open("wb") as stream:
        return subprocess.Popen(command, env=environment(), stdout=stream, stderr=subprocess.STDOUT)


def launched_rank(launching: int, number: int) -> psutil.Process:
    for process in psutil.Process(launching).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(number):
                return process
    raise AssertionError(f"no rank {number}")


def test_launched_collect_survives_a_signal(
    ranks: RankPool, place: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    """The real launcher: SIGTERM to the launching process, then another number of ranks."""
    folder, log = tmp_path / "store", tmp_path / "log"
    process = start([*collecting(place, folder), "--gpus", "2"], log)
    until(lambda: shards(folder) >= 4)
    began = time.monotonic()
    process.terminate()
    assert process.wait() == INTERRUPTED, log.read_text()
    assert time.monotonic() - began < PROMPT_SECONDS
    printed = log.read_text()
    assert printed.count("--resume goes on") == 1 and "Traceback" not in printed and "Error" not in printed
    assert 4 <= check_store(folder, reference) < len(reference)
    assert ranks.run([*collecting(place, folder), "--resume"], 3, log) == [0, 0, 0]
    assert shard_bytes(folder) == reference
    assert len(Store.open(folder, verify=True)) == CONVERSATIONS


@pytest.mark.nightly
def test_launched_collect_survives_a_killed_rank(
    ranks: RankPool, place: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    """The launcher with a hostfile: kill -9 of a rank, then another number of ranks."""
    folder, log = tmp_path / "store", tmp_path / "log"
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    process = start([*collecting(place, folder), "--hostfile", str(tmp_path / "hosts")], log)
    until(lambda: shards(folder) >= 4)
    began = time.monotonic()
    launched_rank(process.pid, 1).kill()
    assert process.wait() == 1, log.read_text()
    assert time.monotonic() - began < PROMPT_SECONDS
    printed = log.read_text()
    assert re.search(r"firp: rank 1 (was killed|ended without a message).*run again with --resume", printed), printed
    assert printed.count("firp:") == 1 and "Traceback" not in printed
    assert 4 <= check_store(folder, reference) < len(reference)
    assert ranks.run([*collecting(place, folder), "--resume"], 3, log) == [0, 0, 0]
    assert shard_bytes(folder) == reference
    assert len(Store.open(folder, verify=True)) == CONVERSATIONS


@pytest.mark.nightly
def test_collect_with_torchrun_prints_one_summary(place: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "firp_cli", *collecting(place, tmp_path / "store"), "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["ranks"] == 2 and summary["shards"] == len(reference)
    assert shard_bytes(tmp_path / "store") == reference


def test_odd_rows_of_all_ranks_are_told_once(ranks: RankPool, place: Path, tmp_path: Path) -> None:
    good = {"question": "2+3?", "answer": "5"}
    rows = [
        good,
        {"question": ""},
        *[good] * 6,
        {"question": "2?", "answer": " "},
        {"question": "1+1? " * 99, "answer": "2"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for count in (1, 2):
        command = [*collecting(place, tmp_path / str(count), path), "data.max_length=64"]
        log = tmp_path / f"log-{count}"
        assert ranks.run(command, count, log) == [0] * count, log.read_text()
        found.append([line for line in log.read_text().splitlines() if "skipped" in line and "of 10" in line])
    assert len(found[0]) == 1 and found[0] == found[1]
    for part in (
        "1 with an empty user turn (first: row 2)",
        "with no answer (first: row 9)",
        "max_length (first: row 10)",
    ):
        assert part in found[0][0]
    assert shard_bytes(tmp_path / "1") == shard_bytes(tmp_path / "2")
