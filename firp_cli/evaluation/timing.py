"""Timing of calls on any device; on CUDA through graphs, as in decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from firp_cli.decoding.cuda_graphs import CudaCapture

Run = Callable[[], object]
PROMPT_TOKEN = 1  # token of timed sequences
BLOCK_SECONDS = 0.01  # least duration of one timing on a CPU
BLOCK_SECONDS_CUDA = 0.005
MOST_CALLS = 200  # in one timing
UNTIMED, UNTIMED_CUDA = 1, 3  # calls before the first timing; with graphs the second one captures a step


def milliseconds(run: Run, calls: int, device: torch.device, warm: int = 0) -> float:
    """Return the milliseconds of a call, averaged over `calls`, after `warm` uncounted ones that refill the caches."""
    for _ in range(warm):
        run()
    _wait(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return 1000 * (time.perf_counter() - began) / calls


def undisturbed(times: Sequence[float]) -> float:
    """Return the lower quartile: other load on the machine only adds to a time."""
    return float(np.quantile(np.asarray(times), 0.25))


def as_benched(times: Sequence[float]) -> float:
    """Return the time that a bench would report: the mean over medians of three repeats."""
    count = max(1, len(times) // 3)
    return float(np.mean([np.median(times[place::count]) for place in range(count)]))


def enough_calls(run: Run, device: torch.device) -> int:
    """Return the calls that fill a timing, from one call after a few uncounted ones."""
    cuda = device.type == "cuda"
    wanted, untimed = (BLOCK_SECONDS_CUDA, UNTIMED_CUDA) if cuda else (BLOCK_SECONDS, UNTIMED)
    return max(1, min(MOST_CALLS, round(1000 * wanted / max(1e-3, milliseconds(run, 1, device, warm=untimed)))))


def captured(run: Run, device: torch.device) -> Run:
    """Return `run` as a CUDA graph, on other devices unchanged; warmed up in both cases. Raises CaptureError."""
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
