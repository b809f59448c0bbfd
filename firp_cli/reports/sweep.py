"""Report of a matrix of benches: one page with a table, throughput against the batch size, and the break-even point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

from firp_cli.provenance import environment
from firp_cli.reports.canvas import COLOURS, MARKERS, SOFT, Picture, canvas, legend, picture
from firp_cli.reports.cells import DASH, Cells, main_rows, markdown_table, number, row_label, with_interval
from firp_cli.reports.figures import WIDTH
from firp_cli.reports.latex import latex_table
from firp_cli.reports.notes import reading_notes, settings_line
from firp_cli.reports.page import closing, figure, listed, page, section, table
from firp_cli.results import UNDRAFTED, BenchReport, BenchRow, as_json

SWEEP = "sweep.json"
BATCH = "--batch-size"
CAPTION = (
    "Above: tokens per second of all sequences together. Below: speedup over autoregressive decoding at the same batch "
    "size, with 95% intervals; under the dashed line drafting no longer pays."
)


@dataclass
class SweepCell:
    """Bench with one combination of settings. `values`: the settings that vary, by option. `folder`: of its report,
    within that of the sweep. `reason`: why there is none.
    """

    values: Mapping[str, str]
    folder: str
    report: BenchReport | None = None
    reason: str = ""


@dataclass
class Curve:
    """Main rows of one method by batch size, with the other settings that vary."""

    label: str
    rows: dict[int, BenchRow] = field(default_factory=dict)


def sweep_json(cells: Sequence[SweepCell]) -> dict[str, Any]:
    """Return sweep.json: settings and rows of every cell."""
    lines = [
        {
            "values": dict(cell.values),
            "folder": cell.folder,
            "reason": cell.reason or None,
            "rows": [as_json(row) for row in cell.report.rows] if cell.report else [],
        }
        for cell in cells
    ]
    return {"schema": "firp.sweep/1", "environment": environment(), "cells": lines}


def sweep_cells(cells: Sequence[SweepCell]) -> tuple[list[str], Cells]:
    """Return headers and cells: a line for each setting and method."""
    options = list(dict.fromkeys(name for cell in cells for name in cell.values))
    headers = [_plain(name) for name in options]
    headers += ["method", "accepted length", "tokens/s", "speedup over ar", "over hf"]
    lines: Cells = []
    for cell in cells:
        values = [cell.values.get(name, DASH) for name in options]
        if cell.report is None:
            lines.append([*values, cell.reason, *[DASH] * 4])
            continue
        for row in main_rows(cell.report):
            figures = [
                number(row.accepted_length),
                number(row.tokens_per_second, 1),
                with_interval(row.speedup, row.speedup_interval),
                with_interval(row.speedup_hf, row.speedup_hf_interval),
            ]
            lines.append([*values, row_label(row), *(figures if not row.reason else [row.reason, *[DASH] * 3])])
    return headers, lines


def _plain(option: str) -> str:
    return option.strip("-").replace("-", " ")


def curves(cells: Sequence[SweepCell]) -> list[Curve]:
    """Return the methods' rows by batch size, for every combination of the other settings."""
    found: dict[str, Curve] = {}
    for cell in cells:
        if cell.report is None or BATCH not in cell.values:
            continue
        others = [f"{_plain(name)} {value}" for name, value in cell.values.items() if name != BATCH]
        several = len({row.dataset for row in cell.report.rows if row.dataset != "all"}) > 1
        for row in main_rows(cell.report):
            if not row.reason:
                label = ", ".join([row_label(row), *([row.dataset] if several else []), *others])
                found.setdefault(label, Curve(label)).rows[int(cell.values[BATCH])] = row
    return list(found.values())


def break_even(curve: Curve) -> float | None:
    """Return the batch size at which the speedup falls through 1, interpolated on a logarithmic scale; None where it
    does not between the measured sizes.
    """
    points = [(size, row.speedup) for size, row in sorted(curve.rows.items()) if row.speedup]
    for (low, above), (high, below) in pairwise(points):
        if above >= 1.0 > below:
            share = (above - 1.0) / (above - below)
            return float(2 ** (math.log2(low) + share * (math.log2(high) - math.log2(low))))
    return None


