"""Provenance of a result: machine, versions, commit and command line; fingerprints."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from firp_cli.machine import processor_name

COMMIT_VARIABLE = "FIRP_GIT_COMMIT"
ABSOLUTE = re.compile(r"(?<![^\s=,:'\"])/[^\s/=,:'\"][^\s=,:'\"]*")  # a path, also in `option=path,path`
PACKAGES = ("torch", "transformers", "deepspeed", "datasets", "tokenizers", "safetensors", "numpy", "triton")


def environment() -> dict[str, Any]:
    """Return machine, versions, git commit and argv as JSON values. Imports no heavy package."""
    return {
        "time": _now(),
        "argv": portable([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {name: version for name in PACKAGES if (version := installed_version(name))},
        "firp": installed_version("firp") or "source tree",
        "git_commit": git_commit(),
    }


def portable(value: Any) -> Any:
    """Return a JSON value in which texts name existing files relative to the working directory: a record that is
    published must not contain the paths of one machine.
    """
    if isinstance(value, dict):
        return {name: portable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(item) for item in value]
    return ABSOLUTE.sub(_relative, value) if isinstance(value, str) else value


def _relative(match: re.Match[str]) -> str:
    path = Path(match[0])
    known = path.exists() or (path.parent.is_dir() and path.parent != Path("/"))
    return os.path.relpath(path) if known else match[0]


def installed_version(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of the running source tree, with `+changes` when it differs.

    Outside a checkout it is the value of FIRP_GIT_COMMIT, else None.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get(COMMIT_VARIABLE) or None
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        status = subprocess.run(
            ["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def fingerprint(value: Any) -> str:
    """Return the first 16 hex digits of the sha256 of a JSON value (keys sorted), a string or bytes."""
    if not isinstance(value, bytes):
        value = (value if isinstance(value, str) else json.dumps(value, sort_keys=True)).encode()
    return hashlib.sha256(value).hexdigest()[:16]


def differences(kept: Mapping[str, Any], now: Mapping[str, Any], place: str) -> list[str]:
    """Return `NAME (PLACE: VALUE, now: VALUE)` for each value of a kept record that is not the same now."""
    return [
        f"{name} ({place}: {kept.get(name, 'not set')}, now: {now.get(name, 'not set')})"
        for name in dict.fromkeys((*now, *kept))
        if kept.get(name) != now.get(name)
    ]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
