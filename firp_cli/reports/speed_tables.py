"""Tables and lines on SPEED pipelines for all reports: ticks, their cost, and the predicted speedup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from firp_cli.reports.cells import (
    Cells,
    group_name,
    main_rows,
    markdown_table,
    number,
    rich_table,
    row_label,
    teacher_column,
)
from firp_cli.results import BenchReport, BenchRow, EvalReport, PipelineReport, TickCost

if TYPE_CHECKING:
    from rich.console import RenderableType

FIGURE = "occupancy"  # shown in the pipeline's own section
HEADERS = (
    "loops",
    "ticks",
    "tokens per tick",
    "idle ticks",
    "flushes",
    "flushed tokens",
    "corrected early",
    "ar tokens",
    "exit loops",
    "exit accuracy",
    "tick ms / loop ms",
    "predicted speedup",
    "measured speedup",
)
TICK_HEADERS = (
    "method",
    "context",
    "tick ms",
    "layers",
    "heads",
    "decision",
    "one loop of one token",
    "tick / loop",
    "ar step",
    "layers for 1, 2, ... tokens",
)
NO_GAIN = (
    "the teacher's loops do not share layers, so every tick runs all of them and no gain is to be expected on one "
    "device (--gpus N distributes the groups over N devices)"
)
NOTES = (
    "Rows with a pipeline (SPEED): a step is a tick, in which every token in flight runs one more of the r loops. "
    "Accepted length is tokens per r ticks: 1 for autoregressive decoding, r for a full pipeline.",
    "Tokens per tick: emitted tokens over ticks; 1 for a full pipeline, 1 / r for autoregressive decoding. Idle ticks: "
    "share of ticks that emitted no token. Ar tokens: decoded autoregressively while the pipeline was slower.",
    "Flushes: changed predictions that discarded younger tokens; flushed tokens: share of started tokens that were "
    "discarded. Corrected early: share of tokens whose early prediction of the next token changed in a later loop. "
    "Exit accuracy: by exit loop, share of predictions that the last loop confirmed.",
    "Predicted speedup: tokens per tick x r / relative tick cost, for tokens in the pipeline. The relative tick cost "
    "is a full tick over one loop of one token (an autoregressive step / r), measured separately from decoding.",
)


def pipeline_rows(rows: Sequence[BenchRow]) -> list[tuple[BenchRow, PipelineReport]]:
    """Return the rows that have a pipeline, with it."""
    return [(row, row.pipeline) for row in rows if row.pipeline is not None]


def pipeline_cells(report: BenchReport) -> tuple[list[str], Cells]:
    """Return headers and cells, one line per row with a pipeline; leading columns name the teacher and the group if
    there are several.
    """
    several = len({group_name(row) for row in report.rows}) > 1
    pairs = pipeline_rows(report.rows)
    cells = []
    for row, pipeline in pairs:
        group = [group_name(row)] if several else []
        cells.append([*group, row.method, *_figures(pipeline, row.speedup)])
    headers = [*(["prompts"] if several else []), "method", *HEADERS]
    return teacher_column([row for row, _ in pairs], headers, cells)


def _figures(pipeline: PipelineReport, speedup: float | None) -> list[str]:
    """Return cells under HEADERS."""
    cost = pipeline.cost
    return [
        str(pipeline.loops),
        str(pipeline.ticks),
        number(pipeline.tokens_per_tick),
        number(pipeline.idle),
        str(pipeline.flushes),
        number(pipeline.flushed),
        number(pipeline.corrected),
        str(pipeline.plain_tokens),
        " ".join(map(str, pipeline.exits)),
        " ".join(map(number, pipeline.exit_accuracy)),
        f"{number(cost.tick)} / {number(cost.loop)} ({number(cost.relative)})" if cost else number(None),
        number(pipeline.predicted_speedup),
        number(speedup),
    ]


def tick_cells(report: BenchReport) -> tuple[list[str], Cells]:
    """Return headers and cells of the parts of a tick in milliseconds, one line per method with a measured tick."""
    cells = [
        [
            method,
            str(cost.context),
            *map(number, (cost.tick, cost.layers, cost.heads, cost.decision, cost.loop, cost.relative, cost.step)),
            " ".join(map(number, cost.rows)),
        ]
        for method, cost in _costs(report).items()
    ]
    return list(TICK_HEADERS), cells


def _costs(report: BenchReport) -> dict[str, TickCost]:
    """Return measured ticks by method; all groups of a method have the same."""
    return {row_label(row): pipeline.cost for row, pipeline in pipeline_rows(report.rows) if pipeline.cost}


def tick_line(cost: TickCost) -> str:
    """Return the parts of a tick in one line."""
    return (
        f"tick {number(cost.tick)} ms: layers {number(cost.layers)}, heads {number(cost.heads)}, decision "
        f"{number(cost.decision)}; one loop of one token {number(cost.loop)} (a tick costs {number(cost.relative)} x "
        f"that); layers for 1..{len(cost.rows)} tokens {' '.join(map(number, cost.rows))}"
    )


def pipeline_note(report: BenchReport) -> str | None:
    """Return a note on pipelines that cannot gain: no layers are shared, and there is one process. Else None."""
    pairs = pipeline_rows(report.rows)
    methods = dict.fromkeys(row_label(row) for row, pipeline in pairs if not pipeline.shared and pipeline.ranks == 1)
    return f"{', '.join(methods)}: {NO_GAIN}" if methods else None


def pipeline_tables(report: BenchReport) -> list[RenderableType]:
    """Return the tables for the terminal: one column per method and one line per metric, then the parts of a tick.
    Empty without pipelines.
    """
    from rich.text import Text

    pairs = pipeline_rows(main_rows(report))
    if not pairs:
        return []
    columns = [[row_label(row), *_figures(pipeline, row.speedup)] for row, pipeline in pairs]
    headers, *cells = map(list, zip(["pipeline", *HEADERS], *columns, strict=True))
    costs = _costs(report)
    lines = [
        Text(f"{method}: {tick_line(cost)}" if len(costs) > 1 else tick_line(cost)) for method, cost in costs.items()
    ]
    return [rich_table(headers, cells, left=1, fixed=False), *lines]


def pipeline_markdown(report: BenchReport, figures: Sequence[str]) -> list[str]:
    """Return the section of bench.md; empty without pipelines."""
    headers, cells = pipeline_cells(report)
    if not cells:
        return []
    ticks, note = tick_cells(report), pipeline_note(report)
    return [
        "## Pipeline\n",
        markdown_table(headers, cells),
        *([f"{note}.\n"] if note else []),
        *(["Parts of a tick, in milliseconds:\n", markdown_table(*ticks)] if ticks[1] else []),
        *([f"![{FIGURE}]({FIGURE}.png)\n"] if FIGURE in figures else []),
    ]


def eval_pipeline_lines(report: EvalReport) -> list[str]:
    """Return lines for the terminal, below the table of the exits; empty without a pipeline."""
    pipeline = report.pipeline
    if pipeline is None:
        return []
    loops, rate = pipeline.loops, number(pipeline.tokens_per_tick)
    lines = [
        f"tokens per tick: {rate} of at most 1; {number(1 / loops)} for autoregressive decoding ({loops} loops)",
        f"corrected early: {number(pipeline.corrected)} of the tokens; idle ticks: {number(pipeline.idle)}",
    ]
    if pipeline.cost:
        relative = number(pipeline.cost.relative)
        predicted = f"{number(pipeline.predicted_speedup)} ({rate} tokens per tick x {loops} / {relative})"
        lines += [tick_line(pipeline.cost), f"predicted speedup: {predicted}"]
    return lines if pipeline.shared or pipeline.ranks > 1 else [*lines, NO_GAIN]
