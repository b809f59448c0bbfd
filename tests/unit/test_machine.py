"""Threads of a command, and the layers that it chooses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from firp_cli import machine
from firp_cli.api.loading import LayerBackend
from firp_cli.errors import UsageError
from firp_cli.machine import _cpu_quota, cores_of_rank, set_threads, usable_cores

V1 = {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}
QUOTAS: dict[str, tuple[dict[str, str], float | None]] = {
    "v2": ({"cpu.max": "150000 100000\n"}, 1.5),
    "v2-unlimited": ({"cpu.max": "max 100000\n"}, None),
    "v2-before-v1": ({"cpu.max": "max 100000\n", **V1}, None),
    "v1": (V1, 2.5),
    "v1-unlimited": (V1 | {"cpu/cpu.cfs_quota_us": "-1\n"}, None),
    "v1-half": ({"cpu/cpu.cfs_quota_us": "250000\n"}, None),
    "none": ({}, None),
    "nonsense": ({"cpu.max": "many\n"}, None),
}


def write_group(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="ascii")


@pytest.mark.parametrize("case", list(QUOTAS))
def test_cpu_quota_of_control_group(case: str, tmp_path: Path) -> None:
    files, expected = QUOTAS[case]
    write_group(tmp_path, files)
    assert _cpu_quota(tmp_path) == expected


def on_machine(monkeypatch: pytest.MonkeyPatch, cores: int | None, affinity: int | None) -> None:
    """Simulate a machine with so many cores; `affinity` None: a system that does not report it."""
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    if affinity is None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)


@pytest.mark.parametrize(
    ("cores", "affinity", "limit", "expected"),
    [
        (8, 6, None, 6),
        (8, None, None, 8),
        (None, None, None, 1),
        (8, 6, "max 100000", 6),
        (8, 6, "150000 100000", 2),
        (8, None, "300000 100000", 3),
        (8, 6, "700000 100000", 6),
        (8, 6, "0 100000", 1),
    ],
)
def test_usable_cores_is_minimum_of_affinity_and_quota(
    cores: int | None,
    affinity: int | None,
    limit: str | None,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The result is the minimum of affinity and quota; a part of a core counts as one."""
    write_group(tmp_path, {"cpu.max": limit} if limit else {})
    on_machine(monkeypatch, cores, affinity)
    assert usable_cores(tmp_path) == expected


def test_cores_of_rank_honours_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 5)
    assert [cores_of_rank(ranks) for ranks in (1, 2, 8)] == [5, 2, 1]


def test_usable_cores_of_this_machine() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("asked", "variable", "cores", "expected"),
    [
        (3, None, 2, 3),
        (3, "1", 2, 3),
        (None, "1", 2, 4),  # torch has read the variable itself, at import
        (None, None, 2, 2),
        (None, None, 16, 4),
    ],
)
def test_set_threads_honours_environment(
    asked: int | None,
    variable: str | None,
    cores: int,
    expected: int,
    four_threads: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number is the argument, else OMP_NUM_THREADS, else the minimum of torch's count and the usable cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    set_threads(asked)
    assert torch.get_num_threads() == expected


@pytest.mark.parametrize(
    ("layers", "compiled", "message"),
    [
        ("leam", False, "unknown backend 'leam'; did you mean 'lean'?"),
        ("", False, "unknown backend ''; known: lean, library"),
        ("librari", True, "unknown backend 'librari'; did you mean 'library'?"),
        ("library", True, "--compile is for the lean layers: leave --backend library out"),
    ],
)
def test_impossible_layers_are_refused(layers: str, compiled: bool, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        LayerBackend(layers, compiled)
    assert str(refused.value) == message


def test_layers_that_can_be() -> None:
    assert LayerBackend() == LayerBackend("lean", False)
    assert LayerBackend("library").name == "library" and LayerBackend("lean", True).compiled
