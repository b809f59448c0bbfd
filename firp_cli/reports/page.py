"""Parts of all HTML reports: the self-contained page, its tables and figures, and the closing sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from firp_cli.reports.canvas import Picture
from firp_cli.reports.cells import Cells, command_line, environment_items
from firp_cli.reports.style import CSS
from firp_cli.reports.svg import inline_svg


def page(title: str, body: Sequence[str]) -> str:
    """Return the whole document; empty parts of `body` are skipped."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """Return a heading and the parts that are not empty; nothing if all are."""
    body = "\n".join(part for part in parts if part)
    return f"<h2>{escape(title)}</h2>\n{body}" if body else ""


def folded(title: str, body: str, opened: bool = False) -> str:
    """Return a part that a click opens."""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>\n{body}\n</details>"


def listed(lines: Sequence[str]) -> str:
    """Return a list; nothing for no lines."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def table(headers: Sequence[str], cells: Cells, left: int, across: Mapping[int, str] | None = None) -> str:
    """Return a table with the first `left` columns flush left; one such column stays in view while others scroll.

    `across`: by line, a text in place of the other columns.
    """

    def line(tag: str, values: Sequence[str], text: str = "") -> str:
        marked = [
            f"<{tag}{' class=left' if place < left else ''}>{escape(value)}</{tag}>"
            for place, value in enumerate(values[:left] if text else values)
        ]
        if text:
            marked.append(f'<td class=across colspan="{len(values) - left}"><span>{escape(text)}</span></td>')
        return "<tr>" + "".join(marked) + "</tr>"

    texts = across or {}
    rows = "\n".join(line("td", values, texts.get(place, "")) for place, values in enumerate(cells))
    head = f"<thead>{line('th', headers)}</thead>"
    kind = "card pinned" if left == 1 else "card"
    return f'<div class="{kind}"><table>\n{head}\n<tbody>{rows}</tbody>\n</table></div>'


def figure(name: str, caption: str, picture: Picture | None) -> str:
    """Return an embedded figure, or nothing without one. `name`: unique on the page."""
    if picture is None:
        return ""
    return f"<figure>{inline_svg(picture.svg, name, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def closing(notes: Sequence[str], environment: dict[str, Any], teachers: Sequence[dict[str, Any]]) -> list[str]:
    """Return the last sections: definitions, environment with the teachers, command line."""
    return [
        "<h2>How to read this</h2>",
        listed(notes),
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
