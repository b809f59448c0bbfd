"""Ctrl-C, SIGTERM and a closed terminal: raised in a block of code, or passed on to a program."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from firp_cli.errors import INTERRUPTED

SAME_INTERRUPTION = 2.0  # seconds within which a repeated signal counts as the same one
IMPORT_POLL = 0.05  # seconds after which an import is looked at again


def end_process(code: int) -> None:
    """End the process without leaving the process group: other ranks may still wait in a collective."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_program(
    command: list[str], environment: dict[str, str] | None = None, stdout: int | None = None
) -> tuple[int, bool]:
    """Run a program in its own process group; return its exit code, and True if the user interrupted it.

    A signal is passed on as SIGTERM, unless within SAME_INTERRUPTION seconds of the last, and the end is awaited.
    """
    passed_on: list[float] = []
    process = subprocess.Popen(command, env=environment, stdout=stdout, start_new_session=True)

    def pass_on(*_: Any) -> None:
        now = time.monotonic()
        if not passed_on or now - passed_on[-1] > SAME_INTERRUPTION:
            passed_on.append(now)
            process.terminate()

    with handling_signals(pass_on):
        return process.wait(), bool(passed_on)


@contextlib.contextmanager
def handling_signals(handler: Callable[..., None]) -> Iterator[None]:
    """Call `handler(number, frame)` on Ctrl-C, SIGTERM and a closed terminal (unless nohup ignores it)."""
    previous = _handle_signals(handler)
    try:
        yield
    finally:
        _restore_signals(previous)


def _handle_signals(handler: Callable[..., None]) -> dict[int, Any]:
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, handler) for number in numbers}


def _restore_signals(previous: dict[int, Any]) -> None:
    for number, former in previous.items():
        signal.signal(number, former)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block on Ctrl-C, SIGTERM or a closed terminal.

    A later signal ends the process at once. A signal within SAME_INTERRUPTION seconds is ignored, since a terminal and
    a launcher may both pass on the same one.
    """
    if isinstance(signal.getsignal(signal.SIGTERM), _Interrupter):  # within another such block
        yield
        return
    interrupter = _Interrupter()
    previous = _handle_signals(interrupter)
    try:
        yield
    finally:
        if not interrupter.received:  # else the process ends, and the same signal may arrive once more
            _restore_signals(previous)
        elif signal.getsignal(signal.SIGALRM) is interrupter:
            signal.setitimer(signal.ITIMER_REAL, 0)  # an import was its last work: nothing is left to interrupt


class _Interrupter:
    """Handler of signals that raises KeyboardInterrupt once, after an import that is running: libraries catch what is
    raised while they are imported.
    """

    def __init__(self) -> None:
        self.received: list[float] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGALRM:
            now = time.monotonic()
            if self.received and now - self.received[0] > SAME_INTERRUPTION:
                end_process(INTERRUPTED)
            self.received.append(now)
            if len(self.received) > 1:
                return
        if _importing(frame):
            signal.signal(signal.SIGALRM, self)
            signal.setitimer(signal.ITIMER_REAL, IMPORT_POLL)
            return
        raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    """Return True if a frame, or one of its callers, imports a module."""
    while frame is not None:
        if "importlib._bootstrap" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
