"""Decoding time from the tokens of each step and what a step costs."""

from __future__ import annotations

import pytest

from firp_cli.evaluation.simulate import simulate_time, simulate_speedup


def test_one_sequence_after_another() -> None:
    assert simulate_time([[3, 2], [4]], 1, lambda live: 5.0) == 15.0


def test_sequences_leave_a_batch_when_they_end() -> None:
    emitted = [[1], [1, 1], [1, 1, 1], [1, 1, 1, 1]]
    assert simulate_time(emitted, 4, lambda live: float(live)) == 4 + 3 + 2 + 1


def test_with_graphs_they_leave_when_half_of_the_batch_has() -> None:
    emitted = [[1], [1, 1], [1, 1, 1], [1, 1, 1, 1]]
    assert simulate_time(emitted, 4, lambda live: float(live), halving=True) == 4 + 4 + 2 + 1


def test_batches_are_taken_in_order_and_the_last_may_be_smaller() -> None:
    seen: list[int] = []
    simulate_time([[1], [1], [1]], 2, lambda live: float(seen.append(live) or 0))
    assert seen == [2, 1]


def test_alone_the_speedup_is_accepted_length_over_the_cost_of_a_step() -> None:
    emitted = [[3, 3, 2], [4, 4]]
    speedup = simulate_speedup(emitted, 1, lambda live: 2.0, lambda live: 1.0)
    assert speedup == pytest.approx((16 / 5) / 2)


def test_in_a_batch_the_slowest_sequence_decides() -> None:
    emitted = [[4, 4], [1] * 8]
    assert simulate_speedup(emitted, 2, lambda live: 1.0, lambda live: 1.0) == pytest.approx(1.0)
