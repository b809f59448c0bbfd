"""Forward time by rows, relative to one row: what a step pays for the rows of its draft tree."""

from __future__ import annotations

from itertools import takewhile

from firp_cli.analyses.subject import Subject
from firp_cli.predictors.base import TreePredictor
from firp_cli.results import Analysis, Panel
from firp_cli.tuning.cost import DEEPEST, measure_rows

ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 256  # committed tokens


def rows(subject: Subject) -> Analysis:
    """Time passes of ROWS rows after a committed context. Raises CapacityError."""
    teacher, predictor = subject.teacher, subject.predictor
    own = predictor.transfer_layers[:1] if isinstance(predictor, TreePredictor) else ()
    split = own[0] if own else teacher.num_layers // 2
    context = max(1, min(CONTEXT, teacher.max_positions - DEEPEST - 1))
    curve = measure_rows(teacher, split, context, ROWS)
    parts = list(zip(curve.lower, curve.upper, curve.head, strict=True))
    one = sum(parts[0])
    relative = [sum(part) / one for part in parts]
    table = [
        [count, sum(part), ratio, ratio / count, *part]
        for count, part, ratio in zip(curve.rows, parts, relative, strict=True)
    ]
    free = max(count for count, _ in takewhile(lambda pair: pair[1] <= 2, zip(curve.rows, relative, strict=True)))
    return Analysis(
        "rows",
        ["rows", "ms", "over one row", "per row", "lower ms", "upper ms", "head ms"],
        table,
        reading=f"{ROWS[-1]} rows take {relative[-1]:.2f} times as long as one; up to {free} rows take at most twice",
        note=(
            f"one sequence with {context} committed tokens; lower: layers 1 to {split}, upper: the others, head: final "
            "norm and head; row counts take turns with passes of one row, and the lower quartile of the rounds counts; "
            "times depend on the machine and on other load"
        ),
        panels=[
            Panel(
                "rows of a pass",
                "time over one row",
                {teacher.name: list(zip(curve.rows, relative, strict=True))},
                True,
            )
        ],
    )
