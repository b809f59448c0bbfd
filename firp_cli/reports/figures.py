"""Figures of `firp bench` and `firp eval` as PNG bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from firp_cli.reports.canvas import COLOURS, MARKERS, canvas, legend, png
from firp_cli.reports.cells import group_name, main_rows, row_label
from firp_cli.reports.speed_tables import pipeline_rows
from firp_cli.results import UNDRAFTED, BenchReport, BenchRow, EvalReport, PipelineReport

LABELLED_BARS = 16  # with more there is no room for labels


def bench_figures(report: BenchReport) -> dict[str, bytes]:
    """Return PNGs by name: `speedup`, `acceptance`, with several data sets or categories `speedup_by_group`, and for
    pipelines `occupancy`.
    """
    main = main_rows(report)
    drafted = [row for row in main if row.acceptance_by_step]
    figures = {}
    if any(row.speedup or row.speedup_hf for row in main):
        figures["speedup"] = _speedup(main)
    if drafted:
        figures["acceptance"] = _acceptance(drafted)
    if len({group_name(row) for row in report.rows}) > 1 and any(row.speedup for row in report.rows):
        figures["speedup_by_group"] = _speedup_by_group(report.rows)
    flowing = {row_label(row): pipeline for row, pipeline in pipeline_rows(main) if pipeline.occupancy}
    if flowing:
        figures["occupancy"] = _occupancy(flowing)
    return figures


def _errors(row: BenchRow) -> tuple[float, float]:
    """Return the extent of the interval below and above the speedup."""
    if row.speedup is None or row.speedup_interval is None:
        return 0.0, 0.0
    return max(0.0, row.speedup - row.speedup_interval[0]), max(0.0, row.speedup_interval[1] - row.speedup)


def _speedup(rows: Sequence[BenchRow]) -> bytes:
    """Draw the speedup of each method over both baselines, with the interval over `ar`."""
    with canvas(6.4, 0.9 + 0.55 * len(rows)) as figure:
        axes = figure.subplots()
        places = list(range(len(rows)))
        bars = 0.36
        axes.barh(
            [place - bars / 2 for place in places],
            [row.speedup or 0.0 for row in rows],
            height=bars,
            xerr=list(zip(*(_errors(row) for row in rows), strict=True)),
            color=COLOURS[0],
            error_kw={"elinewidth": 1.2, "capsize": 3, "ecolor": "#222222"},
            label="over ar, autoregressive decoding in the same engine (95% interval)",
        )
        if any(row.speedup_hf for row in rows):
            values = [row.speedup_hf or 0.0 for row in rows]
            axes.barh([p + bars / 2 for p in places], values, height=bars, color=COLOURS[1], label="over hf generate")
        for place, row in enumerate(rows):
            for offset, value, error in ((-bars / 2, row.speedup, _errors(row)[1]), (bars / 2, row.speedup_hf, 0.0)):
                if value:
                    text = f"{value:.2f}"
                    axes.annotate(
                        text, (value + error, place + offset), (4, 0), textcoords="offset points", va="center"
                    )
        axes.axvline(1.0, color="#555555", linewidth=1.0, linestyle="--")
        axes.set_yticks(places, [row_label(row) for row in rows])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        for place, (above, below) in enumerate(pairwise(rows)):
            if above.teacher != below.teacher:
                axes.axhline(place + 0.5, color="#bbbbbb", linewidth=0.8)
        whose = "its own teacher's" if any(row.teacher for row in rows) else "the"
        axes.set_xlabel(f"decoding speed relative to {whose} baseline (ratio; 1 = as fast)")
        figure.legend(loc="outside upper left", ncols=2)
        return png(figure)


def _acceptance(rows: Sequence[BenchRow]) -> bytes:
    """Draw the share of steps that accepted at least i drafts (left) and the tokens emitted by a step (right)."""
    with canvas(8.4, 3.2) as figure:
        left, right = figure.subplots(1, 2)
        deepest = max(len(row.accepted_histogram) for row in rows)
        width = 0.8 / len(rows)
        for place, row in enumerate(rows):
            colour = COLOURS[place % len(COLOURS)]
            steps = range(1, len(row.acceptance_by_step) + 1)
            label = f"{row_label(row)} ({row.accepted_length:.2f} tokens per step)"
            marker = MARKERS[place % len(MARKERS)]
            left.plot(steps, row.acceptance_by_step, color=colour, marker=marker, markersize=5, label=label)
            total = sum(row.accepted_histogram) or 1
            lengths = range(1, len(row.accepted_histogram))
            shares = [row.accepted_histogram[length] / total for length in lengths]
            offset = (place - (len(rows) - 1) / 2) * width
            right.bar([length + offset for length in lengths], shares, width=width, color=colour)
        left.set_xticks(range(1, deepest - 1))
        left.set_ylim(0, 1)
        left.set_xlabel("drafted tokens i")
        left.set_ylabel("share of steps accepting at least i")
        right.set_xticks(range(1, deepest))
        right.set_ylim(bottom=0)
        right.grid(visible=False, axis="x")
        right.set_xlabel("tokens emitted by a step (bonus included)")
        right.set_ylabel("share of steps")
        legend(figure, 3)
        return png(figure)


def _speedup_by_group(rows: Sequence[BenchRow]) -> bytes:
    """Draw the speedup over `ar` in each data set and category, with intervals."""
    groups = list(dict.fromkeys(group_name(row) for row in rows))
    drafting = [row for row in rows if row.speedup and row.method not in UNDRAFTED]
    methods = list(dict.fromkeys(row_label(row) for row in drafting or rows if row.speedup))
    with canvas(6.8, 1.1 + 0.38 * len(groups)) as figure:
        axes = figure.subplots()
        for number, method in enumerate(methods):
            chosen = [row for row in rows if row_label(row) == method and row.speedup]
            offset = (number - (len(methods) - 1) / 2) * 0.6 / len(methods)
            axes.errorbar(
                [row.speedup or 0.0 for row in chosen],
                [groups.index(group_name(row)) + offset for row in chosen],
                xerr=list(zip(*(_errors(row) for row in chosen), strict=True)),
                fmt=MARKERS[number % len(MARKERS)],
                color=COLOURS[number % len(COLOURS)],
                markersize=5,
                elinewidth=1.2,
                label=method,
            )
        axes.axvline(1.0, color="#555555", linewidth=1.0, linestyle="--")
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylim(-0.6, len(groups) - 0.4)
        axes.invert_yaxis()
        whose = "its own teacher's ar" if any(row.teacher for row in rows) else "ar"
        axes.set_xlabel(f"decoding speed relative to {whose} (ratio, 95% interval; 1 = as fast)")
        legend(figure, 4)
        return png(figure)


def _occupancy(pipelines: Mapping[str, PipelineReport]) -> bytes:
    """Draw the tokens in flight by tick (left), and the accuracy of each exit with the corrected share (right)."""
    loops = sorted({pipeline.loops for pipeline in pipelines.values()})
    exits = sorted({loop for pipeline in pipelines.values() for loop in pipeline.exits})
    apart = len(exits) + 0.4  # x of the corrected share, beside the exits
    width = 0.8 / len(pipelines)
    bars_in_all = sum(len(pipeline.exits) + 1 for pipeline in pipelines.values())
    with canvas(8.4, 3.2) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
        for place, (method, pipeline) in enumerate(pipelines.items()):
            colour, offset = COLOURS[place % len(COLOURS)], (place - (len(pipelines) - 1) / 2) * width
            ticks = range(1, len(pipeline.occupancy) + 1)
            label = f"{method} ({pipeline.tokens_per_tick:.2f} tokens per tick)"
            left.plot(ticks, pipeline.occupancy, color=colour, linewidth=1.3, label=label)
            places = [*(exits.index(loop) for loop in pipeline.exits), apart]
            shares = [*pipeline.exit_accuracy, pipeline.corrected]
            bars = right.bar([at + offset for at in places], shares, width=width, color=colour)
            bars[-1].set(alpha=0.45, hatch="//", edgecolor="white")
            if bars_in_all <= LABELLED_BARS:
                right.bar_label(bars, fmt="%.2f", padding=2, size=8)
        for full in loops:
            left.axhline(full, color="#555555", linewidth=1.0, linestyle="--")
            left.text(0.99, full, f"r = {full}", transform=left.get_yaxis_transform(), ha="right", va="bottom")
        left.set_xlim(1, max(2, *(len(pipeline.occupancy) for pipeline in pipelines.values())))
        left.set_ylim(0, 1.15 * loops[-1])
        left.set_xlabel("tick")
        left.set_ylabel("mean tokens in flight")
        right.axvline(apart - 0.7, color="#bbbbbb", linewidth=0.8)
        right.set_xticks([*range(len(exits)), apart], [*map(str, exits), "corrected\nearly"])
        right.set_ylim(0, 1.08)
        right.grid(visible=False, axis="x")
        right.set_xlabel("exit loop: share that the last loop confirmed")
        right.set_ylabel("share of tokens")
        legend(figure, 3)
        return png(figure)


def eval_figures(report: EvalReport) -> dict[str, bytes]:
    """Return PNGs by name: `quality` by step, for predictors with pseudo states `similarity` by layer and step, and for
    pipelines `occupancy`.
    """
    figures = {"quality": _quality(report)}
    if report.similarity:
        figures["similarity"] = _similarity(report)
    if report.pipeline and report.pipeline.occupancy:
        figures["occupancy"] = _occupancy({"early exits": report.pipeline})
    return figures


def _quality(report: EvalReport) -> bytes:
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
        return png(figure)


def _similarity(report: EvalReport) -> bytes:
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
        return png(figure)


def _cell(values: Sequence[Any], step: int) -> float:
    value = values[step] if step < len(values) else None
    return math.nan if value is None else float(value)
