"""CPU kernels against torch's operations: products, whole layers, decoding; and machines without a compiler."""

from __future__ import annotations

import copy
import gc
import os
import platform
import stat
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.teacher import cpu_kernels
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.cpu_kernels import MOST_ROWS, CompileError, Copy, PackedMatrix, load, missing, to_be_compiled
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.lean_layers import LeanStack
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.masks import step_mask
from firp_cli.teacher.packed_linear import OneDNNMatrix, PackedLinear
from firp_cli.teacher.teacher import Teacher
from helpers.models import SETTINGS, generate_reference, make_predictor, random_prompts, tiny_model

needs_kernels = pytest.mark.skipif(missing() is not None, reason=f"no kernels: {missing()}")
SIZES = [(1, 1), (37, 24), (16, 576), (192, 64), (64, 193), (100, 7)]
# flags that compile for processors with shorter registers
OTHER_LANES = {"8": ["-mno-avx512f"], "4": ["-mno-avx"]}


@pytest.fixture(params=["own", *OTHER_LANES])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels compiled for this processor, and for ones with registers of 8 and 4 floats."""
    if request.param != "own":
        if platform.machine() != "x86_64":
            pytest.skip("these flags are for x86")
        other = load(OTHER_LANES[request.param])
        monkeypatch.setattr(cpu_kernels, "compiled", lambda: other)
        assert other.firp_lanes() == int(request.param)
    return str(request.param)


def some_rows(count: int, inputs: int) -> Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(count))


@needs_kernels
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_product_equals_torch(size: tuple[int, int], lanes: str) -> None:
    torch.manual_seed(1)
    weight, bias = torch.randn(size), torch.randn(size[0])
    for offset in (bias, None):
        packed = PackedMatrix(weight, offset)
        for count in (1, 2, 3, 5, 8, 9, 13, 16, 17, 33, 64, MOST_ROWS):
            rows = some_rows(count, size[1])
            torch.testing.assert_close(packed(rows), functional.linear(rows, weight, offset), rtol=1e-5, atol=1e-4)


@needs_kernels
def test_product_of_row_ignores_other_rows() -> None:
    weight, rows = some_rows(100, 300), some_rows(40, 300)
    packed = PackedMatrix(weight)
    whole = packed(rows)
    for count in (1, 2, 7, 9, 16, 17, 31):
        assert torch.equal(packed(rows[:count]), whole[:count])


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_product_ignores_thread_count(threads: int) -> None:
    weight, rows, before = some_rows(100, 300), some_rows(5, 300), torch.get_num_threads()
    packed = PackedMatrix(weight)
    expected = packed(rows)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(packed(rows), expected)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_packed_memory_is_aligned_and_counted() -> None:
    gc.collect()
    before = Copy.total()
    matrices = [PackedMatrix(some_rows(size, 64)) for size in (3, 50, 1)]
    places = [matrix.own.panels for matrix in matrices]
    assert all(place % 64 == 0 for place in places)
    assert len(set(places)) == 3
    assert Copy.total() == before + 54 * 64 * 4
    del matrices
    gc.collect()
    assert Copy.total() == before


@needs_kernels
def test_packing_works_in_and_out_of_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first matrix allocates the block that both are cut from."""
    weight, bias, rows = some_rows(20, 30), some_rows(1, 20)[0], some_rows(4, 30)
    expected = functional.linear(rows, weight, bias)
    for first in (True, False):
        monkeypatch.setattr(cpu_kernels._Memory, "left", torch.empty(0))
        for inside in (first, not first):
            with torch.inference_mode(inside):
                torch.testing.assert_close(PackedMatrix(weight, bias)(rows), expected)


WIDE: dict[str, Any] = {"initializer_range": 0.1}  # with more weights, wide ones increase rounding errors
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-64": ("Llama", WIDE | {"hidden_size": 256, "head_dim": 64, "intermediate_size": 100}),
    "llama-9-3": (
        "Llama",
        WIDE | {"hidden_size": 288, "head_dim": 32, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 12, "head_dim": 24}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen3-128": ("Qwen3", {"head_dim": 128}),
}


