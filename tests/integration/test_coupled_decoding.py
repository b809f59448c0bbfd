"""Decoding with a coupling: trained drafts, batches, budgets, graphs and sampling against slow references."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.evaluation.gate import gate
from firp_cli.evaluation.simulate import make_trace, simulate_answer, simulate_steps
from firp_cli.predictors.base import TreePredictor
from firp_cli.teacher.load import wrap_model
from helpers.coupling import FORMS, coupled, embedded_coupled, section
from helpers.graphs import with_graphs
from helpers.models import (
    embedded_predictor,
    embedded_prompts,
    embedded_teacher,
    generate_reference,
    random_prompts,
    tiny_model,
    tiny_teacher,
)
from helpers.pairwise import covered

TREES = ["dynamic:9", "dynamic:9@1", "dynamic:9@2", "static:3x2x1", "static:3x2x1@2", "chain", "chain/3@2"]
PSEUDO = ["firp_plus", "hidden_transfer"]
TOKENS = 32
made = cache(embedded_coupled)


@cache
def expected(count: int) -> list[list[int]]:
    return [generate_reference(embedded_teacher().model, prompt, TOKENS) for prompt in embedded_prompts(count)]


def lengths(predictor: TreePredictor, tree: str, batch: int) -> list[list[int]]:
    """Return the accepted lengths of four answers, whose tokens are those of `generate`."""
    engine = Engine(embedded_teacher(), predictor, parse_tree(tree, predictor.steps))
    prompts = embedded_prompts(4)
    got = [item for start in range(0, 4, batch) for item in engine.generate(prompts[start : start + batch], TOKENS)]
    assert [item.token_ids for item in got] == expected(4)
    return [item.accepted_lengths for item in got]


def simulated(predictor: TreePredictor, tree: str) -> list[list[int]]:
    spec = parse_tree(tree, predictor.steps)
    return [
        simulate_answer(embedded_teacher(), predictor, [*prompt, *text], len(prompt), spec)
        for prompt, text in zip(embedded_prompts(4), expected(4), strict=True)
    ]


@pytest.mark.parametrize(
    ("form", "share", "kind", "tree", "batch"), covered(FORMS, [True, False], PSEUDO, TREES, [1, 4])
)
def test_simulation_equals_decoding_step_by_step(form: str, share: bool, kind: str, tree: str, batch: int) -> None:
    """Two ways to the same drafts: the training forward with `_shifted` drafts, and decoding's pseudo rows."""
    predictor = made(kind, form, share, candidates=20)
    decoded = lengths(predictor, tree, batch)
    assert decoded == simulated(predictor, tree)
    every = [length for row in decoded for length in row]
    assert sum(every) > 1.3 * len(every) and len(set(every)) > 1


@pytest.mark.parametrize("form", FORMS)
def test_coupling_changes_the_accepted_lengths(form: str) -> None:
    plain = lengths(embedded_predictor("firp"), "dynamic:9", 4)
    assert lengths(made("firp_plus", form, True, candidates=20), "dynamic:9", 4) != plain
    still = embedded_coupled("firp_plus", form, True, strength=0.0, candidates=1024)
    assert lengths(still, "dynamic:9", 4) == plain


@pytest.mark.parametrize(("form", "share"), [("mlp", True), ("recurrent", False)])
def test_traces_of_wider_trees_serve_narrow_ones(form: str, share: bool) -> None:
    """One trace, made for the widest tree, gives the steps of every tree, also with fewer candidates than children."""
    predictor = made("firp_plus", form, share, candidates=4)
    pairs = list(zip(embedded_prompts(4), expected(4), strict=True))
    traces = [make_trace(embedded_teacher(), predictor, [*prompt, *text], len(prompt), 12) for prompt, text in pairs]
    whole = [trace for trace in traces if trace is not None]
    assert len(whole) == 4
    for tree in ("dynamic:9", "dynamic:3", "static:3x2@2", "dynamic:9/2@2", "none"):
        steps = simulate_steps(predictor, whole, parse_tree(tree, predictor.steps))
        if tree == "none":
            assert all(set(row) == {1} for row in steps)
        else:
            assert steps == lengths(predictor, tree, 4)


@pytest.mark.parametrize("kind", ["firp_plus", "medusa"])
def test_gate_agrees(kind: str) -> None:
    if kind == "medusa":
        teacher = tiny_teacher("llama", lean=True)
        predictor, prompts = coupled(teacher, section("medusa", "recurrent", False)), random_prompts(4, seed=3)
    else:
        teacher, predictor, prompts = embedded_teacher(), made("firp_plus", "recurrent", False), embedded_prompts(4)
    for tree in ("dynamic:6", "static:3x2@2"):
        figures = gate(teacher, predictor, prompts, tree, 24)
        assert figures["agree"] and figures["simulated"] == pytest.approx(figures["real"], rel=1e-9)


