"""Report of `firp bench` as one self-contained HTML page: tables, figures, sample outputs, environment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from firp_cli.reports import notes, speed_tables, tables, verified
from firp_cli.reports.canvas import Picture
from firp_cli.reports.cells import DASH, Cells, by_teacher, main_rows, one_line, row_label, teacher_column
from firp_cli.reports.page import closing, figure, folded, listed, page, section, table
from firp_cli.reports.predicted import predicted_lines
from firp_cli.reports.preset_lines import preset_lines
from firp_cli.reports.sample_outputs import samples_part
from firp_cli.reports.verification import is_lossless
from firp_cli.results import BenchReport

CAPTIONS = {
    "speedup": "Decoding speed over both baselines, without prefill. Whiskers: 95% intervals.",
    "speedup_by_group": "Decoding speed over autoregressive decoding, by data set and category, with 95% intervals.",
    "acceptance": "Share of steps that accepted at least i drafted tokens; in brackets the accepted length.",
    "histogram": "Tokens emitted by one pass of the teacher.",
    "parts": "Time of a decoding step by part, timed apart from the runs; the upright mark is their whole step.",
    "occupancy": "Tokens in the pipeline at each tick, and agreement of early exits with the last loop.",
}
DIVERGENCES_SHOWN = 50
Figures = Mapping[str, Picture]


def bench_html(report: BenchReport, figures: Figures) -> str:
    """Return the page. `figures`: by name, from `figures.bench_figures`."""
    parts = by_teacher(report)
    main = main_rows(report)
    headers, cells = tables.bench_cells(report, main)
    reasons = {place: f"not measured: {one_line(row.reason)}" for place, row in enumerate(main) if row.reason}
    details, execution = tables.detail_cells(report, main), tables.execution_cells(report)
    body = [
        "<h1>firp bench</h1>",
        f'<p class="lead">{escape(notes.settings_line(report))}.</p>',
        *(_paragraph(line, "note") for line in preset_lines(report)),
        *map(_headline, parts),
        table(headers, cells, headers.index("method") + 1, reasons),
        f'<div class="warning">{listed(report.warnings)}</div>' if report.warnings else "",
        *(f"<p>{escape(line)}.</p>" for line in (*predicted_lines(report), notes.process_line(report)) if line),
        section("Speedup", _figure(figures, "speedup"), _paragraph(notes.interval_note(report))),
        section("Data sets and categories", _figure(figures, "speedup_by_group"), *map(_groups, parts), _rows(report)),
        section("Acceptance", _pair(figures, "acceptance", "histogram")),
        section("Time of a step", _figure(figures, "parts"), _optional(*tables.parts_cells(report), 1)),
        _pipeline(report, figures),
        section("Same output?", _lossless(report), _verified(report)),
        section("Sample outputs", samples_part(report.samples)),
        section("Details", _optional(*details, details[0].index("tree")), _optional(*execution, 1)),
        *closing(notes.reading_notes(report), report.environment, [part.teacher for part in parts]),
    ]
    return page("firp bench", body)


def _headline(report: BenchReport) -> str:
    """Return a sentence on the best method of one teacher."""
    found = notes.headline(report)
    if found is None:
        return ""
    owner = f"Teacher {report.rows[0].teacher}: " if report.rows[0].teacher else ""
    return f'<p class="headline">{escape(owner)}<strong>{escape(found[0])}</strong> {escape(found[1])}.</p>'


def _figure(figures: Figures, name: str) -> str:
    return figure(name, CAPTIONS[name], figures.get(name))


def _pair(figures: Figures, *names: str) -> str:
    """Return figures beside each other where the page is wide enough."""
    drawn = "\n".join(_figure(figures, name) for name in names if name in figures)
    return f'<div class="pair">{drawn}</div>' if drawn else ""


def _paragraph(text: str | None, kind: str = "small") -> str:
    return f'<p class="{kind}">{escape(text.rstrip("."))}.</p>' if text else ""


def _optional(headers: list[str], cells: Cells, left: int) -> str:
    return table(headers, cells, left) if cells else ""


def _groups(report: BenchReport) -> str:
    """Return the table of a teacher's data sets and categories: speedup and accepted length of each method."""
    headers, cells = tables.category_cells(report, datasets=True)
    owner = f", teacher {report.rows[0].teacher}" if cells and report.rows[0].teacher else ""
    return _paragraph(f"Speedup over ar (accepted length){owner}") + table(headers, cells, 1) if cells else ""


