"""Processes started ahead: they import the modules of a group of parts and wait for the job. This file imports nothing
slow.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

FLAG = "--job"  # the job follows on standard input


class Spare:
    """A process of the suite that waits for its job. Without a job it ends with its parent."""

    def __init__(self, script: Path, arguments: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments, FLAG],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its children are ended with it
        )

    def start(self, job: dict[str, Any]) -> subprocess.Popen[bytes]:
        """Hand over the job. A process that has ended gets none."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.close()
        return self.process

    def end(self) -> None:
        """End the process."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def read_job() -> dict[str, Any] | None:
    """Return the job of this process; None if its parent has ended."""
    text = sys.stdin.readline()
    return json.loads(text) if text else None
