"""The README's Python example, the commands in docs/, and links from both into the repository."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from helpers.models import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}

PLACEHOLDERS = {"R": "2", "B": "4"}  # numbers that a command leaves open


def docs_commands() -> list[list[str]]:
    blocks = [
        block for text in DOCS.values() for block in re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("firp ")]


def test_readme_python_runs_and_equals_autoregressive_decoding() -> None:
    first, second = re.findall(r"^~~~python\n(.*?)^~~~$", README, re.DOTALL | re.MULTILINE)
    assert len(first.splitlines()) <= 10
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", first + second]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    length = re.search(r"^([\d.]+) tokens per decoding step$", done.stdout, re.MULTILINE)
    assert length is not None, done.stdout
    assert float(length[1]) >= 1.0  # the guard may fall back on a busy machine
    assert "####" in done.stdout


@pytest.mark.parametrize("arguments", docs_commands(), ids=lambda words: " ".join(words)[:50])
def test_docs_commands_parse(arguments: list[str]) -> None:
    from typer.main import get_command

    from firp_cli.cli.app import app

    arguments = [PLACEHOLDERS.get(word, word) for word in arguments]
    get_command(app).commands[arguments[0]].make_context(arguments[0], arguments[1:])  # type: ignore[attr-defined]


def test_links_into_the_repository_name_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    home = project["urls"]["Homepage"]
    raw = home.replace("github.com", "raw.githubusercontent.com")
    pattern = rf"(?:{re.escape(home)}/blob|{re.escape(raw)})/main/([^)#\s]+)"
    paths = re.findall(pattern, README)
    paths += [f"docs/{path}" for text in DOCS.values() for path in re.findall(r"\]\((?!#|http)([^)#]+)", text)]
    assert len(paths) >= 8
    assert [path for path in paths if not (ROOT / path).is_file()] == []
