"""Long prompts in chunks, far past a sliding window, and large batches equal `generate` token for token."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import transformers

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.step import PREFILL_ENTRIES
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from helpers.models import (
    FAMILIES,
    SETTINGS,
    generate_reference,
    make_predictor,
    random_prompts,
    tiny_model,
    tiny_teacher,
)
from helpers.pairwise import pairwise

SECTIONS: dict[str, dict[str, Any] | None] = {"ar": None, "firp": {"kind": "firp", "layer": 2, "steps": 3}}
sections = pytest.mark.parametrize("section", list(SECTIONS))
STACKS = ["lean", "library"]
LONG = 2100


def engine_for(teacher: Teacher, section: str, tree: str = "dynamic:6@3", **options: Any) -> Engine:
    given = SECTIONS[section]
    predictor = make_predictor(teacher, **given) if given else None
    return Engine(teacher, predictor, parse_tree(tree, 3) if predictor else None, options=EngineOptions(**options))


@cache
def long_model(family: str) -> Any:
    """Return a model of a family with a context of thousands of tokens and a window of some hundreds."""
    name, options = FAMILIES[family]
    if options.get("sliding_window"):
        options = options | {"sliding_window": 300}
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**(SETTINGS | options | {"max_position_embeddings": 4096}))
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@cache
def long_reference(family: str) -> tuple[list[list[int]], list[list[int]]]:
    prompts = [random_prompts(1, seed=61, low=length, high=length)[0] for length in (LONG, 700)]
    return prompts, [generate_reference(long_model(family), prompt, 20, eos_token_id=-1) for prompt in prompts]


@pytest.mark.parametrize(
    ("family", "chunk", "section"), pairwise(["llama", "qwen2-window"], [512, 100_000], list(SECTIONS))
)
def test_prefill_long_prompts_equal_generate(family: str, chunk: int, section: str) -> None:
    teacher = wrap_model(long_model(family), name="long")
    teacher.eos_token_ids = ()
    assert use_lean_layers(teacher) is None
    prompts, expected = long_reference(family)
    got = engine_for(teacher, section, prefill_chunk=chunk).generate(prompts, 20)
    assert [item.token_ids for item in got] == expected
    assert len(set(expected[0])) > 5


def test_prefill_chunks_shrink_for_long_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks shrink where a whole chunk's mask would be large."""
    prompt = random_prompts(1, seed=62, low=100, high=100)[0]
    teacher = tiny_teacher("qwen3", lean=True)
    expected = generate_reference(tiny_model("qwen3"), prompt, 10)
    rows: list[int] = []
    embed = teacher.embed
    watched = copy.copy(teacher)
    monkeypatch.setattr(watched, "embed", lambda ids: rows.append(ids.shape[1]) or embed(ids), raising=False)
    for entries, largest in ((PREFILL_ENTRIES, 99), (99 * 30, 30), (10, 1)):
        monkeypatch.setattr("firp_cli.decoding.step.PREFILL_ENTRIES", entries)
        rows.clear()
        assert Engine(watched).generate([prompt], 10)[0].token_ids == expected
        assert max(rows) == largest
        assert sum(rows) == 99 + 10


@cache
def crowd(family: str) -> tuple[list[list[int]], list[list[int]]]:
    prompts = random_prompts(32, seed=63, low=1, high=90)
    return prompts, [generate_reference(tiny_model(family), prompt, 16) for prompt in prompts]


@sections
def test_decoding_batch_of_32_equals_generate(section: str) -> None:
    prompts, expected = crowd("llama")
    assert len(set(map(len, prompts))) > 20
    got = engine_for(tiny_teacher("llama", lean=True), section).generate(prompts, 16)
    assert [item.token_ids for item in got] == expected


@pytest.mark.parametrize(
    ("any_stack", "family", "section"), pairwise(STACKS, ["mistral-window", "qwen2-window"], list(SECTIONS))
)
def test_decoding_past_window_equals_generate(any_stack: str, family: str, section: str) -> None:
    """Decode three windows of tokens after a prompt of three windows, in one chunk and in chunks within a window."""
    window = int(FAMILIES[family][1]["sliding_window"])
    prompts = [random_prompts(1, seed=64, low=length, high=length)[0] for length in (3 * window, window // 2)]
    expected = [generate_reference(tiny_model(family), prompt, 40, eos_token_id=-1) for prompt in prompts]
    teacher = copy.copy(tiny_teacher(family, any_stack == "lean"))
    teacher.eos_token_ids = ()
    for chunk in (512, 7):
        engine = engine_for(teacher, section, prefill_chunk=chunk)
        assert [item.token_ids for item in engine.generate(prompts, 40)] == expected
        assert engine.generate(prompts[:1], 40)[0].token_ids == expected[0]
    wide = copy.deepcopy(tiny_model(family))
    wide.config.sliding_window = 10_000
    assert generate_reference(wide, prompts[0], 40, eos_token_id=-1) != expected[0], "the window matters"
