"""Drafts among the most frequent tokens: the whole head's order within them, folders, training, decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import PredictorError, RecipeError
from firp_cli.evaluation.gate import gate
from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.folder import load_predictor, save_predictor
from firp_cli.recipe import validate_recipe
from firp_cli.teacher.cpu_kernels import missing
from helpers.coupling import UNCOUPLED, section
from helpers.models import HIDDEN, VOCABULARY, make_predictor, random_prompts, tiny_teacher
from helpers.pairwise import covered
from helpers.training import recipe, run, store

SECTIONS: dict[str, dict[str, Any]] = {**UNCOUPLED, "firp_plus": section("firp_plus", "recurrent")}
SECTIONS["firp"] = {"kind": "firp", "layer": 2, "steps": 3}
kinds = pytest.mark.parametrize("kind", list(SECTIONS))


def restricted(kind: str, size: int = 30) -> TreePredictor:
    predictor = make_predictor(tiny_teacher("llama"), **SECTIONS[kind])
    chosen = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(3))[:size]
    predictor.draft_tokens = chosen.sort().values
    return predictor


@kinds
@torch.no_grad()
def test_drafts_are_the_best_of_the_draft_tokens(kind: str) -> None:
    teacher = tiny_teacher("llama")
    predictor = restricted(kind)
    assert predictor.draft_tokens is not None and predictor.width(50, VOCABULARY) == 30
    states = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(1))
    exact = teacher.head_weight()[predictor.draft_tokens]
    logits = predictor.logits(teacher, states)[:, :, predictor.draft_tokens]
    torch.testing.assert_close(logits, states @ exact.T, rtol=1e-5, atol=1e-5)
    rounded = exact if missing() else exact.bfloat16().float()  # the CPU's kernels keep the head of drafts in bfloat16
    for prepared, weight in ((predictor, exact), (predictor.for_decoding(teacher), rounded)):
        best, places = (states @ weight.T).log_softmax(-1).topk(7, dim=-1)
        draft = prepared.most_probable(teacher, states, 7)
        assert torch.equal(draft.tokens, predictor.draft_tokens[places])
        torch.testing.assert_close(draft.log_probs, best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "tree"), covered(list(SECTIONS), ["dynamic:6/3", "dynamic:6/3@2", "static:3x2"]))
def test_decoding_stays_greedy_and_simulation_agrees(kind: str, tree: str) -> None:
    teacher = tiny_teacher("llama", lean=True)
    predictor, prompts = restricted(kind), random_prompts(3, seed=5, low=4, high=9)
    plain = Engine(teacher).generate(prompts, 24)
    drafted = Engine(teacher, predictor, parse_tree(tree, 3)).generate(prompts, 24)
    assert [answer.token_ids for answer in drafted] == [answer.token_ids for answer in plain]
    figures = gate(teacher, predictor, prompts, tree, 24)
    assert figures["agree"] and figures["simulated"] == pytest.approx(figures["real"], rel=1e-9)


def test_folder_keeps_the_draft_tokens(tmp_path: Path) -> None:
    teacher, predictor = tiny_teacher("llama"), restricted("firp_plus")
    save_predictor(predictor, tmp_path, teacher, torch.bfloat16)
    loaded = load_predictor(tmp_path, teacher)
    assert isinstance(loaded, TreePredictor) and loaded.draft_tokens is not None
    assert loaded.draft_tokens.dtype == torch.long and torch.equal(loaded.draft_tokens, predictor.draft_tokens)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([200, 0, 1], dtype=torch.long), "is no mask of tokens"),
        (torch.zeros(3, dtype=torch.uint8), "is no mask of tokens"),
        (torch.full((20,), 255, dtype=torch.uint8), f"has token 159, the teacher has {VOCABULARY}"),
        (None, "is missing, though draft_vocabulary is 30"),
    ],
)
def test_damaged_draft_tokens_are_refused(tokens: Tensor | None, message: str, tmp_path: Path) -> None:
    teacher = tiny_teacher("llama")
    predictor = make_predictor(teacher, **SECTIONS["firp"], draft_vocabulary=30)
    save_predictor(predictor, tmp_path, teacher)
    weights = load_file(tmp_path / "predictor.safetensors")
    save_file(weights if tokens is None else weights | {"draft_tokens": tokens}, tmp_path / "predictor.safetensors")
    with pytest.raises(PredictorError, match=message):
        load_predictor(tmp_path, teacher)


@pytest.mark.parametrize("kind", ["firp", "firp_plus"])
def test_training_chooses_the_frequent_tokens(kind: str, tmp_path: Path) -> None:
    described = {**SECTIONS[kind], "draft_vocabulary": 16}
    run(tmp_path, recipe(described, init="identity", epochs=1, vocabulary=40, coupling={"epochs": 1}))
    loaded = load_predictor(tmp_path, tiny_teacher("llama"))
    assert isinstance(loaded, TreePredictor) and loaded.draft_tokens is not None and len(loaded.draft_tokens) == 16
    counts = sum(torch.bincount(item.input_ids, minlength=VOCABULARY) for item in store())
    assert counts[loaded.draft_tokens].min() >= counts.sort(descending=True).values[24], "held-out ones do not count"


def test_own_heads_refuse_a_draft_vocabulary() -> None:
    with pytest.raises(RecipeError, match="draft_vocabulary reads the teacher's vocabulary matrix: set own_head=false"):
        validate_recipe({"predictor": {"kind": "medusa", "draft_vocabulary": 100}})
