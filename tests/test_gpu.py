"""The lossless checks on CUDA, in fp32 and bf16. Skipped where there is no CUDA device."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import generate_reference, looped_model, make_predictor, random_prompts, tiny_model
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.pipeline import PipelineEngine, PipelineRun
from firp_cli.decoding.tree import parse_tree
from firp_cli.predictors.base import Predictor
from firp_cli.teacher.stack import Teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES = ["llama", "llama-tied", "mistral-window", "qwen2", "qwen3"]
KINDS = [{"kind": "firp", "layer": 2, "steps": 3}, {"kind": "hidden_transfer", "layers": [1, 3]}, {"kind": "medusa"}]


def on_cuda(family: str, dtype: torch.dtype) -> Teacher:
    return Teacher(copy.deepcopy(tiny_model(family)).to("cuda", dtype), name=family)


def predictor_for(teacher: Teacher, section: dict) -> Predictor:
    return make_predictor(teacher, **section).to(teacher.device, teacher.dtype)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("section", KINDS, ids=lambda section: section["kind"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_equals_generate(family: str, section: dict, batch: int) -> None:
    teacher = on_cuda(family, torch.float32)
    prompts = random_prompts(4, seed=21)
    predictor = predictor_for(teacher, section)
    for tree in ("dynamic:9", "static:3x2"):
        engine = Engine(teacher, predictor, parse_tree(tree, predictor.steps))
        got = [item for start in range(0, 4, batch) for item in engine.generate(prompts[start : start + batch], 24)]
        for prompt, item in zip(prompts, got, strict=True):
            assert item.token_ids == generate_reference(teacher.model, prompt, 24)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_differs_only_at_near_ties(family: str) -> None:
    """Other row counts round differently in bf16: where outputs part, the two logits must be close."""
    teacher = on_cuda(family, torch.bfloat16)
    predictor = predictor_for(teacher, KINDS[0])
    for prompt in random_prompts(4, seed=22):
        expected = Engine(teacher).generate([prompt], 24)[0].token_ids
        got = Engine(teacher, predictor).generate([prompt], 24)[0].token_ids
        same = next((n for n, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1]), None)
        if same is None:
            assert got == expected
            continue
        ids = torch.tensor([[*prompt, *expected[:same]]], device="cuda")
        logits = teacher.model(ids).logits[0, -1].float()
        gap = (logits[expected[same]] - logits[got[same]]).abs().item()
        assert gap < 0.05 * logits.abs().max().item()


@pytest.mark.parametrize("section", KINDS, ids=lambda section: section["kind"])
def test_a_step_waits_for_the_device_once(section: dict) -> None:
    """No host synchronisation inside a step; the read of what was emitted comes after it."""
    teacher = on_cuda("llama", torch.float32)
    engine = Engine(teacher, predictor_for(teacher, section))
    engine.generate([[5, 6, 7]], 12)
    original = engine._step

    def guarded(*arguments: object) -> object:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(*arguments)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine._step = guarded  # type: ignore[method-assign, assignment]
    assert len(engine.generate([[5, 6, 7]], 12)[0].token_ids) == 12


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("shape", [(1, 4), (3, 4)], ids=["1x4", "3x4"])
def test_a_pipeline_equals_generate(shape: tuple[int, int], batch: int) -> None:
    teacher = Teacher(copy.deepcopy(looped_model(*shape)).to("cuda", torch.float32), name="looped")
    engine = PipelineEngine(teacher, predictor_for(teacher, {"kind": "speed"}), guard=False)  # type: ignore[arg-type]
    prompts = random_prompts(4, seed=21)
    got = [item for start in range(0, 4, batch) for item in engine.generate(prompts[start : start + batch], 24)]
    for prompt, item in zip(prompts, got, strict=True):
        assert item.token_ids == generate_reference(teacher.model, prompt, 24)


def test_a_tick_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The read of what left comes after the tick's work."""
    teacher = Teacher(copy.deepcopy(looped_model(2, 3)).to("cuda", torch.float32), name="looped")
    engine = PipelineEngine(teacher, predictor_for(teacher, {"kind": "speed"}), guard=False)  # type: ignore[arg-type]
    engine.generate([[5, 6, 7]], 12)
    original = PipelineRun.work

    def guarded(run: PipelineRun) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(PipelineRun, "work", guarded)
    assert len(engine.generate([[5, 6, 7]], 12)[0].token_ids) == 12
