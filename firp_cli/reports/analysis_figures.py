"""Figures of the papers' analyses (`firp eval --analysis`)."""

from __future__ import annotations

from collections.abc import Sequence

from firp_cli.reports.canvas import COLOURS, MARKERS, Picture, canvas, legend, picture
from firp_cli.results import Analysis, Panel

STYLES = ("-", "--", ":")


def analysis_figures(analyses: Sequence[Analysis]) -> dict[str, Picture]:
    """Return a figure by name, `analysis-NAME`, for each analysis with a line to draw."""
    drawn = [analysis for analysis in analyses if any(map(_points, analysis.panels))]
    return {f"analysis-{analysis.name}": _panels(analysis.panels) for analysis in drawn}


def _points(panel: Panel) -> bool:
    return any(panel.lines.values())


def _panels(panels: Sequence[Panel]) -> Picture:
    """Draw the panels side by side under one legend; equal names have equal colours."""
    names = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    shown: set[str] = set()
    with canvas(max(5.6, 4.2 * len(panels)), 3.2 + 0.08 * len(names)) as figure:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for label, points in panel.lines.items():
                place = names.index(label)
                axes.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    color=COLOURS[place % len(COLOURS)],
                    marker=MARKERS[place % len(MARKERS)],
                    linestyle=STYLES[place // len(COLOURS) % len(STYLES)],
                    markersize=4,
                    label=None if label in shown else label,
                )
                shown.add(label)
            if panel.doubling:
                axes.set_xscale("log", base=2)
                ticks = sorted({x for points in panel.lines.values() for x, _ in points})
                axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            else:
                axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel(panel.x)
            axes.set_ylabel(panel.y)
            axes.margins(y=0.08)
        legend(figure, 4)
        return picture(figure)