def make_teacher(family: str) -> Teacher:
    """Return a teacher on lean layers; norms and biases are not 1 and 0."""
    name, options = FAMILIES[family]
    torch.manual_seed(4)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**(SETTINGS | options)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif key.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
    teacher = wrap_model(model.eval(), name=family)
    assert use_lean_layers(teacher) is None
    return teacher


def run_layers(
    teacher: Teacher, batch: int, rows: int, start: int = 0, stop: int | None = None, apart: bool = False
) -> Tensor:
    """Run a step's rows, which see some of each other, over prefixes of different lengths; `apart`: layer by layer."""
    context, scratch = 21, rows + 3
    shape = (teacher.num_layers, batch, scratch, 40, teacher.kv_heads, teacher.head_size, teacher.dtype, teacher.device)
    cache = KVCache(*shape, spread=3)
    torch.manual_seed(5)
    cache.fill(context)
    cache.set_lengths(context - 4 * torch.arange(batch))
    hidden = torch.randn(batch, rows, teacher.hidden_size)
    seen = (torch.rand(batch, rows, rows) < 0.5).tril() | torch.eye(rows, dtype=torch.bool)
    positions = cache.lengths[:, None] + torch.arange(rows).clamp(max=6)
    cache.begin(rows, context)
    mask = step_mask(seen, positions, cache.lengths, cache.prefix_slots(context), teacher.dtype)
    rotary = teacher.rotary(hidden, positions)
    stop = teacher.num_layers if stop is None else stop
    with torch.inference_mode():
        if not apart:
            return teacher.layers_between(start, stop, hidden, rotary, positions, mask, cache)
        for number in range(start, stop):
            seen_rows = mask.at(teacher.windows[number], rows)
            hidden = teacher.layer(number, hidden, rotary, positions, seen_rows, cache)
        return hidden


def without_kernels(teacher: Teacher, run: Callable[[], Tensor]) -> Tensor:
    """Return the result of the lean layers in torch's operations."""
    stack = teacher.stack
    assert isinstance(stack, LeanStack)
    layers = {id(layer): layer for layer in stack._layers if layer}.values()
    packed = [layer.packed for layer in layers]
    assert all(kernel is not None for kernel in packed), "these layers run in kernels"
    runs, stack._runs = stack._runs, {}
    for layer in layers:
        layer.packed = None
    try:
        return run()
    finally:
        stack._runs = runs
        for layer, kernel in zip(layers, packed, strict=True):
            layer.packed = kernel


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


@needs_kernels
@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (1, 9), (3, 1), (3, 5), (1, 40)])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_layers_equal_torch(family: str, batch: int, rows: int) -> None:
    teacher = make_teacher(family)
    expected = without_kernels(teacher, lambda: run_layers(teacher, batch, rows, apart=True))
    for apart in (False, True):
        assert_near(run_layers(teacher, batch, rows, apart=apart), expected)


@needs_kernels
def test_layers_with_short_registers_equal_torch(lanes: str) -> None:
    teacher = make_teacher("qwen3-128")
    expected = without_kernels(teacher, lambda: run_layers(teacher, 2, 11, apart=True))
    assert_near(run_layers(teacher, 2, 11), expected)


@needs_kernels
def test_layers_in_one_call_equal_single_layers() -> None:
    """Compare bit for bit, from any layer to any later one."""
    teacher = make_teacher("llama-9-3")
    for start, stop in ((0, 4), (1, 3), (2, 3)):
        together = run_layers(teacher, 2, 6, start, stop)
        assert torch.equal(together, run_layers(teacher, 2, 6, start, stop, apart=True))


