"""The suite's JSON and its Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firp_cli.provenance import write_atomically, write_json
from firp_cli.records import plain
from firp_cli.reports.tables import markdown_table
from suite.work import Part, Table

SCHEMA = "firp.gpu_suite/1"
NAME = "gpu_suite"
TRACEBACK_SHOWN = 4


def write(
    output: Path,
    head: dict[str, Any],
    seconds: float,
    records: Mapping[str, dict[str, Any]],
    tables: Mapping[str, Sequence[Table]],
) -> None:
    """Both files, whole, with what there is by now."""
    whole = {"schema": SCHEMA, **head, "seconds": round(seconds, 1), "parts": dict(records)}
    write_json(output / f"{NAME}.json", plain(whole))
    text = markdown(whole, tables)
    write_atomically(output / f"{NAME}.md", lambda path: path.write_text(text, encoding="utf-8"))


def markdown(whole: Mapping[str, Any], tables: Mapping[str, Sequence[Table]]) -> str:
    """What ran, and the tables of every part."""
    records: Mapping[str, dict[str, Any]] = whole["parts"]
    versions = whole["environment"]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "triton") if name in versions)
    cells = [
        [name, item["status"], f"{item['seconds']:.1f}", item["key"] or why(item)] for name, item in records.items()
    ]
    blocks = [
        f"# GPU suite: {whole['device']['name']}",
        f"{whole['settings']['sizes']} sizes, {whole['device']['dtype']}, {named}, Python "
        f"{whole['environment']['python']}, commit {whole['environment']['git_commit']}, {whole['seconds']:.0f} s.",
        markdown_table(["part", "status", "s", ""], cells),
    ]
    for name, item in records.items():
        blocks += [
            f"## {table.title}\n\n{markdown_table(table.headers, table.cells)}" for table in tables[name] if table.cells
        ]
        blocks += [f"Left out of {name}: {'; '.join(item['cuts'])}."] if item["cuts"] else []
        if item["status"] == "failed":
            lines = "\n".join(item["traceback"][-TRACEBACK_SHOWN:])
            blocks.append(f"**{name} failed:** {item['error']}\n\n```\n{lines}\n```")
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def why(record: Mapping[str, Any]) -> str:
    """Why a part brought nothing."""
    return str(record.get("reason") or record.get("error") or "").partition("\n")[0]


def line(part: Part, record: Mapping[str, Any]) -> str:
    """What is printed behind a part."""
    told = [text for text in (record["key"], why(record), *record["cuts"]) if text]
    return f"{record['seconds']:6.1f} s  {part.name:<14} {record['status']:<8} {'; '.join(told)}"
