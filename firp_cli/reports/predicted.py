"""Predictions of `firp tune` for the trees of bench rows, beside the measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence

from firp_cli.reports.cells import DASH, Cells, group_name, main_rows, number, row_label
from firp_cli.results import BenchReport, BenchRow

HEADERS = ("predicted accepted length", "predicted speedup")
NOTE = (
    "Predicted: by firp tune for this tree, batch size and machine, from acceptance on its calibration prompts and the "
    "measured cost of passes. Off by: predicted over measured, minus 1."
)


def disagreement(predicted: float | None, measured: float | None) -> float | None:
    """Return the relative error of a prediction, predicted / measured - 1; None if a value is missing."""
    if predicted is None or not measured or math.isnan(predicted) or math.isnan(measured):
        return None
    return predicted / measured - 1


def off(predicted: float | None, measured: float | None) -> str:
    """Return `2% off`; a dash if a value is missing."""
    value = disagreement(predicted, measured)
    return DASH if value is None else f"{abs(value):.0%} off"


def predicted_cells(rows: Sequence[BenchRow]) -> tuple[list[str], Cells]:
    """Return headers and cells to append to a table of `rows`, one line each; no headers without predictions."""
    if not any(row.predicted for row in rows):
        return [], [[] for _ in rows]
    return list(HEADERS), [_cells(row) for row in rows]


def _cells(row: BenchRow) -> list[str]:
    if row.predicted is None:
        return [DASH, DASH]
    pairs = ((row.predicted.accepted_length, row.accepted_length), (row.predicted.speedup, row.speedup))
    return [f"{number(predicted)} ({off(predicted, measured)})" for predicted, measured in pairs]


def predicted_lines(report: BenchReport) -> list[str]:
    """Return a line for each main row with a prediction: `firp: predicted 1.41 x, 2% off; ...`."""
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
