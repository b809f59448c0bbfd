"""What tests of Triton kernels share where there is no device: kernels interpreted in a process of their own, and a
driver that compiles kernels and launches nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton

from helpers.models import ROOT


def run_interpreted(tests: str) -> None:
    """Run tests (`FILE::CLASS`) in a process whose kernels are interpreted. Triton decides at its first import."""
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--noconftest", tests]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def compile_only(monkeypatch: pytest.MonkeyPatch, architecture: int, cache: Path, device: int) -> list[str]:
    """From now on kernels are compiled for an architecture and not launched; returns the list of their names, one for
    each variant. `device`: a number of its own for each test, for kernels are kept by device.
    """
    loaded: list[str] = []

    def load(name: str, binary: bytes, shared: int, number: int) -> tuple[int, int, int, int, int]:
        loaded.append(name)
        return 0, 0, 0, 0, 1024

    target = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 99 * 1024}, load_binary=load)
    driver = SimpleNamespace(
        utils=target,
        launcher_cls=lambda *_: lambda *_: None,
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", architecture, 32),
        get_current_device=lambda: device,
        get_current_stream=lambda _: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    return loaded
