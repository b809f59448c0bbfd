"""Draft quality against slow loops, and simulated decoding against the decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import StoreError
from firp_cli.evaluation import quality, simulate
from firp_cli.evaluation.gate import gate
from firp_cli.evaluation.simulate import simulate_answer
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.forward import sequence_states
from firp_cli.teacher.teacher import Teacher
from helpers.models import make_predictor, random_prompts, sequence_batch, tiny_teacher

SECTIONS: list[dict[str, Any]] = [
    {"kind": "firp", "layer": 2, "steps": 3},
    {"kind": "hidden_transfer", "layers": [1, 3, 3]},
    {"kind": "medusa", "steps": 3},
]


class Stored:
    """Sequence as a store returns it."""

    def __init__(self, teacher: Teacher, predictor: Predictor, tokens: list[int], response: int) -> None:
        batch = sequence_batch(teacher, [tokens], [response], list(predictor.required_layers))
        self.input_ids, self.loss_mask, self.final = batch.input_ids[0], batch.loss_mask[0], batch.final[0]
        self.hidden = {layer: states[0] for layer, states in batch.hidden.items()}


def stored(teacher: Teacher, predictor: Predictor, count: int = 3) -> list[Stored]:
    """Return prompts with the teacher's greedy answers, and one with a random answer."""
    prompts = random_prompts(count, seed=11, low=5, high=12)
    answers = Engine(teacher).generate(prompts, 24)
    sequences = [[*prompt, *answer.token_ids] for prompt, answer in zip(prompts, answers, strict=True)]
    sequences.append(random_prompts(1, seed=12, low=20)[0])
    return [
        Stored(teacher, predictor, tokens, response=len(prompts[place]) if place < count else 6)
        for place, tokens in enumerate(sequences)
    ]


@torch.no_grad()
def slow_evaluation(teacher: Teacher, predictor: Predictor, sequences: list[Stored]) -> tuple[list[Any], list[Any]]:
    """Return hits and validity by anchor, one anchor at a time, from the model's own logits."""
    hits, valid = [], []
    for item in sequences:
        logits = teacher.model(item.input_ids[None]).logits[0]
        batch = sequence_states(teacher, predictor, item.input_ids.tolist())
        for n in range(len(item.input_ids) - 2):
            if not (item.loss_mask[n + 1] and item.loss_mask[n + 2]):
                continue
            states = predictor.draft_states(teacher, batch, torch.tensor([[n]]))[0, 0]
            row = []
            for step in range(1, predictor.steps + 1):
                drafted = predictor.step_logits(teacher, states[None, step - 1], step)[0].argmax()
                row.append(n + step + 1 < len(item.input_ids) and bool(drafted == logits[n + step].argmax()))
            hits.append(row)
            valid.append([n + step + 1 < len(item.input_ids) for step in range(1, predictor.steps + 1)])
    return hits, valid


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section["kind"])
def test_evaluate_equals_a_slow_loop(teacher: Teacher, section: dict[str, Any], monkeypatch: Any) -> None:
    predictor = make_predictor(teacher, **section)
    sequences = stored(teacher, predictor)
    monkeypatch.setattr(quality, "ANCHOR_CHUNK", 7)
    monkeypatch.setattr(quality, "LOGIT_ELEMENTS", 4 * 3 * teacher.vocab_size)
    got = quality.evaluate(teacher, predictor, sequences, parse_tree("chain", 3), batch_size=3)
    hits, valid = slow_evaluation(teacher, predictor, sequences)
    assert got.anchors == len(hits) and got.sequences == len(sequences)
    for place, step in enumerate(got.steps):
        counted = sum(row[place] for row in valid)
        assert step.anchors == counted
        assert step.top1 == pytest.approx(sum(row[place] for row in hits) / counted)
        assert step.top5 >= step.top1 and step.kl > 0
    assert 1.0 <= got.expected_accepted_length_chain <= 4.0
    assert got.expected_accepted_length_tree == pytest.approx(got.expected_accepted_length_chain)
    wide = quality.evaluate(teacher, predictor, sequences, parse_tree("static:4x2x1", 3))
    assert wide.expected_accepted_length_tree >= got.expected_accepted_length_tree
    assert wide.expected_accepted_length_chain == pytest.approx(got.expected_accepted_length_chain)


