"""Size of the trial of `firp tune`: it fits into its time, and repeats, prompts and trees are reduced in this order."""

from __future__ import annotations

import pytest

from firp_cli.results import Prediction
from firp_cli.tune_results import Trial
from firp_cli.tuning.trial import Bout, TrialSize, make_bout, trial_size

LADDER = Bout(1, 4.0, (2.0, 2.0, 2.5, 2.5, 3.0, 3.0))  # 19 s for a batch with each of six trees and without


def sizes(bouts: list[Bout], held: int, repeats: int, limit: float) -> tuple[int, int, int]:
    found = trial_size(bouts, held, repeats, limit)
    return found.prompts, found.repeats, found.trees


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1000.0, (8, 2, 6)),
        (19 * 17.0, (8, 2, 6)),
        (19 * 16.9, (8, 1, 6)),  # repeats first
        (19 * 9.0, (8, 1, 6)),
        (95.0, (4, 1, 6)),  # then prompts
        (57.0, (2, 1, 6)),
        (56.0, (2, 1, 5)),  # then trees
        (18.0, (2, 1, 1)),
        (0.0, (2, 1, 1)),  # the first tree is always tried
    ],
)
def test_trial_reduces_repeats_then_prompts_then_trees(limit: float, expected: tuple[int, int, int]) -> None:
    assert sizes([LADDER], 8, 2, limit) == expected


def test_trial_of_a_slow_model_fits_into_its_time() -> None:
    found = trial_size([LADDER], 16, 2)
    assert 60 < found.seconds <= 90 and found.trees == 6
    assert str(found) == "3 of 16 prompts, 1 repeat, 6 trees, about 76 s"


def test_trial_always_fills_a_batch() -> None:
    large = Bout(8, 10.0, (9.0,))
    assert large.seconds(2, 1, 6) == large.seconds(8, 1, 6) == 2 * 19.0
    assert large.seconds(9, 1, 6) == 3 * 19.0
    assert sizes([LADDER, large], 16, 2, 19 * 5.0) == (2, 1, 6)
    assert sizes([LADDER, large], 16, 2, 60.0) == (2, 1, 1)


def test_trial_takes_at_most_the_prompts_kept_back() -> None:
    assert sizes([LADDER], 1, 3, 1000.0) == (1, 3, 6)
    assert sizes([LADDER], 1, 3, 0.0) == (1, 1, 1)


def test_bout_predicts_seconds_from_speedups() -> None:
    trials = [Trial("chain", 4, 2, 10, Prediction(2.0, 30.0, 20.0, speedup)) for speedup in (2.0, 0.5)]
    bout = make_bout(trials, 100.0)
    assert (bout.batch, bout.ar) == (4, pytest.approx(2.0)) and bout.trees == pytest.approx((1.0, 4.0))


def test_trial_size_as_text_uses_singular_and_plural() -> None:
    assert str(TrialSize(2, 2, 2, 1, 3.2)) == "2 of 2 prompts, 2 repeats, 1 tree, about 3 s"
