"""Coupling: its formulas node by node, drafts by decoding's way, its first steps, half precision, folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_build import build
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import PredictorError, RecipeError
from firp_cli.predictors.base import SequenceBatch, TreePredictor
from firp_cli.predictors.coupling import embedding_scale
from firp_cli.predictors.draft import Draft
from firp_cli.predictors.folder import load_predictor, predictor_folder, save_predictor
from firp_cli.recipe import validate_recipe
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from helpers.coupling import FORMS, UNCOUPLED, adjusted_state, coupled, coupling_of, section
from helpers.models import HIDDEN, VOCABULARY, make_predictor, random_prompts, sequence_batch, tiny_model, tiny_teacher
from helpers.pairwise import covered
from helpers.trees import paths_of

ANCHORS = torch.tensor([[3, 6, 9], [0, 5, 10]])
SEQUENCES = random_prompts(2, seed=21, low=16, high=20)
cases = pytest.mark.parametrize(("form", "share", "kind"), covered(FORMS, [True, False], list(UNCOUPLED)))


def states_of(teacher: Teacher, predictor: TreePredictor, anchors: Tensor = ANCHORS) -> tuple[SequenceBatch, Tensor]:
    batch = sequence_batch(teacher, SEQUENCES, [1, 1], list(predictor.required_layers))
    return batch, predictor.draft_states(teacher, batch, anchors)


def finals(batch: SequenceBatch) -> Tensor:
    """Return the anchors' own final states (B * A, d)."""
    return torch.stack([batch.final[row, n] for row in range(2) for n in ANCHORS[row].tolist()])


def drafts_of(teacher: Teacher, predictor: TreePredictor, breadth: int) -> tuple[Draft, Tensor, Tensor]:
    """Return the draft of every anchor, the path states (B * A, k, d), and the tokens after the anchors (B * A, k)."""
    batch, states = states_of(teacher, predictor)
    draft = predictor.draft(teacher, states.flatten(0, 1), breadth, final=finals(batch))
    path = predictor.path_states(batch, ANCHORS, states).flatten(0, 1)
    places = [(row, n) for row in range(2) for n in ANCHORS[row].tolist()]
    parents = torch.tensor([SEQUENCES[row][n + 1 : n + 1 + predictor.steps] for row, n in places])
    return draft, path, parents


@cases
@torch.no_grad()
def test_path_states_are_the_formulas(form: str, share: bool, kind: str) -> None:
    teacher = tiny_teacher("llama-tied", lean=True)
    predictor = coupled(teacher, section(kind, form, share))
    batch, states = states_of(teacher, predictor)
    path = predictor.path_states(batch, ANCHORS, states)
    for row in range(2):
        for place, anchor in enumerate(ANCHORS[row].tolist()):
            previous = batch.final[row, anchor]
            for step in range(predictor.steps):
                token = SEQUENCES[row][anchor + step + 1]
                previous = adjusted_state(
                    coupling_of(predictor), teacher, step, states[row, place, step], token, previous
                )
                torch.testing.assert_close(path[row, place, step], previous, rtol=1e-4, atol=1e-4)
    assert (path - states).abs().mean() > 0.1, "the coupling matters"


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_path_states_do_not_depend_on_later_tokens(form: str) -> None:
    """Anchors whose steps reach beyond the conversation still have their first steps."""
    teacher = tiny_teacher()
    predictor = coupled(teacher, section("firp_plus", form))
    batch, states = states_of(teacher, predictor)
    short = len(SEQUENCES[0]) - 2
    anchors = torch.tensor([[short], [short]])
    whole = predictor.draft_states(teacher, batch, anchors)
    path = predictor.path_states(batch, anchors, whole)
    expected = adjusted_state(
        coupling_of(predictor), teacher, 0, whole[0, 0, 0], SEQUENCES[0][short + 1], batch.final[0, short]
    )
    torch.testing.assert_close(path[0, 0, 0], expected, rtol=1e-4, atol=1e-4)
    before = predictor.path_states(batch, ANCHORS, states)
    batch.input_ids[0, 3 + 2] = (batch.input_ids[0, 3 + 2] + 1) % VOCABULARY
    after = predictor.path_states(batch, ANCHORS, states)
    changed = (after - before)[0, 0].abs().amax(-1) > 1e-4
    assert changed.tolist() == [False, True, form == "recurrent"]


@cases
@torch.no_grad()
def test_candidates_along_a_path_have_the_probabilities_of_path_states(form: str, share: bool, kind: str) -> None:
    """The teacher's head on the path's states over the M candidates, times their probability without the coupling."""
    teacher = tiny_teacher("qwen3", lean=True)
    predictor = coupled(teacher, section(kind, form, share))
    draft, path, parents = drafts_of(teacher, predictor, 5)
    assert draft.tokens.shape == (6, 3, 12)
    prepared, states, reordered = predictor.for_decoding(teacher), None, 0
    for step in range(1, 4):
        tokens, known = draft.tokens[:, step - 1], draft.log_probs[:, step - 1].exp().sum(-1)
        children = prepared.child_candidates(draft, step, parents[:, step - 1, None], 7, states)
        logits = teacher.head(path[:, step - 1]).gather(1, tokens)
        expected = logits.log_softmax(-1) + known.log()[:, None]
        best, order = expected.sort(dim=-1, descending=True)
        torch.testing.assert_close(children.log_probs[:, 0], best[:, :7], rtol=1e-4, atol=1e-4)
        assert torch.equal(children.tokens[:, 0], tokens.gather(1, order[:, :7]))
        reordered += int((order[:, 0] > 0).sum())
        states = children.states
        assert (states is not None) == (form == "recurrent")
    assert reordered > 0, "the coupling changes some drafts"