@torch.no_grad()
def test_similarity_compares_pseudo_states_with_later_real_states(teacher: Teacher) -> None:
    predictor = make_predictor(teacher, kind="hidden_transfer", layers=[1, 3, 3])
    sequences = stored(teacher, predictor, count=1)[:1]
    got = quality.evaluate(teacher, predictor, sequences, parse_tree("chain", 3))
    assert sorted(got.similarity) == [1, 2, 3, 4]
    assert got.similarity[1][1:] == [None, None] and got.similarity[2][1:] == [None, None]
    hidden = teacher.model(sequences[0].input_ids[None], output_hidden_states=True).hidden_states
    response = int(sequences[0].loss_mask.nonzero()[0])
    expected = []
    for n in range(response - 1, len(sequences[0].input_ids) - 2):
        pseudo = predictor.make_pseudo_states(1, 1, hidden[1][:1, n : n + 1])[0, 0]
        expected.append(torch.cosine_similarity(pseudo, hidden[1][0, n + 1], dim=0).item())
    first = got.similarity[1][0]
    assert first == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert all(value is not None and -1 <= value <= 1 for value in got.similarity[4])


def test_medusa_has_no_similarity(teacher: Teacher) -> None:
    predictor = make_predictor(teacher, kind="medusa", steps=2)
    got = quality.evaluate(teacher, predictor, stored(teacher, predictor, 1), parse_tree("chain", 2), limit=1)
    assert got.similarity == {} and got.sequences == 1


def test_evaluate_without_anchors_raises(teacher: Teacher) -> None:
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=2)
    with pytest.raises(StoreError, match="nothing to evaluate"):
        quality.evaluate(teacher, predictor, [Stored(teacher, predictor, [3, 4, 5], 3)], parse_tree("chain", 2))


@pytest.mark.parametrize("tree", ["dynamic:12", "chain", "static:4x2x1"])
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section["kind"])
def test_simulated_answer_equals_decoding(section: dict[str, Any], tree: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(simulate, "ANCHOR_CHUNK", 10)
    for family in ("llama", "mistral-window"):
        teacher = tiny_teacher(family)
        predictor = make_predictor(teacher, **section)
        spec = parse_tree(tree, 3)
        prompts = random_prompts(5, seed=21)
        for prompt, real in zip(prompts, Engine(teacher, predictor, spec).generate(prompts, 40), strict=True):
            simulated = simulate_answer(teacher, predictor, [*prompt, *real.token_ids], len(prompt), spec)
            assert simulated == real.accepted_lengths


def test_simulated_answer_without_steps_is_empty(teacher: Teacher) -> None:
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=2)
    assert simulate_answer(teacher, predictor, [3, 4, 5, 6], 3, parse_tree("chain", 2)) == []


def test_gate_agrees_and_skips_long_prompts(teacher: Teacher) -> None:
    predictor = make_predictor(teacher, kind="firp", layer=3, steps=3)
    prompts = random_prompts(4, seed=31)
    passed = gate(teacher, predictor, prompts, "dynamic:16", 24)
    assert passed["agree"] and passed["prompts"] == 4
    assert passed["simulated"] == pytest.approx(passed["real"]) and passed["real"] > 1.0
    too_long = [[5] * teacher.max_positions]
    assert gate(teacher, predictor, [*prompts, *too_long], "dynamic:16", 24) == passed
    assert gate(teacher, predictor, too_long, None, 24)["prompts"] == 0


def test_gate_fails_when_training_and_decoding_differ(teacher: Teacher, monkeypatch: Any) -> None:
    predictor = make_predictor(teacher, kind="firp", layer=3, steps=3)
    prompts = random_prompts(4, seed=31)
    # a training forward that looks one position back does not describe the decoder
    whole = predictor.draft_states
    monkeypatch.setattr(
        predictor, "draft_states", lambda teacher, batch, anchors: whole(teacher, batch, (anchors - 1).clamp(min=0))
    )
    assert not gate(teacher, predictor, prompts, "dynamic:16", 24)["agree"]
