"""Definitions of the metrics that training, eval and bench report. Uses numpy, imports no torch.

A chain draft of k steps is accepted up to its first miss, and the teacher adds a bonus token, so an accepted length is
in 1..1+k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from firp_cli.results import Interval

DRAWS = 4000
BLOCK_ELEMENTS = 1 << 20  # drawn values of a table in memory
FEWEST_UNITS = 8
PARTS = 4  # of the units
MEDIAN_SPREAD = math.sqrt(math.pi / 2)  # standard error of a median of many over that of their mean

Table = NDArray[np.float64]


def joint_hits(hits: ArrayLike, valid: ArrayLike | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return chain hits and anchor counts by draft step from a hit matrix.

    Args:
        hits: (anchors, k), true where step i drafted the teacher's token.
        valid: (anchors, k), true where step i counts; None: everywhere.

    Returns:
        `joint` (k,): anchors whose steps 1..i all hit; `counts` (k,): anchors at which step i counts.
    """
    matrix = np.asarray(hits, dtype=bool)
    counted = np.ones_like(matrix) if valid is None else np.asarray(valid, dtype=bool)
    chain = np.logical_and.accumulate(matrix & counted, axis=1)
    return chain.sum(axis=0), counted.sum(axis=0)


def chain_length(joint: ArrayLike, counts: ArrayLike) -> float:
    """Return the expected accepted length of a greedy chain: 1 + sum over i of P(steps 1..i all hit).

    P is joint_i / counts_i; a step that no anchor counts adds nothing.
    """
    chain, total = np.asarray(joint, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    return float(1.0 + np.divide(chain, total, out=np.zeros_like(chain), where=total > 0).sum())


def ticks_per_token(settled: ArrayLike, counts: ArrayLike, pipeline: Sequence[int]) -> float:
    """Return the expected ticks of a SPEED pipeline between the start of a token and that of its right successor.

    The successor starts after the first exit from which on all predictions are right, else after the last loop.

    Args:
        settled: (E,) tokens whose predictions are right from exit j on. counts: (E,) tokens.
        pipeline: the E exit loops, ascending, then the loops r.
    """
    right, total = np.asarray(settled, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    late = 1.0 - np.divide(right, total, out=np.zeros_like(right), where=total > 0)
    return float(pipeline[0] + (np.diff(np.asarray(pipeline)) * late).sum())


def accepted_length(joint: ArrayLike, counts: ArrayLike, pipeline: Sequence[int] = ()) -> float:
    """Return the expected accepted length of a greedy chain; with a `pipeline` the expected tokens in r ticks, which
    autoregressive decoding needs for one.
    """
    return pipeline[-1] / ticks_per_token(joint, counts, pipeline) if pipeline else chain_length(joint, counts)


def chain_length_of_hits(hits: ArrayLike, valid: ArrayLike | None = None) -> float:
    """Return the expected accepted length of a greedy chain from per-anchor hits (anchors, k): 1 + the mean sum of the
    cumulative products along the steps. The steps of an anchor are not assumed to be independent.
    """
    return chain_length(*joint_hits(hits, valid))


def bootstrap(
    statistic: Callable[..., Sequence[Table]],
    tables: Sequence[Table],
    groups: Sequence[Sequence[Table]] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Interval | None]:
    """Return 95% intervals of one or several positive figures, from two levels: units, and groups of measurements.

    A unit is a prompt, or a batch whose sequences share their time; units are drawn with replacement. A group is a
    process, or a repeat of the only process: what makes a whole group slower is not averaged away by many units. Few
    groups that are drawn again vary too little, so their spread is Student's t. It is the mean variance between groups
    over PARTS consecutive parts of the units, which stand for that many times the degrees of freedom: the state of a
    machine changes within a group. The draws of n units are scaled likewise. Logarithms of figures are added. Below
    FEWEST_UNITS units there is no interval (None). Equal input gives equal intervals. Davison and Hinkley, Bootstrap
    Methods and their Application (1997), chapters 2 and 3.

    Args:
        statistic: returns the figures (S,) each, from tables (S, n).
        tables: (1, n) one value for each unit, of all measurements, in the order of measuring.
        groups: for each independent set of m groups the same tables as measured by each group alone, (m, n) or (1, n).
    """
    generator = np.random.default_rng(seed)
    units = max(table.shape[1] for table in tables)
    block = max(1, BLOCK_ELEMENTS // units)
    drawn: list[list[Table]] = []
    with np.errstate(divide="ignore", invalid="ignore"):
        figures = [np.log(values) for values in statistic(*tables)]
        if units < FEWEST_UNITS:
            return [None] * len(figures)
        for start in range(0, draws, block):
            picks = generator.integers(0, units, (min(block, draws - start), units))
            drawn.append([np.log(values) for values in statistic(*(table[0, picks] for table in tables))])
        parts = np.array_split(np.arange(units), PARTS)
        spreads = [
            [[np.log(values) for values in statistic(*(table[:, part] for table in measured))] for part in parts]
            for measured in groups
        ]
    intervals: list[Interval | None] = []
    for place, figure in enumerate(figures):
        deviations = np.concatenate([values[place] for values in drawn]) - figure
        values = figure + deviations * np.sqrt(units / generator.chisquare(units - 1, draws))
        for measured in spreads:
            values = values + _group_deviations([part[place] for part in measured], draws, generator)
        intervals.append(percentile_interval(np.exp(values)))
    return intervals


def _group_deviations(parts: Sequence[Table], draws: int, generator: np.random.Generator) -> Table:
    """Return deviations (draws,) of a figure that m groups measured on each part (m,): standard error times t."""
    count, known = len(parts[0]), [figures for figures in parts if np.isfinite(figures).all()]
    if count < 2 or not known:
        return np.zeros(draws)
    variance = np.mean([figures.var(ddof=1) for figures in known])
    error = np.sqrt(variance / count) * (MEDIAN_SPREAD if count > 2 else 1.0)
    return np.asarray(error * generator.standard_t(len(known) * (count - 1), draws))


def percentile_interval(values: NDArray[np.float64]) -> Interval | None:
    """Return the 2.5 and 97.5 percentiles of a figure's draws; None without a number."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return None
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)
