"""Triton kernels without a device: interpreted in a process of their own, or compiled and not launched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.models import ROOT


def run_interpreted(*tests: str, nightly: bool = False) -> str:
    """Run tests (`FILE::CLASS`) of one tier in a process whose kernels are interpreted; return what it printed.

    Triton decides at its first import whether kernels are interpreted.
    """
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ["-v", "-x", "-p", "no:cacheprovider", "-m", "nightly" if nightly else "not nightly"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def compile_only(monkeypatch: pytest.MonkeyPatch, architecture: int, cache: Path, device: int) -> list[str]:
    """Compile kernels for an architecture from now on and launch none; return the growing list of compiled variants.

    `device`: a number that no other test uses, since Triton caches kernels by device.
    """
    import triton

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
