"""Losslessness on CUDA, in fp32 and bf16, with graphs and kernels. Skipped without a CUDA device."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import transformers

from firp_cli.decoding.cuda_graphs import CaptureError, CudaCapture
from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.speed.pipeline import PipelineEngine, PipelineRun
from firp_cli.decoding.step import DecodeStep
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.evaluation.environment import measurement_environment
from firp_cli.evaluation.execution import engine_execution
from firp_cli.evaluation.step_parts import step_parts
from firp_cli.predictors.base import Predictor
from firp_cli.results import Generation, Prediction
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from firp_cli.tune_results import TunedTree
from helpers.models import SETTINGS, generate_reference, looped_model, make_predictor, random_prompts, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FAMILIES = ["llama", "llama-tied", "mistral-window", "qwen2", "qwen3"]
KINDS = [{"kind": "firp", "layer": 2, "steps": 3}, {"kind": "hidden_transfer", "layers": [1, 3]}, {"kind": "medusa"}]


def on_cuda(family: str, dtype: torch.dtype) -> Teacher:
    return wrap_model(copy.deepcopy(tiny_model(family)).to("cuda", dtype), name=family)


def predictor_for(teacher: Teacher, section: dict) -> Predictor:
    return make_predictor(teacher, **section).to(teacher.device, teacher.dtype)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("section", KINDS, ids=lambda section: section["kind"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_decoding_equals_generate(family: str, section: dict, batch: int) -> None:
    teacher = on_cuda(family, torch.float32)
    prompts = random_prompts(4, seed=21)
    predictor = predictor_for(teacher, section)
    for tree in ("dynamic:9", "static:3x2"):
        engine = Engine(teacher, predictor, parse_tree(tree, predictor.steps))
        got = [item for start in range(0, 4, batch) for item in engine.generate(prompts[start : start + batch], 24)]
        for prompt, item in zip(prompts, got, strict=True):
            assert item.token_ids == generate_reference(teacher.model, prompt, 24)


@pytest.mark.parametrize("section", KINDS, ids=lambda section: section["kind"])
def test_attention_by_torch_needs_no_triton(section: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way out where Triton cannot compile for a device."""
    teacher = on_cuda("llama", torch.float32)
    assert use_lean_layers(teacher) is None
    predictor = predictor_for(teacher, section)
    for name in ("decoding.triton_tree", "decoding.triton_sampling", "predictors.triton_candidates"):
        monkeypatch.setitem(sys.modules, f"firp_cli.{name}", None)
    for name in ("attention", "commit", "layer", "products"):
        monkeypatch.setitem(sys.modules, f"firp_cli.teacher.triton_{name}", None)
    (prompt,) = random_prompts(1, seed=24)
    engine = Engine(teacher, predictor, parse_tree("dynamic:5", predictor.steps), options=EngineOptions("sdpa"))
    assert engine.generate([prompt], 16)[0].token_ids == generate_reference(teacher.model, prompt, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_decoding_differs_only_at_near_ties(family: str) -> None:
    """Other row counts round differently in bf16: where outputs differ, the two logits must be close."""
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
@pytest.mark.parametrize("batch", [1, 3])
def test_step_never_waits_for_the_device(section: dict, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step contains no host synchronisation; emitted tokens are read after it."""
    teacher = on_cuda("llama", torch.float32)
    engine = Engine(teacher, predictor_for(teacher, section), options=EngineOptions(graphs=False))
    prompts = random_prompts(3, seed=25)[:batch]
    expected = [item.token_ids for item in engine.generate(prompts, 24)]
    original, steps = DecodeStep.step, []

    def guarded(*arguments: Any, **options: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            original(*arguments, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        steps.append(1)

    monkeypatch.setattr(DecodeStep, "step", guarded)
    assert [item.token_ids for item in engine.generate(prompts, 24)] == expected
    assert len(steps) > 5


def decode(engine: Engine, prompts: list[list[int]], batch: int) -> list[Generation]:
    places = range(0, len(prompts), batch)
    return [item for start in places for item in engine.generate(prompts[start : start + batch], 24)]


def texts(engine: Engine, prompts: list[list[int]], batch: int) -> list[list[int]]:
    return [item.token_ids for item in decode(engine, prompts, batch)]


def written(teacher: Teacher, prompts: list[list[int]]) -> list[list[int]]:
    """Return the tokens of `generate`."""
    return [generate_reference(teacher.model, prompt, 24) for prompt in prompts]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tree", ["dynamic:9", "dynamic:9@3"])
@pytest.mark.parametrize("section", [None, *KINDS], ids=lambda section: section["kind"] if section else "ar")
@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_graphs_write_the_tokens_of_eager_steps(family: str, section: dict | None, tree: str, batch: int) -> None:
    """In the second run the graphs' keys are known, in the third the graphs are captured."""
    teacher = on_cuda(family, torch.float32)
    predictor = predictor_for(teacher, section) if section else None
    spec = parse_tree(tree, predictor.steps) if predictor else None
    prompts = random_prompts(4, seed=23)
    eager = Engine(teacher, predictor, spec, options=EngineOptions(graphs=False))
    captured = Engine(teacher, predictor, spec, options=EngineOptions(graphs=True))
    expected = decode(eager, prompts, batch)
    assert [item.token_ids for item in expected] == written(teacher, prompts)
    assert eager.graphs is None
    assert captured.graphs is not None
    for _ in range(3):
        got = decode(captured, prompts, batch)
        assert [item.token_ids for item in got] == [item.token_ids for item in expected]
        assert [item.accepted_lengths for item in got] == [item.accepted_lengths for item in expected]
    assert len(captured.graphs._replays) > 0


def test_graphs_of_larger_requests_replace_smaller_ones() -> None:
    """New buffers, new graphs, the same tokens; then the small request in the large buffers."""
    teacher = on_cuda("qwen3", torch.float32)
    engine = Engine(teacher, predictor_for(teacher, KINDS[0]))
    assert engine.graphs is not None
    for seed, count in ((31, 1), (32, 3), (31, 1)):
        prompts = random_prompts(count, seed=seed)
        for _ in range(3):
            assert texts(engine, prompts, count) == written(teacher, prompts)


def test_failed_capture_leaves_the_device_usable() -> None:
    """The error names the cause; stream, random numbers, memory and the next capture are as before."""
    device = torch.device("cuda", torch.cuda.current_device())
    values = torch.zeros(4, device=device)

    def add() -> None:
        values.add_(1)

    def waits() -> None:
        values.add_(1)
        values.new_empty(1 << 20).normal_()
        values.sum().item()

    capture = CudaCapture(device)
    kept, stream = capture(add), torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(CaptureError, match="--no-graphs"):
            capture(waits)
    assert torch.cuda.current_stream() == stream
    torch.empty(1 << 20, device=device).normal_()
    torch.cuda.empty_cache()
    replay = capture(add)
    before = values.clone()
    replay()
    kept()
    torch.cuda.synchronize()
    assert torch.equal(values, before + 2)
    test_replayed_steps_sample_new_tokens()


def test_graphs_of_several_trees_stay_captured() -> None:
    """Trees that differ by batch size take turns: none is captured while answers are written. Then a profile runs
    eagerly, and the next answers capture anew.
    """
    teacher = on_cuda("llama", torch.float32)
    predictor = predictor_for(teacher, KINDS[0])
    entries = [
        TunedTree({}, "", batch, 64, 0.0, tree, Prediction(2.0, 2.0, 1.0, 1.0))
        for batch, tree in ((1, "dynamic:9"), (2, "none"), (4, "static:3x2"))
    ]
    engine = Engine(teacher, predictor, TunedTrees(parse_tree("dynamic:6", predictor.steps), 3, tuple(entries)))
    prompts = random_prompts(4, seed=27)
    expected = written(teacher, prompts)
    assert engine.graphs is not None
    for count in (4, 2, 1):
        engine.capture(count, max(map(len, prompts)), 24)
    engine.graphs.captures = 0
    for count in (4, 1, 2, 4, 2, 1):
        assert [item.token_ids for item in engine.generate(prompts[:count], 24)] == expected[:count]
    assert engine_execution(engine, teacher).graphs == "captured" and engine.graphs.captures == 0
    parts = step_parts(engine, [prompts, prompts], 24)
    assert {"layers", "head", "tree", "pseudo states and drafts", "host"} <= set(parts) and min(parts.values()) > 0
    for _ in range(3):
        assert [item.token_ids for item in engine.generate(prompts, 24)] == expected
    assert engine.graphs.captures > 0
    assert measurement_environment(teacher)["devices"] == torch.cuda.device_count()


def test_replayed_steps_sample_new_tokens() -> None:
    """Sampled texts differ between requests, also with graphs, and repeat with the seed."""
    teacher = on_cuda("llama", torch.float32)
    predictor = predictor_for(teacher, KINDS[0])
    runs = []
    for _ in range(2):
        engine = Engine(teacher, predictor, temperature=2.0, seed=5)
        runs.append([tuple(engine.generate([[5, 6, 7]], 24)[0].token_ids) for _ in range(4)])
        assert engine.graphs is not None
        assert len(engine.graphs._replays) > 0
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 4


def wide_teacher(lean: bool, **options: Any) -> Teacher:
    """Return a Llama with heads of 64, a size of the attention kernels."""
    sizes = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 2048, "initializer_range": 0.1}
    torch.manual_seed(4)
    config = transformers.MistralConfig(**(SETTINGS | sizes | {"sliding_window": None} | options))
    teacher = wrap_model(transformers.MistralForCausalLM(config).eval().to("cuda"), name="wide")
    if lean:
        assert use_lean_layers(teacher) is None
    return teacher


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("section", [None, *KINDS], ids=lambda section: section["kind"] if section else "ar")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("lean", [True, False], ids=["lean", "library"])
def test_kernel_writes_the_tokens_of_torch_attention(
    lean: bool, window: int | None, section: dict | None, batch: int
) -> None:
    pytest.importorskip("triton")
    teacher = wide_teacher(lean, sliding_window=window)
    predictor = predictor_for(teacher, section) if section else None
    prompts = random_prompts(4, seed=24, low=3, high=60)
    expected = written(teacher, prompts)
    for attention, graphs in (("sdpa", False), ("triton", False), ("triton", True)):
        engine = Engine(teacher, predictor, options=EngineOptions(attention=attention, graphs=graphs))
        for _ in range(3 if graphs else 1):
            assert texts(engine, prompts, batch) == expected, (attention, graphs)


def test_graph_serves_all_lengths() -> None:
    """The kernel reads lengths from the device, so a growing text needs no other graph."""
    pytest.importorskip("triton")
    teacher = wide_teacher(lean=True)
    prompt = random_prompts(1, seed=29, low=240, high=240)[0]
    for predictor in (None, predictor_for(teacher, KINDS[0])):
        engine = Engine(teacher, predictor, options=EngineOptions(attention="triton"))
        assert engine.generate([prompt], 40)[0].token_ids == generate_reference(teacher.model, prompt, 40)
        assert engine.graphs is not None and len(engine.graphs._replays) == 1


def test_kernel_reads_long_prefixes() -> None:
    """Several splits of more than a thousand positions, sequences of very different lengths."""
    pytest.importorskip("triton")
    teacher = wide_teacher(lean=True)
    predictor = predictor_for(teacher, KINDS[0])
    prompts = [random_prompts(1, seed=26, low=length, high=length)[0] for length in (1500, 3, 400)]
    engine = Engine(teacher, predictor, options=EngineOptions(attention="triton"))
    assert texts(engine, prompts, 3) == written(teacher, prompts)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("section", [None, *KINDS], ids=lambda section: section["kind"] if section else "ar")
@pytest.mark.parametrize("family", FAMILIES)
def test_lean_layers_write_the_tokens_of_library_layers(family: str, section: dict | None, batch: int) -> None:
    teacher, prompts = on_cuda(family, torch.float32), random_prompts(4, seed=27)
    predictor = predictor_for(teacher, section) if section else None
    expected = written(teacher, prompts)
    assert texts(Engine(teacher, predictor), prompts, batch) == expected
    assert use_lean_layers(teacher) is None
    assert texts(Engine(teacher, predictor), prompts, batch) == expected


def test_late_reading_changes_no_token() -> None:
    """The host sees the end of a sequence one step late; one text ends by EOS in the middle."""
    teacher = on_cuda("llama", torch.float32)
    predictor, prompts = predictor_for(teacher, KINDS[0]), random_prompts(4, seed=28)
    expected = written(teacher, prompts)
    ending = expected[0][9]
    teacher.eos_token_ids = (*teacher.eos_token_ids, ending)
    expected = [text[: text.index(ending) + 1] if ending in text else text for text in expected]
    assert len(set(map(len, expected))) > 1
    for graphs in (False, True):
        engine = Engine(teacher, predictor, options=EngineOptions(graphs=graphs))
        for _ in range(3):
            assert texts(engine, prompts, 4) == expected, graphs


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("shape", [(1, 4), (3, 4)], ids=["1x4", "3x4"])
def test_pipeline_equals_generate(shape: tuple[int, int], batch: int) -> None:
    teacher = wrap_model(copy.deepcopy(looped_model(*shape)).to("cuda", torch.float32), name="looped")
    engine = PipelineEngine(teacher, predictor_for(teacher, {"kind": "speed"}), guard=False)  # type: ignore[arg-type]
    prompts = random_prompts(4, seed=21)
    got = [item for start in range(0, 4, batch) for item in engine.generate(prompts[start : start + batch], 24)]
    for prompt, item in zip(prompts, got, strict=True):
        assert item.token_ids == generate_reference(teacher.model, prompt, 24)


def test_tick_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished tokens are read after the tick's work."""
    teacher = wrap_model(copy.deepcopy(looped_model(2, 3)).to("cuda", torch.float32), name="looped")
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
