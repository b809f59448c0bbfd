"""Commands in messages run as printed: every one is known to the program with its options, and many are run here."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from firp_cli.cli import quickstart as module
from firp_cli.cli.app import app
from helpers.commands import invoke, succeed
from helpers.models import ROOT

SOURCES = sorted((ROOT / "firp_cli").rglob("*.py"))
QUOTED = re.compile(r"`firp ([^`]*)`|: firp ([a-z][^;(]* --[^;(]*)")  # in backticks, or after a colon


def text_of(node: ast.expr) -> str:
    """Return a string of the source with X for each value that it inserts."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    assert isinstance(node, ast.JoinedStr)
    return "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)


def docstrings(tree: ast.AST) -> set[int]:
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


def commands_of(path: Path) -> Iterator[list[str]]:
    """Yield the words after `firp` in the texts of a file, and the known ones of commands that it puts together."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = docstrings(tree)
    for node in ast.walk(tree):
        skipped |= {id(part) for part in node.values} if isinstance(node, ast.JoinedStr) else set()
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in skipped:
            for found in QUOTED.finditer(text_of(node)):
                yield shlex.split(found[1] or found[2])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "command_text":
            yield constants(node.args)
        elif isinstance(node, ast.List) and (words := constants(node.elts))[:1] == ["firp"]:
            yield words[1:]


def constants(items: list[ast.expr]) -> list[str]:
    """Return the strings among the items, and those of lists that are unpacked there."""
    parts = [part for item in items for part in (ast.walk(item) if isinstance(item, ast.Starred) else [item])]
    return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


@cache
def program() -> Any:
    return get_command(app)


def fault(words: list[str]) -> str | None:
    """Return why the program would not parse these words; arguments are not looked at."""
    command = program()
    if words[:1] in ([], ["X"]):  # a command that is inserted
        return None
    while hasattr(command, "commands") and words:
        if words[0] not in command.commands:
            return f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    known = {name for item in command.params for name in (*item.opts, *item.secondary_opts)}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    return f"no option {unknown[0]!r}" if unknown else None


def test_every_command_in_a_text_is_known() -> None:
    commands = [(path.name, words) for path in SOURCES for words in commands_of(path)]
    assert len(commands) > 20 and ["store", "verify", "STORE"] in [words for _, words in commands]
    assert [(name, words, fault(words)) for name, words in commands if fault(words)] == []
    assert fault(["store", "show"]) == "no command 'show'" and fault(["train", "--limit", "2"]) == "no option '--limit'"


def following(text: str, mark: str) -> list[str]:
    """Return the words of the command after `mark`."""
    line = next(line for line in text.splitlines() if mark in line)
    return shlex.split(line.partition(mark)[2].partition(" (")[0])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


def test_the_next_line_of_prompts_collects(here: Path) -> None:
    written = succeed("prompts", "arithmetic", "--output", "my own.jsonl", "--count", 2, "--max-new-tokens", 24)
    words = following(written.stdout, "next: firp ")
    done = succeed(*words, "data.max_new_tokens=4")
    assert words[-2:] == ["my own.jsonl", "--regenerate"] and "answers: " in done.stdout


def test_remedies_for_a_missing_store_make_one(here: Path) -> None:
    """Then the refused command succeeds."""
    few = ("data.regenerate=false", "data.limit=6")
    train = ("train", "demo", *few, "training.max_steps=0", "training.gate_prompts=0", "--store", "my store")
    words = following(str(invoke(*train).exception), "  firp ")
    succeed(*words)
    succeed(*train, "--output", "run")
    words = following(str(invoke("store", "info", "new store").exception), "make one: firp ")
    succeed(*words, *few)
    succeed("store", "info", "new store")


@pytest.mark.parametrize("place", ["plain", "plain/inner"])
def test_file_in_place_of_a_store_is_named(here: Path, place: str) -> None:
    """A store there cannot be collected, so nothing advises it."""
    (here / "plain").write_text("x", encoding="utf-8")
    for command in (("train", "demo", "--store"), ("eval", "firp", "--store"), ("store", "verify")):
        said = str(invoke(*command, place).exception)
        assert said.startswith("plain is a file: a store is a folder") and "--output" not in said


def test_remedy_for_stores_of_two_dtypes_converts(here: Path) -> None:
    for dtype in ("float32", "int8"):
        given = ("data.regenerate=false", "data.limit=4", f"data.store_dtype={dtype}")
        succeed("collect", "demo", *given, "--output", f"in {dtype}")
    merge = ("store", "merge", "in float32", "in int8", "--output", "both")
    words = following(str(invoke(*merge).exception), "first: firp ")
    succeed(*words)
    succeed(*merge[:3], words[-1], *merge[4:])


def test_last_lines_of_quickstart_are_commands(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(module, "run", lambda *_: None)
    monkeypatch.setattr(module, "_affordable", lambda *_: 4)
    module.quickstart("arithmetic", 15.0, "chat", None, Path("my out"), 4, 2, 32, False)
    printed = capsys.readouterr().out
    plan = succeed(*following(printed, "accepted drafts:  firp "), "--plan")
    assert "my out/store" in plan.stdout
    refused = invoke(*following(printed, "try it:  firp "))
    assert str(refused.exception).startswith("no predictor folder 'my out/predictor'")  # nothing was trained here
