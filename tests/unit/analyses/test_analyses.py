"""Analyses of the papers against direct computations on tiny teachers."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from firp_cli.analyses.heads import EarlyExit, exit_head, exit_layers, heads, linear_head
from firp_cli.analyses.row_costs import ROWS, rows
from firp_cli.analyses.run import chosen_analyses, run_analyses
from firp_cli.analyses.similarity import similarity
from firp_cli.analyses.subject import Subject, run_layer
from firp_cli.analyses.transfer_layer import MOST_LAYERS, measured_layers, transfer_layer
from firp_cli.analyses.tree_size import SIZES, first_answer, tree_of_size, tree_size
from firp_cli.collecting.collect_store import silent
from firp_cli.decoding.engine import Engine
from firp_cli.errors import UsageError
from firp_cli.evaluation import quality
from firp_cli.evaluation.simulate import simulate_answer
from firp_cli.predictors.base import Predictor
from firp_cli.results import ANALYSES, Analysis
from firp_cli.store.reader import StoredSequence
from firp_cli.teacher.teacher import Teacher
from firp_cli.tuning import cost
from helpers.models import (
    LAYERS,
    embedded_predictor,
    embedded_prompts,
    embedded_teacher,
    looped_teacher,
    make_predictor,
    random_prompts,
    sequence_batch,
    tiny_teacher,
)

TEACHER = tiny_teacher("llama")
RESPONSE = 4  # first position of the answers


def conversations(teacher: Teacher, predictor: Predictor, count: int) -> list[StoredSequence]:
    found = []
    for tokens in random_prompts(count, seed=7, low=18, high=28):
        batch = sequence_batch(teacher, [tokens], [RESPONSE], list(predictor.required_layers))
        hidden = {layer: states[0] for layer, states in batch.hidden.items()}
        found.append(StoredSequence(batch.input_ids[0], batch.loss_mask[0], batch.final[0], hidden))
    return found


def subject_of(predictor: Predictor, count: int = 6, teacher: Teacher = TEACHER, **options: float) -> Subject:
    return Subject(teacher, predictor, conversations(teacher, predictor, count), **options)  # type: ignore[arg-type]


@cache
def library_states(ids: tuple[int, ...]) -> list[Tensor]:
    with torch.no_grad():
        states = TEACHER.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [part[0] for part in states]


def hidden_states(item: StoredSequence) -> list[Tensor]:
    """Return the states after each layer as the library gives them; the last one is normed."""
    return library_states(tuple(item.input_ids.tolist()))


def pairs(subject: Subject, part: int, step: int) -> list[tuple[StoredSequence, int]]:
    """Return conversation and anchor wherever a step counts."""
    chosen = [subject.sequences[index] for index in subject.parts[part]]
    return [(item, n) for item in chosen for n in range(RESPONSE - 1, len(item.input_ids) - step - 1)]


def cell(analysis: Analysis, *start: object, column: str) -> float:
    row = next(row for row in analysis.rows if row[: len(start)] == list(start))
    return row[analysis.headers.index(column)]


@torch.no_grad()
def test_similarity_equals_a_direct_computation() -> None:
    predictor = make_predictor(TEACHER, kind="hidden_transfer", layers=[1, 3, 3])
    subject = subject_of(predictor)
    found = similarity(subject)
    predicted, real, origin = [], [], []
    for item in subject.sequences:
        states = hidden_states(item)[1]
        for n in range(RESPONSE - 1, len(item.input_ids) - 2):
            predicted.append(predictor.make_pseudo_states(1, 1, states[None, n : n + 1])[0, 0])
            real.append(states[n + 1])
            origin.append(states[n])
    a, b, c = (torch.stack(part).double() for part in (predicted, real, origin))
    lengths = b.norm(dim=-1)
    expected = {
        "cosine": torch.cosine_similarity(a, b),
        "cosine of the anchor": torch.cosine_similarity(c, b),
        "relative L2": (a - b).norm(dim=-1) / lengths,
        "norm ratio": a.norm(dim=-1) / lengths,
    }
    for name, values in expected.items():
        assert cell(found, name, 1, column="step 1") == pytest.approx(values.mean().item(), abs=1e-5)
        assert cell(found, name, 2, column="step 2") is None  # step 2 enters at layer 3
    whole = quality.evaluate(TEACHER, predictor, subject.sequences, None).similarity
    for layer, cosines in whole.items():
        for step, cosine in enumerate(cosines, start=1):
            assert cell(found, "cosine", layer, column=f"step {step}") == pytest.approx(cosine)
    assert "at layer" not in found.reading and "of 3 steps" in found.reading


def test_states_after_a_layer_are_those_of_the_whole_forward() -> None:
    subject = subject_of(make_predictor(TEACHER, kind="firp", layer=2, steps=2))
    items = subject.with_states([1])
    run_layer(TEACHER, items, 1)
    run_layer(TEACHER, items, 2)
    for item, direct in zip(items, subject.with_states([3]), strict=True):
        assert list(item.hidden) == [3]
        torch.testing.assert_close(item.hidden[3], direct.hidden[3], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(direct.hidden[3], hidden_states(direct)[3], rtol=1e-4, atol=1e-4)


def least_squares(x: list[Tensor], y: list[Tensor]) -> np.ndarray:
    return np.linalg.lstsq(torch.stack(x).double().numpy(), torch.stack(y).double().numpy(), rcond=None)[0].T


def test_transfer_layer_solves_least_squares_at_every_layer() -> None:
    subject = subject_of(make_predictor(TEACHER, kind="firp", layer=2, steps=2), count=12, ridge_lambda=1e-12)
    assert not set(subject.parts[0]) & set(subject.parts[1]) and sorted([*subject.parts[0], *subject.parts[1]]) == list(
        range(12)
    )
    items = subject.with_states([1])
    run_layer(TEACHER, items, 1)
    made = subject.transfer(items, [2, 2])
    for step in (1, 2):
        places = pairs(subject, 0, step)
        x = [hidden_states(item)[2][n] for item, n in places]
        y = [hidden_states(item)[2][n + step] for item, n in places]
        solved = made.maps[step - 1].weight.double().numpy()  # type: ignore[union-attr, operator]
        np.testing.assert_allclose(solved, least_squares(x, y), rtol=1e-3, atol=1e-3)
    found = transfer_layer(subject)
    held = quality.evaluate(TEACHER, made, [items[index] for index in subject.parts[1]], None)
    assert [row[0] for row in found.rows[::2]] == list(range(1, LAYERS))
    assert cell(found, 2, "top-1", column="step 2") == pytest.approx(held.steps[1].top1)
    assert cell(found, 2, "top-1", column="chain") == pytest.approx(held.expected_accepted_length_chain)
    assert f"({len(pairs(subject, 0, 1))} pairs, few for maps of 48 inputs" in found.note


def test_layers_of_a_deep_teacher_are_thinned() -> None:
    layers = measured_layers(61, (20,))
    assert {1, 20, 61} <= set(layers) and MOST_LAYERS - 2 <= len(layers) <= MOST_LAYERS + 2
    assert measured_layers(5) == [1, 2, 3, 4, 5]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral-window"])
def test_isolated_steps_equal_single_rows_after_their_anchor(family: str) -> None:
    teacher = tiny_teacher(family)
    predictor = make_predictor(teacher, kind="hidden_transfer", layers=[1, 2, 2])
    batch = sequence_batch(teacher, random_prompts(1, seed=3, low=20), [RESPONSE], [1])
    anchors = torch.tensor([[5, 9, 14]])
    seen, alone = (made.draft_states(teacher, batch, anchors) for made in (predictor, predictor.isolated()))
    torch.testing.assert_close(alone[:, :, 0], seen[:, :, 0])
    assert (alone[:, :, 1:] - seen[:, :, 1:]).abs().max() > 0.01
    whole = sequence_batch(teacher, batch.input_ids.tolist(), [RESPONSE], [1, 2]).hidden
    for place, n in enumerate(anchors[0].tolist()):
        for step, layer in enumerate((1, 2, 2), start=1):
            rows_before = whole[layer][:, : n + 1]
            pseudo = predictor.make_pseudo_states(step, step, rows_before[:, n:])
            positions = torch.tensor([[*range(n + 1), n + step]])
            allowed = torch.ones(n + 2, n + 2, dtype=torch.bool).tril()[None]
            mask = teacher.sequence_mask(allowed, positions)
            last = teacher.run(torch.cat([rows_before, pseudo], dim=1), positions, mask, layer)
            torch.testing.assert_close(alone[0, place, step - 1], teacher.norm(last)[0, -1], rtol=1e-3, atol=1e-3)


def test_attention_reports_both_masks() -> None:
    subject = subject_of(make_predictor(TEACHER, kind="firp", layer=1, steps=3))
    (found,) = run_analyses(["attention"], subject, silent)
    assert found.reason is None and len(found.rows) == 8
    for name in ("firp (trained)", "firp (ridge)"):
        on, off = (cell(found, name, sight, "top-1", column="step 1") for sight in ("on", "off"))
        assert on == off
    held = [subject.with_states([1])[index] for index in subject.parts[1]]
    direct = quality.evaluate(TEACHER, subject.predictor.isolated(), held, None)  # type: ignore[operator]
    assert cell(found, "firp (trained)", "off", "top-5", column="step 3") == pytest.approx(direct.steps[2].top5)
    assert "was trained with them visible" in found.note


@torch.no_grad()
def test_early_exit_is_the_teachers_head_on_a_middle_layer() -> None:
    subject = subject_of(make_predictor(TEACHER, kind="firp", layer=2, steps=2))
    found = heads(subject)
    for step in (1, 2):
        hits = []
        for item, n in pairs(subject, 1, step):
            early = TEACHER.head(TEACHER.norm(hidden_states(item)[2][n + step])).argmax()
            hits.append(bool(early == TEACHER.head(hidden_states(item)[-1][n + step]).argmax()))
        assert cell(found, "exit 2", "top-1", column=f"step {step}") == pytest.approx(np.mean(hits))
    names = ["firp (trained)", "firp (ridge)", "linear head (ridge)", "exit 2", "exit 2 (ridge)", "exit 3"]
    assert [row[0] for row in found.rows[::2]][:6] == names
    assert "on their own data" in found.note and "on 4 of 6 conversations" in found.note
    chain = cell(found, "exit 3", "top-1", column="chain")
    assert cell(found, "exit 3", "top-1", column="per pass") == pytest.approx(chain / (1 + 2 * 3 / LAYERS))
    assert cell(found, "firp (trained)", "top-1", column="per pass") == found.rows[0][-2]


def test_linear_head_and_exit_map_solve_least_squares() -> None:
    subject = subject_of(make_predictor(TEACHER, kind="firp", layer=2, steps=2), count=12, ridge_lambda=1e-12)
    items = subject.with_states([2])
    head, early = linear_head(subject, items, 2), exit_head(subject, items, 2, 2)
    places = pairs(subject, 0, 2)
    final = [hidden_states(item)[-1][n] for item, n in places]
    later = [hidden_states(item)[-1][n + 2] for item, n in places]
    np.testing.assert_allclose(head.maps[1].weight.double(), least_squares(final, later), rtol=1e-3, atol=1e-3)
    exits = pairs(subject, 0, 0)
    x = [hidden_states(item)[2][n] for item, n in exits]
    gain = TEACHER.model.model.norm.weight.detach()
    y = [hidden_states(item)[-1][n] / gain * hidden_states(item)[2][n].square().mean().sqrt() for item, n in exits]
    np.testing.assert_allclose(early.maps[0].weight.double(), least_squares(x, y), rtol=1e-2, atol=1e-2)


def test_heads_compare_other_predictors_on_the_same_conversations() -> None:
    predictor = make_predictor(TEACHER, kind="medusa", steps=2)
    rival = make_predictor(TEACHER, kind="firp", layer=1, steps=3)
    subject = subject_of(predictor)
    subject.against = {"rival": rival}
    found = heads(subject)
    assert found.headers[-3:] == ["step 3", "chain", "per pass"] and "medusa (ridge)" not in str(found.rows)
    assert cell(found, "medusa (trained)", "top-1", column="step 3") is None
    held = [subject.with_states([1])[index] for index in subject.parts[1]]
    direct = quality.evaluate(TEACHER, rival, held, None)
    assert cell(found, "rival", "top-1", column="step 3") == pytest.approx(direct.steps[2].top1)
    assert exit_layers((), 6) == [3, 4] and exit_layers((20,) * 4, 30) == [20, 25] and exit_layers((), 1) == []
    assert EarlyExit(TEACHER, 2, [1, 2, 3]).steps == 3


def test_rows_are_relative_to_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "ROUNDS", 2)
    found = rows(subject_of(make_predictor(TEACHER, kind="firp", layer=3, steps=2), count=1))
    assert [row[0] for row in found.rows] == list(ROWS) and found.rows[0][2] == 1.0
    for _, whole, ratio, _, *parts in found.rows:
        assert whole == pytest.approx(sum(parts)) and min(parts) > 0
        assert ratio == pytest.approx(whole / found.rows[0][1])
    assert found.rows[-1][3] == pytest.approx(found.rows[-1][2] / ROWS[-1])


def test_tree_size_is_monotone_and_equals_simulated_answers() -> None:
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")
    prompts = embedded_prompts(3)
    answers = Engine(teacher).generate(prompts, 48)
    whole = [[*prompt, *answer.token_ids] for prompt, answer in zip(prompts, answers, strict=True)]
    items = []
    for prompt, tokens in zip(prompts, whole, strict=True):
        mask = torch.arange(len(tokens)) >= len(prompt)
        items.append(StoredSequence(torch.tensor(tokens), mask, torch.zeros(len(tokens), teacher.hidden_size)))
    found = tree_size(Subject(teacher, predictor, items))
    lengths = [row[2] for row in found.rows]
    assert [row[0] for row in found.rows] == list(SIZES) and lengths[0] == 1.0
    assert all(later >= before for before, later in pairwise(lengths)) and lengths[-1] > 2
    spec = tree_of_size(8)
    emitted = [
        count
        for prompt, tokens in zip(prompts, whole, strict=True)
        for count in simulate_answer(teacher, predictor, tokens, len(prompt), spec)  # type: ignore[arg-type]
    ]
    assert cell(found, 8, column="accepted length") == pytest.approx(sum(emitted) / len(emitted))
    assert [row[1] for row in found.rows[:4]] == [1, 2 * 2, 4 * 4, 8 * 5]


def test_first_answer_ends_where_the_next_turn_begins() -> None:
    ids, mask = torch.arange(9), torch.tensor([0, 0, 1, 1, 1, 0, 0, 1, 1])
    assert first_answer(ids, mask) == ([0, 1, 2, 3, 4], 2)
    assert first_answer(ids[:5], mask[:5]) == ([0, 1, 2, 3, 4], 2)
    assert first_answer(ids[:2], mask[:2]) == ([0, 1], 2)


def test_analyses_are_chosen_by_name() -> None:
    assert chosen_analyses("rows, similarity") == ["similarity", "rows"]
    assert chosen_analyses("all") == chosen_analyses(["all"]) == list(ANALYSES)
    with pytest.raises(UsageError, match=r"no analysis 'similarty'; did you mean 'similarity'"):
        chosen_analyses("similarty")
    with pytest.raises(UsageError, match="no analysis ''"):
        chosen_analyses("rows,")


def test_missing_analyses_have_a_reason() -> None:
    medusa = subject_of(make_predictor(TEACHER, kind="medusa", steps=2))
    found = run_analyses(["similarity", "attention", "tree-size"], medusa, silent)
    assert [item.reason for item in found] == ["a medusa predictor has no pseudo states"] * 2 + [None]
    looped = looped_teacher(2, 3)
    exits = Subject(looped, make_predictor(looped, kind="speed"), [])
    for item in run_analyses([name for name in ANALYSES if name != "rows"], exits, silent):
        assert item.reason is not None and item.reason.startswith("a speed predictor") and not item.rows
    silent_answers = subject_of(make_predictor(TEACHER, kind="firp", layer=2, steps=2))
    for item in silent_answers.sequences:
        item.loss_mask[:] = False
    for item in run_analyses(["similarity", "heads", "tree-size", "attention"], silent_answers, silent):
        assert "no step has an anchor" in item.reading if item.name == "similarity" else item.reason
    single = subject_of(make_predictor(TEACHER, kind="firp", layer=2, steps=1), count=1)
    reasons = [item.reason for item in run_analyses(["transfer-layer", "attention", "heads"], single, silent)]
    assert all(reasons) and "two or more" in str(reasons[0]) and "one step" in str(reasons[1])
