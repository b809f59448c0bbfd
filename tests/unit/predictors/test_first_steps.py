"""Predictors limited to their first steps, and trees that need fewer steps than the predictor has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.step import DecodeStep
from firp_cli.decoding.step_shape import DraftSetup
from firp_cli.decoding.tree_build import build, build_by_level
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import PredictorError
from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.draft import Draft
from firp_cli.predictors.forward import forward_rows
from firp_cli.results import Prediction
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.masks import step_mask, step_rows
from firp_cli.teacher.teacher import Teacher
from firp_cli.tune_results import TunedTree
from helpers.graphs import with_graphs
from helpers.models import (
    FakeExits,
    FakePredictor,
    embedded_predictor,
    embedded_prompts,
    embedded_teacher,
    generate_reference,
    looped_teacher,
    make_predictor,
    random_prompts,
    sequence_batch,
    tiny_model,
    tiny_teacher,
)
from helpers.pairwise import covered

SECTIONS: dict[str, dict[str, Any]] = {
    "firp": {"kind": "firp", "layer": 2, "steps": 4, "bias": True},
    "hidden_transfer": {"kind": "hidden_transfer", "layers": [1, 2, 2, 3]},
    "medusa": {"kind": "medusa", "steps": 4, "resblocks": 2},
    "medusa-shared": {"kind": "medusa", "steps": 4, "own_head": False},
}
COUPLED: dict[str, dict[str, Any]] = {
    "firp_plus": SECTIONS["firp"] | {"kind": "firp_plus"},
    "hidden_transfer-coupled": SECTIONS["hidden_transfer"] | {"coupling": {"form": "recurrent", "share": False}},
    "medusa-coupled": SECTIONS["medusa-shared"] | {"coupling": {"form": "low_rank"}},
}
sections = pytest.mark.parametrize("section", list(SECTIONS))


@pytest.mark.parametrize("steps", [1, 2, 3])
@sections
@torch.no_grad()
def test_first_steps_draft_as_in_the_whole_predictor(section: str, steps: int) -> None:
    """By training's forward: the same drafts within rounding."""
    teacher = tiny_teacher("qwen2-window", lean=True)
    whole = make_predictor(teacher, **SECTIONS[section])
    first = whole.first_steps(steps)
    assert (first.steps, first.kind, first.parent_dependent) == (steps, whole.kind, whole.parent_dependent)
    assert first.transfer_layers == whole.transfer_layers[:steps]
    assert first.describe()["steps"] == steps and first.offsets == whole.offsets[:steps]
    assert whole.steps == 4 and len(list(whole.parameters())) == 4 * len(list(first.parameters())) // steps
    sequences = random_prompts(2, seed=71, low=14, high=20)
    batch = sequence_batch(teacher, sequences, [1, 1], list(whole.required_layers))
    anchors = torch.tensor([[2, 7, 11], [0, 5, 12]])
    states = [predictor.draft_states(teacher, batch, anchors) for predictor in (whole, first)]
    torch.testing.assert_close(states[1], states[0][:, :, :steps], rtol=1e-5, atol=1e-5)
    drafts = [
        predictor.draft(teacher, part.flatten(0, 1), 6) for predictor, part in zip((whole, first), states, strict=True)
    ]
    assert torch.equal(drafts[1].tokens, drafts[0].tokens[:, :steps])
    torch.testing.assert_close(drafts[1].log_probs, drafts[0].log_probs[:, :steps], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("section", [*SECTIONS, *COUPLED])
@torch.no_grad()
def test_first_steps_equal_the_whole_predictor_on_given_states(section: str, steps: int) -> None:
    """Drafts of given states do not depend on later steps, to the bit."""
    teacher = tiny_teacher("llama", lean=True)
    whole = make_predictor(teacher, **(SECTIONS | COUPLED)[section])
    first = whole.first_steps(steps)
    generator = torch.Generator().manual_seed(3)
    final = torch.randn(5, teacher.hidden_size, generator=generator)
    pseudo = torch.randn(5, 4, teacher.hidden_size, generator=generator) if whole.transfer_layers else None
    states = whole.draft_hidden(teacher, final, pseudo)[:, :steps]
    limited = first.draft_hidden(teacher, final, None if pseudo is None else pseudo[:, :steps])
    assert torch.equal(limited, states)
    for step in range(1, steps + 1):
        args = (teacher, states[:, step - 1], step)
        assert torch.equal(first.step_logits(*args), whole.step_logits(*args))
    assert torch.equal(
        first.logits(teacher, limited), whole.logits(teacher, whole.draft_hidden(teacher, final, pseudo))[:, :steps]
    )


@pytest.mark.parametrize("section", ["firp", "hidden_transfer", "firp_plus"])
@torch.no_grad()
def test_first_steps_have_the_pseudo_states_of_all_steps(section: str) -> None:
    """Pseudo states of one node, by decoding's forward and `pseudo_state_maker`."""
    teacher = tiny_teacher("llama", lean=True)
    whole = make_predictor(teacher, **(SECTIONS | COUPLED)[section])
    assert torch.equal(pseudo_rows(teacher, whole.first_steps(4)), pseudo_rows(teacher, whole))
    for steps in (1, 2, 3):
        torch.testing.assert_close(
            pseudo_rows(teacher, whole.first_steps(steps)), pseudo_rows(teacher, whole)[:, :steps], rtol=1e-5, atol=1e-5
        )


def pseudo_rows(teacher: Teacher, predictor: TreePredictor) -> Tensor:
    tree = parse_tree("dynamic:2", predictor.steps)
    cache = KVCache(**DraftSetup.of(predictor, tree).shape.cache(teacher, 1, 4), device=torch.device("cpu"))
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    rows, offsets = step_rows(one, torch.zeros(1, 1, dtype=torch.long), None, predictor.steps)
    cache.begin(rows.shape[1], 0)
    mask = step_mask(rows, offsets, cache.lengths, cache.prefix_slots(0), torch.float32)
    _, pseudo = forward_rows(
        teacher,
        teacher.embed(torch.tensor([[9]])),
        offsets,
        mask,
        transfer_layers=predictor.transfer_layers,
        make_pseudo_states=predictor.pseudo_state_maker(),
        cache=cache,
    )
    assert pseudo is not None
    return pseudo


@sections
def test_first_steps_share_the_weights(section: str) -> None:
    teacher = tiny_teacher("llama")
    whole = make_predictor(teacher, **SECTIONS[section])
    assert whole.first_steps(4) is whole
    first = whole.first_steps(2)
    kept = {parameter.data_ptr() for parameter in first.parameters()}
    assert kept < {parameter.data_ptr() for parameter in whole.parameters()}
    assert len(whole.state_dict()) == 2 * len(first.state_dict()), "the whole predictor keeps its steps"
    assert not first.training
    assert first.first_steps(1).steps == 1


def test_first_steps_refuse_impossible_numbers() -> None:
    teacher = tiny_teacher("llama")
    predictor = make_predictor(teacher, **SECTIONS["firp"])
    for steps in (0, -1, 5):
        with pytest.raises(PredictorError, match=f"1 to 4 steps, not {steps}"):
            predictor.first_steps(steps)
    exits = FakeExits(looped_teacher(2, 3), random_prompts(1), lambda n, i: True)
    assert not hasattr(exits, "first_steps"), "early exits are all needed"


def test_first_steps_refuse_predictors_that_need_all_steps() -> None:
    class Whole(FakePredictor):
        _truncate = TreePredictor._truncate

    teacher = tiny_teacher("llama")
    with pytest.raises(PredictorError, match="cannot leave out its later steps"):
        Whole(teacher, random_prompts(1), 3, lambda n, i: True).first_steps(1)


def rows_of(engine: Engine, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]], tokens: int) -> list[int]:
    """Return the rows of every step after prefill."""
    rows: list[int] = []
    original = KVCache.begin

    def begin(cache: KVCache, count: int, longest: int) -> None:
        rows.append(count)
        original(cache, count, longest)

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "begin", begin)
        engine.generate(prompts, tokens)
    return rows


