"""Steps held still: every call starts from the same state, and is a step as the engine makes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from firp_cli.decoding.batch import DecodeBatch
from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.sequences import Writer
from firp_cli.decoding.step import Mode
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.evaluation.timing import PROMPT_TOKEN
from firp_cli.results import Prediction
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.tune_results import TunedTree
from firp_cli.tuning.step_timing import TimedStep
from helpers.graphs import with_graphs
from helpers.models import embedded_predictor, embedded_teacher, make_predictor, tiny_teacher

TREES = {"dynamic:6": 6 * 5, "dynamic:6/2": 6 * 3, "dynamic:6@2": 6 + 8, "static:2x2": 7 * 3, "chain/3": 16, "none": 1}


def state_of(probe: TimedStep) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in probe.stepper.state()]


@pytest.mark.parametrize("run", ["at-once", "late", "graphs"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tree", list(TREES))
def test_every_call_is_the_same_step(
    tree: str, batch: int, run: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if run == "late":
        request.getfixturevalue("late")
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")
    options = EngineOptions(read_every=4 if run == "late" else 1)
    engine = Engine(teacher, predictor, parse_tree("dynamic:8", 4), options=options)
    tapes = with_graphs(engine)[1] if run == "graphs" else None
    probe = TimedStep(engine, batch, 50, parse_tree(tree, 4))
    assert probe.rows == TREES[tree]
    assert probe.stepper.cache.lengths.tolist() == [50] * batch
    rows: list[tuple[int, int]] = []
    begin = KVCache.begin

    def noting(cache: KVCache, count: int, longest: int) -> None:
        rows.append((count, longest))
        begin(cache, count, longest)

    monkeypatch.setattr(KVCache, "begin", noting)
    after: dict[str, list[list[torch.Tensor]]] = {"step": [], "ar_step": []}
    for name in ("step", "ar_step", "step", "ar_step"):
        for _ in range(25):
            getattr(probe, name)()
            after[name].append(state_of(probe))
    for each in after.values():
        for state in each[1:]:
            for one, other in zip(state, each[0], strict=True):  # seen from afar a prefix rounds otherwise
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 if run == "late" else 0.0)
    assert all(50 < length <= 55 for length in after["step"][0][0].tolist())
    assert after["ar_step"][0][0].tolist() == [51] * batch
    if run != "graphs":
        assert {count for count, _ in rows} == {TREES[tree], 1}
        assert max(longest for _, longest in rows) <= (50 if run == "at-once" else 50 + 8 * 5)
    assert tapes is None or (tapes.captured == (1 if tree == "none" else 2) and tapes.replayed > 90)
    for item in probe.items:
        assert item.finish_reason == "" and len(item.tokens) <= 4 * 5


@pytest.mark.parametrize("kind", ["medusa", "hidden_transfer"])
def test_a_probe_makes_the_engines_own_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state behind a call is that of a run which prefills the same prompt and takes one step."""
    teacher = tiny_teacher("llama", lean=True)
    sections: dict[str, dict[str, Any]] = {
        "medusa": {"kind": "medusa", "steps": 3},
        "hidden_transfer": {"kind": "hidden_transfer", "layers": [1, 3, 3]},
    }
    engine = Engine(teacher, make_predictor(teacher, **sections[kind]), parse_tree("dynamic:4", 3))
    probe = TimedStep(engine, 2, 20)
    states: list[list[torch.Tensor]] = []
    modes: list[Mode] = []
    step = DecodeBatch.step

    def noting(run: DecodeBatch, mode: Mode) -> None:
        step(run, mode)
        states.append([tensor.clone() for tensor in run.stepper.state()])
        modes.append(mode)

    monkeypatch.setattr(DecodeBatch, "step", noting)
    engine.generate([[PROMPT_TOKEN] * 20] * 2, 12)
    expected = states[0]
    probe.step()
    assert modes[-1] == modes[0] == "drafted"
    assert all(torch.equal(one, other) for one, other in zip(state_of(probe), expected, strict=True))


def test_nothing_ends_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens are EOS for the engine's teacher, not for the probe."""
    teacher = tiny_teacher("llama", lean=True)
    monkeypatch.setattr(teacher, "eos_token_ids", tuple(range(teacher.vocab_size)))
    written: list[int] = []
    original = Writer.write

    def write(writer: Writer, item: Any, tokens: list[int], drafted: int) -> int:
        written.append(original(writer, item, tokens, drafted))
        assert item.finish_reason == ""
        return written[-1]

    monkeypatch.setattr(Writer, "write", write)
    probe = TimedStep(Engine(teacher, make_predictor(teacher, kind="firp", layer=2, steps=3)), 2, 10)
    for _ in range(50):
        probe.step()
    assert len(written) == 2 * 51
    assert len(teacher.eos_token_ids) == teacher.vocab_size


def test_a_probe_takes_the_engines_tree() -> None:
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")
    entry = TunedTree({}, "", 2, 64, 0.0, "dynamic:4/2", Prediction(2.0, 2.0, 1.0, 1.0))
    engines = {
        4 * 3: Engine(teacher, predictor, TunedTrees(parse_tree("dynamic:8", 4), 4, (entry,))),
        8 * 5: Engine(teacher, predictor),
        1: Engine(teacher),
    }
    for rows, engine in engines.items():
        probe = TimedStep(engine, 2, 40)
        assert probe.rows == rows
        probe.step()
        assert [item.committed > 40 for item in probe.items] == [True, True]


def test_with_graphs_the_newest_probe_is_served() -> None:
    engine = Engine(embedded_teacher(), embedded_predictor("firp"))
    with_graphs(engine)
    first = TimedStep(engine, 1, 30, parse_tree("dynamic:4", 4))
    first.step()
    second = TimedStep(engine, 1, 30, parse_tree("dynamic:6", 4))
    second.step()
    with pytest.raises(AssertionError, match="newer"):
        first.step()
