"""Tuning: choices, predictions, entries of tree.json, and refused input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_file import read_trees, update_trees
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import CapacityError, UsageError
from firp_cli.results import as_json
from firp_cli.tune_results import TREES_SCHEMA
from firp_cli.tuning import tuner as module
from firp_cli.tuning.calibration import TuneSettings
from firp_cli.tuning.search import Candidate, Scored
from firp_cli.tuning.tuner import Tuner, tune
from helpers.coupling import embedded_coupled
from helpers.models import (
    embedded_predictor,
    embedded_prompts,
    embedded_teacher,
    looped_teacher,
    make_predictor,
    random_prompts,
    tiny_teacher,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shorten timings, and keep costs in a temporary folder."""
    monkeypatch.setenv("FIRP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("firp_cli.evaluation.timing.BLOCK_SECONDS", 0.001)
    monkeypatch.setattr("firp_cli.tuning.cost.ROUNDS", 3)
    monkeypatch.setattr(module, "REPEATS", 3)
    monkeypatch.setattr(module, "PROBE_REPEATS", 3)
    monkeypatch.setattr(module, "TIMING_ROUNDS", 1)
    monkeypatch.setattr(module, "LEAST_TIMING_ROUNDS", 1)
    monkeypatch.setattr(module, "LADDER", (2, 8))


def settings(**changes: Any) -> TuneSettings:
    return TuneSettings(
        **({"batches": (1, 2), "max_new_tokens": 24, "most_rows": 16, "repeats": 1, "seconds": 2.0} | changes)
    )


def test_accurate_predictor_gets_a_tree() -> None:
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")
    told: list[str] = []
    report = tune(teacher, predictor, embedded_prompts(8), settings(), dataset="arithmetic", tell=told.append)
    assert [entry.batch_size for entry in report.entries] == [1, 2]
    assert report.calibration["prompts"] == 6 and report.calibration["kept_back"] == 2
    for trial in report.batches:
        assert trial.predicted.accepted_length > 1.5 and trial.rows <= 16
        assert trial.measured is not None and trial.measured.accepted_length > 1.5
    assert {trial.nodes for trial in report.ladder} >= {2, 3, 4, 5, 8}
    assert [trial.nodes for trial in report.ladder if trial.measured] != []
    assert report.acceptance[0].rate > 0.5 and report.acceptance[0].count > 50
    assert any("calibration" in line for line in told) and any("batch 2" in line for line in told)
    assert json.dumps(as_json(report), allow_nan=False)


def test_trial_without_time_decodes_only_the_best_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRIAL_SECONDS", 0.0)
    whole_steps_take({"none": 2.0}, 1.5, monkeypatch)
    told: list[str] = []
    report = tune(
        embedded_teacher(), embedded_predictor("firp"), embedded_prompts(12), settings(repeats=2), tell=told.append
    )
    assert [line for line in told if line.startswith("trial: 2 of 3 prompts, 1 repeat, 1 tree, about")]
    assert report.calibration["trial"]["prompts"] == 2 and report.calibration["kept_back"] == 3
    assert all(trial.measured is not None for trial in report.batches)
    assert [trial.tree for trial in report.ladder if trial.measured] == [report.batches[0].tree]


def whole_steps_take(times: dict[str, float], others: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the timing of whole steps by these milliseconds, by tree."""

    def timed(*arguments: Any) -> dict[Any, list[float]]:
        return {spec: [times.get(str(spec), others)] * 3 for spec in arguments[2]}

    monkeypatch.setattr(module, "time_steps", timed)


def test_inaccurate_predictor_gets_no_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher(lean=True)
    predictor = make_predictor(teacher, kind="firp", layer=1, steps=3)
    logits = predictor.logits
    monkeypatch.setattr(predictor, "logits", lambda *arguments: -logits(*arguments))  # the least likely first
    whole_steps_take({"none": 1.0}, 1.15, monkeypatch)
    report = tune(teacher, predictor, random_prompts(8, seed=1), settings(trial=False))
    assert [entry.tree for entry in report.entries] == ["none", "none"]
    assert report.entries[0].predicted.speedup == 1.0 and report.entries[0].rows == 1
    assert report.break_even == 1
    assert report.batches[0].tree != "none" and report.batches[0].predicted.speedup < 1.0
    assert all(trial.measured is None for trial in report.ladder)


def test_batches_beyond_one_that_drafting_slows_down_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    probed: dict[int, int] = {}  # trees of the first timing at each batch size

    def timed(*arguments: Any) -> dict[Any, list[float]]:
        batches.append(arguments[3])
        probed.setdefault(arguments[3], len(arguments[2]) - 1)
        drafted = 1.0 if arguments[3] == 1 else 20.0
        return {spec: [1.0 if spec.kind == "none" else drafted] * 3 for spec in arguments[2]}

    monkeypatch.setattr(module, "time_steps", timed)
    told: list[str] = []
    wanted = settings(trial=False, batches=(1, 2, 4, 8))
    report = tune(embedded_teacher(), embedded_predictor("firp"), embedded_prompts(8), wanted, tell=told.append)
    assert [(entry.batch_size, entry.tree == "none") for entry in report.entries] == [(1, False), (2, True)]
    assert report.break_even == 2 and set(batches) == {1, 2}
    assert probed[2] == -(-probed[1] // 2), "steps of larger batches take longer"
    assert "batch sizes above 2 are not timed: drafting does not pay at 2" in told


def test_estimates_take_a_sample_spread_over_all_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firp_cli.tuning.calibration.SAMPLED_PARTS", 4)
    monkeypatch.setattr("firp_cli.tuning.calibration.PART_ANCHORS", 10)
    tuner = Tuner(embedded_teacher(), embedded_predictor("firp"), settings())
    traces = tuner.learn(embedded_prompts(8)).traces
    sample = tuner.calibration.sample
    assert 3 <= len(sample) <= 4 and all(part.last - part.first <= 10 for part in sample)
    holders = [sum(part.ids is trace.ids for part in sample) for trace in traces]
    assert max(holders) == 1 and sum(holders) == len(sample)
    spec = parse_tree("dynamic:8", 4)
    assert tuner.estimate(spec) == pytest.approx(tuner.length(spec), rel=0.25)


def tuner_of(lengths: dict[str, float], times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> Tuner:
    """Return a tuner whose search prefers the trees of `lengths`; whole steps take `times`, of other trees 5 ms."""
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")
    tuner = Tuner(teacher, predictor, settings(batches=(1,)), parse_tree("dynamic:3", 4))
    tuner.learn(embedded_prompts(4))
    tuner.measure()

    def emitted(spec: Any) -> list[list[int]]:
        steps = 100
        total = round(lengths.get(str(spec), 1.0) * steps)
        return [[total // steps + (place < total % steps) for place in range(steps)]]

    monkeypatch.setattr(tuner, "emitted", emitted)

    whole_steps_take(times, 5.0, monkeypatch)
    names = [name for name in lengths if parse_tree(name, 4) != tuner.default]
    found = [Scored(Candidate(parse_tree(name, 4)), lengths[name], 1.0) for name in names]
    monkeypatch.setattr(tuner.search, "best", lambda *_: found)
    return tuner


def test_choice_follows_the_measured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = {"chain/2": 2.5, "chain": 2.4, "dynamic:3": 2.2}
    choice = tuner_of(lengths, {"none": 1.0, "chain/2": 2.0, "chain": 1.5}, monkeypatch).tune()[0]
    assert choice.entry.tree == "chain"
    assert choice.entry.predicted.speedup == pytest.approx(1.6) and choice.entry.predicted.step_milliseconds == 1.5


def test_tree_in_use_is_a_finalist(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = {"chain/2": 2.5, "dynamic:3": 2.2}
    choice = tuner_of(lengths, {"none": 1.0, "chain/2": 2.0, "dynamic:3": 1.1}, monkeypatch).tune()[0]
    assert choice.entry.tree == "dynamic:3" and choice.entry.predicted.speedup == pytest.approx(2.0)


def test_choice_without_speedup_is_autoregressive_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = tuner_of({"chain/2": 2.5}, {"none": 1.0, "chain/2": 2.6}, monkeypatch).tune()[0]
    assert choice.entry.tree == "none" and choice.trial.predicted.speedup < 1.0


def test_same_calibration_gives_the_same_lengths() -> None:
    teacher, predictor = embedded_teacher(), embedded_predictor("medusa")
    tuners = [Tuner(teacher, predictor, settings()) for _ in range(2)]
    for tuner in tuners:
        tuner.learn(embedded_prompts(5))
    first, second = ([tuner.length(one.spec) for one in tuner.candidates] for tuner in tuners)
    assert first == second and max(first) > 1.5


def test_coupled_predictor_gets_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that the tuner predicts are near those of decoding."""
    whole_steps_take({"none": 2.0}, 1.5, monkeypatch)
    teacher, predictor = embedded_teacher(), embedded_coupled("firp_plus", "mlp", True, candidates=20)
    tuner = Tuner(teacher, predictor, settings(batches=(1,)))
    tuner.learn(embedded_prompts(6))
    tuner.measure()
    assert tuner.tune()[0].entry.predicted.accepted_length > 1.3
    for name in ("dynamic:6@2", "static:3x2"):
        tree = parse_tree(name, predictor.steps)
        decoded = Engine(teacher, predictor, tree).generate(embedded_prompts(6), 24)
        lengths = [length for item in decoded for length in item.accepted_lengths]
        assert tuner.length(tree) == pytest.approx(sum(lengths) / len(lengths), rel=0.25)
        assert tuner.length(tree) > 1.2


def test_calibration_samples_at_the_temperature() -> None:
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")
    cold, hot = (Tuner(teacher, predictor, settings(temperature=value)) for value in (0.0, 3.0))
    for tuner in (cold, hot):
        tuner.learn(embedded_prompts(4))
    tree = parse_tree("chain", predictor.steps)
    assert hot.length(tree) < cold.length(tree)


@pytest.mark.parametrize(
    ("changes", "prompts", "message"),
    [
        ({}, random_prompts(3), "tuning needs at least"),
        ({"max_new_tokens": 4000}, random_prompts(9), "0 of 9 prompts leave room"),
        ({"context": 500}, random_prompts(9), "leaves no room for 24 new tokens"),
        ({"most_rows": 3}, random_prompts(9), "raise --max-rows"),
        ({"batches": (0,)}, random_prompts(9), "at least 1"),
        ({"batches": ()}, random_prompts(9), "none"),
    ],
)
def test_unusable_input_is_refused(changes: dict[str, Any], prompts: list[list[int]], message: str) -> None:
    teacher = tiny_teacher()
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=2)
    with pytest.raises(UsageError, match=message):
        tune(teacher, predictor, prompts, settings(**changes))


def test_early_exits_are_refused() -> None:
    teacher = looped_teacher(2, 3)
    predictor = make_predictor(teacher, kind="speed", exits=[1, 2])
    with pytest.raises(UsageError, match="pipeline"):
        tune(teacher, predictor, random_prompts(9), settings())


def test_entries_are_used_on_the_same_machine_only(tmp_path: Path) -> None:
    """The decoder takes the tuned entries on this machine, and the default tree on another one."""
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")
    report = tune(teacher, predictor, embedded_prompts(6), settings(trial=False))
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"tree": "dynamic:9"}))
    path.write_text(json.dumps(update_trees(path, report.entries)))
    assert json.loads(path.read_text())["schema"] == TREES_SCHEMA
    trees = read_trees(path, predictor.steps)
    here = trees.fitting(report.entries[0].machine, teacher.fingerprint, 0.0)
    for entry in report.entries:
        assert here.entry(entry.batch_size, entry.context) == entry
        assert str(here.at(entry.batch_size, entry.context)) == entry.tree
    assert str(trees.fitting({"device": "another"}, teacher.fingerprint, 0.0).at(1, 100)) == "dynamic:9"


def test_dynamic_entry_contains_its_typical_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = tuner_of({"dynamic:3": 2.5}, {"none": 1.0, "dynamic:3": 1.5}, monkeypatch)
    entry = tuner.tune()[0].entry
    assert entry.tree == "dynamic:3" and entry.paths is not None and len(entry.paths) == 2
    assert entry.probabilities == sorted(entry.probabilities or [], reverse=True)
    assert entry.probabilities is not None and entry.probabilities[0] == 1.0 and len(entry.probabilities) == 3


def test_batches_that_do_not_fit_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")

    def check(teacher: Any, batch: int, *_: Any) -> dict[str, Any]:
        if batch > limit:
            raise CapacityError(f"no room for {batch}\nremedy")
        return {}

    monkeypatch.setattr(module, "check_cache", check)
    told: list[str] = []
    tuner = Tuner(teacher, predictor, settings(batches=(1, 2, 8, 16)), tell=told.append)
    limit = 2
    tuner.learn(embedded_prompts(4))
    assert tuner.batches == [1, 2] and told == ["batch sizes from 8 on are skipped: no room for 8"]
    limit = 0
    with pytest.raises(CapacityError):
        tuner.learn(embedded_prompts(4))
