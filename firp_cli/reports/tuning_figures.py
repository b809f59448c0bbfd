"""Figures of `firp tune` as PNG bytes: cost of passes, performance of trees by size, accuracy of drafts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

from firp_cli.reports.canvas import COLOURS, MARKERS, PAPER, SOFT, Picture, canvas, legend, picture
from firp_cli.tune_results import CandidateRate, CostCheck, CostCurve, Reliability, Trial, TunedTree, TuneReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURED, PREDICTED, CHOSEN = COLOURS[5], COLOURS[0], COLOURS[2]
TICKS_APART = 0.055  # least distance, as a share of the axis
LONGEST_NAME = 28
LEAST_MARK, MOST_MARK = 10.0, 110.0  # areas in square points


def shortened(name: str) -> str:
    """Return a tree's name with at most LONGEST_NAME characters."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def nearest_curve(report: TuneReport) -> CostCurve:
    """Return the curve nearest to the first choice, by batch size and then context."""
    first = report.entries[0] if report.entries else None
    batch, context = (first.batch_size, first.context) if first else (1, 0)
    return min(report.cost.curves, key=lambda curve: (abs(curve.batch_size - batch), abs(curve.context - context)))


def near_checks(report: TuneReport, curve: CostCurve) -> list[CostCheck]:
    """Return the checks at a curve's batch size and at the context nearest to its own."""
    checks = [check for check in report.cost.checks if check.batch_size == curve.batch_size]
    nearest = min((check.context for check in checks), key=lambda context: abs(context - curve.context), default=0)
    return [check for check in checks if check.context == nearest]


def cost_figure(report: TuneReport) -> Picture:
    """Draw the milliseconds of a pass by its rows and parts, with the checks and the rows of the chosen tree."""
    curve = nearest_curve(report)
    whole = [sum(parts) for parts in zip(curve.lower, curve.upper, curve.head, strict=True)]
    split, layers = report.cost.split, report.cost.layers
    parts = [
        (whole, "whole pass", COLOURS[6]),
        *([(curve.lower, f"layers 1 to {split}", COLOURS[0])] if split > 0 else []),
        *([(curve.upper, f"layers {split + 1} to {layers}", COLOURS[1])] if split < layers else []),
        (curve.head, "norm and head", COLOURS[3]),
    ]
    with canvas(7.4, 3.6) as figure:
        axes = figure.subplots()
        for values, label, colour in parts:
            axes.plot(curve.rows, values, color=colour, marker=".", markersize=5, linewidth=1.5, label=label)
        checks = near_checks(report, curve)
        if checks:
            context = "" if checks[0].context == curve.context else f" at context {checks[0].context}"
            rows, times = [check.rows for check in checks], [check.measured for check in checks]
            predicted = [check.predicted for check in checks]
            if context:
                axes.plot(rows, predicted, "x", color=SOFT, markersize=6, label=f"predicted{context}")
            label = f"measured check{context}"
            axes.plot(rows, times, "o", color=MEASURED, mfc="none", mew=1.4, markersize=8, label=label)
        axes.set_ylim(0, 1.12 * max([*whole, *(check.measured for check in checks)]))
        axes.set_xlim(0, 1.03 * max([*curve.rows, *(check.rows for check in checks), *_chosen_rows(report)]))
        _mark_rows(axes, report)
        axes.set_xlabel("rows of a pass, per sequence")
        axes.set_ylabel("milliseconds")
        axes.set_title(_cost_title(report, curve))
        legend(figure, 5)
        return picture(figure)


def _cost_title(report: TuneReport, curve: CostCurve) -> str:
    title = f"Batch size {curve.batch_size}, context {curve.context}"
    count = len(report.cost.checks)
    checks = f"largest residual {report.cost.residual:.1%} at {count} check{'' if count == 1 else 's'}"
    return f"{title}: {checks}" if count else title


def _chosen(report: TuneReport) -> TunedTree | None:
    """Return the choice for the first batch size, if it is a tree."""
    return next((entry for entry in report.entries[:1] if entry.tree != "none"), None)


def _chosen_rows(report: TuneReport) -> list[int]:
    chosen = _chosen(report)
    return [chosen.rows] if chosen else []


