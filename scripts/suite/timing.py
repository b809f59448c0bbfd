"""Times by CUDA events, or by the clock on a CPU: medians over rounds."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from firp_cli.evaluation.timing import captured

Run = Callable[[], object]
ROUND_SECONDS = 0.02  # least duration of one round
MOST_CALLS = 200


def wait(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Run, device: torch.device, rounds: int) -> float:
    """Return milliseconds of a call: the median over rounds that fill ROUND_SECONDS, after two uncounted calls."""
    run()
    one = _round(run, 1, device)
    calls = max(1, min(MOST_CALLS, round(1000 * ROUND_SECONDS / max(one, 1e-3))))
    return median(_round(run, calls, device) for _ in range(rounds))


def graphed(run: Run, device: torch.device) -> tuple[Run, bool]:
    """Return the call as a CUDA graph, and True if it could be captured; on other devices the call itself."""
    graph = captured(run, device)
    return graph, graph is not run


def _round(run: Run, calls: int, device: torch.device) -> float:
    wait(device)
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(calls):
            run()
        return 1000 * (time.perf_counter() - began) / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls
