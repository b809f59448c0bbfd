"""Figures of `firp bench`, narrow enough for the page of a telephone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from firp_cli.reports.canvas import COLOURS, INK, MARKERS, PAPER, SOFT, Picture, canvas, legend, picture
from firp_cli.reports.cells import group_name, main_rows, measured, parts_of, published, short_label
from firp_cli.reports.pipeline_figures import occupancy
from firp_cli.reports.speed_tables import pipeline_rows
from firp_cli.results import UNDRAFTED, BenchReport, BenchRow, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 4.0  # inches, for which a telephone's page has room
NAME, BAR, MARK = 0.22, 0.16, 0.1  # inches of a name, of a bar and of a marker below it
Values = Callable[[BenchRow], tuple[float | None, Interval | None]]


def bench_figures(report: BenchReport) -> dict[str, Picture]:
    """Return figures by name, without those that would be empty: `speedup`, `speedup_by_group` with several data sets
    or categories, `acceptance` by step, `histogram` of accepted lengths, `parts` of a step, and for pipelines
    `occupancy`.
    """
    main, rows = measured(main_rows(report)), measured(report.rows)
    drafted = [row for row in main if row.acceptance_by_step]
    figures = {}
    if any(row.speedup or row.speedup_hf for row in main):
        figures["speedup"] = _speedup(main, published(report))
    if len({group_name(row) for row in rows}) > 1 and any(row.speedup for row in rows):
        figures["speedup_by_group"] = _speedup_by_group(rows)
    if drafted:
        figures["acceptance"] = _acceptance(drafted)
    if drafted := [row for row in main if sum(row.accepted_histogram[2:])]:
        figures["histogram"] = _histogram(drafted)
    if timed := [row for row in main if sum(parts_of(row).values())]:
        figures["parts"] = _parts(timed)
    flowing = {short_label(row): pipeline for row, pipeline in pipeline_rows(main) if pipeline.occupancy}
    if flowing:
        figures["occupancy"] = occupancy(flowing)
    return figures


def _marker(place: int) -> str:
    """Return a marker that the methods of the same colour do not have."""
    return MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]


def _errors(value: float | None, interval: Interval | None) -> tuple[float, float]:
    """Return the extent of the interval below and above the value."""
    if value is None or interval is None:
        return 0.0, 0.0
    return max(0.0, value - interval[0]), max(0.0, interval[1] - value)


def _named_lines(axes: Axes, names: Sequence[str], height: float) -> list[float]:
    """Write each name above its line of marks, which is `height` inches high; return the tops of the marks.

    The y axis counts inches from the top. Names take no room beside the axes, so that long ones fit a narrow figure.
    """
    tops = [place * (NAME + height + 0.08) + NAME for place in range(len(names))]
    axes.set_ylim(tops[-1] + height + 0.06, -0.02)
    axes.set_yticks([top - NAME / 2 for top in tops], names)
    axes.tick_params(axis="y", length=0, pad=-3)
    for label in axes.get_yticklabels():
        label.set(ha="left", weight="bold", bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.8})
    axes.grid(visible=False, axis="y")
    return tops


def _height(lines: int, height: float) -> float:
    """Return the inches of a figure with so many lines of marks, axis and legend included."""
    return 1.0 + lines * (NAME + height + 0.08)


def _speedup(rows: Sequence[BenchRow], spec_bench: bool) -> Picture:
    """Draw the speedup of each method over both baselines with intervals, and in Spec-Bench's definition if asked."""
    series: list[tuple[str, Values]] = [
        ("over ar (same engine)", lambda row: (row.speedup, row.speedup_interval)),
        ("over hf (transformers)", lambda row: (row.speedup_hf, row.speedup_hf_interval)),
        (
            "over hf, as Spec-Bench defines it",
            lambda row: (row.speedup_with_prefill_hf, row.speedup_with_prefill_hf_interval),
        ),
    ]
    series = [item for item in series[: 3 if spec_bench else 2] if any(item[1](row)[0] for row in rows)]
    with canvas(WIDTH, _height(len(rows), BAR * len(series))) as figure:
        axes = figure.subplots()
        tops = _named_lines(axes, [short_label(row) for row in rows], BAR * len(series))
        for number, (label, values) in enumerate(series):
            colour = COLOURS[("over ar" not in label) + ("Spec" in label)]
            pairs = [values(row) for row in rows]
            errors = [_errors(*pair) for pair in pairs]
            places = [top + BAR * (number + 0.5) for top in tops]
            shown = {"elinewidth": 1.1, "capsize": 2.5, "ecolor": INK}
            lengths, ends = [value or 0.0 for value, _ in pairs], list(zip(*errors, strict=True))
            axes.barh(places, lengths, height=0.9 * BAR, xerr=ends, color=colour, error_kw=shown, label=label)
            for place, value, (_, above) in zip(places, lengths, errors, strict=True):
                if value:
                    end = (value + above, place)
                    axes.annotate(f"{value:.2f}", end, (4, 0), textcoords="offset points", va="center", size=8)
        axes.axvline(1.0, color=SOFT, linewidth=1.0, linestyle="--", zorder=0.4)  # below the names
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        for (upper, lower), top in zip(pairwise(rows), tops[1:], strict=True):
            if upper.teacher != lower.teacher:
                axes.axhline(top - NAME - 0.04, color=SOFT, linewidth=0.8)
        whose = "its own teacher's" if any(row.teacher for row in rows) else "the"
        axes.set_xlabel(f"decoding speed over {whose} baseline's (1 = as fast)")
        legend(figure, 2)
        return picture(figure)