def _mark_rows(axes: Axes, report: TuneReport) -> None:
    """Draw a vertical line at the rows of the chosen tree's step, labelled on the side that has room."""
    chosen = _chosen(report)
    if chosen:
        left, right = axes.get_xlim()
        rightwards = chosen.rows < (left + right) / 2
        text = f"{shortened(chosen.tree)}\n{chosen.rows} rows a step"
        _vertical(axes, chosen.rows, text, rightwards)


def _vertical(axes: Axes, x: float, text: str, rightwards: bool, colour: str = CHOSEN) -> None:
    axes.axvline(x, color=colour, linewidth=1.3, linestyle="--", zorder=1.5)
    axes.annotate(
        text,
        (x, 1.0),
        (5 if rightwards else -5, -3),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="left" if rightwards else "right",
        va="top",
        color=colour,
        size=8.5,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.0, "alpha": 0.8},
    )


def _doubling(axes: Axes, values: Iterable[int]) -> None:
    """Make the x axis logarithmic with base 2, with ticks at as many of `values` as have room."""
    ordered = sorted(set(values))
    low, high = math.log2(ordered[0]), math.log2(ordered[-1])
    room = (high - low) or 1.0
    ticks: list[int] = []
    for value in sorted(ordered, key=lambda value: (not math.log2(value).is_integer(), value)):  # powers of two first
        if all(abs(math.log2(value / tick)) >= TICKS_APART * room for tick in ticks):
            ticks.append(value)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(2 ** (low - 0.06 * room), 2 ** (high + 0.06 * room))


def nodes_figure(report: TuneReport) -> Picture:
    """Draw accepted length (left) and speedup (right) by number of nodes. Lines are predicted, markers measured."""
    ladder = sorted(report.ladder, key=lambda trial: trial.nodes)
    chosen = _chosen(report)
    with canvas(8.4, 3.4) as figure:
        panels = figure.subplots(1, 2)
        for axes, name, label in zip(
            panels,
            ("accepted_length", "speedup"),
            ("accepted length (tokens per step)", "speedup over autoregressive decoding"),
            strict=True,
        ):
            _predicted_and_measured(axes, [trial.nodes for trial in ladder], ladder, name)
            counts = [trial.nodes for trial in ladder]
            if chosen:
                value = getattr(chosen.predicted, name)
                mark = {
                    "marker": "*",
                    "markersize": 16,
                    "color": CHOSEN,
                    "alpha": 0.8,
                    "zorder": 1.8,
                    "linestyle": "none",
                }
                axes.plot([chosen.nodes], [value], label=f"chosen: {shortened(chosen.tree)}", **mark)
                counts.append(chosen.nodes)
            _doubling(axes, counts)
            axes.set_xlabel("nodes N of the tree, root included")
            axes.set_ylabel(label)
            axes.margins(y=0.12)
        panels[1].axhline(1.0, color=SOFT, linewidth=1.0, linestyle="--")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
        return picture(figure)


def _predicted_and_measured(axes: Axes, places: Sequence[int], trials: Sequence[Trial], name: str) -> None:
    """Draw a line of predictions, and open markers for measured trials. `name`: field of a Prediction."""
    values = [getattr(trial.predicted, name) for trial in trials]
    axes.plot(places, values, color=PREDICTED, marker=".", markersize=6, linewidth=1.5, label="predicted")
    pairs = zip(places, trials, strict=True)
    points = [(place, getattr(trial.measured, name)) for place, trial in pairs if trial.measured]
    if points:
        axes.plot(*zip(*points, strict=True), "o", color=MEASURED, mfc="none", mew=1.4, markersize=8, label="measured")


