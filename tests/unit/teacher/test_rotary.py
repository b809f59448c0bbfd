"""Position embeddings of every kind: equal on both stacks, from a look-up table where possible, and lossless."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from firp_cli.decoding.engine import Engine
from firp_cli.errors import CapacityError
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import wrap_model
from helpers.layers import assert_equal, small_llama, some_ids, states_of
from helpers.models import SETTINGS, generate_reference, make_predictor, random_prompts

ROTARY: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "dynamic": {"factor": 2.0},
}


@cache
def rotary_model(kind: str) -> Any:
    return small_llama(rope_parameters={"rope_type": kind, "rope_theta": 10_000.0} | ROTARY[kind])


@pytest.mark.parametrize("kind", list(ROTARY))
def test_rotary_variants_equal_library(any_stack: str, kind: str) -> None:
    """Compare states and the look-up table, also past the length that the model was trained for."""
    model = rotary_model(kind)
    teacher, prompts = wrap_model(model), random_prompts(3, seed=7, low=2, high=80)
    expected = states_of(teacher, some_ids(2, 90))
    if any_stack == "lean":
        assert use_lean_layers(teacher) is None
        assert_equal(states_of(teacher, some_ids(2, 90)), expected)
    table = teacher.rotary_table(100)
    assert table is not None
    like, places = torch.zeros(1, 1, teacher.hidden_size), torch.tensor([[3, 99, 3]])
    for part, looked_up in zip(teacher.rotary(like, places), table(places, 99), strict=True):
        assert torch.equal(part, looked_up)
    for first, past in zip(table(places, 99), table(torch.tensor([[3, 120, 3]]), 120), strict=True):
        assert torch.equal(first, past), "positions after the table get its last embeddings"
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=3)
    texts = [generate_reference(model, prompt, 20) for prompt in prompts]
    for engine in (Engine(teacher), Engine(teacher, predictor)):
        assert [item.token_ids for item in engine.generate(prompts, 20)] == texts


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_drafts_past_context_change_no_token(any_stack: str, kind: str) -> None:
    """Past the context the library would rotate the real rows by other angles too."""
    half = SETTINGS["head_dim"] // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [4.0] * half, "original_max_position_embeddings": 64}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0} | (factors if kind == "longrope" else {})
    options = {"rope_parameters": rope, "max_position_embeddings": 64 if kind == "dynamic" else 128}
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**(SETTINGS | options | {"eos_token_id": None}))).eval()
    teacher = wrap_model(model, check=kind == "dynamic")
    assert teacher.max_positions == 64
    if any_stack == "lean":
        assert use_lean_layers(teacher) is None
    prompt = random_prompts(1, seed=5, low=44, high=44)[0]
    text = generate_reference(model, prompt, 20)
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=3)
    for engine in (Engine(teacher), Engine(teacher, predictor)):
        assert engine.generate([prompt], 20)[0].token_ids == text
    with pytest.raises(CapacityError, match="64"):
        Engine(teacher).generate([prompt], 21)


def test_rotary_variants_differ() -> None:
    """Without this the comparison above would not show that one variant is used for another."""
    prompt = random_prompts(1, seed=8, low=80, high=80)[0]
    texts = {kind: tuple(generate_reference(rotary_model(kind), prompt, 20)) for kind in ROTARY if kind != "dynamic"}
    assert len(set(texts.values())) == len(texts)
