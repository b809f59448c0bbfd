"""Lean layers equal the library's on the same weights; models of other kinds keep the library's layers."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from firp_cli.decoding.engine import Engine
from firp_cli.predictors.forward import forward_rows
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.masks import AttentionMask, step_mask
from firp_cli.teacher.teacher import Teacher
from helpers.layers import (
    LOOPED,
    LOOPS,
    assert_equal,
    new_teacher,
    small_llama,
    some_ids,
    states_of,
    tolerance_of,
    varied,
)
from helpers.models import (
    FAMILIES,
    SETTINGS,
    generate_reference,
    make_predictor,
    random_prompts,
    sequence_batch,
    tiny_model,
)

names = pytest.mark.parametrize("name", [*FAMILIES, *LOOPED, *LOOPS])
families = pytest.mark.parametrize("name", list(FAMILIES))


@names
def test_lean_states_equal_library(name: str) -> None:
    """Compare every layer's states, past any sliding window."""
    teacher, ids = new_teacher(name), some_ids()
    expected = states_of(teacher, ids)
    assert (teacher.stack.name, use_lean_layers(teacher)) == ("library", None)
    assert teacher.stack.name.startswith("lean")
    assert_equal(states_of(teacher, ids), expected, tolerance_of(teacher))


@torch.no_grad()
def cached_states(teacher: Teacher, batch: int) -> list[Tensor]:
    """Return states over a `KVCache`: prompts of different lengths in chunks, a tree of four nodes, then one row."""
    ids = some_ids(batch, 21)
    shape = (teacher.num_layers, batch, 4, 40, teacher.kv_heads, teacher.head_size, teacher.dtype, teacher.device)
    kv_cache, states = KVCache(*shape, spread=3), []
    for start in (0, 6, 12):
        part, positions = ids[:, start : start + 6], torch.arange(start, start + 6)[None]
        kv_cache.begin_chunk(start, 6)
        slots = kv_cache.prefix_slots(start + 6)[None]
        mask = AttentionMask(slots <= positions[:, :, None], torch.float32, positions, slots)
        states.append(forward_rows(teacher, teacher.embed(part), positions, mask, cache=kv_cache)[0])
    kv_cache.set_lengths(torch.tensor([18, 11, 15][:batch]))
    nodes = torch.eye(4).bool()
    nodes[:, 0] = nodes[3, 1] = True
    for rows, depth in ((nodes, [0, 1, 1, 2]), (torch.ones(1, 1).bool(), [0])):
        positions = kv_cache.lengths[:, None] + torch.tensor(depth)
        kv_cache.begin(len(depth), 24)
        allowed = rows.expand(batch, -1, -1)
        mask = step_mask(allowed, positions, kv_cache.lengths, kv_cache.prefix_slots(24), torch.float32)
        states.append(forward_rows(teacher, teacher.embed(ids[:, -len(depth) :]), positions, mask, cache=kv_cache)[0])
        path, counts = torch.tensor([[0, 1, 3]] * batch), torch.tensor([3, 1, 2][:batch])
        kv_cache.commit(path[:, : len(depth)], counts.clamp(max=len(depth)))
    return states


@pytest.mark.parametrize("batch", [1, 3])
@names
def test_lean_cached_states_equal_library(name: str, batch: int) -> None:
    teacher = new_teacher(name)
    expected = cached_states(teacher, batch)
    assert use_lean_layers(teacher) is None
    assert_equal(cached_states(teacher, batch), expected, tolerance_of(teacher))


@pytest.mark.parametrize(
    "section", [{"kind": "firp", "layer": 2, "steps": 3}, {"kind": "speed"}], ids=["firp", "speed"]
)
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "qwen3", "3x4", "ouro-loops"])
def test_lean_gradients_equal_library(name: str, section: dict[str, Any]) -> None:
    """Compare forward and backward pass of pseudo states that attend to cached real rows (`SequenceCache`)."""
    teacher = new_teacher(name)
    if section["kind"] == "speed" and teacher.looped is None:
        section = section | {"loops": 2}
    results = []
    for _ in range(2):
        predictor = make_predictor(teacher, **section).requires_grad_(True)
        batch = sequence_batch(teacher, some_ids().tolist(), [2, 3], list(predictor.required_layers))
        states = predictor.draft_states(teacher, batch, torch.tensor([[4, 9, 20], [5, 6, 17]]))
        states.square().mean().backward()
        results.append([states.detach(), *(parameter.grad for parameter in predictor.parameters())])
        assert all(parameter.grad is None for parameter in teacher.model.parameters())
        assert use_lean_layers(teacher) is None
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def storages(model: Any) -> dict[int, int]:
    """Return the addresses and sizes of the parameters' memory."""
    parts = [parameter.untyped_storage() for parameter in model.parameters()]
    return {part.data_ptr(): part.nbytes() for part in parts}


