"""Figures of `firp eval`: quality of drafts by step, similarity of states, early exits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from firp_cli.reports.canvas import COLOURS, MARKERS, Picture, canvas, picture
from firp_cli.reports.pipeline_figures import occupancy
from firp_cli.results import EvalReport


def eval_figures(report: EvalReport) -> dict[str, Picture]:
    """Return figures by name: `quality` by step, for predictors with pseudo states `similarity` by layer and step, and
    for pipelines `occupancy`.
    """
    figures = {"quality": _quality(report)}
    if report.similarity:
        figures["similarity"] = _similarity(report)
    if report.pipeline and report.pipeline.occupancy:
        figures["occupancy"] = occupancy({"early exits": report.pipeline})
    return figures


def _quality(report: EvalReport) -> Picture:
    """Draw top-1 and top-5 (left) and KL (right) by draft step, or by exit loop of a pipeline."""
    drafter = "exit" if report.pipeline else "draft"
    steps_are = "exit loop g (predicts the next token)" if report.pipeline else "step i (drafts the token i + 1 ahead)"
    with canvas(8.0, 3.1) as figure:
        left, right = figure.subplots(1, 2)
        steps = [item.step for item in report.steps]
        for name, values, place, above in (
            ("top-5", [item.top5 for item in report.steps], 1, 6),
            ("top-1", [item.top1 for item in report.steps], 0, -13 if report.pipeline else 6),
        ):
            left.plot(steps, values, color=COLOURS[place], marker=MARKERS[place], markersize=5, label=name)
            for step, value in zip(steps, values, strict=True):
                left.annotate(
                    f"{value:.2f}", (step, value), (0, above), textcoords="offset points", ha="center", size=8
                )
        left.set_ylim(0, 1.08)
        left.set_ylabel("share of anchors")
        left.set_title(f"The teacher's token among the {drafter}'s best")
        left.legend(loc="lower right" if report.pipeline else "upper right")  # exits rise, drafts fall
        right.plot(steps, [item.kl for item in report.steps], color=COLOURS[2], marker=MARKERS[2], markersize=5)
        right.set_ylim(0, 1.12 * max(item.kl for item in report.steps))
        right.set_ylabel(f"KL(teacher, {drafter}) in nats")
        right.set_title("Distance from the teacher's distribution")
        for axes in (left, right):
            axes.set_xticks(steps)
            axes.set_xlabel(steps_are)
            axes.margins(x=0.12)
        return picture(figure)


def _similarity(report: EvalReport) -> Picture:
    """Draw a heat map of cosine(pseudo, real), with layers upwards and steps to the right."""
    layers = sorted(report.similarity)
    steps = max(len(values) for values in report.similarity.values())
    grid = [[_cell(report.similarity[layer], step) for step in range(steps)] for layer in layers]
    finite = [value for line in grid for value in line if not math.isnan(value)]
    low = min([0.0, *finite])
    with canvas(2.2 + 0.75 * steps, 1.5 + 0.36 * len(layers)) as figure:
        axes = figure.subplots()
        image = axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis", vmin=low, vmax=1.0)
        for place, line in enumerate(grid):
            for step, value in enumerate(line):
                bright = not math.isnan(value) and (value - low) / (1.0 - low) > 0.6
                text = "" if math.isnan(value) else f"{value:.2f}"
                axes.text(step, place, text, ha="center", va="center", size=8, color="black" if bright else "white")
        axes.set_xticks(range(steps), [str(step + 1) for step in range(steps)])
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.grid(visible=False)
        axes.set_xlabel("step i")
        axes.set_ylabel("after layer")
        figure.colorbar(image, ax=axes, label="cosine(pseudo, real state)")
        return picture(figure)


def _cell(values: Sequence[Any], step: int) -> float:
    value = values[step] if step < len(values) else None
    return math.nan if value is None else float(value)
