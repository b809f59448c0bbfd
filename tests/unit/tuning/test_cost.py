"""Cost of passes: interpolation, refinement, measuring, and reuse of earlier measurements."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from firp_cli.evaluation.environment import machine_key
from firp_cli.evaluation.timing import as_benched, milliseconds, undisturbed
from firp_cli.results import as_json
from firp_cli.tune_results import CostCurve, CostReport
from firp_cli.tuning import cost as module
from firp_cli.tuning.cost import CostModel, CostProbe, load_or_measure, measure_cost
from helpers.models import tiny_teacher


def report(curves: list[CostCurve], split: int = 2, layers: int = 4) -> CostReport:
    return CostReport({}, {}, {}, split, layers, curves, [], 0.0)


def curve(batch: int, context: int, scale: float) -> CostCurve:
    return CostCurve(batch, context, [1, 4, 16], [scale, 2 * scale, 8 * scale], [2 * scale] * 3, [scale] * 3)


def test_cost_model_interpolates_rows_contexts_and_batches() -> None:
    model = CostModel(report([curve(1, 100, 1.0), curve(1, 200, 2.0), curve(3, 100, 3.0), curve(3, 200, 4.0)]))
    assert model.parts(1, 1, 100) == [1.0, 2.0, 1.0]
    assert model.parts(10, 1, 100) == pytest.approx([5.0, 2.0, 1.0])
    assert model.parts(1, 1, 150) == pytest.approx([1.5, 3.0, 1.5])
    assert model.parts(1, 2, 150) == pytest.approx([2.5, 5.0, 2.5])
    assert model.parts(28, 1, 100)[0] == pytest.approx(14.0)  # the last piece is extended
    assert model.parts(1, 1, 10) == model.parts(1, 1, 100)


def test_cost_of_layers_depends_on_the_rows_of_each() -> None:
    model = CostModel(report([curve(1, 100, 1.0)]))
    assert model.layers([1, 1, 1, 1], 1, 100) == pytest.approx(3.0)
    assert model.layers([1, 4, 4, 16], 1, 100) == pytest.approx(0.5 * 1 + 0.5 * 2 + 0.5 * 2 + 0.5 * 2)
    everything_below = CostModel(report([curve(1, 100, 1.0)], split=4))
    assert everything_below.layers([4] * 4, 1, 100) == pytest.approx(2.0)


def fake_curve(monkeypatch: pytest.MonkeyPatch, time: object) -> module._Curve:
    """Return a curve whose passes of M rows take `time(M)`, all in the lower part."""
    made = object.__new__(module._Curve)
    made.seconds = 1.0
    made.times, made.ones, made.checks = {1: (time(1), 0.0, 0.0)}, [1.0], []  # type: ignore[operator]

    def measure(rows: int) -> tuple[float, float, float]:
        return made.times.setdefault(rows, (time(rows), 0.0, 0.0))  # type: ignore[operator]

    monkeypatch.setattr(made, "measure", measure)
    return made


def test_refine_adds_no_points_to_a_straight_line(monkeypatch: pytest.MonkeyPatch) -> None:
    line = fake_curve(monkeypatch, lambda rows: 1.0 + 0.1 * rows)
    line.refine(64, until=float("inf"))
    assert sorted(line.times) == [1, 2, 64] and [rows for rows, _, _ in line.checks] == [11]


def test_refine_finds_a_bend(monkeypatch: pytest.MonkeyPatch) -> None:
    def time(rows: int) -> float:
        return 1.0 if rows <= 16 else 1.0 + 0.2 * (rows - 16)

    bent = fake_curve(monkeypatch, time)
    bent.refine(256, until=float("inf"))
    knots = sorted(bent.times)
    for rows, predicted, measured in bent.checks:
        assert abs(predicted / measured - 1) <= module.TOLERANCE and rows not in knots
    model = CostModel(
        report([CostCurve(1, 1, knots, *([part[place] for part in map(bent.times.get, knots)] for place in range(3)))])
    )  # type: ignore[index]
    errors = [abs(sum(model.parts(rows, 1, 1)) / time(rows) - 1) for rows in range(1, 257)]
    assert max(errors) < 0.15 and sum(errors) / len(errors) < 0.03


def test_refine_stops_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = fake_curve(monkeypatch, lambda rows: float(rows**2))
    coarse.refine(64, until=0.0)
    assert sorted(coarse.times) == [1, 2, 64] and not coarse.checks


@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_parts_of_a_pass_equal_one_forward(family: str) -> None:
    """Lower layers, upper layers and head, run one after the other, leave the prefix unchanged and repeat exactly."""
    teacher = tiny_teacher(family)
    passes = CostProbe(teacher, 2, batch=2, context=12, most_rows=5)
    for rows in (1, 3, 5):
        parts = passes.parts(rows)
        states = parts["upper"]()
        assert isinstance(states, torch.Tensor) and states.shape == (2, rows, teacher.hidden_size)
        again = passes.parts(rows)["upper"]()
        assert torch.equal(states, again)
        logits = parts["head"]()
        assert isinstance(logits, torch.Tensor) and logits.shape == (2, rows, teacher.vocab_size)
        assert torch.equal(logits, teacher.head(teacher.norm(states)))


def test_measure_cost_covers_batches_contexts_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firp_cli.evaluation.timing.BLOCK_SECONDS", 0.002)
    teacher = tiny_teacher("llama")
    measured = measure_cost(teacher, 2, [1, 4], [16, 32], most_rows=256, seconds=3)
    places = {(one.batch_size, one.context) for one in measured.curves}
    assert {(1, 16), (1, 32), (4, 16), (4, 32)} <= places
    for one in measured.curves:
        assert one.rows[0] == 1 and one.rows[-1] == 256
        assert min(*one.lower, *one.upper, *one.head) > 0
    assert CostReport.from_json(as_json(measured)) == measured
    model = CostModel(measured)
    assert sum(model.parts(256, 4, 32)) > sum(model.parts(1, 1, 16))


def test_load_or_measure_reuses_costs_of_machine_and_teacher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FIRP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("firp_cli.evaluation.timing.BLOCK_SECONDS", 0.001)
    teacher = tiny_teacher("llama")
    measure = partial(load_or_measure, seconds=0.2)
    first, kept = measure(teacher, 2, [1], [16], 4)
    assert not kept
    second, kept = measure(teacher, 2, [1], [16], 4)
    assert kept and second == first
    assert measure(teacher, 2, [1], [16], 4, again=True)[1] is False
    assert measure(teacher, 1, [1], [16], 4)[1] is False
    assert measure(tiny_teacher("qwen3"), 2, [1], [16], 4)[1] is False
    another = machine_key(teacher) | {"threads": 64}
    monkeypatch.setattr(module, "machine_key", lambda *_: another)
    assert measure(teacher, 2, [1], [16], 4)[1] is False
    for file in (tmp_path / "costs").iterdir():
        file.write_text("{}")
    assert measure(teacher, 2, [1], [16], 4)[1] is False  # damaged: measured again


def test_as_benched_is_the_mean_over_medians_of_three() -> None:
    assert as_benched([3.0]) == 3.0
    assert as_benched([1.0, 2.0, 9.0]) == 2.0
    assert as_benched([1.0, 5.0, 1.0, 5.0, 9.0, 6.0]) == pytest.approx((1.0 + 5.0) / 2)


def test_undisturbed_ignores_slow_outliers() -> None:
    assert undisturbed([5.0, 1.0, 1.0, 1.0, 50.0]) == 1.0


def test_milliseconds_does_not_count_warm_up() -> None:
    calls: list[int] = []
    milliseconds(lambda: calls.append(1), 3, torch.device("cpu"), warm=4)
    assert len(calls) == 7
