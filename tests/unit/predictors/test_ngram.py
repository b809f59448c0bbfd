"""Drafts from a text's own n-grams: matches and what followed them, against plain Python and transformers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from firp_cli.config import KINDS
from firp_cli.errors import PredictorError
from firp_cli.predictors.folder import PREDICTORS, save_predictor
from firp_cli.predictors.ngram import BEFORE, NOTHING, RULES, NgramPredictor, NgramRule
from helpers.models import tiny_teacher

CASES = [
    NgramRule(steps=4, longest=3, occurrences=1, latest=False),
    NgramRule(steps=3, longest=2, occurrences=5, latest=True),
    NgramRule(steps=5, longest=6, occurrences=40, latest=False),
]


def random_texts(seed: int, count: int = 6, longest: int = 40) -> list[list[int]]:
    """Return texts of few different tokens and of all lengths from 1."""
    chance = random.Random(seed)
    return [chance.choices(range(chance.randint(1, 4)), k=chance.randint(1, longest)) for _ in range(count)]


def slow_continuations(text: list[int], rule: NgramRule) -> list[tuple[int, list[int]]]:
    """Return the lengths of the best matches and what followed them."""
    found = []
    for position in range(len(text) - 1):
        matched = 0
        while matched < rule.longest and matched <= position and text[position - matched] == text[-1 - matched]:
            matched += 1
        if matched:
            order = -position if rule.latest else position
            found.append((-matched, order, text[position + 1 : position + 1 + rule.steps]))
    return [(-best, following) for best, _, following in sorted(found)[: rule.occurrences]]


@pytest.mark.parametrize("rule", CASES)
@pytest.mark.parametrize("seed", range(8))
def test_continuations_equal_the_element_wise_rule(rule: NgramRule, seed: int) -> None:
    texts = random_texts(seed)
    longest = max(map(len, texts))
    noise = torch.randint(4, (len(texts), rule.longest - 1 + longest + rule.steps))  # of an earlier, longer text
    noise[:, : rule.longest - 1] = BEFORE
    for row, text in enumerate(texts):
        noise[row, rule.longest - 1 : rule.longest - 1 + len(text)] = torch.tensor(text)
    lengths = torch.tensor([len(text) - 1 for text in texts])
    numbers = torch.arange(noise.shape[1])
    tokens, matched = NgramPredictor("any", rule).continuations(noise, lengths, longest, numbers)
    for row, text in enumerate(texts):
        expected = slow_continuations(text, rule)
        kept = int((matched[row] > 0).sum())
        assert matched[row, :kept].tolist() == [best for best, _ in expected]
        padded = [following + [NOTHING] * (rule.steps - len(following)) for _, following in expected]
        assert tokens[row, :kept].tolist() == padded
        assert (tokens[row, kept:] == NOTHING).all()


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_prompt_lookup_drafts_what_transformers_drafts(longest: int) -> None:
    rule = replace(RULES["prompt-lookup"], longest=longest)
    oracle = PromptLookupCandidateGenerator(None, rule.steps, longest, max_length=1000)  # type: ignore[arg-type]
    drafted = 0
    for text in [text for seed in range(20) for text in random_texts(seed)]:
        ids = torch.tensor([text])
        padded = torch.nn.functional.pad(torch.nn.functional.pad(ids, (longest - 1, 0), value=BEFORE), (0, rule.steps))
        numbers = torch.arange(padded.shape[1])
        found = NgramPredictor("prompt-lookup", rule).continuations(
            padded, torch.tensor([len(text) - 1]), len(text), numbers
        )
        draft = [token for token in found.tokens[0, 0].tolist() if token != NOTHING]
        assert text + draft == oracle.get_candidates(ids)[0][0].tolist()
        drafted += bool(draft)
    assert drafted > 40


@pytest.mark.parametrize("name", RULES)
def test_ngram_predictors_are_neither_trained_nor_saved(name: str, tmp_path: Path) -> None:
    predictor, teacher = NgramPredictor(name, RULES[name]), tiny_teacher()
    assert predictor.kind == name
    assert name not in KINDS
    assert name not in PREDICTORS
    assert list(predictor.parameters()) == []
    with pytest.raises(PredictorError, match=f"{name} drafts from the text: it has no weights"):
        save_predictor(predictor, tmp_path / "folder", teacher)
    assert not (tmp_path / "folder").exists()