def _rows(report: BenchReport) -> str:
    """Return the tables of all data sets and categories, folded; empty if the main table has them all."""
    if len(report.rows) == len(main_rows(report)):
        return ""
    headers, cells = tables.bench_cells(report)
    details = tables.detail_cells(report)
    whole = table(headers, cells, headers.index("method") + 1) + _optional(*details, details[0].index("tree"))
    return folded("All figures by data set and category", whole)


def _verified(report: BenchReport) -> str:
    """Return the check of every token against the teacher; empty without one."""
    headers, cells = verified.verified_cells(report)
    if not cells:
        return ""
    kind = "note" if all(row.verified is None or is_lossless(row.verified) for row in report.rows) else "warning"
    return _paragraph(verified.verified_note(report), kind) + table(headers, cells, headers.index("method") + 1)


def _pipeline(report: BenchReport, figures: Figures) -> str:
    """Return the section on pipelines: statistics, note, parts of a tick; empty without pipelines."""
    headers, cells = speed_tables.pipeline_cells(report)
    if not cells:
        return ""
    note, (tick_headers, ticks) = speed_tables.pipeline_note(report), speed_tables.tick_cells(report)
    named = headers.index("method") + 1
    columns = [" ".join(line[:named]) for line in cells]
    lines = [[header, *(line[place] for line in cells)] for place, header in enumerate(headers) if place >= named]
    return section(
        "Pipeline",
        _paragraph(note, "note"),
        table(["", *columns], lines, 1),
        _figure(figures, speed_tables.FIGURE),
        f"<p>Parts of a tick, in milliseconds:</p>{table(tick_headers, ticks, 1)}" if ticks else "",
    )


def _lossless(report: BenchReport) -> str:
    """Return the section on identical outputs: counts, the note on differences, and a table of them."""
    reference = report.settings.get("reference")
    if not reference:
        sampled = report.settings.get("temperature")
        reason = "sampled output differs by chance" if sampled else "neither hf nor ar was measured"
        return f"<p>Outputs are not compared: {reason}.</p>"
    whole = [row for row in report.rows if row.category == "all" and row.dataset != "all" and row.lossless.compared]
    counts = ", ".join(
        f"{row_label(row)} {row.lossless.identical} of {row.lossless.compared} ({row.dataset})" for row in whole
    )
    text = f"<p>Outputs identical to {escape(reference)}'s, token for token: {escape(counts)}.</p>"
    note = verified.lossless_note(report)
    marks = [(row, mark) for row in whole for mark in row.lossless.divergences]
    text += f'<p class="note">{escape(note)}.</p>' if note else ""
    if not marks:
        return text
    cells = [
        [
            row.method,
            row.dataset,
            str(mark.prompt) if mark.turn == 1 else f"{mark.prompt}, turn {mark.turn}",
            str(mark.position),
            str(mark.expected),
            str(mark.got),
            DASH if mark.logit_gap is None or math.isnan(mark.logit_gap) else f"{mark.logit_gap:.3g}",
        ]
        for row, mark in marks[:DIVERGENCES_SHOWN]
    ]
    headers = ["method", "data set", "prompt", "new token", "expected", "got", "logit gap"]
    headers, cells = teacher_column([row for row, _ in marks[:DIVERGENCES_SHOWN]], headers, cells)
    more = f"<p>bench.json lists {len(marks) - len(cells)} more.</p>" if len(marks) > len(cells) else ""
    return f"{text}{table(headers, cells, headers.index('prompt'))}{more}"