@cases
@torch.no_grad()
def test_sibling_nodes_have_the_candidates_of_their_own_tokens(form: str, share: bool, kind: str) -> None:
    """Several nodes of one depth at once, each with its own parent's state, against one node at a time."""
    teacher = tiny_teacher("llama", lean=True)
    predictor = coupled(teacher, section(kind, form, share)).for_decoding(teacher)
    draft, _, _ = drafts_of(teacher, predictor, 5)
    generator = torch.Generator().manual_seed(4)
    parents = torch.randint(3, VOCABULARY, (6, 4), generator=generator)
    above = torch.randn(6, 4, HIDDEN, generator=generator) if form == "recurrent" else None
    together = predictor.child_candidates(draft, 2, parents, 6, above)
    for node in range(4):
        own = None if above is None else above[:, node : node + 1]
        alone = predictor.child_candidates(draft, 2, parents[:, node : node + 1], 6, own)
        assert torch.equal(together.tokens[:, node], alone.tokens[:, 0])
        torch.testing.assert_close(together.log_probs[:, node], alone.log_probs[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "share", "tree"), covered(FORMS, [True, False], ["dynamic:9", "dynamic:6/2", "static:3x2x1", "chain"])
)
@torch.no_grad()
def test_coupling_without_output_drafts_the_plain_trees(form: str, share: bool, tree: str) -> None:
    teacher = tiny_teacher("llama", lean=True)
    predictor = coupled(teacher, section("firp_plus", form, share, candidates=VOCABULARY))
    coupling_of(predictor).output_weight.zero_()
    plain = make_predictor(teacher, **{**UNCOUPLED["firp_plus"], "kind": "firp"})
    weights = {name: value for name, value in predictor.state_dict().items() if not name.startswith("coupling.")}
    plain.load_state_dict(weights)
    draft, path, parents = drafts_of(teacher, predictor, 5)
    _, states = states_of(teacher, plain)
    assert torch.equal(path, states.flatten(0, 1))
    spec = parse_tree(tree, 3)
    expected = plain.draft(teacher, states.flatten(0, 1), spec.breadth(VOCABULARY))
    assert torch.equal(draft.tokens[:, :, : expected.tokens.shape[2]], expected.tokens)
    assert predictor.parent_dependent and not plain.parent_dependent
    coupled_tree = build(spec, predictor, draft, parents[:, 0])
    plain_tree = build(spec, plain, expected, parents[:, 0])
    for row in range(6):
        assert sorted(paths_of(coupled_tree, row)) == sorted(paths_of(plain_tree, row))
    if plain_tree.scores is not None and coupled_tree.scores is not None:
        torch.testing.assert_close(
            coupled_tree.scores.sort().values, plain_tree.scores.sort().values, rtol=1e-4, atol=1e-4
        )


def test_width_is_that_of_candidates_and_trees() -> None:
    """More children than candidates: the draft widens. The vocabulary is the limit."""
    teacher = tiny_teacher()
    few = coupled(teacher, section("firp_plus", candidates=4))
    assert [few.width(breadth, VOCABULARY) for breadth in (1, 4, 8, 200)] == [4, 4, 8, VOCABULARY]
    assert make_predictor(teacher, kind="firp", layer=2, steps=3).width(8, VOCABULARY) == 8
    many = coupled(teacher, section("firp_plus", candidates=4096))
    assert many.width(3, VOCABULARY) == VOCABULARY
    draft, _, parents = drafts_of(teacher, few, 9)
    assert draft.tokens.shape[2] == 9
    tree = build(parse_tree("dynamic:10", 3), few, draft, parents[:, 0])
    assert tree.tokens.shape == (6, 10)
    for row in range(6):
        assert len(set(paths_of(tree, row))) == 10
    chain = build(parse_tree("chain", 3), few, draft, parents[:, 0])
    assert chain.tokens.shape == (6, 4)


