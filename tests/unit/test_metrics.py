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


def ratio_interval(tokens: np.ndarray, seconds: np.ndarray, processes: list[int]) -> metrics.Interval | None:
    """Return the interval of sum(tokens) / sum(seconds) of tables (repeats, units)."""
    (interval,) = metrics.bootstrap(
        lambda repeats: [tokens[repeats].mean(axis=1), np.median(seconds[repeats], axis=1)],
        lambda top, bottom: [top.sum(axis=1) / bottom.sum(axis=1)],
        tokens.shape[1],
        processes,
    )
    return interval


def test_bootstrap_contains_the_ratio_and_is_seeded() -> None:
    generator = np.random.default_rng(1)
    steps = generator.integers(20, 40, size=(1, 60)).astype(float)
    tokens = steps * 2.0 + generator.normal(0, 4, size=60)
    interval = ratio_interval(tokens, steps, [0])
    assert interval is not None
    assert interval[0] < tokens.sum() / steps.sum() < interval[1] and interval[1] - interval[0] < 0.3
    assert interval == ratio_interval(tokens, steps, [0])
    assert ratio_interval(2.0 * steps, steps, [0]) == (2.0, 2.0)


def test_few_units_have_no_interval() -> None:
    tokens, seconds = np.full((3, 8), 100.0), np.random.default_rng(2).uniform(1, 3, size=(3, 8))
    assert ratio_interval(tokens, seconds, [0, 0, 0]) is not None
    assert ratio_interval(tokens[:, :7], seconds[:, :7], [0, 0, 0]) is None


def test_bootstrap_sees_what_slows_a_whole_repeat() -> None:
    """Units alone do not vary here; one repeat of three took twice as long, so the median of drawn repeats does."""
    tokens, seconds = np.full((3, 20), 100.0), np.ones((3, 20))
    seconds[1] = 2.0
    low, high = ratio_interval(tokens, seconds, [0, 0, 0]) or (0.0, 0.0)
    assert (low, high) == (50.0, 100.0)


def test_repeats_are_drawn_within_drawn_processes() -> None:
    generator = np.random.default_rng(3)
    drawn = metrics.resampled_repeats([0, 0, 1, 1, 2, 2], 400, generator)
    assert drawn.shape == (400, 4) and set(drawn.flatten()) == set(range(6)), "one process fewer than there are"
    owners = drawn.reshape(400, 2, 2) // 2
    assert (owners[:, :, 0] == owners[:, :, 1]).all(), "the repeats of a draw are of one process"
    assert (owners[:, 0] != owners[:, 1]).any() and (owners[:, 0] == owners[:, 1]).any()
    assert metrics.resampled_repeats([0, 0, 0], 9, generator).shape == (9, 2)
    assert metrics.resampled_repeats([0], 9, generator).tolist() == [[0]] * 9


def test_drawn_repeats_have_the_variance_of_the_mean() -> None:
    """The mean of the drawn ones varies as much as the mean of so many measurements does."""
    generator, estimates = np.random.default_rng(5), []
    for _ in range(300):
        values = generator.normal(size=3)
        drawn = metrics.resampled_repeats([0, 1, 2], 300, generator)
        estimates.append(values[drawn].mean(axis=1).var())
    assert np.mean(estimates) == pytest.approx(1 / 3, rel=0.15)


def test_interval_covers_the_true_ratio() -> None:
    """Coverage of the 95% interval over simulated measurements: prompts differ, and each repeat has its own speed."""
    generator = np.random.default_rng(4)
    covered = 0
    for _ in range(120):
        rates = generator.lognormal(0.5, 0.3, size=24)  # speedup by prompt; the truth weighs prompts by their seconds
        noise = generator.lognormal(0.0, 0.03, size=(3, 1)) * generator.lognormal(0.0, 0.02, size=(3, 24))
        seconds = noise / rates
        low, high = ratio_interval(np.ones((3, 24)), seconds, [0, 0, 0]) or (0.0, 0.0)
        covered += low <= 1 / (np.exp(-0.5 + 0.3**2 / 2)) <= high
    assert covered >= 0.88 * 120
