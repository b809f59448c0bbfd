"""Definitions of the metrics that training, eval and bench report. Uses numpy, imports no torch.

A chain draft of k steps is accepted up to its first miss, and the teacher adds a bonus token, so an accepted length is
in 1..1+k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from firp_cli.results import Interval

DRAWS = 2000
SCENARIOS = 256  # choices of repeats, shared by the draws
BLOCK_ELEMENTS = 1 << 20  # drawn values of a table in memory
FEWEST_UNITS = 8  # simulated coverage of a 95% interval: 0.48 with 2 units, 0.80 with 4, 0.88 with 8, 0.93 with 20


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


def resampled_repeats(processes: Sequence[int], scenarios: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return numbers of repeats (scenarios, drawn), drawn with replacement: of several processes first the processes,
    then repeats of each.

    Of P processes P - 1 are drawn, of the R repeats of one process R - 1: as many as there are would vary too little,
    by a third for three (Rao and Wu 1988, Resampling inference with complex survey data, section 2).

    Args:
        processes: (R,) the process that measured each repeat; each has as many.
    """
    owners = np.asarray(processes)
    members = np.stack([np.flatnonzero(owners == process) for process in np.unique(owners)])  # (P, R / P)
    count, repeats = members.shape
    drawn = (count - 1, repeats) if count > 1 else (1, max(1, repeats - 1))
    chosen = generator.integers(0, count, (scenarios, drawn[0], 1))
    within = generator.integers(0, repeats, (scenarios, *drawn))
    return members[chosen, within].reshape(scenarios, -1)


def bootstrap(
    fold: Callable[[NDArray[np.int64]], Sequence[NDArray[np.float64]]],
    statistic: Callable[..., Sequence[NDArray[np.float64]]],
    units: int,
    processes: Sequence[int] = (0,),
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Interval | None]:
    """Return 95% percentile intervals of one or several figures by a two-level bootstrap.

    The units (prompts, or batches that share their time) and the repeats of the measurement are both drawn with
    replacement, the repeats the same for all units of a draw: what makes a whole repeat slower is not averaged away.
    Below FEWEST_UNITS units a percentile interval is far too narrow, and there is none (None). Equal input gives equal
    intervals. Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8.

    Args:
        fold: returns tables (S, units), one value for each unit, from choices of repeats (S, r) that it folds into one.
        statistic: returns the figures (draws,) each, from tables (draws, units) of drawn units.
        processes: (R,) the process of each repeat.
    """
    generator = np.random.default_rng(seed)
    tables = fold(resampled_repeats(processes, SCENARIOS, generator))
    found: list[list[NDArray[np.float64]]] = []
    block = max(1, BLOCK_ELEMENTS // max(1, units))
    for start in range(0, draws, block):
        count = min(block, draws - start)
        scenarios = generator.integers(0, SCENARIOS, (count, 1))
        picks = generator.integers(0, units, (count, units))
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(list(statistic(*(table[scenarios, picks] for table in tables))))
    return [percentile_interval(np.concatenate(values), units) for values in zip(*found, strict=True)]


def percentile_interval(values: NDArray[np.float64], units: int) -> Interval | None:
    """Return the 2.5 and 97.5 percentiles of a figure's draws; None below FEWEST_UNITS units or without a number."""
    finite = values[np.isfinite(values)]
    if units < FEWEST_UNITS or not len(finite):
        return None
    low, high = np.percentile(finite, (2.5, 97.5))
    return float(low), float(high)
