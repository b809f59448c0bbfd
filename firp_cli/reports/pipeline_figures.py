"""Figure of SPEED pipelines, of benches and evaluations."""

from __future__ import annotations

from collections.abc import Mapping

from firp_cli.reports.canvas import COLOURS, GRID, SOFT, Picture, canvas, legend, picture
from firp_cli.results import PipelineReport

LABELLED_BARS = 16  # with more there is no room for labels


def occupancy(pipelines: Mapping[str, PipelineReport]) -> Picture:
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
            left.axhline(full, color=SOFT, linewidth=1.0, linestyle="--")
            left.text(0.99, full, f"r = {full}", transform=left.get_yaxis_transform(), ha="right", va="bottom")
        left.set_xlim(1, max(2, *(len(pipeline.occupancy) for pipeline in pipelines.values())))
        left.set_ylim(0, 1.15 * loops[-1])
        left.set_xlabel("tick")
        left.set_ylabel("mean tokens in flight")
        right.axvline(apart - 0.7, color=GRID, linewidth=0.8)
        right.set_xticks([*range(len(exits)), apart], [*map(str, exits), "corrected\nearly"])
        right.set_ylim(0, 1.08)
        right.grid(visible=False, axis="x")
        right.set_xlabel("exit loop: share that the last loop confirmed")
        right.set_ylabel("share of tokens")
        legend(figure, 3)
        return picture(figure)
