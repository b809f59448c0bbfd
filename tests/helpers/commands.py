"""The program as a user runs it: in this process, or in one of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from firp_cli.cli.app import app, main
from helpers.models import ROOT

PROMPT = "Mia has 12 shells. She finds 7 more. How many shells does Mia have?"
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}  # nothing waits for a hub


def firp(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program's entry point in this process; return its exit code and what it printed.

    `firp_process` runs the same in a process of its own, which costs the seconds of importing torch.
    """
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["firp", *arguments])
        patch.delenv("FIRP_DATA_DIR", raising=False)
        for name, value in (OFFLINE | environment).items():
            patch.setenv(name, value)
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
    printed = [stream.buffer.getvalue().decode() for stream in streams]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(["firp", *arguments], code, *printed)


def firp_process(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, as a user does."""
    values = {key: value for key, value in os.environ.items() if key != "FIRP_DATA_DIR"}
    command = [sys.executable, "-m", "firp_cli", *arguments]
    values |= OFFLINE | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=values, check=False, timeout=280)


def invoke(*arguments: object) -> Result:
    """Run the program in this process; a user error comes out as `result.exception`."""
    return CliRunner().invoke(app, [str(item) for item in arguments])
