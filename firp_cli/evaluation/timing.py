"""Timing on any device: on CUDA through graphs, as decoding runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from firp_cli.decoding.cuda_graphs import CudaCapture

Run = Callable[[], object]
PROMPT_TOKEN = 1  # what timed sequences consist of
BLOCK_SECONDS = 0.01  # of one timing on a CPU, at least
BLOCK_SECONDS_CUDA = 0.005
MOST_CALLS = 200  # of one timing
UNTIMED = 3  # calls before the first timing


def milliseconds(run: Run, calls: int, device: torch.device, warm: int = 0) -> float:
    """Milliseconds of one call, averaged over `calls` of them, behind `warm` uncounted ones: what ran before has taken
    the caches.
    """
    for _ in range(warm):
        run()
    _wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return 1000 * (time.perf_counter() - began) / calls


def undisturbed(times: Sequence[float]) -> float:
    """The lower quartile: others on the machine only ever add to a time."""
    return float(np.quantile(np.asarray(times), 0.25))


def as_benched(times: Sequence[float]) -> float:
    """What a bench makes of such times: the mean over medians of three repeats."""
    count = max(1, len(times) // 3)
    return float(np.mean([np.median(times[place::count]) for place in range(count)]))


def enough_calls(run: Run, device: torch.device) -> int:
    """Calls that fill a timing. Runs it a few times: a step of an engine with graphs is captured in the second."""
    wanted = BLOCK_SECONDS_CUDA if device.type == "cuda" else BLOCK_SECONDS
    return max(1, min(MOST_CALLS, round(1000 * wanted / max(1e-3, milliseconds(run, 1, device, warm=UNTIMED)))))


def captured(run: Run, device: torch.device) -> Run:
    """The run as a graph on CUDA devices; elsewhere itself. Warmed up in both cases. Raises CaptureError."""
    run()
    if device.type != "cuda":
        return run
    run()

    def step() -> None:
        run()

    return CudaCapture(device)(step)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
