"""Memory of a request: its K/V cache is known and checked before it is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from firp_cli import machine
from firp_cli.decoding import sequences
from firp_cli.decoding.cuda_graphs import StepGraphs
from firp_cli.decoding.engine import CAPACITY_STEP, Engine
from firp_cli.decoding.sequences import check_fits
from firp_cli.decoding.speed import pipeline
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.decoding.speed.stage_cache import StageCache
from firp_cli.decoding.step import DecodeStep
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import CapacityError
from firp_cli.machine import free_bytes, readable_bytes
from helpers.models import looped_teacher, make_predictor, random_prompts, tiny_teacher
from helpers.pairwise import covered

CPU = torch.device("cpu")
METHODS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "ar": (None, ""),
    "firp": ({"kind": "firp", "layer": 2, "steps": 3}, "dynamic:9"),
    "firp-budget": ({"kind": "firp", "layer": 2, "steps": 3}, "dynamic:9@2"),
    "hidden_transfer": ({"kind": "hidden_transfer", "layers": [1, 3, 3]}, "static:3x2"),
    "medusa": ({"kind": "medusa", "steps": 3}, "chain"),
}


@pytest.mark.parametrize(("method", "graphs", "batch"), covered(list(METHODS), [False, True], [1, 3]))
def test_cache_bytes_is_the_allocated_size(
    method: str, graphs: bool, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size includes the rows that the last steps may write past the capacity."""
    section, tree = METHODS[method]
    teacher = tiny_teacher("llama", lean=True)
    predictor = make_predictor(teacher, **section) if section else None
    engine = Engine(teacher, predictor, parse_tree(tree, 3) if predictor else None)
    if graphs:
        engine.graphs = StepGraphs(lambda step: step)
    made: list[DecodeStep] = []
    original = engine.stepper
    monkeypatch.setattr(engine, "stepper", lambda *sizes: made.append(original(*sizes)) or made[-1])
    prompts = random_prompts(batch, seed=51)
    engine.generate(prompts, 20)
    longest = max(map(len, prompts))
    announced = engine.cache_bytes(batch, longest, 20)
    (stepper,) = made
    assert stepper.capacity == (CAPACITY_STEP if graphs else longest + 20)
    slot = teacher.num_layers * 2 * batch * teacher.kv_heads * teacher.head_size * 4
    assert stepper.cache.bytes() == announced
    # by hand: slots for the rows of the largest step, for all positions, and for the tokens that a step emits past them
    rows = {"ar": 1, "firp": 36, "firp-budget": 15, "hidden_transfer": 30, "medusa": 4}[method]
    assert announced == (rows + stepper.capacity + stepper.shape.width) * slot


@pytest.mark.parametrize("loops", [(2, 3), (1, 4)])
def test_pipeline_cache_bytes_is_the_allocated_size(loops: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = looped_teacher(*loops)
    engine = PipelineEngine(teacher, make_predictor(teacher, kind="speed"), guard=False)  # type: ignore[arg-type]
    made: list[StageCache] = []

    def recording(*arguments: Any) -> StageCache:
        made.append(StageCache(*arguments))
        return made[-1]

    monkeypatch.setattr(pipeline, "StageCache", recording)
    engine.generate([[5, 6, 7], [8]], 1)  # one token, so that both sequences end together
    (cache,) = made
    assert sum(store.nbytes for store in cache._stores if store is not None) == engine.cache_bytes(2, 3, 1)


@pytest.mark.parametrize("section", [None, {"kind": "firp", "layer": 2, "steps": 3}, {"kind": "speed", "loops": 2}])
def test_cache_that_does_not_fit_is_refused(section: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher("llama")
    predictor = make_predictor(teacher, **section) if section else None
    engine: Any
    if section and section["kind"] == "speed":
        engine = PipelineEngine(teacher, predictor)  # type: ignore[arg-type]
    else:
        engine = Engine(teacher, predictor)
    needed = engine.cache_bytes(2, 3, 100)
    monkeypatch.setattr(sequences, "free_bytes", lambda device: needed)
    assert len(engine.generate([[5, 6, 7], [8]], 100)) == 2
    monkeypatch.setattr(sequences, "free_bytes", lambda device: needed - 1)
    with pytest.raises(
        CapacityError, match=r"2 sequences of \d+ positions takes .* [kM]B, cpu has .* [kM]?B free: decode"
    ):
        engine.generate([[5, 6, 7], [8]], 100)
    monkeypatch.setattr(sequences, "free_bytes", lambda device: None)
    assert len(engine.generate([[5, 6, 7]], 3)) == 1, "without a known limit nothing is refused"


def test_sizes_are_printed_in_the_fitting_unit() -> None:
    sizes = (0, 999, 100_000, 128 * 10**6, 999.94e6, 2.5e9, 7e12)
    assert [readable_bytes(size) for size in sizes] == [
        *("0 B", "999 B", "100.0 kB", "128.0 MB", "999.9 MB", "2.5 GB", "7.0 TB")
    ]
    with pytest.raises(CapacityError, match=r"of 3 sequences of 77 positions takes 1125\.9 TB, cpu has .* GB"):
        check_fits(1 << 50, 3, 77, CPU)
    check_fits(1, 3, 77, CPU)


def test_free_memory_is_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_bytes(CPU)
    assert free is None or 1 << 20 < free < 1 << 50
    for text, expected in (("MemTotal: 9 kB\nMemAvailable:   1234 kB\n", 1234 * 1024), ("MemTotal: 9 kB\n", None)):
        (tmp_path / "meminfo").write_text(text)
        monkeypatch.setattr(machine, "MEMINFO", tmp_path / "meminfo")
        assert free_bytes(CPU) == expected
    monkeypatch.setattr(machine, "MEMINFO", tmp_path / "nothing")
    assert free_bytes(CPU) is None
