"""JSON and Markdown of the suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firp_cli.files import write_atomically, write_json
from firp_cli.reports.cells import markdown_table
from firp_cli.results import plain
from suite.groups import Found

SCHEMA = "firp.gpu_suite/1"
NAME = "gpu_suite"
TRACEBACK_SHOWN = 4


def write(output: Path, head: dict[str, Any], seconds: float, found: Found) -> None:
    """Write both files, whole, with the results so far."""
    whole = {"schema": SCHEMA, **head, "device": found.device, "seconds": round(seconds, 1), "parts": found.records}
    write_json(output / f"{NAME}.json", plain(whole))
    text = markdown(whole, found.tables)
    write_atomically(output / f"{NAME}.md", lambda path: path.write_text(text, encoding="utf-8"))


def markdown(whole: Mapping[str, Any], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the parts that ran, and the tables of every part."""
    records: Mapping[str, dict[str, Any]] = whole["parts"]
    versions, device = whole["environment"]["versions"], whole["device"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "triton") if name in versions)
    cells = [
        [name, item["status"], f"{item['seconds']:.1f}", item["key"] or why(item)] for name, item in records.items()
    ]
    blocks = [
        f"# GPU suite: {device.get('name', 'no device seen')}",
        f"{whole['settings']['sizes']} sizes, {device.get('dtype', 'no dtype')}, {named}, Python "
        f"{whole['environment']['python']}, commit {whole['environment']['git_commit']}, {whole['seconds']:.0f} s.",
        markdown_table(["part", "status", "s", ""], cells),
    ]
    for name, item in records.items():
        blocks += [
            f"## {table['title']}\n\n{markdown_table(table['headers'], table['cells'])}"
            for table in tables[name]
            if table["cells"]
        ]
        blocks += [f"Skipped in {name}: {'; '.join(item['cuts'])}."] if item["cuts"] else []
        if item["status"] == "failed":
            lines = "\n".join(item.get("traceback", [])[-TRACEBACK_SHOWN:])
            blocks.append(f"**{name} failed:** {item['error']}" + (f"\n\n```\n{lines}\n```" if lines else ""))
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def why(record: Mapping[str, Any]) -> str:
    """Return the reason why a part has no result."""
    return str(record.get("reason") or record.get("error") or "").partition("\n")[0]
