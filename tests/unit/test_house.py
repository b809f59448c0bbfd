"""The layout's import table, as one dictionary, against every import; and fast `--help`."""

from __future__ import annotations

import ast
import subprocess
import sys
import time

import pytest

from helpers.models import ROOT

BASE = {"errors", "records", "provenance"}
MAY_IMPORT = {
    "errors": set(),
    "records": set(),
    "provenance": set(),
    "recipe": {"errors", "records"},
    "metrics": {"errors", "records"},
    "reports": {"errors", "records", "metrics"},
    "data": {"recipe", *BASE},
    "teacher": {"recipe", "provenance", "errors"},
    "predictors": {"teacher", "recipe", "errors"},
    "distributed": {"teacher", "recipe", "errors"},
    "collecting": {"distributed", "teacher", "data", "recipe", *BASE},
    "training": {"distributed", "predictors", "teacher", "data", "metrics", "recipe", *BASE},
    "decoding": {"predictors", "teacher", "recipe", "records", "errors"},
    "evaluation": {"decoding", "predictors", "teacher", "data", "metrics", "recipe", *BASE},
    "commands": None,  # all
}
ONLY_IN = {
    "deepspeed": {"distributed", "training"},
    "typer": {"commands"},
    "rich": {"commands", "reports"},
    "datasets": {"data"},
    "matplotlib": {"reports"},
}
NO_TORCH = {"errors", "records", "recipe", "provenance", "metrics", "reports"}
SOURCES = sorted((ROOT / "firp_cli").rglob("*.py"))


def imported(source: str) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {(*str(node.module).split("."), alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path: object) -> None:
    parts = path.relative_to(ROOT / "firp_cli").with_suffix("").parts  # type: ignore[attr-defined]
    room = parts[0]
    if room in ("__init__", "__main__"):
        return
    allowed = MAY_IMPORT[room]
    for name in imported(path.read_text()):  # type: ignore[attr-defined]
        if name[0] == "firp_cli" and len(name) > 1 and name[1] in MAY_IMPORT:
            assert allowed is None or name[1] in allowed | {room}, f"{room} imports {'.'.join(name)}"
        if name[0] in ONLY_IN:
            assert room in ONLY_IN[name[0]], f"{room} imports {name[0]}"
        if name[0] == "torch":
            assert room not in NO_TORCH, f"{room} imports torch"


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["collect"],
        ["store"],
        ["store", "verify"],
        ["train"],
        ["eval"],
        ["tune"],
        ["bench"],
        ["generate"],
        ["doctor"],
    ],
)
def test_help_answers_at_once(command: list[str]) -> None:
    """Half a second is the promise on an idle machine; the heavy imports are what would break it."""
    code = (
        f"import sys; sys.argv=['firp', *{command!r}, '--help']\n"
        "from firp_cli.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    best = 99.0
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        best = min(best, time.perf_counter() - began)
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout
        if best < 0.5:
            break
    assert best < 1.5  # a loaded machine; the modules above are the exact check
