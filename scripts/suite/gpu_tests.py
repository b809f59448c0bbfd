"""Tests marked `gpu`, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from suite.work import Failed, Shared, Skipped, Table, Work

MARK = "mark.gpu"
FIRST = "test_gpu.py"
OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")
SUMMARY = "short test summary info"
TAIL = 25  # last lines of the output that are kept
SPARE = 2.0  # seconds of the part's time not given to the tests
VERBOSE = re.compile(
    rf"^(?:\[gw\d+\] +\[ *\d+%\] )?(?:(\S+::.*?) )?({'|'.join(OUTCOMES)})\b(?: (\S+::\S.*))?", re.MULTILINE
)


def marked_files(root: Path) -> list[str]:
    """Return the test files with tests marked `gpu`, those of FIRST ahead: others may import packages that the machine
    lacks.
    """
    own = "test_gpu_suite.py"
    found = sorted(
        str(path.relative_to(root))
        for path in (root / "tests").rglob("test_*.py")
        if path.name != own and MARK in path.read_text(encoding="utf-8")
    )
    return sorted(found, key=lambda name: Path(name).name != FIRST)


def counts(output: str) -> dict[str, int]:
    """Return the outcomes of a verbose run, also of one that was stopped."""
    progress = output.partition(SUMMARY)[0]
    found = Counter(match.group(2) for match in VERBOSE.finditer(progress) if match.group(1) or match.group(3))
    return {outcome.lower(): found[outcome] for outcome in OUTCOMES}


def command(files: list[str], workers: int) -> list[str]:
    """Return pytest's command line; in several processes if pytest-xdist is installed."""
    several = workers > 1 and importlib.util.find_spec("xdist") is not None
    spread = ["-n", str(workers)] if several else []
    options = ["-p", "no:cacheprovider", "--no-header", "--tb=short"]
    return [sys.executable, "-m", "pytest", "-v", "-m", "gpu", *options, *spread, *files]


def tests(shared: Shared, work: Work) -> None:
    """Run the tests within the part's time. Raises Failed if any fails, Skipped without a CUDA device."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    files = marked_files(shared.root)
    paths = [str(shared.root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    run = command(files, min(shared.sizes.workers, os.cpu_count() or 1))
    process = subprocess.Popen(
        run,
        cwd=shared.root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # its workers are ended with it
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, work.clock.left() - SPARE))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        work.clock.cuts.append("the tests were stopped: --parts tests runs them alone")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    work.values |= {"command": ["python", *run[1:]], "status": process.returncode, "counts": counts(output)}
    report(work, output, shared.device.type == "cuda")


def report(work: Work, output: str, cuda: bool) -> None:
    """Report the outcomes. Raises Failed, Skipped."""
    found: dict[str, Any] = work.values["counts"]
    work.values["tail"] = output.splitlines()[-TAIL:]
    work.key = ", ".join(f"{count} {outcome}" for outcome, count in found.items() if count) or "no test ran"
    work.tables.append(Table("Tests marked `gpu`", list(found), [[str(count) for count in found.values()]]))
    if found["failed"] or found["error"] or (not work.clock.cuts and work.values["status"] not in (0, 5)):
        raise Failed(f"{work.key}; pytest's exit status is {work.values['status']}")
    if not cuda:
        raise Skipped("no CUDA device")
