"""Hostfiles, Slurm variables, node lists, and launch commands."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path

import pytest

from firp_cli.distributed.cluster import expand_nodes, ranks_by_host, read_hostfile, slurm_ranks
from firp_cli.distributed.launch import launch_command, ranks_wanted
from firp_cli.errors import ClusterError

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# the fast ones\nnode-2 slots=8\n\nnode-1   slots=4  # half of it\n")
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_read_hostfile_keeps_the_order(hostfile: Path) -> None:
    assert list(read_hostfile(hostfile).items()) == [("node-2", 8), ("node-1", 4)]
    assert ranks_by_host(hostfile, None) == {"node-2": 8, "node-1": 4}
    assert ranks_by_host(hostfile, 3) == {"node-2": 3, "node-1": 3}
    assert ranks_wanted(None, hostfile) == (12, 8) and ranks_wanted(3, hostfile) == (6, 3)
    assert ranks_wanted(4, None) == (4, 4) and ranks_wanted(None, None) == (1, 1)
    with pytest.raises(ClusterError, match="--gpus 5: node-1 has 4 slots"):
        ranks_by_host(hostfile, 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node-1\n", r"hosts:1: 'node-1' is not of the form `HOST slots=N`"),
        ("node-1 slots=4\nnode-2 slots = 4\n", r"hosts:2: .* is not of the form"),
        ("node-1 slots=4\nnode-2 slots=0\n", r"hosts:2: node-2 has no slot"),
        ("node-1 slots=4\n\nnode-1 slots=4\n", r"hosts:3: node-1 is listed twice \(first on line 1\)"),
        ("# nobody\n", "names no machine"),
        ("", "names no machine"),
    ],
)
def test_read_hostfile_names_the_wrong_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ClusterError, match=words):
        read_hostfile(tmp_path / "hosts")


def test_read_hostfile_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"no hostfile .*hosts: it has a line"):
        read_hostfile(tmp_path / "hosts")
    (tmp_path / "hosts").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClusterError, match=r"no hostfile .*decode"):
        read_hostfile(tmp_path / "hosts")


def test_slurm_ranks_of_an_srun_task() -> None:
    found = slurm_ranks(STEP)
    port = int(found.pop("MASTER_PORT"))
    assert found == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07"}
    assert 1024 < port < 32768
    assert int(slurm_ranks(STEP | {"SLURM_STEP_ID": "1"})["MASTER_PORT"]) != port  # two steps side by side
    assert slurm_ranks(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}).items() >= {
        ("MASTER_ADDR", "10.0.0.1"),
        ("MASTER_PORT", "29500"),
    }
    older = {re.sub("STEP_NUM_TASKS", "NTASKS", name).replace("_ID", "ID"): value for name, value in STEP.items()}
    assert slurm_ranks(older)["WORLD_SIZE"] == "8"


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": "0"},  # torchrun within the step
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_ID": str(0xFFFFFFFB)},  # the script of sbatch
        {"SLURM_STEP_ID": "batch"},
        {"SLURM_PTY_PORT": "4711"},  # srun --pty
    ],
)
def test_slurm_ranks_is_empty_without_a_group(changes: dict[str, str]) -> None:
    assert slurm_ranks(STEP | changes) == {}
    assert slurm_ranks({}) == {} and slurm_ranks({"SLURM_JOB_ID": "4711"}) == {}


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("head", ["head"]),
        ("gpu[01-03,7],head", ["gpu01", "gpu02", "gpu03", "gpu7", "head"]),
        ("a[1-2]b[8-9]-x", ["a1b8-x", "a1b9-x", "a2b8-x", "a2b9-x"]),
        ("n[099-101]", ["n099", "n100", "n101"]),
    ],
)
def test_expand_nodes(text: str, nodes: list[str]) -> None:
    assert expand_nodes(text) == nodes


@pytest.mark.parametrize("text", ["", "gpu[", "gpu[1-", "gpu[a-b]", ","])
def test_expand_nodes_refuses_other_text(text: str) -> None:
    with pytest.raises(ClusterError, match="set MASTER_ADDR to the first"):
        expand_nodes(text)


def devices(command: list[str]) -> dict[str, list[int]]:
    world = next(item for item in command if item.startswith("--world_info="))
    return json.loads(base64.urlsafe_b64decode(world.partition("=")[2]))


def test_launch_command_follows_the_hostfile(hostfile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command, environment = launch_command(3, None)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.launch"]
    assert devices(command) == {"localhost": [0, 1, 2]} and "--module" in command and "--no_local_rank" in command
    assert int(environment["OMP_NUM_THREADS"]) >= 1
    (tmp_path / "here").write_text("localhost slots=2\n")
    assert devices(launch_command(None, str(tmp_path / "here"))[0]) == {"localhost": [0, 1]}  # no ssh to ourselves
    assert devices(launch_command(1, str(tmp_path / "here"))[0]) == {"localhost": [0]}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match=r"pdsh.*torchrun or srun"):
        launch_command(None, str(hostfile))
    (tmp_path / "pdsh").write_text("#!/bin/sh\n")
    (tmp_path / "pdsh").chmod(0o755)
    command, _ = launch_command(4, str(hostfile))
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert {f"--hostfile={hostfile}", "--num_gpus=4", "--force_multi"} <= set(command)
    with pytest.raises(ClusterError, match="at least one device"):
        launch_command(0, None)


def test_launch_command_refuses_more_ranks_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ClusterError, match="--gpus 3: this machine shows 2 CUDA devices"):
        launch_command(3, None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert devices(launch_command(2, None)[0]) == {"localhost": [4, 6]}
