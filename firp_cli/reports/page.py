"""Parts of all HTML reports: the self-contained page, its tables and figures, and the closing sections."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from firp_cli.reports.cells import Cells, command_line, environment_items

WIDE = 1600  # pixels
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
figure { margin: 1.2rem 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 1rem;
  overflow-x: auto; }
figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figure img.wide { max-width: none; width: 90rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .6rem; text-align: center; }
ul { padding-left: 1.2rem; } li { margin: .25rem 0; }
pre { background: #1d2430; color: #f2f4f7; padding: .9rem 1.1rem; border-radius: 8px; overflow-x: auto; }
.note { border-left: 4px solid var(--accent); background: #fff; padding: .7rem 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: .6rem 0; font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(title: str, body: Sequence[str]) -> str:
    """Return the whole document; empty parts of `body` are skipped."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def table(headers: Sequence[str], cells: Cells, left: int) -> str:
    """Return a table with the first `left` columns flush left."""

    def line(tag: str, values: Sequence[str]) -> str:
        marked = (
            f"<{tag}{' class=left' if place < left else ''}>{escape(value)}</{tag}>"
            for place, value in enumerate(values)
        )
        return "<tr>" + "".join(marked) + "</tr>"

    rows = "\n".join(line("td", values) for values in cells)
    head = f"<thead>{line('th', headers)}</thead>"
    return f'<div class="card"><table>\n{head}\n<tbody>{rows}</tbody>\n</table></div>'


def figure(caption: str, image: bytes) -> str:
    """Return an embedded PNG, scaled to the page; one wider than WIDE keeps its size and scrolls, to stay readable."""
    caption = escape(caption)
    kind = ' class="wide"' if int.from_bytes(image[16:20], "big") > WIDE else ""
    data = base64.b64encode(image).decode("ascii")
    source = f"data:image/png;base64,{data}"
    return f'<figure><img{kind} alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'


def closing(notes: Sequence[str], environment: dict[str, Any], teachers: Sequence[dict[str, Any]]) -> list[str]:
    """Return the last sections: definitions, environment with the teachers, command line."""
    return [
        "<h2>How to read this</h2>",
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in notes) + "</ul>",
        "<h2>Environment</h2>",
        _pairs([*environment_items(environment), *map(_teacher_item, teachers)]),
        "<h2>Reproduce</h2>",
        f"<pre>{escape(command_line(environment))}</pre>",
    ]


def _teacher_item(teacher: dict[str, Any]) -> tuple[str, str]:
    shape = f"{teacher.get('layers')} layers, hidden size {teacher.get('hidden_size')}"
    size = f"{teacher.get('parameters', 0):,} parameters"
    return "teacher", f"{teacher.get('name')}: {shape}, {size}, weights {teacher.get('fingerprint')}"


def _pairs(items: Sequence[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in items) + "</dl>"