def batch_figure(report: TuneReport) -> Picture:
    """Draw the speedup of the best tree by batch size, and the break-even."""
    trials = sorted(report.batches, key=lambda trial: trial.batch_size)
    sizes = [trial.batch_size for trial in trials]
    with canvas(6.4, 3.4) as figure:
        axes = figure.subplots()
        _predicted_and_measured(axes, sizes, trials, "speedup")
        _name_sizes(axes, trials)
        axes.axhline(1.0, color=SOFT, linewidth=1.0, linestyle="--", label="autoregressive decoding")
        _doubling(axes, sizes)
        low, high = axes.get_ylim()
        room = 0.18 * (high - min(low, 1.0))
        axes.set_ylim(min(low - 0.6 * room, 1.0 - room), high + room)
        if report.break_even is None:
            axes.set_title("A tree pays at every batch size tried")
        else:
            axes.set_title(f"Break-even: no tree pays at batch size {report.break_even}")
            rightwards = math.log2(report.break_even) < (math.log2(sizes[0]) + math.log2(sizes[-1])) / 2
            _vertical(axes, report.break_even, "break-even", rightwards)
        axes.set_xlabel("batch size")
        axes.set_ylabel("speedup over autoregressive decoding")
        legend(figure, 3)
        return picture(figure)


def _name_sizes(axes: Axes, trials: Sequence[Trial]) -> None:
    """Write the number of nodes of each tree on the side of the line that has room; `none` below."""
    for trial, after in zip_longest(trials, trials[1:]):
        rising = after is not None and after.predicted.speedup > trial.predicted.speedup
        text, side, offset = f"{trial.nodes} nodes", "left", (5, -13 if rising else 6)
        if trial.tree == "none":
            text, side, offset = "none", "center", (0, -14)
        box = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}
        place = (trial.batch_size, trial.predicted.speedup)
        axes.annotate(text, place, offset, textcoords="offset points", ha=side, size=8, color=SOFT, bbox=box)


def acceptance_figure(report: TuneReport) -> Picture:
    """Draw the accuracy of each candidate by its order (left), and the reliability of drafted probabilities (right)."""
    steps = sorted({rate.step for rate in report.acceptance} | {item.step for item in report.reliability})
    with canvas(8.4, 3.7) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.1, 1.0))
        most = max((item.count for item in report.reliability), default=1)
        for place, step in enumerate(steps):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            _ranks(left, [item for item in report.acceptance if item.step == step], step, colour, marker)
            _bins(right, [item for item in report.reliability if item.step == step], most, colour, marker)
        deepest = max((item.rank for item in report.acceptance), default=0) + 1
        left.set_xticks(range(1, deepest + 1, max(1, math.ceil(deepest / 12))))
        left.set_ylim(bottom=0)
        left.set_xlabel("order of the candidate (1: most probable)")
        left.set_ylabel("share of accepted parents")
        left.set_title("Accuracy of each candidate")
        right.plot([0, 1], [0, 1], color=SOFT, linewidth=1.0, linestyle="--", zorder=1)
        right.set_xlim(0, 1)
        right.set_ylim(0, 1)
        right.set_xlabel("drafted probability")
        right.set_ylabel("share that was right")
        right.set_title("Reliability (marker area: candidates)")
        legend(figure, 4)
        return picture(figure)


def _ranks(axes: Axes, rates: Sequence[CandidateRate], step: int, colour: str, marker: str) -> None:
    """Draw the line of a draft step; its label gives the number of parents."""
    ordered = sorted(rates, key=lambda item: item.rank)
    counts = sorted({item.count for item in ordered})
    of = (
        "" if not counts else f" ({counts[0]:,} parents)" if len(counts) == 1 else f" ({counts[0]:,} to {counts[-1]:,})"
    )
    places, shares = [item.rank + 1 for item in ordered], [item.rate for item in ordered]
    axes.plot(places, shares, color=colour, marker=marker, markersize=4.5, label=f"step {step}{of}")


def _bins(axes: Axes, bins: Sequence[Reliability], most: int, colour: str, marker: str) -> None:
    """Draw the bins of a draft step; a marker's area grows with the count."""
    ordered = sorted(bins, key=lambda item: item.drafted)
    at, shares = [item.drafted for item in ordered], [item.accepted for item in ordered]
    areas = [LEAST_MARK + (MOST_MARK - LEAST_MARK) * item.count / most for item in ordered]
    axes.plot(at, shares, color=colour, linewidth=1.0, alpha=0.6)
    axes.scatter(at, shares, s=areas, color=colour, marker=marker, alpha=0.85, linewidths=0)