def _speedup_by_group(rows: Sequence[BenchRow]) -> Picture:
    """Draw the speedup over `ar` in each data set and category, with intervals."""
    groups = list(dict.fromkeys(group_name(row) for row in rows))
    drafting = [row for row in rows if row.speedup and row.method not in UNDRAFTED]
    methods = list(dict.fromkeys(short_label(row) for row in drafting or rows if row.speedup))
    height = MARK * len(methods)
    with canvas(WIDTH, _height(len(groups), height)) as figure:
        axes = figure.subplots()
        tops = dict(zip(groups, _named_lines(axes, groups, height), strict=True))
        for number, method in enumerate(methods):
            chosen = [row for row in rows if short_label(row) == method and row.speedup]
            errors = [_errors(row.speedup, row.speedup_interval) for row in chosen]
            axes.errorbar(
                [row.speedup or 0.0 for row in chosen],
                [tops[group_name(row)] + MARK * (number + 0.5) for row in chosen],
                xerr=list(zip(*errors, strict=True)),
                fmt=_marker(number),
                color=COLOURS[number % len(COLOURS)],
                markersize=4,
                elinewidth=1.1,
                label=method,
            )
        axes.axvline(1.0, color=SOFT, linewidth=1.0, linestyle="--", zorder=0.4)
        whose = "its own teacher's ar" if any(row.teacher for row in rows) else "ar"
        axes.set_xlabel(f"decoding speed over {whose} (1 = as fast)")
        legend(figure, 3)
        return picture(figure)


def _acceptance(rows: Sequence[BenchRow]) -> Picture:
    """Draw the share of steps that accepted at least i drafts."""
    with canvas(WIDTH, 2.9 + 0.16 * len(rows)) as figure:
        axes = figure.subplots()
        for place, row in enumerate(rows):
            style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "marker": _marker(place)}
            steps = range(1, len(row.acceptance_by_step) + 1)
            label = f"{short_label(row)} ({row.accepted_length:.2f})"
            axes.plot(steps, row.acceptance_by_step, markersize=5, label=label, **style)
        deepest = max(len(row.acceptance_by_step) for row in rows)
        axes.set_xticks(range(1, deepest + 1, max(1, deepest // 10)))
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("drafted tokens i")
        axes.set_ylabel("share of steps accepting at least i")
        legend(figure, 1)
        return picture(figure)


def _histogram(rows: Sequence[BenchRow]) -> Picture:
    """Draw the share of steps that emitted each number of tokens: a panel for each method, its mean marked."""
    longest = max(len(row.accepted_histogram) for row in rows)
    with canvas(WIDTH, 0.75 + 0.72 * len(rows)) as figure:
        panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
        most = max(max(row.accepted_histogram) / sum(row.accepted_histogram) for row in rows)
        for place, (axes, row) in enumerate(zip(panels, rows, strict=True)):
            shares = [count / sum(row.accepted_histogram) for count in row.accepted_histogram]
            axes.bar(range(1, len(shares)), shares[1:], width=0.8, color=COLOURS[place % len(COLOURS)])
            axes.axvline(row.accepted_length, color=INK, linewidth=1.0, linestyle=":")
            axes.set_ylim(0, 1.1 * most)
            axes.grid(visible=False, axis="x")
            axes.set_title(f"{short_label(row)}, mean {row.accepted_length:.2f}", size=9, pad=3)
        panels[-1].set_xticks(range(1, longest, max(1, longest // 12)))
        panels[-1].set_xlabel("tokens emitted by a step (dotted: mean)")
        figure.supylabel("share of steps", size=9)
        return picture(figure)


def _parts(rows: Sequence[BenchRow]) -> Picture:
    """Draw the milliseconds of a step by part as stacked bars, and those of a step in the timed runs."""
    names = list(dict.fromkeys(name for row in rows for name in parts_of(row)))
    height = 1.5 * BAR
    with canvas(WIDTH, _height(len(rows), height) + 0.12 * len(names)) as figure:
        axes = figure.subplots()
        tops = _named_lines(axes, [short_label(row) for row in rows], height)
        places = [top + height / 2 for top in tops]
        ends = [0.0] * len(rows)
        for number, name in enumerate(names):
            lengths = [parts_of(row).get(name, 0.0) for row in rows]
            colour = COLOURS[number % len(COLOURS)]
            axes.barh(places, lengths, left=ends, height=0.9 * height, color=colour, label=name)
            ends = [end + length for end, length in zip(ends, lengths, strict=True)]
        for place, end in zip(places, ends, strict=True):
            axes.annotate(f"{end:.2f}", (end, place), (5, 0), textcoords="offset points", va="center", size=8)
        style: dict[str, Any] = {"fmt": "|", "color": INK, "markersize": 13, "markeredgewidth": 1.6}
        whole = [row.step_milliseconds if row.steps else math.nan for row in rows]
        axes.errorbar(whole, places, label="whole step, timed runs", **style)
        axes.margins(x=0.14)
        axes.set_xlim(left=0)
        axes.set_xlabel("milliseconds of a step")
        legend(figure, 3)
        return picture(figure)