@names
def test_lean_layers_share_library_weights(name: str) -> None:
    """The library's matrices become views into the joined ones; names and values do not change."""
    teacher = new_teacher(name)
    before, size = copy.deepcopy(teacher.model.state_dict()), sum(storages(teacher.model).values())
    fingerprint, description = teacher.fingerprint, teacher.describe()
    assert use_lean_layers(teacher) is None
    assert sum(storages(teacher.model).values()) == size
    layers = {id(layer): layer for layer in getattr(teacher.layers, "unique", teacher.layers)}.values()
    for layer in layers:
        for parts in (
            [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
            [layer.mlp.gate_proj, layer.mlp.up_proj],
        ):
            place = parts[0].weight.data_ptr()
            for part in parts:
                assert part.weight.untyped_storage().data_ptr() == parts[0].weight.untyped_storage().data_ptr()
                assert (part.weight.data_ptr(), part.weight.is_contiguous()) == (place, True)
                place += part.weight.nbytes
    after = teacher.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert wrap_model(teacher.model, name=teacher.name, looped=teacher.looped).fingerprint == fingerprint
    assert teacher.describe() == description


@families
def test_use_lean_layers_again_takes_new_values(name: str) -> None:
    """Lean layers may keep packed copies, which must follow the library's parameters."""
    teacher = new_teacher(name)
    assert use_lean_layers(teacher) is None
    with torch.no_grad():
        teacher.layers[1].self_attn.k_proj.weight.mul_(1.5)
        teacher.layers[2].mlp.up_proj.weight.mul_(0.5)
        teacher.layers[3].input_layernorm.weight.mul_(1.1)
    assert use_lean_layers(teacher) is None
    assert_equal(states_of(teacher, some_ids()), states_of(wrap_model(teacher.model), some_ids()))


@names
def test_use_lean_layers_again_copies_nothing(name: str) -> None:
    """No copy is made by this teacher, nor by another one of the same model."""
    teacher = new_teacher(name)
    assert use_lean_layers(teacher) is None
    places = [parameter.data_ptr() for parameter in teacher.model.parameters()]
    states = states_of(teacher, some_ids())
    other = wrap_model(teacher.model, looped=teacher.looped)
    for again in (teacher, other):
        assert use_lean_layers(again) is None
        assert [parameter.data_ptr() for parameter in teacher.model.parameters()] == places
        assert_equal(states_of(again, some_ids()), states)


def test_use_lean_layers_after_moving_model() -> None:
    teacher = new_teacher("qwen2")
    assert use_lean_layers(teacher) is None
    teacher.model.to(torch.float64)
    assert use_lean_layers(teacher) is None
    double = states_of(teacher, some_ids())[-1]
    teacher.model.to(torch.float32)
    assert use_lean_layers(teacher) is None
    assert_equal([states_of(teacher, some_ids())[-1].double()], [double.double()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@families
def test_lean_half_precision_is_as_exact_as_library(name: str, dtype: torch.dtype) -> None:
    """Compare errors against the same weights in float32."""
    model = varied(copy.deepcopy(tiny_model(name))).to(dtype)
    exact = states_of(wrap_model(copy.deepcopy(model).float()), some_ids())[-1]
    teacher = wrap_model(model)
    errors = []
    for _ in range(2):
        errors.append((states_of(teacher, some_ids())[-1] - exact).abs().mean().item())
        assert use_lean_layers(teacher) is None
    assert errors[1] <= 1.2 * errors[0]
    assert errors[0] > 0


@pytest.mark.parametrize("name", [*FAMILIES, *LOOPED, "llama-norms-loops", "qwen2-window-loops"])
def test_lean_layers_keep_librarys_generate(name: str, tmp_path: Path) -> None:
    teacher, prompt = new_teacher(name), random_prompts(1, seed=2)[0]
    expected = generate_reference(teacher.model, prompt, 16)
    assert use_lean_layers(teacher) is None
    assert generate_reference(teacher.model, prompt, 16) == expected
    assert Engine(teacher).generate([prompt], 16)[0].token_ids == expected
    if name in FAMILIES:
        teacher.model.save_pretrained(tmp_path)
        again = type(teacher.model).from_pretrained(tmp_path)
        assert wrap_model(again).fingerprint == teacher.fingerprint


class OddLinear(nn.Linear):
    """Subclass of a linear, as quantised and adapted ones are."""

    def forward(self, inputs: Tensor) -> Tensor:
        return 1.25 * super().forward(inputs)


class DoubledMLP(LlamaMLP):
    """Gated feed-forward with the usual parts and other numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def _set(path: str, value: Callable[[Any, Any], Any]) -> Callable[[Any], None]:
    """Return a function that replaces a part of layer 2 by `value(part, config)`."""

    def change(model: Any) -> None:
        parent, _, name = f"layer.{path}".rpartition(".")
        holder = model.model.layers[2].get_submodule(parent.removeprefix("layer").lstrip("."))
        setattr(holder, name, value(getattr(holder, name, None), model.config))

    return change


def _odd(linear: Any, _: Any) -> Any:
    odd = OddLinear(linear.in_features, linear.out_features, bias=False)
    odd.load_state_dict(linear.state_dict())
    return odd


def _doubled(mlp: Any, config: Any) -> Any:
    doubled = DoubledMLP(config)
    doubled.load_state_dict(mlp.state_dict())
    return doubled


def _hooked(linear: Any, _: Any) -> Any:
    linear.register_forward_hook(lambda *_: None)
    return linear


def _quiet(module: Any, _: Any) -> Any:
    module.register_forward_hook(lambda _module, _inputs, output: 0.5 * output)
    return module


def _biased(linear: Any, _: Any) -> Any:
    linear.bias = nn.Parameter(torch.randn(linear.out_features))
    return linear


OTHERS: dict[str, tuple[Callable[[Any], None], str]] = {
    "submodule": (_set("adapter", lambda *_: nn.Linear(4, 4)), "LlamaDecoderLayer has adapter"),
    "submodule-attention": (_set("self_attn.sink", lambda *_: nn.Linear(4, 4)), "LlamaAttention has sink"),
    "submodule-mlp": (_set("mlp.router", lambda *_: nn.Linear(4, 4)), "LlamaMLP has router"),
    "parameter": (_set("scale", lambda *_: nn.Parameter(torch.ones(3))), "LlamaDecoderLayer has scale"),
    "parameter-mlp": (_set("mlp.gain", lambda *_: nn.Parameter(torch.ones(3))), "LlamaMLP has gain"),
    "linear": (_set("self_attn.q_proj", _odd), "q_proj is a OddLinear"),
    "linear-mlp": (_set("mlp.down_proj", _odd), "down_proj is a OddLinear"),
    "layer-norm": (
        _set("input_layernorm", lambda _, config: nn.LayerNorm(config.hidden_size)),
        r"lean ones differ by \d",
    ),
    "no-norm": (_set("input_layernorm", lambda *_: nn.Identity()), "Identity is not an RMS norm with a weight"),
    "biases": (_set("self_attn.k_proj", _biased), "joined matrices differ in their biases or devices"),
    "hook": (_set("mlp.up_proj", _hooked), "up_proj has hooks"),
    "hook-mlp": (_set("mlp", _quiet), r"lean ones differ by \d"),
    "placed-layer": (_set("_hf_hook", lambda *_: object()), "LlamaDecoderLayer is placed on several devices"),
    "placed-attention": (_set("self_attn._hf_hook", lambda *_: object()), "LlamaAttention is placed on several dev"),
    "placed-linear": (_set("self_attn.o_proj._hf_hook", lambda *_: object()), "o_proj has hooks"),
    "mlp": (_set("mlp", _doubled), r"lean ones differ by \d"),
}


@pytest.mark.parametrize("other", list(OTHERS))
def test_unknown_layers_keep_library(other: str) -> None:
    change, reason = OTHERS[other]
    teacher = wrap_model(varied(copy.deepcopy(tiny_model("llama"))))
    assert use_lean_layers(teacher) is None
    change(teacher.model)
    expected, prompt = states_of(wrap_model(teacher.model), some_ids()), random_prompts(1, seed=4)[0]
    reason_given = use_lean_layers(teacher)
    assert reason_given is not None
    assert reason_given.startswith("LlamaForCausalLM keeps the library's layers: ")
    assert len(reason_given.splitlines()) == 1
    assert re.search(reason, reason_given)
    assert teacher.stack.name == "library"
    assert all(torch.equal(got, want) for got, want in zip(states_of(teacher, some_ids()), expected, strict=True))
    assert Engine(teacher).generate([prompt], 12)[0].token_ids == generate_reference(teacher.model, prompt, 12)


@pytest.mark.parametrize(
    ("architecture", "options", "reason"),
    [
        ("Phi3", {"pad_token_id": 0}, "Phi3DecoderLayer has|Phi3Attention has"),
        ("Granite", {"residual_multiplier": 0.4, "attention_multiplier": 0.2}, r"lean ones differ by \d"),
        ("Granite", {"attention_multiplier": 0.2}, None),
        ("Llama", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, None),
    ],
)
def test_architectures_decode_as_generate(architecture: str, options: dict[str, Any], reason: str | None) -> None:
    torch.manual_seed(5)
    config = getattr(transformers, f"{architecture}Config")(**(SETTINGS | options))
    teacher = wrap_model(varied(getattr(transformers, f"{architecture}ForCausalLM")(config).eval()))
    reason_given = use_lean_layers(teacher)
    assert reason_given is None if reason is None else re.search(reason, str(reason_given)), reason_given
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=3)
    for prompt in random_prompts(2, seed=6):
        expected = generate_reference(teacher.model, prompt, 16)
        for engine in (Engine(teacher), Engine(teacher, predictor)):
            assert engine.generate([prompt], 16)[0].token_ids == expected


def test_lean_biases_equal_library() -> None:
    model = small_llama(attention_bias=True, mlp_bias=True)
    assert all(linear.bias.abs().sum() > 0 for linear in model.model.layers.modules() if isinstance(linear, nn.Linear))
    teacher = wrap_model(model)
    expected, size = states_of(teacher, some_ids()), sum(storages(model).values())
    assert use_lean_layers(teacher) is None
    assert_equal(states_of(teacher, some_ids()), expected)
    assert sum(storages(model).values()) == size
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.bias.zero_()
    assert use_lean_layers(teacher) is None
    assert_equal(states_of(teacher, some_ids()), states_of(wrap_model(model), some_ids()))


@pytest.mark.parametrize("before", [True, False], ids=["lean-before", "lean-after"])
@families
def test_released_layers_raise_when_run(name: str, before: bool) -> None:
    """A rank of a pipeline runs its own layers, made lean before or after the release."""
    teacher, ids = new_teacher(name), some_ids()
    expected = states_of(teacher, ids)
    fingerprint = teacher.fingerprint
    if before:
        assert use_lean_layers(teacher) is None
    teacher.release(range(2))
    assert (use_lean_layers(teacher), teacher.stack.name[:4], teacher.fingerprint) == (None, "lean", fingerprint)
    assert_equal(states_of(teacher, ids, stop=2), expected[:3])
    with pytest.raises(AssertionError, match="layer 2 was released"):
        states_of(teacher, ids)


def test_release_keeps_shared_layers() -> None:
    teacher, ids = new_teacher("3x4"), some_ids()
    expected = states_of(teacher, ids)
    teacher.release(range(3))
    assert use_lean_layers(teacher) is None
    assert_equal(states_of(teacher, ids), expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_layers_equal_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare states and logits; the compiler gets the option that fuses products of one row."""
    given: list[dict[str, Any]] = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, **named: (given.append(named), compile_(run, **named))[1])
    teacher, ids = new_teacher("qwen3"), some_ids(1, 20)
    expected, prompt = states_of(teacher, ids), random_prompts(1, seed=9)[0]
    assert (use_lean_layers(teacher, compiled=True), teacher.stack.name) == (None, "lean")
    assert teacher.stack.compiled
    assert given == [{"options": {"coordinate_descent_tuning": True}}] * 2 * teacher.num_layers
    assert_equal(states_of(teacher, ids), expected)
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=2)
    assert Engine(teacher, predictor).generate([prompt], 6)[0].token_ids == generate_reference(teacher.model, prompt, 6)
