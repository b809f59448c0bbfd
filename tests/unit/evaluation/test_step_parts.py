"""Parts of a decoding step: they add up to the step, and the engine decodes as before afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from firp_cli.decoding.batch import DecodeBatch
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.step import DecodeStep
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.evaluation import step_parts as module
from firp_cli.evaluation.step_parts import HOST, LAYERS, PARTS, SUMMARY, TREE, StepClock, profiled, step_parts
from firp_cli.teacher.masks import AttentionMask
from helpers.graphs import with_graphs
from helpers.models import ROOT, embedded_predictor, embedded_prompts, embedded_teacher, pipe_teacher
from helpers.pipelines import random_exits

METHODS = {"ar": None, "firp": "dynamic:8", "hidden_transfer": "static:2x2@3", "medusa": "dynamic:6"}


def engine_of(method: str, **options: object) -> Engine:
    if METHODS[method] is None:
        return Engine(embedded_teacher(), **options)  # type: ignore[arg-type]
    predictor = embedded_predictor(method)
    spec = parse_tree(METHODS[method] or "", predictor.steps)
    return Engine(embedded_teacher(), predictor, spec, **options)  # type: ignore[arg-type]


def ticking(step: float = 1.0) -> Iterator[float]:
    """Yield a clock's times: every reading is one later."""
    time = 0.0
    while True:
        yield time
        time += step


def test_clock_charges_nested_calls_to_one_part_each() -> None:
    times = ticking()
    clock = StepClock(lambda: next(times))
    inner = clock.wrap(lambda: None, LAYERS)
    other = clock.wrap(lambda: None, LAYERS, inside={TREE: HOST})

    def raising() -> None:
        inner()
        raise ValueError("wrong")

    outer, failing = clock.wrap(lambda: [inner(), inner(), other()], TREE), clock.wrap(raising, TREE)

    def step(run: object) -> None:
        outer()
        with pytest.raises(ValueError, match="wrong"):
            failing()

    clock.ends(step, lambda _: True)(None)  # type: ignore[arg-type]
    (seconds,) = clock.steps
    found = {name: value for name, value in zip(PARTS, seconds, strict=True) if value}
    # one tick between two readings: of `outer` four lie around its calls, of `failing` two
    assert found == {LAYERS: 3.0, TREE: 6.0, HOST: 1.0 + 3.0} and clock.calls == 6
    clock.ends(step, lambda _: False)(None)  # type: ignore[arg-type]
    assert len(clock.steps) == 1


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("batch", [1, 2])
def test_parts_of_every_step_add_up_to_its_time(method: str, batch: int) -> None:
    """A clock that counts its readings gives every step a known time: the readings within it."""
    readings: list[int] = []
    clock = StepClock(lambda: float(readings.append(0) or len(readings)))
    engine, prompts = engine_of(method), embedded_prompts(batch)
    expected = engine.generate(prompts, 20)
    marks: list[int] = []
    with profiled(clock, engine):
        wrapped = DecodeBatch.step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DecodeBatch, "step", lambda *given: (wrapped(*given), marks.append(len(readings)))[0])
            got = engine.generate(prompts, 20)
    assert [item.token_ids for item in got] == [item.token_ids for item in expected]
    assert [item.accepted_lengths for item in got] == [item.accepted_lengths for item in expected]
    assert len(clock.steps) == min(item.steps for item in got) > 2  # until a sequence leaves
    for before, after, seconds in zip(marks, marks[1:], clock.steps[1:], strict=False):
        assert sum(seconds) == after - before
    parts = dict(zip(PARTS, clock.faster_half(), strict=True))
    assert parts[LAYERS] > 0 and parts[HOST] > 0 and (parts[TREE] > 0)


@pytest.mark.parametrize("method", list(METHODS))
def test_step_parts_are_named_and_add_up(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StepClock] = []
    monkeypatch.setattr(module, "StepClock", lambda now: made.append(StepClock(now)) or made[-1])
    parts = step_parts(engine_of(method), [[prompt] for prompt in embedded_prompts(2)], 30)
    (clock,) = made
    assert sum(parts.values()) == pytest.approx(1000 * sum(clock.faster_half())) and min(parts.values()) > 0
    drafting = {"pseudo states and drafts"} if method != "ar" else set()
    assert set(parts) - drafting == {"layers", "head", "tree", "acceptance", "K/V commit", "host"}
    assert set(parts) >= drafting
    assert sorted(part for parts in SUMMARY.values() for part in parts) == sorted(PARTS)


def test_profile_leaves_nothing_wrapped_and_graphs_usable() -> None:
    """With graphs the profile runs eagerly; afterwards steps are captured anew. A guard's times are not touched."""
    before = [DecodeStep.step, DecodeStep.__init__, DecodeBatch.step, AttentionMask.at]
    engine, prompts = engine_of("firp", guard=True), embedded_prompts(2)
    expected = [item.token_ids for item in engine.generate(prompts, 20)]
    graphs, _ = with_graphs(engine)
    engine.generate(prompts, 20)
    known, keys = dict(engine.fallbacks), len(graphs.keys)
    assert "layers" in step_parts(engine, [prompts], 20)
    assert len(graphs.keys) == keys and engine.graphs is graphs and engine.fallbacks == known
    assert [DecodeStep.step, DecodeStep.__init__, DecodeBatch.step, AttentionMask.at] == before
    assert "layers_between" not in vars(engine.teacher) and "norm" not in vars(engine.teacher)
    for _ in range(3):
        assert [item.token_ids for item in engine.generate(prompts, 20)] == expected
    assert graphs.captures > 0


def test_profile_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = Engine.generate
    monkeypatch.setattr(
        Engine, "generate", lambda self, batch, limit: asked.append(limit) or original(self, batch, limit)
    )
    monkeypatch.setattr(module, "MOST_SECONDS", 0.0)
    engine, prompt = engine_of("ar"), embedded_prompts(1)
    assert step_parts(engine, [prompt] * 9, 100) and asked == [module.FIRST_TOKENS]
    monkeypatch.setattr(module, "MOST_SECONDS", 60.0)
    assert step_parts(engine, [prompt] * 9, 100) and asked[1:] == [8, 32, 32]
    assert step_parts(engine, [prompt] * 2, 1) == {} and step_parts(engine, [], 8) == {}


def test_other_engines_have_no_parts() -> None:
    from firp_cli.decoding.speed.pipeline import PipelineEngine

    teacher, loops = pipe_teacher("2x3")
    assert step_parts(None, [[[3, 4]]], 8) == {}
    assert step_parts(PipelineEngine(teacher, random_exits(teacher, loops)), [[[3, 4]]], 8) == {}


def test_profile_script_uses_the_same_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    from step_profile import main  # type: ignore[import-not-found]

    arguments = ["--methods", "ar,firp", "--limit", "1", "--repeats", "1", "--max-new-tokens", "12", "--threads", "1"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    layers = [float(line.split("|")[3].strip(" %")) for line in shown.splitlines() if line.startswith("| layers |")]
    assert len(layers) == 2 and min(layers) > 5  # most of a step
    assert "firp, tree" in shown and "pseudo states" in shown
