"""What `firp tune` foretold for a bench row's tree, beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from firp_cli.reports.cells import DASH, Cells, group_name, main_rows, number, row_label
from firp_cli.results import BenchReport, BenchRow

HEADERS = ("predicted accepted length", "predicted speedup")
NOTE = (
    "Predicted: what firp tune foretold for this tree, batch size and machine, from acceptance on its calibration "
    "prompts and the measured cost of passes. Off by: predicted over measured, minus 1."
)


def disagreement(predicted: float | None, measured: float | None) -> float | None:
    """How far a prediction is off, relative to what was measured; None where one of them is missing."""
    if predicted is None or not measured or math.isnan(predicted) or math.isnan(measured):
        return None
    return predicted / measured - 1


def off(predicted: float | None, measured: float | None) -> str:
    """`2% off`; a dash where there is nothing to compare."""
    value = disagreement(predicted, measured)
    return DASH if value is None else f"{abs(value):.0%} off"


def predicted_cells(rows: Sequence[BenchRow]) -> tuple[list[str], Cells]:
    """Headers and cells that follow a table of `rows`, one line each; none of both where nothing was foretold."""
    if not any(row.predicted for row in rows):
        return [], [[] for _ in rows]
    return list(HEADERS), [_cells(row) for row in rows]


def _cells(row: BenchRow) -> list[str]:
    foretold = row.predicted
    if foretold is None:
        return [DASH, DASH]
    pairs = ((foretold.accepted_length, row.accepted_length), (foretold.speedup, row.speedup))
    return [f"{number(predicted)} ({off(predicted, measured)})" for predicted, measured in pairs]


def predicted_lines(report: BenchReport) -> list[str]:
    """One line for each main row that has a prediction: `firp: predicted 1.41 x, 2% off; ...`."""
    rows = main_rows(report)
    several = len({group_name(row) for row in rows}) > 1
    lines = []
    for row in rows:
        if row.predicted:
            speedup, length = row.predicted.speedup, row.predicted.accepted_length
            lines.append(
                f"{f'{group_name(row)}: ' if several else ''}{row_label(row)}: "
                f"predicted {number(speedup)} x, {off(speedup, row.speedup)}; "
                f"accepted length {number(length)}, {off(length, row.accepted_length)}"
            )
    return lines
