"""Timed steps: every call starts from the same state, and runs a step as the engine does."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from firp_cli.decoding.batch import DecodeBatch
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.sequences import Writer
from firp_cli.decoding.step import Mode
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.evaluation.timing import PROMPT_TOKEN
from firp_cli.results import Prediction
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.tune_results import TunedTree
from firp_cli.tuning import step_timing as module
from firp_cli.tuning.calibration import TuneSettings
from firp_cli.tuning.step_timing import TimedStep, time_steps
from helpers.graphs import with_graphs
from helpers.models import embedded_predictor, embedded_teacher, make_predictor, tiny_teacher
from helpers.pairwise import pairwise

TREES = {"dynamic:6": 6 * 5, "dynamic:6/2": 6 * 3, "dynamic:6@2": 6 + 8, "static:2x2": 7 * 3, "chain/3": 16, "none": 1}


AXES = (list(TREES), [1, 3], ["at-once", "late", "graphs"])
COVER = pairwise(*AXES)


def state_of(timed: TimedStep) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in timed.stepper.buffers()]


@pytest.mark.parametrize(
    ("tree", "batch", "run"),
    [case if case in COVER else pytest.param(*case, marks=pytest.mark.nightly) for case in product(*AXES)],
)
def test_every_call_repeats_the_same_step(
    tree: str, batch: int, run: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if run == "late":
        request.getfixturevalue("late")
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")
    engine = Engine(teacher, predictor, parse_tree("dynamic:8", 4))
    tapes = with_graphs(engine)[1] if run == "graphs" else None
    timed = TimedStep(engine, batch, 50, parse_tree(tree, 4))
    assert timed.rows == TREES[tree]
    assert timed.stepper.cache.lengths.tolist() == [50] * batch
    rows: list[tuple[int, int]] = []
    begin = KVCache.begin

    def noting(cache: KVCache, count: int, longest: int) -> None:
        rows.append((count, longest))
        begin(cache, count, longest)

    monkeypatch.setattr(KVCache, "begin", noting)
    after: dict[str, list[list[torch.Tensor]]] = {"step": [], "ar_step": []}
    for name in ("step", "ar_step", "step", "ar_step"):
        for _ in range(25):
            getattr(timed, name)()
            after[name].append(state_of(timed))
    for each in after.values():
        for state in each[1:]:
            for one, other in zip(state, each[0], strict=True):  # with a larger bound on the context rounding differs
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 if run == "late" else 0.0)
    assert all(50 < length <= 55 for length in after["step"][0][0].tolist())
    assert after["ar_step"][0][0].tolist() == [51] * batch
    if run != "graphs":
        assert {count for count, _ in rows} == {TREES[tree], 1}
        assert max(longest for _, longest in rows) <= (50 if run == "at-once" else 50 + 2 * 5)
    assert tapes is None or (tapes.captured == (1 if tree == "none" else 2) and tapes.replayed > 90)
    for item in timed.items:
        assert item.finish_reason == "" and len(item.tokens) <= 4 * 5


@pytest.mark.parametrize("kind", ["medusa", "hidden_transfer"])
def test_timed_step_equals_the_engines_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state after a call is that of `generate` after prefill of the same prompt and one step."""
    teacher = tiny_teacher("llama", lean=True)
    sections: dict[str, dict[str, Any]] = {
        "medusa": {"kind": "medusa", "steps": 3},
        "hidden_transfer": {"kind": "hidden_transfer", "layers": [1, 3, 3]},
    }
    engine = Engine(teacher, make_predictor(teacher, **sections[kind]), parse_tree("dynamic:4", 3))
    timed = TimedStep(engine, 2, 20)
    states: list[list[torch.Tensor]] = []
    modes: list[Mode] = []
    step = DecodeBatch.step

    def noting(run: DecodeBatch, mode: Mode) -> None:
        step(run, mode)
        states.append([tensor.clone() for tensor in run.stepper.buffers()])
        modes.append(mode)

    monkeypatch.setattr(DecodeBatch, "step", noting)
    engine.generate([[PROMPT_TOKEN] * 20] * 2, 12)
    expected = states[0]
    timed.step()
    assert modes[-1] == modes[0] == "drafted"
    assert all(torch.equal(one, other) for one, other in zip(state_of(timed), expected, strict=True))


def test_timed_step_ignores_eos(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens are EOS for the engine's teacher, but not for the timed step."""
    teacher = tiny_teacher("llama", lean=True)
    monkeypatch.setattr(teacher, "eos_token_ids", tuple(range(teacher.vocab_size)))
    written: list[int] = []
    original = Writer.write

    def write(writer: Writer, item: Any, tokens: list[int], drafted: int) -> int:
        written.append(original(writer, item, tokens, drafted))
        assert item.finish_reason == ""
        return written[-1]

    monkeypatch.setattr(Writer, "write", write)
    timed = TimedStep(Engine(teacher, make_predictor(teacher, kind="firp", layer=2, steps=3)), 2, 10)
    for _ in range(50):
        timed.step()
    assert len(written) == 2 * 51
    assert len(teacher.eos_token_ids) == teacher.vocab_size


def test_timed_step_uses_the_engines_tree() -> None:
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")
    entry = TunedTree({}, "", 2, 64, 0.0, "dynamic:4/2", Prediction(2.0, 2.0, 1.0, 1.0))
    engines = {
        4 * 3: Engine(teacher, predictor, TunedTrees(parse_tree("dynamic:8", 4), 4, (entry,))),
        8 * 5: Engine(teacher, predictor),
        1: Engine(teacher),
    }
    for rows, engine in engines.items():
        timed = TimedStep(engine, 2, 40)
        assert timed.rows == rows
        timed.step()
        assert [item.committed > 40 for item in timed.items] == [True, True]


def test_engine_with_graphs_serves_only_the_newest_timed_step() -> None:
    engine = Engine(embedded_teacher(), embedded_predictor("firp"))
    with_graphs(engine)
    first = TimedStep(engine, 1, 30, parse_tree("dynamic:4", 4))
    first.step()
    second = TimedStep(engine, 1, 30, parse_tree("dynamic:6", 4))
    second.step()
    with pytest.raises(AssertionError, match="newer"):
        first.step()


@pytest.mark.parametrize(("long", "calls"), [(1e9, 3 * 2), (0.0, 2 + 1 + 1)])
def test_long_steps_are_warmed_up_once(long: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONG", long)
    monkeypatch.setattr(module, "enough_calls", lambda *_: 1)
    run: list[TimedStep] = []
    monkeypatch.setattr(TimedStep, "step", lambda timed: run.append(timed))
    spec = parse_tree("dynamic:4", 4)
    times = time_steps(embedded_teacher(), embedded_predictor("firp"), [spec], 1, 20, TuneSettings(), 3)
    assert len(times[spec]) == 3 and len(run) == calls
