"""Simulated decoding of written answers, and acceptance by candidate, against the decoder."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.evaluation.simulate import make_trace, simulate_steps
from firp_cli.predictors.base import Predictor
from firp_cli.teacher.teacher import Teacher
from firp_cli.tuning.acceptance import Acceptance, candidate_positions, reliability
from helpers.coupling import coupled
from helpers.models import (
    embedded_predictor,
    embedded_prompts,
    embedded_teacher,
    make_predictor,
    random_prompts,
    sequence_batch,
    tiny_teacher,
)
from helpers.pairwise import covered, nightly_rest

TREES = [
    "none",
    "chain",
    "chain/2",
    "dynamic:8",
    "dynamic:6/2",
    "static:3x2x1",
    "chain@1",
    "dynamic:8@2",
    "dynamic:9/3@3",
]
TOKENS = 40
KINDS = ["firp", "hidden_transfer", "medusa"]


def greedy_answers(teacher: Teacher, prompts: list[list[int]]) -> list[list[int]]:
    return [item.token_ids for item in Engine(teacher).generate(prompts, TOKENS)]


@pytest.mark.parametrize(
    ("kind", "tree"), nightly_rest([(KINDS[place % 3], tree) for place, tree in enumerate(TREES)], KINDS, TREES)
)
def test_simulated_steps_equal_decoded_steps(kind: str, tree: str) -> None:
    teacher, predictor = embedded_teacher(), embedded_predictor(kind)
    prompts = embedded_prompts(5)
    spec = parse_tree(tree, predictor.steps)
    decoded = [Engine(teacher, predictor, spec).generate([prompt], TOKENS)[0] for prompt in prompts]
    traces = [
        make_trace(teacher, predictor, [*prompt, *item.token_ids], len(prompt), 8)
        for prompt, item in zip(prompts, decoded, strict=True)
    ]
    simulated = simulate_steps(predictor, [item for item in traces if item], spec)
    assert simulated == [item.accepted_lengths for item in decoded]


def test_make_trace_needs_two_new_tokens() -> None:
    teacher = tiny_teacher()
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=2)
    assert make_trace(teacher, predictor, [5, 6, 7, 8], 3, 4) is None


def test_simulated_steps_stop_at_the_end_of_the_answer() -> None:
    teacher = tiny_teacher()
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=2)
    short = make_trace(teacher, predictor, [5, 6, 7, 8, 9], 3, 4)
    assert short is not None and short.draft.tokens.shape == (1, 2, 4)
    assert simulate_steps(predictor, [short], parse_tree("chain", 2)) == [[1]]


@pytest.mark.parametrize(("kind", "tree"), [("firp", "dynamic:8"), ("firp", "dynamic:8@2"), ("medusa", "chain")])
def test_parts_of_an_answer_take_the_steps_that_begin_in_them(kind: str, tree: str) -> None:
    teacher, predictor, prompt = embedded_teacher(), embedded_predictor(kind), embedded_prompts(1)[0]
    spec = parse_tree(tree, predictor.steps)
    trace = make_trace(teacher, predictor, [*prompt, *greedy_answers(teacher, [prompt])[0]], len(prompt), 8)
    assert trace is not None
    parts = trace.parts(7)
    assert [part.first for part in parts] == list(range(trace.first, trace.last, 7)) and parts[-1].last == trace.last
    for part, steps in zip(parts, simulate_steps(predictor, parts, spec), strict=True):
        skipped = part.first - trace.first
        rest = replace(part, draft=trace.draft.map(lambda tensor, skipped=skipped: tensor[skipped:]))
        counts = simulate_steps(predictor, [rest], spec)[0]
        starts = [0, *itertools.accumulate(counts)]
        assert steps == [count for count, start in zip(counts, starts, strict=False) if start < part.last - part.first]


def positions_in_answers(
    teacher: Teacher, predictor: Predictor, breadth: int
) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    prompts = random_prompts(3, seed=4)
    answers = greedy_answers(teacher, prompts)
    traces = [
        make_trace(teacher, predictor, [*prompt, *answer], len(prompt), breadth)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    found, probable = candidate_positions(predictor, [item for item in traces if item])
    return found, probable, answers


def test_candidate_positions_cover_all_tokens_of_the_answers() -> None:
    """With the whole vocabulary as candidates every token has a position; there is none after the end of an answer."""
    teacher = tiny_teacher()
    predictor = make_predictor(teacher, kind="firp", layer=2, steps=3)
    found, probable, answers = positions_in_answers(teacher, predictor, teacher.vocab_size)
    assert len(found) == sum(len(answer) - 1 for answer in answers)
    assert found.max() < teacher.vocab_size and found[:, 0].min() >= 0
    assert (found[:, 1] < 0).sum() == len(answers)
    assert (found[:, 2] < 0).sum() == sum(min(2, len(answer) - 1) for answer in answers)
    assert probable.sum(axis=2) == pytest.approx(1.0)
    few, _, _ = positions_in_answers(teacher, predictor, 4)
    assert np.array_equal(few, np.where(found < 0, -1, np.minimum(found, 4)))


def answers_of_firp() -> tuple[np.ndarray, np.ndarray]:
    """Return positions and probabilities of 6 candidates in four answers of the embedded teacher."""
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")
    prompts = embedded_prompts(4)
    traces = [
        make_trace(teacher, predictor, [*prompt, *answer], len(prompt), 6)
        for prompt, answer in zip(prompts, greedy_answers(teacher, prompts), strict=True)
    ]
    return candidate_positions(predictor, [item for item in traces if item])


def test_first_candidate_rate_is_the_share_of_hits() -> None:
    found, _ = answers_of_firp()
    acceptance = Acceptance(found, 6)
    first = (found[:, 0] == 0).mean()
    assert acceptance.rates[0][0] == pytest.approx(first) and first > 0.5


def test_reliability_counts_all_candidates_of_reached_steps() -> None:
    found, probable = answers_of_firp()
    bins = reliability(found, probable)
    assert sum(item.count for item in bins if item.step == 1) == 6 * len(found)
    high = [item for item in bins if item.step == 1 and item.drafted > 0.9]
    assert high and high[0].accepted > 0.8


@pytest.mark.parametrize(("form", "share"), covered(["mlp", "recurrent", "low_rank"], [True, False]))
def test_candidate_positions_of_a_coupled_predictor_are_those_along_the_answer(form: str, share: bool) -> None:
    """The rank of each token by the teacher's head on the path states, over the whole vocabulary."""
    teacher = tiny_teacher()
    described = {"kind": "firp_plus", "layer": 2, "steps": 3}
    coupling = {"form": form, "share": share, "candidates": teacher.vocab_size}
    predictor = coupled(teacher, {**described, "coupling": coupling})
    found, probable, answers = positions_in_answers(teacher, predictor, teacher.vocab_size)
    row = 0
    for prompt, answer in zip(random_prompts(3, seed=4), answers, strict=True):
        text = [*prompt, *answer]
        batch = sequence_batch(teacher, [text], [1], [2])
        anchors = torch.arange(len(prompt) - 1, len(text) - 2)[None]
        with torch.no_grad():
            path = predictor.path_states(batch, anchors, predictor.draft_states(teacher, batch, anchors))
            ranked = teacher.head(path[0]).softmax(-1).sort(dim=-1, descending=True)
        for place, anchor in enumerate(anchors[0].tolist()):
            for step in range(3):
                if anchor + step + 2 < len(text):
                    expected = ranked.indices[place, step].tolist().index(text[anchor + step + 2])
                    assert found[row, step] == expected
                    torch.testing.assert_close(
                        torch.from_numpy(probable[row, step]).float(), ranked.values[place, step], rtol=1e-3, atol=1e-4
                    )
                else:
                    assert found[row, step] == -1
            row += 1
    assert row == len(found)