@needs_kernels
def test_layers_keep_cache_tensors_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache may return tensors without another reference."""
    teacher, alive = make_teacher("llama-64"), []
    library = cpu_kernels.compiled()
    made: list[weakref.ref[Tensor]] = []

    class Watching:
        firp_before = staticmethod(library.firp_before)

        @staticmethod
        def firp_after(*given: Any) -> None:
            alive.append(all(reference() is not None for reference in made))
            library.firp_after(*given)

    class Fresh:
        def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
            fresh = keys.clone(), values.clone()
            made[:] = [weakref.ref(tensor) for tensor in fresh]
            return fresh

    monkeypatch.setattr(cpu_kernels, "compiled", lambda: Watching)
    hidden, positions = torch.randn(1, 3, 256), torch.arange(3)[None]
    mask = teacher.sequence_mask(torch.ones(1, 3, 3, dtype=torch.bool).tril(), positions)
    with torch.inference_mode():
        teacher.run(hidden, positions, mask, cache=Fresh())
    assert alive == [True] * teacher.num_layers


@needs_kernels
def test_layers_keep_callers_rows() -> None:
    teacher = make_teacher("llama-64")
    hidden = torch.randn(1, 3, 256)
    before, positions = hidden.clone(), torch.arange(3)[None]
    mask = teacher.sequence_mask(torch.ones(1, 3, 3, dtype=torch.bool).tril(), positions)
    with torch.inference_mode():
        teacher.run(hidden, positions, mask)
    assert torch.equal(hidden, before)


@needs_kernels
def test_row_that_sees_no_slot_is_finite() -> None:
    teacher = make_teacher("llama")
    hidden, positions = torch.randn(1, 4, 48), torch.arange(4)[None]
    mask = teacher.sequence_mask(torch.zeros(1, 4, 4, dtype=torch.bool), positions)
    with torch.inference_mode():
        got = teacher.run(hidden, positions, mask)
        assert_near(got, without_kernels(teacher, lambda: teacher.run(hidden, positions, mask)))
    assert got.isfinite().all()


@needs_kernels
def test_gate_with_large_values_equals_torch() -> None:
    """Compare gates whose exp(-x) is far below and far above 0."""
    teacher = make_teacher("llama-64")
    with torch.no_grad():
        for name, parameter in teacher.model.named_parameters():
            if "gate_proj" in name or "down_proj" in name:
                parameter.mul_(300.0 if "gate_proj" in name else 0.01)
    assert use_lean_layers(teacher) is None
    expected = without_kernels(teacher, lambda: run_layers(teacher, 1, 7, apart=True))
    assert expected.isfinite().all()
    assert_near(run_layers(teacher, 1, 7), expected)


@needs_kernels
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama-9-3", "mistral-window", "qwen3-128"])
def test_decoding_equals_generate(family: str, batch: int) -> None:
    teacher, prompts = make_teacher(family), random_prompts(batch, seed=3)
    expected = [generate_reference(teacher.model, prompt, 24) for prompt in prompts]
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=2)
    for engine in (Engine(teacher), Engine(teacher, predictor, parse_tree("dynamic:4/2", 2))):
        assert [item.token_ids for item in engine.generate(prompts, 24)] == expected


@needs_kernels
def test_rows_with_gradients_run_in_torch() -> None:
    teacher = make_teacher("llama")
    hidden, positions = torch.randn(1, 3, 48, requires_grad=True), torch.arange(3)[None]
    mask = teacher.sequence_mask(torch.ones(1, 3, 3, dtype=torch.bool).tril(), positions)
    teacher.run(hidden, positions, mask).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().max() > 0


@needs_kernels
def test_dispatch_mode_sees_every_operation() -> None:
    """A counter of operations counts the products of all layers and of the head."""
    teacher = make_teacher("llama")
    positions = torch.arange(3)[None]
    mask = teacher.sequence_mask(torch.ones(1, 3, 3, dtype=torch.bool).tril(), positions)
    hidden = torch.randn(1, 3, 48)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        teacher.head(teacher.norm(teacher.run(hidden, positions, mask)))
    weights = sum(parameter.numel() for parameter in teacher.model.parameters() if parameter.dim() == 2)
    embedding = teacher.model.get_input_embeddings().weight.numel()
    assert counter.get_total_flops() >= 2 * 3 * (weights - embedding)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Empty cache folder, as on a machine that has compiled nothing."""
    monkeypatch.setattr(cpu_kernels, "cache_folder", lambda: tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    yield tmp_path


def test_load_without_compiler_names_reason(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(CompileError, match=r"no C\+\+ compiler is installed"):
        load()
    assert not to_be_compiled(), "no compilation is announced"


def test_load_quotes_failing_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fresh / "c++"
    compiler.write_text("#!/bin/sh\necho 'c++: internal error' >&2\nexit 3\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(fresh))
    with pytest.raises(CompileError, match=r"c\+\+: internal error"):
        load()
    assert not list(fresh.glob("kernels/*")), "no partial file remains"


@needs_kernels
def test_load_refuses_damaged_library(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load()
    (library,) = fresh.glob("kernels/cpu-*.so")
    damaged = fresh / "other" / "kernels" / library.name  # under another path, since this one is loaded
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"no library")
    monkeypatch.setattr(cpu_kernels, "cache_folder", lambda: fresh / "other")
    with pytest.raises(CompileError, match=r"cpu-\w+\.so"):
        load()


def test_load_obeys_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu_kernels.SWITCH, "0")
    with pytest.raises(CompileError, match="FIRP_CPU_KERNELS=0"):
        load()


def test_decoding_without_kernels_equals_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode with torch's operations and oneDNN's products."""
    for module in ("firp_cli.teacher.cpu_kernels.missing", "firp_cli.teacher.packed_linear.missing"):
        monkeypatch.setattr(module, lambda: "none")
    model = copy.deepcopy(tiny_model("llama"))
    teacher, (prompt,) = wrap_model(model), random_prompts(1, seed=4)
    assert use_lean_layers(teacher) is None
    assert isinstance(teacher.stack, LeanStack)
    assert all(layer is not None and layer.packed is None for layer in teacher.stack._layers)
    product = PackedLinear(torch.randn(40, 16))
    assert product._packed is None or isinstance(product._packed, OneDNNMatrix)
    assert Engine(teacher).generate([prompt], 16)[0].token_ids == generate_reference(model, prompt, 16)


@needs_kernels
def test_copies_stay_within_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers whose copies exceed the limit keep torch's operations."""
    gc.collect()
    monkeypatch.setattr(cpu_kernels, "MOST_BYTES", Copy.total() + 60_000)
    teacher = make_teacher("llama")
    assert isinstance(teacher.stack, LeanStack)
    kinds = [layer is not None and layer.packed is not None for layer in teacher.stack._layers]
    assert kinds == sorted(kinds, reverse=True)
    assert not all(kinds)
    assert Copy.total() <= cpu_kernels.MOST_BYTES
    (prompt,) = random_prompts(1, seed=4)
    assert Engine(teacher).generate([prompt], 16)[0].token_ids == generate_reference(teacher.model, prompt, 16)


def test_kernel_file_depends_on_instructions(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual processors of one name may have different instruction sets."""
    places = set()
    for instructions in ("flags: avx2", "flags: avx2 avx512f"):
        monkeypatch.setattr(cpu_kernels, "_instructions", lambda instructions=instructions: instructions)
        places.add(cpu_kernels._place()[0])
    assert len(places) == 2


@needs_kernels
def test_load_compiles_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_be_compiled()
    load()
    (library,) = fresh.glob("kernels/*")
    changed = library.stat().st_mtime_ns
    monkeypatch.setenv("PATH", os.devnull)
    assert not to_be_compiled()
    assert load().firp_lanes() in (4, 8, 16)
    assert library.stat().st_mtime_ns == changed
