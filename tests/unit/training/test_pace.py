"""Runs with `training.max_minutes`: schedule, validations, files, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from firp_cli.errors import RecipeError
from firp_cli.predictors.folder import load_predictor
from firp_cli.recipe import load_recipe
from firp_cli.training import checkpoint as checkpoints
from firp_cli.training.metrics_log import Listener
from firp_cli.training.pace import Pace, usual_interval
from helpers.models import tiny_teacher
from helpers.training import recipe, rows, run

ENDLESS: dict[str, Any] = {"epochs": 100_000, "validate_every": None, "save_every": None}


def test_pace_follows_the_larger_of_steps_and_time() -> None:
    pace = Pace(100, seconds=10.0)
    assert [pace.move(step, spent) for step, spent in ((0, 0.0), (1, 0.5), (30, 2.0), (31, 9.0))] == [0, 5, 30, 90]
    assert pace.expected == 34 and not pace.ended
    assert pace.move(32, 10.0) == 100 and pace.ended and pace.expected == 32
    untimed = Pace(100)
    assert untimed.move(7, 1e9) == 7 and untimed.expected == 100
    assert Pace(0).ended


def test_pace_passes_each_multiple_once() -> None:
    pace = Pace(100, seconds=10.0)
    found = [pace.passed(25)]
    for step, spent in enumerate((0.1, 2.6, 2.7, 8.0, 10.0), start=1):
        pace.move(step, spent)
        found.append(pace.passed(25))
    assert found == [True, False, True, False, True, True]


def test_pace_without_limit_passes_at_multiples() -> None:
    for start in (0, 5, 6):
        pace = Pace(20)
        pace.resume(start, 0.0)
        found = [start] if pace.passed(3) else []
        for step in range(start + 1, 21):
            pace.move(step, 0.0)
            found += [step] if pace.passed(3) else []
        assert found == [step for step in range(start, 21) if step % 3 == 0]


def test_usual_interval_is_at_least_a_minute() -> None:
    minutes = {0.1: 1, 4.4: 4, 60: 10, None: 10}
    found = {limit: 1000 // usual_interval(recipe(max_minutes=limit).training, 1000) for limit in minutes}
    assert found == minutes


def test_max_minutes_ends_run_with_full_schedule(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    listener = Listener(step=lambda done, total, row: calls.append((done, total)))
    outcome = run(tmp_path, recipe(**ENDLESS, max_minutes=0.03), listener=listener)
    assert not outcome.stopped and 1 < outcome.step < outcome.total_steps == 700_000
    found = rows(tmp_path)
    assert [row["step"] for row in found if row["split"] == "validation"] == [0, outcome.step]
    rates = [row["learning_rate"] for row in found if row["split"] == "train"]
    assert len(rates) == outcome.step and max(rates) > 0.9 * 5e-3 and rates[-1] < 0.2 * 5e-3
    falling = rates[rates.index(max(rates)) :]
    assert falling == sorted(falling, reverse=True)
    assert calls[-1] == (outcome.step, outcome.step) and calls[len(calls) // 2][1] < 20 * outcome.step
    assert outcome.training is not None and outcome.training["steps"] == outcome.step
    found_at = checkpoints.latest_checkpoint(tmp_path)
    assert found_at is not None and found_at.name == f"step-{outcome.step}"
    load_predictor(tmp_path, tiny_teacher())
    again = run(tmp_path, recipe(**ENDLESS, max_minutes=0.03), resume=True)
    assert (again.step, again.stopped) == (outcome.step, False)


def test_run_ends_by_steps_before_max_minutes(tmp_path: Path) -> None:
    run(tmp_path / "timed", recipe(max_minutes=1000.0))
    run(tmp_path / "untimed", recipe())
    assert rows(tmp_path / "timed") == rows(tmp_path / "untimed")


def test_resume_counts_earlier_minutes(tmp_path: Path) -> None:
    wanted = recipe(**ENDLESS, max_minutes=10.0)
    assert run(tmp_path, wanted, listener=Listener(stop=lambda done: done == 3)).stopped
    found_at = checkpoints.latest_checkpoint(tmp_path)
    assert found_at is not None
    path = found_at / "state.json"
    saved = json.loads(path.read_text())
    assert 0 < saved["state"]["spent"] < 600
    saved["state"]["spent"] = 599.9
    path.write_text(json.dumps(saved))
    with pytest.raises(RecipeError, match=r"training.max_minutes=10.0, now it is 20.0"):
        run(tmp_path, recipe(**ENDLESS, max_minutes=20.0), resume=True)
    outcome = run(tmp_path, wanted, resume=True)
    assert not outcome.stopped and 4 <= outcome.step < 1000
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-2])["learning_rate"] < 0.2 * 5e-3


@pytest.mark.parametrize("minutes", ["0", "-1", ".nan"])
def test_max_minutes_must_be_positive(minutes: str) -> None:
    with pytest.raises(RecipeError, match="max_minutes"):
        load_recipe("demo", [f"training.max_minutes={minutes}"])
