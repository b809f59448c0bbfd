"""Rules of the house: imports, circles, sizes, words, and a fast `--help`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from helpers.models import ROOT

PACKAGE = ROOT / "firp_cli"
BASE = {
    "assets",
    "chat_template",
    "config",
    "errors",
    "files",
    "machine",
    "metrics",
    "records",
    "provenance",
    "recipe",
    "results",
    "tune_results",
}
ONLY_IN = {
    "typer": {"cli"},
    "rich": {"cli", "reports"},
    "deepspeed": {"distributed", "training"},
    "datasets": {"data"},
    "matplotlib": {"reports"},
}
NO_TORCH = {"reports"} | BASE - {"machine"}
FILE_LINES, FUNCTION_LINES = 400, 60
WORDS = re.compile(r"\b(foretold|foretell\w*|behind|stands? twice|learnt|whatever else)\b", re.IGNORECASE)
FRAGMENT = re.compile(r"(What|Whether|Of|Where|Who|How|Which)\b")
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
HELP = [
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
]


def listed(violations: Iterable[str]) -> str:
    return "\n" + "\n".join(violations)


def place(path: Path) -> str:
    return str(path.relative_to(ROOT))


def folder_of(module: str) -> str:
    """Return the package or base module of `firp_cli` that a module belongs to."""
    return (*module.split("."), "__init__")[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every imported name with its line, at any depth: in functions and for type checking too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = "." * node.level + (node.module or "")
            yield from ((f"{stem}.{alias.name}", node.lineno) for alias in node.names)


def import_table() -> dict[str, set[str]]:
    """Return the folders that each package may import, by the table `folder | job | may import` of CONTRIBUTING.md."""
    rows = re.findall(
        r"^\| *`(\w+)/` *\|.*\|([^|]*)\| *$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M
    )
    table = {}
    for folder, cell in rows:
        listed = set(re.findall(r"`(\w+)/`", cell))
        if cell.strip().startswith("all"):  # "all", or "all but `cli/`"
            table[folder] = {other for other, _ in rows} - listed
        else:
            assert listed or cell.strip() in ("-", "–"), f"CONTRIBUTING.md, {folder}/: cannot read '{cell.strip()}'"
            table[folder] = listed
    return table


def circles(edges: dict[str, set[str]]) -> set[str]:
    """Return the groups of nodes that reach each other."""
    reached = {}
    for start in edges:
        seen: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += edges.get(node, ())
        reached[start] = seen
    groups = (sorted(other for other in reached[node] if node in reached.get(other, ())) for node in edges)
    return {" <-> ".join(group) for group in groups if group}


def module_edges() -> dict[str, set[str]]:
    known = {module_name(path) for path in TREES}
    edges = {}
    for path, tree in TREES.items():
        name = module_name(path)
        named = {part for imported, _ in imports(tree) for part in (imported, imported.rpartition(".")[0])}
        edges[name] = named & known - {name}
    return edges


def lines(paths: list[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield f"{place(path)}:{number}", line


def test_imports_follow_the_table_of_contributing() -> None:
    table = import_table()
    assert set(table) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    violations = []
    for path, tree in TREES.items():
        folder = folder_of(module_name(path))
        allowed = table.get(folder, set()) | BASE | {folder, "__init__", "__version__"}
        for name, line in imports(tree):
            if name.startswith("."):
                violations.append(f"{place(path)}:{line}: relative import")
            entry = folder in ("__init__", "__main__")
            if name.startswith("firp_cli.") and not entry and folder_of(name) not in allowed:
                violations.append(f"{place(path)}:{line}: {folder} imports {name}")
    assert not violations, listed(violations)


def test_imports_make_no_circle_of_files_or_packages() -> None:
    edges = module_edges()
    packages: dict[str, set[str]] = {}
    for name, others in edges.items():
        packages.setdefault(folder_of(name), set()).update({folder_of(other) for other in others} - {folder_of(name)})
    found = circles(edges) | circles(packages)
    assert not found, listed(found)


def test_libraries_are_imported_only_in_their_folders() -> None:
    violations = [
        f"{place(path)}:{line}: imports {name}"
        for path, tree in TREES.items()
        for name, line in imports(tree)
        if folder_of(module_name(path)) not in ONLY_IN.get(name.split(".")[0], {folder_of(module_name(path))})
    ]
    assert not violations, listed(violations)


def test_torch_is_not_imported_by_base_modules_and_reports() -> None:
    violations = [
        f"{place(path)}:{line}: imports {name}"
        for path, tree in TREES.items()
        for name, line in imports(tree)
        if name.split(".")[0] == "torch" and folder_of(module_name(path)) in NO_TORCH
    ]
    early = [node for node in TREES[PACKAGE / "machine.py"].body if not isinstance(node, (ast.FunctionDef, ast.If))]
    violations += [f"machine.py imports {name}" for name, _ in imports(ast.Module(early, [])) if name == "torch"]
    assert not violations, listed(violations)


def test_test_files_import_no_test_file() -> None:
    violations = [
        f"{place(path)}:{line}: imports {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for name, line in imports(ast.parse(path.read_text(encoding="utf-8")))
        if any(part.startswith("test_") for part in name.split(".")[:2])
    ]
    assert not violations, listed(violations)


def test_files_and_functions_are_short() -> None:
    violations = []
    for path in [*TREES, *PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")]:
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > FILE_LINES:
            violations.append(f"{place(path)}: {count} lines")
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > FUNCTION_LINES:
                    violations.append(f"{place(path)}:{node.lineno}: {node.name}: {count} lines")
    assert not violations, listed(violations)


def test_prose_uses_plain_words() -> None:
    paths = [path for folder in ("firp_cli", "scripts", "recipes", "docs") for path in (ROOT / folder).rglob("*")]
    paths = [path for path in paths if path.suffix in (".py", ".cpp", ".h", ".md", ".yaml", ".txt")]
    paths += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    violations = [f"{where}: {found[0]}" for where, line in lines(sorted(paths)) for found in WORDS.finditer(line)]
    assert not violations, listed(violations)


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    violations = [
        f"{place(path)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and FRAGMENT.match(text := ast.get_docstring(node) or "")
    ]
    assert not violations, listed(violations)


def test_help_imports_nothing_heavy_and_is_fast() -> None:
    """The promise is half a second on an idle machine; heavy imports are the exact check."""
    code = (
        "import sys; sys.argv=['firp', *{command!r}, '--help']\n"
        "from firp_cli.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "heavy = {{'torch', 'transformers', 'deepspeed', 'datasets', 'matplotlib', 'numpy'}} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    best = 99.0
    for command in HELP:
        began = time.perf_counter()
        argv = [sys.executable, "-c", code.format(command=command)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        best = min(best, time.perf_counter() - began)
        assert done.returncode == 0, (command, done.stderr)
        assert "Usage" in done.stdout
    assert best < 1.5  # a loaded machine
