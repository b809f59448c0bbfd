"""Ctrl-C and SIGTERM end every command with exit code 130 and a line on what is kept; real signals, real processes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from firp_cli.errors import INTERRUPTED, UsageError
from helpers.commands import invoke, succeed

PATIENCE = 120.0  # seconds until a command reaches the point where it is interrupted


def interrupted(number: int, reached: Callable[[], bool], *arguments: object) -> tuple[str, str]:
    """Run a command, send it a signal when `reached` is true; check its exit code and return its output."""
    command = [sys.executable, "-m", "firp_cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        until = time.monotonic() + PATIENCE
        while not reached():
            assert process.poll() is None and time.monotonic() < until, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == INTERRUPTED, (out, err)
    assert "Traceback" not in out + err
    return out, err


def next_command(text: str) -> list[str]:
    return shlex.split(text[text.rindex("next: firp ") :].splitlines()[0])[2:]


def test_interrupted_prompts_are_a_data_set(tmp_path: Path) -> None:
    file = tmp_path / "my prompts.jsonl"

    def begun() -> bool:
        if not file.exists() or not file.stat().st_size:
            return False
        second = invoke("prompts", "arithmetic", "--output", file).exception
        return isinstance(second, UsageError)

    _, err = interrupted(signal.SIGTERM, begun, "prompts", "arithmetic", "--output", file, "--count", 10**6)
    kept = file.read_text(encoding="utf-8").count("\n")
    assert kept and f"interrupted; {kept} of 1000000 prompts are in {file}" in err
    succeed(*next_command(err), "--limit", 2, "data.max_new_tokens=4", "--output", tmp_path / "store")


def test_interrupted_quickstart_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, rows = tmp_path / "run" / "store", tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{number} + 3?"}}\n' for number in range(60)), encoding="utf-8")
    model = ("arithmetic", "--prompts", rows, "--minutes", 2, "--max-new-tokens", 96)
    _, err = interrupted(signal.SIGINT, store.exists, "quickstart", *model, "--output", tmp_path / "run")
    assert "quickstart interrupted; go on with the commands one by one" in err
    assert next_command(err) == ["collect", str(tmp_path / "run" / "recipe.yaml"), "--resume"]
    monkeypatch.chdir(tmp_path)
    succeed(*next_command(err))


def test_signal_during_an_import_that_catches_everything_is_not_lost(tmp_path: Path) -> None:
    lines = ("import os, signal, time", "try:", " os.kill(os.getpid(), signal.SIGTERM)", " time.sleep(0.3)")
    caught = ("except BaseException:", " pass")
    (tmp_path / "greedy.py").write_text("\n".join((*lines, *caught)), encoding="utf-8")
    program = """
import time
from firp_cli.distributed.signals import interruptible
try:
    with interruptible():
        import greedy
        print("imported", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=PATIENCE)
    assert done.stdout.splitlines() == ["imported", "interrupted"], done.stderr


def test_a_command_that_is_loading_ends_with_a_line(tmp_path: Path) -> None:
    began = time.monotonic()
    out, err = interrupted(signal.SIGTERM, lambda: time.monotonic() > began + 1.5, "generate", "--prompt", "2+3?")
    assert out == "" and err == "firp: interrupted\n"
