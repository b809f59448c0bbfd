"""The program as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from firp_cli.cli.app import app
from helpers.models import ROOT

PROMPT = "Mia has 12 shells. She finds 7 more. How many shells does Mia have?"


def firp(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a user would; offline, so that nothing waits for a hub."""
    values = {key: value for key, value in os.environ.items() if key != "FIRP_DATA_DIR"}
    values |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment
    command = [sys.executable, "-m", "firp_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=values, check=False, timeout=280)


def invoke(*arguments: object) -> Result:
    """Run the program in this process; a user error comes out as `result.exception`."""
    return CliRunner().invoke(app, [str(item) for item in arguments])
