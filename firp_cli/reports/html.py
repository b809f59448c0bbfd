"""Report of `firp bench` as one self-contained HTML page: tables, embedded figures, environment, command line."""

from __future__ import annotations

import math
from html import escape

from firp_cli.reports import speed_tables, tables
from firp_cli.reports.cells import by_teacher, row_label, teacher_column
from firp_cli.reports.page import closing, figure, page, table
from firp_cli.reports.predicted import predicted_lines
from firp_cli.reports.preset_lines import preset_lines
from firp_cli.results import UNDRAFTED, BenchReport

CAPTIONS = {
    "speedup": "Decoding speed relative to both baselines, without prefill.",
    "acceptance": "Acceptance of drafts, and tokens emitted by one pass of the teacher.",
    "speedup_by_group": "Decoding speed relative to autoregressive decoding, by data set and category.",
    "occupancy": "Tokens in the pipeline at each tick, and agreement of early exits with the last loop.",
}
DIVERGENCES_SHOWN = 50


def bench_html(report: BenchReport, figures: dict[str, bytes]) -> str:
    """Return the page. `figures`: PNGs by name, from `figures.bench_figures`."""
    headers, cells = tables.bench_cells(report)
    detail_headers, details = tables.detail_cells(report)
    body = [
        "<h1>firp bench</h1>",
        f'<p class="lead">{escape(tables.settings_line(report))}.</p>',
        *(f'<p class="note">{escape(line)}.</p>' for line in preset_lines(report)),
        *map(_headline, by_teacher(report)),
        table(headers, cells, headers.index("method") + 1),
        *(f"<p>{escape(line)}.</p>" for line in predicted_lines(report)),
        *(figure(CAPTIONS[name], image) for name, image in figures.items() if name != speed_tables.FIGURE),
        _pipeline(report, figures.get(speed_tables.FIGURE)),
        "<h2>Same output?</h2>",
        _lossless(report),
        "<h2>Details</h2>",
        table(detail_headers, details, detail_headers.index("tree") + 1),
        *closing(tables.reading_notes(report), report.environment, [part.teacher for part in by_teacher(report)]),
    ]
    return page("firp bench", body)


def _headline(report: BenchReport) -> str:
    """Return a sentence on the best method of one teacher."""
    whole = [row for row in report.rows if row.category == "all" and row.method not in UNDRAFTED and row.speedup]
    whole = [row for row in whole if row.dataset == "all"] or whole
    if not whole:
        return ""
    best = max(whole, key=lambda row: row.speedup or 0.0)
    length = f"{best.accepted_length:.2f} tokens per {f'{best.pipeline.loops} ticks' if best.pipeline else 'step'}"
    over_hf = f" and {best.speedup_hf:.2f} times transformers generate" if best.speedup_hf else ""
    owner = f"Teacher {escape(best.teacher)}: " if best.teacher else ""
    return (
        f'<p class="headline">{owner}<strong>{escape(best.method)}</strong> decodes {best.speedup:.2f} times as fast '
        f"as autoregressive decoding in the same engine{over_hf}, at {length} ({escape(best.dataset)}).</p>"
    )


def _pipeline(report: BenchReport, occupancy: bytes | None) -> str:
    """Return the section on pipelines: statistics, note, parts of a tick; empty without pipelines."""
    headers, cells = speed_tables.pipeline_cells(report)
    if not cells:
        return ""
    note, (tick_headers, ticks) = speed_tables.pipeline_note(report), speed_tables.tick_cells(report)
    named = headers.index("method") + 1
    columns = [" ".join(line[:named]) for line in cells]
    lines = [[header, *(line[place] for line in cells)] for place, header in enumerate(headers) if place >= named]
    parts = [
        "<h2>Pipeline</h2>",
        f'<p class="note">{escape(note)}.</p>' if note else "",
        table(["", *columns], lines, 1),
        figure(CAPTIONS[speed_tables.FIGURE], occupancy) if occupancy else "",
        f"<p>Parts of a tick, in milliseconds:</p>{table(tick_headers, ticks, 1)}" if ticks else "",
    ]
    return "\n".join(part for part in parts if part)


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
    note = tables.lossless_note(report)
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
            tables.DASH if mark.logit_gap is None or math.isnan(mark.logit_gap) else f"{mark.logit_gap:.3g}",
        ]
        for row, mark in marks[:DIVERGENCES_SHOWN]
    ]
    headers = ["method", "data set", "prompt", "new token", "expected", "got", "logit gap"]
    headers, cells = teacher_column([row for row, _ in marks[:DIVERGENCES_SHOWN]], headers, cells)
    more = f"<p>bench.json lists {len(marks) - len(cells)} more.</p>" if len(marks) > len(cells) else ""
    return f"{text}{table(headers, cells, headers.index('prompt'))}{more}"