@pytest.mark.parametrize("steps", [1, 2])
@cases
@torch.no_grad()
def test_first_steps_couple_as_the_whole_predictor(form: str, share: bool, kind: str, steps: int) -> None:
    teacher = tiny_teacher("llama", lean=True)
    whole = coupled(teacher, section(kind, form, share))
    first = whole.first_steps(steps)
    assert (first.steps, first.kind, first.parent_dependent) == (steps, whole.kind, True)
    assert {parameter.data_ptr() for parameter in first.parameters()} <= {
        parameter.data_ptr() for parameter in whole.parameters()
    }
    assert len(coupling_of(whole).bias) == 3 and len(coupling_of(first).bias) == steps
    (draft, path, parents), (limited, limited_path, _) = (drafts_of(teacher, one, 5) for one in (whole, first))
    torch.testing.assert_close(limited_path, path[:, :steps], rtol=1e-5, atol=1e-5)
    assert torch.equal(limited.tokens, draft.tokens[:, :steps])
    states, limited_states = None, None
    for step in range(1, steps + 1):
        above = parents[:, step - 1, None]
        children = whole.child_candidates(draft, step, above, 5, states)
        cut = first.for_decoding(teacher).child_candidates(limited, step, above, 5, limited_states)
        assert torch.equal(cut.tokens, children.tokens)
        torch.testing.assert_close(cut.log_probs, children.log_probs, rtol=1e-4, atol=1e-4)
        states, limited_states = children.states, cut.states
    shapes = {name: value.shape for name, value in whole.state_dict().items()}
    built = make_predictor(teacher, **section(kind, form, share)).state_dict()
    assert shapes == {name: value.shape for name, value in built.items()}, "the whole predictor keeps its steps"


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_coupling_runs_in_bfloat16(form: str) -> None:
    """Teacher and predictor in half precision: drafts near those in float32, and decoding ends."""
    half = wrap_model(copy.deepcopy(tiny_model("llama")).bfloat16(), name="half", check=False)
    described = section("firp_plus", form, share=form == "mlp")
    predictor, exact = coupled(half, described).to(torch.bfloat16), coupled(tiny_teacher(), described)
    _, path, _ = drafts_of(half, predictor, 5)
    _, expected, _ = drafts_of(tiny_teacher(), exact, 5)
    assert path.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(path.float(), expected, dim=-1).mean() > 0.97
    for tree in ("dynamic:6", "static:2x2@2"):
        got = Engine(half, predictor, parse_tree(tree, 3)).generate(random_prompts(2, seed=5), 10)
        assert all(len(item.token_ids) == 10 or item.finish_reason == "eos" for item in got)


@cases
def test_folder_keeps_the_coupling(form: str, share: bool, kind: str, tmp_path: Path) -> None:
    teacher = tiny_teacher()
    predictor = coupled(teacher, section(kind, form, share, width=20))
    save_predictor(predictor, tmp_path / "p", teacher)
    again = load_predictor(predictor_folder(str(tmp_path / "p")), teacher)
    assert again.describe() == predictor.describe() and again.kind == kind
    values = again.state_dict()
    assert values.keys() == predictor.state_dict().keys() and "coupling.output_weight" in values
    assert values["coupling.output_weight"].shape == (1 if share else 3, HIDDEN, 20)
    assert all(torch.equal(values[name], value) for name, value in predictor.state_dict().items())
    path = tmp_path / "p" / "config.json"
    path.write_text(path.read_text().replace('"width": 20', '"width": 24'))
    with pytest.raises(PredictorError, match="cannot be loaded"):
        load_predictor(tmp_path / "p", teacher)


@pytest.mark.parametrize("predictor", [{"kind": "medusa", "coupling": {}}, section("medusa") | {"own_head": True}])
def test_medusa_with_own_heads_refuses_a_coupling(predictor: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"vocabulary matrix: set own_head=false"):
        validate_recipe({"predictor": predictor})


@pytest.mark.parametrize(("bias", "softcap"), covered([False, True], [None, 3.0]))
@torch.no_grad()
def test_head_at_is_the_head_of_the_tokens(bias: bool, softcap: float | None) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    if bias:
        weight = model.lm_head.weight
        model.lm_head = nn.Linear(HIDDEN, VOCABULARY)
        model.lm_head.weight = weight
        nn.init.normal_(model.lm_head.bias)
    teacher = wrap_model(model, name="headed", check=False)
    teacher._softcap = softcap
    generator = torch.Generator().manual_seed(2)
    normed = torch.randn(3, 4, HIDDEN, generator=generator)
    whole = teacher.head(normed)
    if softcap:
        assert whole.abs().max() < softcap
    tokens = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:9] for _ in range(3)])
    got = teacher.head_at(normed, tokens)
    assert got.dtype == torch.float32
    expected = whole.gather(2, tokens[:, None].expand(-1, 4, -1))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(teacher.partial_head(tokens[0])(normed), whole[:, :, tokens[0]], rtol=1e-5, atol=1e-5)
    drafting = teacher.capped(teacher.draft_head(tokens[0])(normed))  # its matrix may be rounded to bfloat16
    torch.testing.assert_close(drafting, whole[:, :, tokens[0]], rtol=1e-2, atol=1e-2)


def test_embedding_scale_is_one_over_the_deviation() -> None:
    teacher = tiny_teacher("llama")
    embedding = teacher.model.get_input_embeddings().weight
    assert embedding_scale(teacher) == pytest.approx(1 / float(embedding.detach().std()), rel=1e-5)