def break_even_lines(cells: Sequence[SweepCell]) -> list[str]:
    """Return a line on each drafting method: the batch size from which it is slower than autoregressive decoding."""
    lines = []
    for curve in curves(cells):
        speedups = {size: row.speedup for size, row in sorted(curve.rows.items()) if row.speedup}
        if len(speedups) < 2 or next(iter(curve.rows.values())).method in UNDRAFTED:
            continue
        even = break_even(curve)
        if even is not None:
            lines.append(f"{curve.label}: break-even at a batch size of about {even:.1f}")
        elif min(speedups.values()) >= 1.0:
            lines.append(f"{curve.label}: faster than ar at every measured batch size, up to {max(speedups)}")
        elif max(speedups.values()) < 1.0:
            sizes = f"{min(speedups)} to {max(speedups)}"
            lines.append(f"{curve.label}: slower than ar at every measured batch size, {sizes}")
        else:
            lines.append(f"{curve.label}: no break-even between the measured batch sizes")
    return lines


def sweep_figure(cells: Sequence[SweepCell]) -> Picture | None:
    """Return throughput and speedup against the batch size; None where the batch size does not vary."""
    drawn = [curve for curve in curves(cells) if len(curve.rows) > 1]
    if not drawn:
        return None
    with canvas(WIDTH, 5.0 + 0.16 * len(drawn)) as drawing:
        left, right = drawing.subplots(2, 1)
        for place, curve in enumerate(drawn):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            sizes = sorted(curve.rows)
            rows = [curve.rows[size] for size in sizes]
            rates = [row.tokens_per_second for row in rows]
            left.plot(sizes, rates, color=colour, marker=marker, markersize=5, label=curve.label)
            known = [(size, row) for size, row in zip(sizes, rows, strict=True) if row.speedup and row.method != "ar"]
            values = [row.speedup or 0.0 for _, row in known]
            ends = [row.speedup_interval or (row.speedup or 0.0,) * 2 for _, row in known]
            below = [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)]
            above = [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)]
            right.errorbar(
                [size for size, _ in known], values, yerr=[below, above], color=colour, marker=marker, markersize=5
            )
            even = break_even(curve)
            if even is not None:
                right.axvline(even, color=colour, linewidth=1.0, linestyle=":")
                right.annotate(f"{even:.1f}", (even, 1.0), (3, 6), textcoords="offset points", color=colour, size=8)
        right.axhline(1.0, color=SOFT, linewidth=1.0, linestyle="--")
        ticks = sorted({size for curve in drawn for size in curve.rows})
        for axes, label in ((left, "tokens per second"), (right, "speedup over ar")):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(size) for size in ticks])
            axes.set_xlabel("batch size")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        legend(drawing, 2)
        return picture(drawing)


def sweep_markdown(cells: Sequence[SweepCell]) -> str:
    """Return sweep.md."""
    lines = "".join(f"- {line}\n" for line in break_even_lines(cells))
    return f"# firp bench: sweep\n\n{markdown_table(*sweep_cells(cells))}\n{lines}"


def sweep_latex(cells: Sequence[SweepCell]) -> str:
    """Return the table of the whole matrix."""
    headers, lines = sweep_cells(cells)
    first = next((f" First: {settings_line(cell.report)}." for cell in cells if cell.report), "")
    return latex_table(headers, lines, headers.index("method") + 1, f"Matrix of settings.{first}", "tab:firp-sweep")


def sweep_html(cells: Sequence[SweepCell]) -> str:
    """Return the page of the whole matrix, with links to the pages of its cells."""
    headers, lines = sweep_cells(cells)
    image, first = sweep_figure(cells), next((cell.report for cell in cells if cell.report), None)
    folders = [escape(cell.folder) for cell in cells if cell.report]
    links = "".join(f'<li><a href="{folder}/bench.html">{folder}</a></li>' for folder in folders)
    body = [
        "<h1>firp bench: sweep</h1>",
        f'<p class="lead">First cell: {escape(settings_line(first))}.</p>' if first else "",
        figure("throughput", CAPTION, image),
        listed(break_even_lines(cells)),
        table(headers, lines, headers.index("method") + 1),
        section("Reports", f"<ul>{links}</ul>" if links else ""),
        *(closing(reading_notes(first), {**first.environment, **environment()}, [first.teacher]) if first else []),
    ]
    return page("firp bench: sweep", body)