@pytest.mark.parametrize(
    ("tree", "rows"),
    [
        ("static:3x2", 10 * 3),
        ("static:3x2@2", 10 + 2 * 4),
        ("static:3x2/3@2", 10 + 2 * 3),
        ("dynamic:8/2", 8 * 3),
        ("dynamic:8/2@3", 8 + 3 * 2),
        ("dynamic:3", 3 * 3),
        ("dynamic:8", 8 * 5),
        ("chain/3", 4 * 4),
        ("chain/1@1", 2 + 1),
        ("chain", 5 * 5),
    ],
)
@pytest.mark.parametrize("section", ["firp", "hidden_transfer", "firp_plus"])
def test_step_runs_only_the_pseudo_rows_that_the_tree_needs(
    section: str, tree: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, prompts = tiny_teacher("llama", lean=True), random_prompts(2, seed=73)
    engine = Engine(teacher, make_predictor(teacher, **(SECTIONS | COUPLED)[section]), parse_tree(tree, 4))
    seen = rows_of(engine, monkeypatch, prompts, 12)
    assert set(seen[1:]) == {rows}
    drafting = parse_tree(tree, 4).drafting(4)
    assert seen[0] == 1 + drafting


@pytest.mark.parametrize(
    ("kind", "tree", "batch"),
    covered(
        ["firp", "hidden_transfer", "medusa"],
        ["static:3x2", "static:2x1@2", "dynamic:6/2", "dynamic:2", "chain/2", "chain/3@1"],
        [1, 3],
    ),
)
def test_shallow_trees_write_the_same_tokens(kind: str, tree: str, batch: int) -> None:
    """Trained predictors: the tokens of `generate`. If every node has pseudo rows, also the same steps."""
    teacher, predictor, prompts = embedded_teacher(), embedded_predictor(kind), embedded_prompts(batch)
    spec = parse_tree(tree, 4)
    got = Engine(teacher, predictor, spec).generate(prompts, 40)
    expected = [generate_reference(teacher.model, prompt, 40) for prompt in prompts]
    assert [item.token_ids for item in got] == expected
    lengths = [length for item in got for length in item.accepted_lengths]
    assert max(lengths) <= spec.depth(4) + 1
    assert sum(lengths) > 1.3 * len(lengths)
    if not spec.limited:
        engine = Engine(teacher, predictor, spec)
        engine._limited[spec.drafting(4)] = predictor, predictor.pseudo_state_maker()
        for whole, limited in zip(engine.generate(prompts, 40), got, strict=True):
            assert whole.accepted_lengths == limited.accepted_lengths


@pytest.mark.parametrize("nodes", [3, 8, 20])
def test_tree_build_reads_only_the_steps_of_the_tree(nodes: int) -> None:
    """A whole draft and a tree of fewer steps give the tree of the cut draft."""
    predictor = make_predictor(tiny_teacher("llama"), **SECTIONS["firp"])
    log_probs, tokens = torch.randn(2, 4, 30).log_softmax(-1).topk(nodes - 1)
    root = torch.tensor([4, 5])
    built = build(parse_tree(f"dynamic:{nodes}/2", 4), predictor, Draft(tokens, log_probs), root)
    cut = Draft(tokens[:, :2], log_probs[:, :2])
    slow = build_by_level(nodes, predictor.first_steps(2), cut, root)
    assert built.scores is not None and slow.scores is not None
    assert int(built.depth.max()) <= 2
    assert torch.equal(built.scores.sort().values, slow.scores.sort().values)
    none = build(parse_tree("none", 4), predictor, cut, root)
    assert none.tokens.tolist() == [[4], [5]]


@pytest.mark.parametrize("kind", ["firp", "medusa"])
def test_tree_none_is_autoregressive_decoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pseudo rows, no heads, and the memory of `ar`."""
    teacher, prompts = embedded_teacher(), embedded_prompts(2)
    engine = Engine(teacher, embedded_predictor(kind), parse_tree("none", 4))
    autoregressive = Engine(teacher)
    assert engine.cache_bytes(2, 30, 20) == autoregressive.cache_bytes(2, 30, 20)
    monkeypatch.setattr(TreePredictor, "draft", lambda *_: pytest.fail("a draft was made"))
    assert set(rows_of(engine, monkeypatch, prompts, 20)) == {1}
    got, expected = engine.generate(prompts, 20), autoregressive.generate(prompts, 20)
    assert [item.token_ids for item in got] == [item.token_ids for item in expected]
    assert [item.accepted_lengths for item in got] == [item.accepted_lengths for item in expected]


@pytest.mark.parametrize("section", ["firp", "medusa"])
@torch.inference_mode()
def test_autoregressive_steps_make_no_draft(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run one row, and a `start` step after them drafts as if they had been part of the prompt."""
    teacher = tiny_teacher("llama", lean=True)
    predictor = make_predictor(teacher, **SECTIONS[section])
    engine = Engine(teacher, predictor, parse_tree("dynamic:4", 4))
    prompt = random_prompts(1, seed=74, low=9, high=9)[0]
    text = generate_reference(tiny_model("llama"), prompt, 8, eos_token_id=-1)
    stepper, straight = (engine.stepper(engine.setup(1, 9, 20), 1, 40) for _ in range(2))
    stepper.prefill([prompt], 512)
    calls = []
    monkeypatch.setattr(predictor, "draft_hidden", lambda *_: calls.append(1))
    for length in range(8, 12):
        stepper.step(length, "autoregressive")
    monkeypatch.undo()
    assert calls == []
    stepper.step(12, "drafted", first=True)
    assert int(stepper.cache.lengths) == len(prompt) + 4
    straight.prefill([prompt + text[:4]], 512)
    straight.step(len(prompt) + 3, "drafted", first=True)
    for stepped, prefilled in zip(stepper.buffers(), straight.buffers(), strict=True):
        torch.testing.assert_close(stepped, prefilled, rtol=1e-4, atol=1e-4)


def entry(batch: int, tree: str, context: int = 64) -> TunedTree:
    return TunedTree({}, "", batch, context, 0.0, tree, Prediction(2.0, 2.0, 1.0, 1.0))


def test_engine_takes_the_tuned_tree_of_the_batch() -> None:
    """By the number of prompts and the middle of their answers; `cache_bytes` is that tree's."""
    teacher, predictor, prompts = embedded_teacher(), embedded_predictor("firp"), embedded_prompts(4)
    trees = TunedTrees(
        parse_tree("dynamic:8", 4),
        4,
        (entry(1, "dynamic:6"), entry(1, "chain/2", 4096), entry(4, "dynamic:3/2@1"), entry(16, "none")),
    )
    engine = Engine(teacher, predictor, trees)
    made: list[DecodeStep] = []
    original = engine.stepper
    engine.stepper = lambda *sizes: made.append(original(*sizes)) or made[-1]  # type: ignore[method-assign, func-returns-value]
    for count, tree in ((1, "dynamic:6"), (2, "dynamic:3/2@1"), (4, "dynamic:3/2@1")):
        got = engine.generate(prompts[:count], 30)
        assert [item.token_ids for item in got] == [
            generate_reference(teacher.model, prompt, 30) for prompt in prompts[:count]
        ]
        assert str(made[-1].tree) == tree
        longest = max(map(len, prompts[:count]))
        assert made[-1].cache.bytes() == engine.cache_bytes(count, longest, 30)
    engine.generate(prompts * 4, 3)
    assert made[-1].tree is None and made[-1].predictor is None
    assert str(engine.setup(1, 1000, 7000).tree) == "chain/2"
    assert str(engine.setup(1, 100, 10).tree) == "dynamic:6"


@pytest.mark.parametrize("free", [1 << 40, 1 << 22], ids=["plenty", "little"])
def test_new_tree_gets_new_buffers_and_graphs(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured step belongs to one tree. When the tree is used again, it is replayed, or captured again where the
    memory was needed for another tree.
    """
    monkeypatch.setattr("firp_cli.decoding.engine.free_bytes", lambda _: free)
    teacher, predictor, prompts = embedded_teacher(), embedded_predictor("firp"), embedded_prompts(4)
    trees = TunedTrees(parse_tree("dynamic:8", 4), 4, (entry(1, "dynamic:6"), entry(4, "static:2x1")))
    engine = Engine(teacher, predictor, trees)
    graphs, tapes = with_graphs(engine)
    expected = [generate_reference(teacher.model, prompt, 24) for prompt in prompts]
    forgotten, captured = [], []
    for count in (1, 1, 4, 4, 4, 1, 1):
        assert [item.token_ids for item in engine.generate(prompts[:count], 24)] == expected[:count]
        forgotten.append(graphs.forgotten)
        captured.append(graphs.captures)
        assert engine.kept is not None
        assert engine.kept.cache.bytes() == engine.cache_bytes(count, max(map(len, prompts[:count])), 24)
    little = free < 1 << 40
    assert forgotten == ([0, 0, 1, 1, 1, 2, 2] if little else [0] * 7)
    assert (captured[-1] > captured[4]) is little and captured[-1] == tapes.captured
    assert tapes.replayed > 0
