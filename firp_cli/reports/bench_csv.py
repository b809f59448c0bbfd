"""CSV file of `firp bench`: one line per row with every field."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import fields, is_dataclass
from typing import Any

from firp_cli.results import BenchReport

PARTS = ("lossless_ar", "predicted", "pipeline", "cost", "verified", "worst", "accuracy", "execution")
LEFT_OUT = ("divergences", "occupancy")  # as long as the run


def bench_csv(report: BenchReport) -> str:
    """Return bench.csv: one line per row with every field; intervals as two columns, lists joined by spaces. Fields of
    a part have its name before theirs (`verified_gap`, `parts_draft`) and are there if a row has the part. A leading
    column names the teacher if there are several.
    """
    stream = io.StringIO()
    lines = []
    for row in report.rows:
        line = {"teacher": row.teacher} if row.teacher else {}
        lines.append(line | {name: value for name, value in _flat("", row).items() if name != "teacher"})
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(stream, fieldnames=names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _flat(before: str, value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass by name, those of its parts with the part's name before theirs."""
    flat: dict[str, Any] = {}
    for item in fields(value):
        name, part = before + item.name, getattr(value, item.name)
        if item.name == "interval" or item.name.endswith("_interval"):
            stem = name.removesuffix("interval")
            flat[f"{stem}low"], flat[f"{stem}high"] = part or ("", "")
        elif is_dataclass(part):
            flat |= _flat(f"{name}_", part)
        elif isinstance(part, dict):
            flat |= {f"{name}_{key}": _cell(entry) for key, entry in part.items()}
        elif item.name not in LEFT_OUT and (part is not None or item.name not in PARTS):
            flat[name] = _cell(part)
    return flat


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join("nan" if entry is None else f"{entry:g}" for entry in value)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
