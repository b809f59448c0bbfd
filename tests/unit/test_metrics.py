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


def test_bootstrap_ratio_contains_the_ratio_and_is_seeded():
    generator = np.random.default_rng(1)
    steps = generator.integers(20, 40, size=60)
    tokens = steps * 2.0 + generator.normal(0, 4, size=60)
    low, high = metrics.bootstrap_ratio(tokens, steps)
    assert low < tokens.sum() / steps.sum() < high and high - low < 0.3
    assert (low, high) == metrics.bootstrap_ratio(tokens, steps)
    assert metrics.bootstrap_ratio([2.0, 4.0], [1.0, 2.0]) == (2.0, 2.0)


def test_bootstrap_ratio_of_ratios_resamples_prompts_jointly():
    tokens = np.full(30, 100.0)
    seconds = np.random.default_rng(2).uniform(1, 3, size=30)
    low, high = metrics.bootstrap_ratio_of_ratios(1.5 * seconds, tokens, seconds, tokens)
    assert low == pytest.approx(1.5) and high == pytest.approx(1.5), "prompts that are slow for both cancel out"
    low, high = metrics.bootstrap_ratio_of_ratios(1.5 * seconds[::-1], tokens, seconds, tokens)
    assert low < 1.5 < high


def test_bootstrap_ratio_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="one entry per prompt"):
        metrics.bootstrap_ratio([1.0, 2.0], [1.0])
