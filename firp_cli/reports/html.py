"""A bench run as one page that needs nothing else: tables, figures inside, environment, how to run it again."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape

from firp_cli.records import BenchReport
from firp_cli.reports import pipeline, tables
from firp_cli.reports.teachers import by_teacher, row_label, teacher_column

CAPTIONS = {
    "speedup": "Decoding speed relative to both baselines; prefill left out.",
    "acceptance": "How often drafts are accepted, and how many tokens one pass of the teacher emits.",
    "speedup_by_group": "Decoding speed relative to plain decoding, by data set and category.",
    "occupancy": "Tokens in the pipeline at each tick, and how often early exits predict what the last loop does.",
}
DIVERGENCES_SHOWN = 50
CSS = """
:root { --ink: #1d2430; --soft: #5b6573; --line: #dfe3e8; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #f6f7f9; font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, Helvetica, Arial, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.12rem; margin: 2.4rem 0 .7rem; }
p.lead { color: var(--soft); margin: 0 0 1.5rem; }
p.headline { font-size: 1.15rem; margin: 0 0 1.4rem; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .4rem 1rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { text-align: right; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th, td { padding: .5rem .6rem; }
th { vertical-align: bottom; }
td { white-space: nowrap; }
td { text-align: right; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th.left, td.left { text-align: left; }
figure { margin: 1.2rem 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 1rem; }
figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .6rem; text-align: center; }
ul { padding-left: 1.2rem; } li { margin: .25rem 0; }
pre { background: #1d2430; color: #f2f4f7; padding: .9rem 1.1rem; border-radius: 8px; overflow-x: auto; }
.note { border-left: 4px solid var(--accent); background: #fff; padding: .7rem 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: .6rem 0; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def bench_html(report: BenchReport, figures: dict[str, bytes]) -> str:
    """The page. `figures` are PNGs by name, as `figures.bench_figures` makes them."""
    headers, cells = tables.bench_cells(report)
    detail_headers, details = tables.detail_cells(report)
    body = [
        "<h1>firp bench</h1>",
        f'<p class="lead">{escape(tables.settings_line(report))}.</p>',
        *map(_headline, by_teacher(report)),
        _table(headers, cells, headers.index("method") + 1),
        *(_figure(name, image) for name, image in figures.items() if name != pipeline.FIGURE),
        _pipeline(report, figures.get(pipeline.FIGURE)),
        "<h2>Same output?</h2>",
        _lossless(report),
        "<h2>Details</h2>",
        _table(detail_headers, details, detail_headers.index("tree") + 1),
        "<h2>How to read this</h2>",
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in tables.reading_notes(report)) + "</ul>",
        "<h2>Environment</h2>",
        _pairs([*tables.environment_items(report.environment), *_teacher_items(report)]),
        "<h2>Reproduce</h2>",
        f"<pre>{escape(tables.command_line(report.environment))}</pre>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>firp bench</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _headline(report: BenchReport) -> str:
    """The best method of one teacher in one sentence."""
    whole = [row for row in report.rows if row.category == "all" and row.method not in ("ar", "hf") and row.speedup]
    whole = [row for row in whole if row.dataset == "all"] or whole
    if not whole:
        return ""
    best = max(whole, key=lambda row: row.speedup or 0.0)
    length = f"{best.accepted_length:.2f} tokens per {f'{best.pipeline.loops} ticks' if best.pipeline else 'step'}"
    over_hf = f" and {best.speedup_hf:.2f} times transformers generate" if best.speedup_hf else ""
    owner = f"Teacher {escape(best.teacher)}: " if best.teacher else ""
    return (
        f'<p class="headline">{owner}<strong>{escape(best.method)}</strong> decodes {best.speedup:.2f} times as fast '
        f"as plain decoding in the same engine{over_hf}, at {length} ({escape(best.dataset)}).</p>"
    )


def _table(headers: Sequence[str], cells: tables.Cells, left: int) -> str:
    """The first `left` columns flush left."""

    def line(tag: str, values: Sequence[str]) -> str:
        marked = (
            f"<{tag}{' class=left' if place < left else ''}>{escape(value)}</{tag}>"
            for place, value in enumerate(values)
        )
        return "<tr>" + "".join(marked) + "</tr>"

    rows = "\n".join(line("td", values) for values in cells)
    head = f"<thead>{line('th', headers)}</thead>"
    return f'<div class="card"><table>\n{head}\n<tbody>{rows}</tbody>\n</table></div>'


def _figure(name: str, image: bytes) -> str:
    caption = escape(CAPTIONS.get(name, name.replace("_", " ")))
    data = base64.b64encode(image).decode("ascii")
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _pipeline(report: BenchReport, occupancy: bytes | None) -> str:
    """What pipelines did, where they cannot gain, and where a tick goes; empty without pipelines."""
    headers, cells = pipeline.pipeline_cells(report)
    if not cells:
        return ""
    note, (tick_headers, ticks) = pipeline.pipeline_note(report), pipeline.tick_cells(report)
    named = headers.index("method") + 1
    columns = [" ".join(line[:named]) for line in cells]
    lines = [[header, *(line[place] for line in cells)] for place, header in enumerate(headers) if place >= named]
    parts = [
        "<h2>Pipeline</h2>",
        f'<p class="note">{escape(note)}.</p>' if note else "",
        _table(["", *columns], lines, 1),
        _figure(pipeline.FIGURE, occupancy) if occupancy else "",
        f"<p>Where a tick goes, in milliseconds:</p>{_table(tick_headers, ticks, 1)}" if ticks else "",
    ]
    return "\n".join(part for part in parts if part)


def _lossless(report: BenchReport) -> str:
    """What was compared, the note on differences, and where they are."""
    reference = report.settings.get("reference")
    if not reference:
        return (
            "<p>Sampled output is not compared token by token.</p>"
            if report.settings.get("temperature")
            else ("<p>Nothing to compare with: neither hf nor ar was measured.</p>")
        )
    whole = [row for row in report.rows if row.category == "all" and row.dataset != "all" and row.lossless.compared]
    counts = ", ".join(
        f"{row_label(row)} {row.lossless.identical} of {row.lossless.compared} ({row.dataset})" for row in whole
    )
    text = f"<p>Outputs identical to {escape(reference)}'s, token for token: {escape(counts)}.</p>"
    note = tables.lossless_note(report)
    marks = [(row, mark) for row in whole for mark in row.lossless.divergences]
    if not note:
        return text
    cells = [
        [
            row.method,
            row.dataset,
            str(mark.prompt),
            str(mark.position),
            str(mark.expected),
            str(mark.got),
            tables.DASH if mark.logit_gap is None or math.isnan(mark.logit_gap) else f"{mark.logit_gap:.3g}",
        ]
        for row, mark in marks[:DIVERGENCES_SHOWN]
    ]
    headers = ["method", "data set", "prompt", "new token", "expected", "got", "logit gap"]
    headers, cells = teacher_column([row for row, _ in marks[:DIVERGENCES_SHOWN]], headers, cells)
    more = f"<p>{len(marks) - len(cells)} more stand in bench.json.</p>" if len(marks) > len(cells) else ""
    return f'{text}<p class="note">{escape(note)}.</p>{_table(headers, cells, headers.index("prompt"))}{more}'


def _teacher_items(report: BenchReport) -> list[tuple[str, str]]:
    items = []
    for teacher in (part.teacher for part in by_teacher(report)):
        shape = f"{teacher.get('layers')} layers, hidden size {teacher.get('hidden_size')}"
        size = f"{teacher.get('parameters', 0):,} parameters"
        items.append(("teacher", f"{teacher.get('name')}: {shape}, {size}, weights {teacher.get('fingerprint')}"))
    return items


def _pairs(items: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in items) + "</dl>"
