"""SVG files of figures made part of a page: without what fetches or clashes, in the page's colours."""

from __future__ import annotations

import re
from html import escape

from firp_cli.reports.canvas import COLOURS, GRID, INK, PAPER, SOFT

VARIABLES = {
    **{colour: f"--series-{place}" for place, colour in enumerate(COLOURS)},
    INK: "--ink",
    SOFT: "--soft",
    GRID: "--line",
    PAPER: "--card",
}  # CSS variables of the page, which the dark scheme sets anew
COLOUR = re.compile(f"(?<=: )({'|'.join(VARIABLES)})\\b")
REFERENCE = re.compile(r'(url\(#|href="#)([^)"]+)')
IDENTITY = re.compile(r' id="([^"]*)"')
DROPPED = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|(?<=\s)\n", re.DOTALL)
POINTS = re.compile(r'viewBox="0 0 ([\d.]+) ([\d.]+)"')
SMALLEST, LARGEST = 1.1, 2.0  # pixels per point between which a figure scales with the page


def inline_svg(drawn: str, name: str, caption: str) -> str:
    """Return matplotlib's SVG file as an element of a page that scales with its width.

    `name` is unique on the page and prefixes the ids; ids that nothing refers to are left out.
    """
    found = POINTS.search(drawn)
    assert found, "no viewBox"
    width = float(found[1])
    _, _, content = drawn[drawn.index("<svg") :].partition(">")
    content = DROPPED.sub("", content)
    used = {match[2] for match in REFERENCE.finditer(content)}
    content = IDENTITY.sub(lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", content)
    content = REFERENCE.sub(rf"\g<1>{name}-\g<2>", content).replace("xlink:href", "href")
    content = re.sub(r"<g>\s*</g>\s*", "", content)
    content = COLOUR.sub(lambda match: f"var({VARIABLES[match[0]]})", content)
    size = f"width: 100%; min-width: {SMALLEST * width:.0f}px; max-width: {LARGEST * width:.0f}px"
    return f'<svg {found[0]} style="{size}" role="img" aria-label="{escape(caption)}">{content}'