@pytest.mark.parametrize("tree", ["dynamic:3", "dynamic:9"])
@pytest.mark.parametrize("form", FORMS)
def test_one_pass_of_the_head_drafts_as_two(form: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small steps make the logits of all anchors' drafts in one pass; the context comes from another place then."""
    predictor = made("firp_plus", form, True, candidates=20)
    found = []
    for rows in (0, 1 << 20):
        monkeypatch.setattr("firp_cli.decoding.step.ONE_PASS_ROWS", rows)
        found.append([lengths(predictor, f"{tree}{budget}", 4) for budget in ("", "@2")])
    assert found[0] == found[1]


@pytest.mark.parametrize(("form", "share", "tree"), covered(FORMS, [True, False], ["dynamic:6", "static:2x1@2"]))
def test_replayed_steps_write_the_same_tokens(form: str, share: bool, tree: str) -> None:
    """A tape of operations, as a captured graph: it reads the draft's context in place."""
    predictor = made("firp_plus", form, share, candidates=20)
    engine = Engine(embedded_teacher(), predictor, parse_tree(tree, predictor.steps))
    plain = lengths(predictor, tree, 4)
    _, tapes = with_graphs(engine)
    for _ in range(2):
        got = engine.generate(embedded_prompts(4), TOKENS)
        assert [item.token_ids for item in got] == expected(4)
        assert [item.accepted_lengths for item in got] == plain
    assert tapes.captured > 0 and tapes.replayed > 0


@pytest.mark.parametrize("form", FORMS)
def test_shallow_trees_take_the_first_steps(form: str) -> None:
    for tree in ("dynamic:6/2", "static:3x2", "chain/1"):
        predictor = made("firp_plus", form, False, candidates=20)
        assert lengths(predictor, tree, 4) == simulated(predictor, tree)


def test_long_prompts_and_refills_keep_the_context() -> None:
    """Prefill in chunks; sequences of one batch end at different steps and others move up with their drafts."""
    teacher = tiny_teacher("qwen2-window", lean=True)
    predictor = coupled(teacher, section("firp_plus", "recurrent"))
    prompts = [*random_prompts(2, seed=4, low=70, high=90), *random_prompts(3, seed=5, low=3, high=9)]
    texts = [generate_reference(tiny_model("qwen2-window"), prompt, 20) for prompt in prompts]
    engine = Engine(teacher, predictor, parse_tree("dynamic:5@2", 3), options=EngineOptions(prefill_chunk=16))
    alone = [engine.generate([prompt], 20)[0].accepted_lengths for prompt in prompts]
    got = engine.generate(prompts, 20)
    assert [item.token_ids for item in got] == texts
    assert [item.accepted_lengths for item in got] == alone


@pytest.mark.parametrize(("form", "tree"), [("mlp", "dynamic:6"), ("recurrent", "static:3x2@2")])
def test_sampling_is_plain_sampling(form: str, tree: str) -> None:
    """Chi-square over the second and third sampled token of a coupled tree against the exact distribution."""
    from scipy.stats import chi2

    soft = wrap_model(tiny_model("qwen3"), check=False)
    soft.eos_token_ids = ()
    head = soft.head
    soft.head = lambda normed: head(normed) * 0.25  # type: ignore[method-assign]  # flat: many outcomes
    predictor = coupled(soft, section("firp_plus", form))
    prompt = random_prompts(1, seed=9)[0]
    with torch.no_grad():
        vocabulary = soft.vocab_size
        ids = torch.tensor([prompt])
        first = (soft.model(ids).logits[0, -1] * 0.25).softmax(-1)
        pairs = torch.cat([ids.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], dim=1)
        second = first @ (soft.model(pairs).logits[:, -1] * 0.25).softmax(-1)
    counts = torch.zeros(2, vocabulary)
    accepted = 0
    for seed in range(30):
        engine = Engine(soft, predictor, parse_tree(tree, 3), temperature=1.0, seed=seed)
        for item in engine.generate([prompt] * 50, 3):
            counts[0, item.token_ids[0]] += 1
            counts[1, item.token_ids[1]] += 1
            accepted += max(item.accepted_lengths) > 1
    assert accepted > 20
    for row, exact in zip(counts, (first, second), strict=True):
        wanted = exact * row.sum()
        common = wanted >= 5
        observed = torch.cat([row[common], row[~common].sum()[None]])
        wanted = torch.cat([wanted[common], wanted[~common].sum()[None]])
        statistic = ((observed - wanted) ** 2 / wanted.clamp(min=1e-9)).sum().item()
        assert statistic < chi2.ppf(0.999, len(wanted) - 1), statistic
