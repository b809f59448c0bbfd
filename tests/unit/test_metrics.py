"""Accepted length, ticks of a pipeline, and bootstrap intervals against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from firp_cli import metrics


def test_chain_length_is_the_mean_accepted_length_of_simulated_chains():
    generator = np.random.default_rng(0)
    hits = generator.random((500, 4)) < [0.8, 0.6, 0.5, 0.4]
    accepted = []
    for row in hits:
        length = 1
        for hit in row:
            if not hit:
                break
            length += 1
        accepted.append(length)
    assert metrics.chain_length_of_hits(hits) == pytest.approx(np.mean(accepted))
    assert metrics.chain_length_of_hits(np.ones((3, 4))) == 5.0
    assert metrics.chain_length_of_hits(np.zeros((3, 4))) == 1.0


def test_joint_hits_ignore_steps_that_do_not_count():
    hits = np.array([[1, 1], [1, 0], [0, 1]], dtype=bool)
    valid = np.array([[1, 1], [1, 0], [1, 1]], dtype=bool)
    joint, counts = metrics.joint_hits(hits, valid)
    assert joint.tolist() == [2, 1] and counts.tolist() == [3, 2]
    assert metrics.chain_length(joint, counts) == pytest.approx(1 + 2 / 3 + 1 / 2)
    assert metrics.chain_length([0, 0], [5, 0]) == 1.0


@pytest.mark.parametrize(
    ("settled", "pipeline", "expected"),
    [
        ([10, 10, 10], (1, 2, 3, 4), 1.0),
        ([0, 0, 0], (1, 2, 3, 4), 4.0),
        ([0, 0, 10], (1, 2, 3, 4), 3.0),
        ([5, 5, 10], (1, 2, 3, 4), 0.5 * 1 + 0.5 * 3),
        ([2, 6, 9], (1, 2, 3, 4), 0.2 * 1 + 0.4 * 2 + 0.3 * 3 + 0.1 * 4),
        ([10], (3, 4), 3.0),
        ([4], (2, 8), 0.4 * 2 + 0.6 * 8),
        ([3, 8], (2, 5, 6), 0.3 * 2 + 0.5 * 5 + 0.2 * 6),
    ],
)
def test_ticks_per_token_is_the_mean_loop_that_settles_the_prediction(
    settled: list[int], pipeline: tuple[int, ...], expected: float
) -> None:
    counts = [10] * len(settled)
    assert metrics.ticks_per_token(settled, counts, pipeline) == pytest.approx(expected)
    assert metrics.accepted_length(settled, counts, pipeline) == pytest.approx(pipeline[-1] / expected)


def test_accepted_length_without_counts():
    assert metrics.ticks_per_token([0, 0], [0, 0], (1, 2, 3)) == 3.0
    assert metrics.accepted_length([0, 0], [0, 0], (1, 2, 3)) == 1.0


def test_accepted_length_without_pipeline_is_chain_length():
    assert (
        metrics.accepted_length([2, 1], [3, 2])
        == metrics.chain_length([2, 1], [3, 2])
        == pytest.approx(1 + 2 / 3 + 0.5)
    )


def ratio_interval(tokens: np.ndarray, seconds: np.ndarray) -> metrics.Interval | None:
    """Return the interval of sum(tokens) / sum(seconds) of tables (repeats, units)."""
    (interval,) = metrics.bootstrap(
        lambda top, bottom: [top.sum(axis=1) / bottom.sum(axis=1)],
        [tokens.mean(axis=0, keepdims=True), np.median(seconds, axis=0, keepdims=True)],
        [[tokens, seconds]],
    )
    return interval


def test_bootstrap_contains_the_ratio_and_is_seeded() -> None:
    generator = np.random.default_rng(1)
    steps = generator.integers(20, 40, size=(1, 60)).astype(float)
    tokens = steps * 2.0 + generator.normal(0, 4, size=60)
    interval = ratio_interval(tokens, steps)
    assert interval is not None
    assert interval[0] < tokens.sum() / steps.sum() < interval[1] and interval[1] - interval[0] < 0.3
    assert interval == ratio_interval(tokens, steps)
    assert ratio_interval(2.0 * steps, steps) == pytest.approx((2.0, 2.0))


def test_few_units_have_no_interval() -> None:
    tokens, seconds = np.full((3, 8), 100.0), np.random.default_rng(2).uniform(1, 3, size=(3, 8))
    assert ratio_interval(tokens, seconds) is not None
    assert ratio_interval(tokens[:, :7], seconds[:, :7]) is None


def test_spread_of_repeats_widens_the_interval() -> None:
    """Units alone do not vary here: the interval is the standard error of the repeats times Student's t."""
    tokens = np.full((2, 20), 100.0)
    seconds = np.ones((2, 20))
    seconds[1] = 1.1
    low, high = ratio_interval(tokens, seconds) or (0.0, 0.0)
    error = abs(np.log(1.1)) / 2  # of the mean of two
    assert np.log(high / low) / 2 == pytest.approx(2.776 * error, rel=0.1), "t of four degrees of freedom: four parts"
    seconds[:, 5:] = 1.0
    less = ratio_interval(tokens, seconds) or (0.0, 0.0)
    assert np.log(less[1] / less[0]) < 0.8 * np.log(high / low), "one part of four was slow"


def test_one_repeat_knows_only_its_units() -> None:
    tokens = np.random.default_rng(6).uniform(50, 100, size=(1, 20))
    alone = ratio_interval(tokens, np.ones((1, 20)))
    assert alone == ratio_interval(tokens.repeat(3, axis=0), np.ones((3, 20))), "equal repeats add nothing"


@pytest.mark.parametrize(("units", "repeats"), [(24, 3), (8, 3), (24, 2), (80, 5)])
def test_interval_covers_the_true_ratio(units: int, repeats: int) -> None:
    """Coverage of the 95% interval over simulated measurements: prompts differ, and each repeat has its own speed."""
    generator = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        rates = generator.lognormal(0.5, 0.3, size=units)  # by prompt; the truth weighs by seconds
        noise = generator.lognormal(0.0, 0.03, size=(repeats, 1)) * generator.lognormal(0.0, 0.02, (repeats, units))
        low, high = ratio_interval(np.ones((repeats, units)), noise / rates) or (0.0, 0.0)
        covered += low <= 1 / (np.exp(-0.5 + 0.3**2 / 2)) <= high
    assert covered >= 0.92 * 200


def test_interval_covers_the_figure_of_another_run() -> None:
    """The same prompts measured again, each time by three processes of which each has its own speed."""
    generator = np.random.default_rng(5)
    rates = generator.lognormal(0.5, 0.1, size=12)
    intervals, figures = [], []
    for _ in range(60):
        seconds = generator.lognormal(0.0, 0.06, size=(3, 1)) * generator.lognormal(0.0, 0.02, (3, 12)) / rates
        intervals.append(ratio_interval(np.ones((3, 12)), seconds) or (0.0, 0.0))
        figures.append(12 / np.median(seconds, axis=0).sum())
    covered = [low <= other <= high for low, high in intervals for other in figures]
    assert np.mean(covered) >= 0.9
