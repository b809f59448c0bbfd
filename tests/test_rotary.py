"""Position embeddings of every kind: the same on both stacks, looked up where they can be, and lossless."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from test_fused import assert_equal, small_llama, some_ids, states_of

from conftest import generate_reference, make_predictor, random_prompts
from firp_cli.decoding.engine import Engine
from firp_cli.teacher.stack import Teacher

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
def test_rotary_variants(any_stack: str, kind: str) -> None:
    """Looked up in a table where they depend on the position alone; past the length that they were trained for."""
    model = rotary_model(kind)
    teacher, prompts = Teacher(model), random_prompts(3, seed=7, low=2, high=80)
    expected = states_of(teacher, some_ids(2, 90))
    if any_stack == "lean":
        assert teacher.fuse() is None
        assert_equal(states_of(teacher, some_ids(2, 90)), expected)
    table = teacher.rotary_table(100)
    assert (table is None) == (kind == "dynamic")
    if table is not None:
        like = torch.zeros(1, 1, teacher.hidden_size)
        for part, whole in zip(teacher.rotary(like, torch.tensor([[3, 99, 3]])), table, strict=True):
            assert torch.equal(part[0], whole[[3, 99, 3]])
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=3)
    texts = [generate_reference(model, prompt, 20) for prompt in prompts]
    for engine in (Engine(teacher), Engine(teacher, predictor)):
        assert [item.token_ids for item in engine.generate(prompts, 20)] == texts


def test_rotary_variants_write_different_texts() -> None:
    """Else the comparison above would not show a variant that is taken for another."""
    prompt = random_prompts(1, seed=8, low=80, high=80)[0]
    texts = {kind: tuple(generate_reference(rotary_model(kind), prompt, 20)) for kind in ROTARY if kind != "dynamic"}
    assert len(set(texts.values())) == len(texts)
