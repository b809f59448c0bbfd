"""Definitions of the metrics that training, eval and bench report. Uses numpy, imports no torch.

A chain draft of k steps is accepted up to its first miss, and the teacher adds a bonus token, so an accepted length is
in 1..1+k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from firp_cli.results import Interval

REPEATS = 2000
BLOCK_ELEMENTS = 1 << 22  # resampled prompt indices in memory


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


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], repeats: int = REPEATS, seed: int = 0
) -> Interval:
    """Return the 95% percentile interval of sum(numerators) / sum(denominators), resampling prompts with replacement.

    Entry p of both belongs to prompt p (tokens and steps, for an accepted length). Equal input gives equal intervals.
    """
    top, bottom = _columns(numerators, denominators)
    return _interval(lambda picks: top[picks].sum(axis=1) / bottom[picks].sum(axis=1), len(top), repeats, seed)


def bootstrap_ratio_of_ratios(
    base_seconds: Sequence[float],
    base_tokens: Sequence[float],
    seconds: Sequence[float],
    tokens: Sequence[float],
    repeats: int = REPEATS,
    seed: int = 0,
) -> Interval:
    """Return the 95% percentile interval of (sum base_seconds / sum base_tokens) / (sum seconds / sum tokens).

    Prompts are resampled jointly: entry p of all four lists belongs to prompt p.
    """
    base_time, base_count, time, count = _columns(base_seconds, base_tokens, seconds, tokens)

    def speedup(picks: NDArray[np.int64]) -> NDArray[np.float64]:
        base = base_time[picks].sum(axis=1) / base_count[picks].sum(axis=1)
        return base * count[picks].sum(axis=1) / time[picks].sum(axis=1)

    return _interval(speedup, len(time), repeats, seed)


def _columns(*columns: Sequence[float]) -> tuple[NDArray[np.float64], ...]:
    arrays = tuple(np.asarray(column, dtype=np.float64) for column in columns)
    sizes = {len(array) for array in arrays}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"a bootstrap needs one entry per prompt in each list, got {[len(item) for item in arrays]}")
    return arrays


def _interval(
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], prompts: int, repeats: int, seed: int
) -> Interval:
    """Return the 2.5 and 97.5 percentiles of `statistic` over `repeats` draws of `prompts` prompts, drawn in blocks."""
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_ELEMENTS // prompts)
    values = []
    for start in range(0, repeats, block):
        picks = generator.integers(0, prompts, size=(min(block, repeats - start), prompts))
        with np.errstate(divide="ignore", invalid="ignore"):
            values.append(statistic(picks))
    low, high = np.nanpercentile(np.concatenate(values), (2.5, 97.5))
    return float(low), float(high)
