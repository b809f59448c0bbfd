"""Simulated time of decoding, from the tokens of each step and the cost of a step."""

from __future__ import annotations

import pytest

from firp_cli.evaluation.simulate import simulate_speedup, simulate_time


def test_time_of_single_sequences_is_the_number_of_steps() -> None:
    assert simulate_time([[3, 2], [4]], 1, lambda live: 5.0) == 15.0


def test_sequences_leave_the_batch_when_they_end() -> None:
    emitted = [[1], [1, 1], [1, 1, 1], [1, 1, 1, 1]]
    assert simulate_time(emitted, 4, lambda live: float(live)) == 4 + 3 + 2 + 1


def test_halving_keeps_ended_sequences_until_half_have_ended() -> None:
    emitted = [[1], [1, 1], [1, 1, 1], [1, 1, 1, 1]]
    assert simulate_time(emitted, 4, lambda live: float(live), halving=True) == 4 + 4 + 2 + 1


def test_last_batch_may_be_smaller() -> None:
    seen: list[int] = []
    simulate_time([[1], [1], [1]], 2, lambda live: float(seen.append(live) or 0))
    assert seen == [2, 1]


def test_speedup_of_single_sequences_is_accepted_length_over_step_cost() -> None:
    emitted = [[3, 3, 2], [4, 4]]
    speedup = simulate_speedup(emitted, 1, lambda live: 2.0, lambda live: 1.0)
    assert speedup == pytest.approx((16 / 5) / 2)


def test_speedup_of_a_batch_is_that_of_its_slowest_sequence() -> None:
    emitted = [[4, 4], [1] * 8]
    assert simulate_speedup(emitted, 2, lambda live: 1.0, lambda live: 1.0) == pytest.approx(1.0)
