"""Environment of a measurement: clocks, driver and load, from a stand-in of nvidia-smi and of the system's files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from firp_cli.evaluation.environment import device_state, measurement_environment, read_gpu
from firp_cli.machine import processor_state, query_gpus
from helpers.models import tiny_teacher

ANSWER = "550.54.15, 1980, 1980, 2619, 2619, 700.00, 121.53, 34"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File with the answer of the nvidia-smi on PATH, which writes its arguments to `asked` beside it."""
    script, answer = tmp_path / "nvidia-smi", tmp_path / "answer"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n[ -f {answer} ] || exit 9\ncat {answer}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    answer.write_text(ANSWER + "\n")
    return answer


def test_device_state_is_read_from_nvidia_smi(smi: Path) -> None:
    assert read_gpu("GPU-1a2b") == {
        "driver": "550.54.15",
        "sm_megahertz": 1980.0,
        "sm_megahertz_max": 1980.0,
        "memory_megahertz": 2619.0,
        "memory_megahertz_max": 2619.0,
        "power_limit_watts": 700.0,
        "power_watts": 121.5,
        "temperature_celsius": 34.0,
    }
    asked = (smi.parent / "asked").read_text()
    assert "--id=GPU-1a2b" in asked and "nounits" in asked and "driver_version,clocks.sm" in asked


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "550.54.15, [N/A], [Not Supported], N/A, [N/A], [N/A], [N/A], 34",
            {"driver": "550.54.15", "temperature_celsius": 34},
        ),
        ("NVIDIA-SMI has failed because it could not communicate with the driver", {}),
        ("", {}),
    ],
)
def test_values_that_nvidia_smi_does_not_tell_are_left_out(smi: Path, answer: str, expected: dict[str, object]) -> None:
    smi.write_text(answer + "\n")
    assert read_gpu("0") == expected


def test_nvidia_smi_that_fails_hangs_or_is_missing_leaves_all_out(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.unlink()
    assert read_gpu("0") == {}
    (smi.parent / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr("firp_cli.machine.SMI_SECONDS", 0.2)
    assert query_gpus(["driver_version"]) == []
    monkeypatch.setenv("PATH", "")
    assert query_gpus(["driver_version"]) == []


def test_processor_state_reads_governor_and_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the cores that this process may use; a file that is missing or no number is left out."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2}, raising=False)
    for core, (governor, clock) in enumerate([("powersave", "800000"), ("performance", "3000000"), ("schedutil", "x")]):
        folder = tmp_path / f"cpu{core}" / "cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_governor").write_text(governor + "\n")
        (folder / "scaling_cur_freq").write_text(clock + "\n")
    assert processor_state(tmp_path) == {"governor": "performance, schedutil", "megahertz": 3000}
    missing, info = tmp_path / "missing", tmp_path / "info"
    info.write_text("model name\t: x\ncpu MHz\t\t: 2400.5\n\ncpu MHz\t\t: 2600.5\n")
    assert processor_state(missing, missing) == {} and processor_state(missing, info) == {"megahertz": 2500}
    assert processor_state(tmp_path, info)["megahertz"] == 3000


def test_environment_of_a_cpu_has_load_and_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1.234, 0.5, 0.25))
    values = measurement_environment(tiny_teacher("llama"))
    assert values["load"] == [1.23, 0.5, 0.25]
    assert not {"driver", "nccl", "device_state", "devices"} & set(values)
    assert device_state(torch.device("cpu")) == {}


def test_environment_of_a_cuda_device_names_driver_and_clocks(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid = "1a2b"

    class Stack:
        name = "lean"

    class OnDevice:
        device, stack = torch.device("cuda", 1), Stack()

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 21, 5))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    values = measurement_environment(OnDevice())  # type: ignore[arg-type]
    assert (values["device_name"], values["devices"], values["driver"]) == ("NVIDIA H200", 8, "550.54.15")
    assert values["nccl"] == "2.21.5" and values["device_state"]["sm_megahertz"] == 1980
    assert "driver" not in values["device_state"] and "--id=GPU-1a2b" in (smi.parent / "asked").read_text()
    smi.unlink()
    values = measurement_environment(OnDevice())  # type: ignore[arg-type]
    assert values["device_name"] == "NVIDIA H200" and not {"driver", "device_state"} & set(values)
