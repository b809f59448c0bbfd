"""Lossless decoding: every method's greedy output equals transformers' `generate`, token for token, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.reference import greedy
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.errors import CapacityError, UsageError
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from helpers.coupling import COUPLED
from helpers.decoding import TOKENS, count_reads, references, watch_steps
from helpers.models import (
    FAMILIES,
    LAYERS,
    VOCABULARY,
    FakePredictor,
    ParentPredictor,
    make_predictor,
    random_prompts,
    tiny_model,
    tiny_teacher,
)
from helpers.pairwise import covered

TREES = ["dynamic:2", "dynamic:9", "chain", "static:3x2x1"]
STACKS = ["lean", "library"]
KINDS: dict[str, dict[str, Any]] = {
    "firp": {"kind": "firp", "layer": 2, "steps": 3},
    "hidden_transfer": {"kind": "hidden_transfer", "layers": [1, 3, 3]},
    "medusa": {"kind": "medusa", "steps": 3},
    **COUPLED,
}
RULES: dict[str, Callable[[int, int], bool]] = {
    "always": lambda n, i: True,
    "never": lambda n, i: False,
    "sometimes": lambda n, i: (n * 7 + i) % 3 > 0,
}


def test_oracle_is_generate(any_teacher: Teacher) -> None:
    prompt = random_prompts(1, seed=3)[0]
    assert greedy(any_teacher, prompt, TOKENS) == references(any_teacher, [prompt])[0]


@pytest.mark.parametrize(("family", "stack", "batch"), covered(list(FAMILIES), STACKS, [1, 4]))
def test_autoregressive_decoding_is_generate(family: str, stack: str, batch: int) -> None:
    teacher, prompts = tiny_teacher(family, stack == "lean"), random_prompts(4)
    expected = references(teacher, prompts)
    engine = Engine(teacher)
    got = [
        item.token_ids
        for start in range(0, 4, batch)
        for item in engine.generate(prompts[start : start + batch], TOKENS)
    ]
    assert got == expected


@pytest.mark.parametrize(
    ("family", "stack", "kind", "tree", "batch"), covered(list(FAMILIES), STACKS, list(KINDS), TREES, [1, 4])
)
def test_predictors_are_lossless(family: str, stack: str, kind: str, tree: str, batch: int) -> None:
    teacher, prompts = tiny_teacher(family, stack == "lean"), random_prompts(4, seed=1)
    expected = references(teacher, prompts)
    predictor = make_predictor(teacher, **KINDS[kind])
    engine = Engine(teacher, predictor, parse_tree(tree, predictor.steps))
    got = [item for start in range(0, 4, batch) for item in engine.generate(prompts[start : start + batch], TOKENS)]
    assert [item.token_ids for item in got] == expected
    for item in got:
        assert sum(item.accepted_lengths) + 1 == len(item.token_ids)
        assert item.steps == len(item.accepted_lengths)


@pytest.mark.parametrize(
    ("stack", "fake", "mode", "tree", "batch"),
    covered(STACKS, [FakePredictor, ParentPredictor], list(RULES), TREES, [1, 4]),
)
def test_fakes_are_lossless(stack: str, fake: type[FakePredictor], mode: str, tree: str, batch: int) -> None:
    teacher = tiny_teacher("llama", stack == "lean")
    prompts = random_prompts(4, seed=2)
    expected = references(teacher, prompts)
    sequences = [prompt + text for prompt, text in zip(prompts, expected, strict=True)]
    predictor = fake(teacher, sequences, 3, RULES[mode])
    engine = Engine(teacher, predictor, parse_tree(tree, 3))
    got = [item for start in range(0, 4, batch) for item in engine.generate(prompts[start : start + batch], TOKENS)]
    assert [item.token_ids for item in got] == expected
    lengths = [length for item in got for length in item.accepted_lengths]
    if fake is FakePredictor and mode == "always":
        deepest = 1 if tree == "dynamic:2" else 3
        full = [length for item in got for length in item.accepted_lengths[:-1]]  # the last one is cut at the limit
        assert set(full) == {deepest + 1}
    if fake is FakePredictor and mode == "never":
        assert set(lengths) == {1}


def test_long_prompts_in_chunks(stacked_teacher: Teacher) -> None:
    prompts = [*random_prompts(1, seed=4, low=70, high=90), *random_prompts(1, seed=5, low=3, high=9)]
    expected = references(stacked_teacher, prompts)
    predictor = make_predictor(stacked_teacher, kind="firp", layer=LAYERS - 1, steps=2)
    engine = Engine(stacked_teacher, predictor, options=EngineOptions(prefill_chunk=16))
    assert [item.token_ids for item in engine.generate(prompts, TOKENS)] == expected


def test_finished_sequences_leave(teacher: Teacher) -> None:
    """EOS ends a sequence, keeps the EOS token, and the others go on."""
    prompts = random_prompts(4, seed=6)
    texts = references(teacher, prompts, 40)
    ending = texts[0][5]
    shortened = wrap_model(tiny_model("llama"), name="tiny-llama", check=False)
    shortened.eos_token_ids = (ending,)
    expected = [text[: text.index(ending) + 1] if ending in text else text for text in texts]
    assert len(set(map(len, expected))) > 1
    got = Engine(shortened, make_predictor(teacher, kind="firp", layer=2, steps=3)).generate(prompts, 40)
    assert [item.token_ids for item in got] == expected
    reasons = ["eos" if ending in text else "length" for text in texts]
    assert [item.finish_reason for item in got] == reasons


class _Letters:
    """Tokenizer of one character per token, for stop strings."""

    eos_token_id = None

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(chr(200 + token) for token in tokens)


def test_stop_strings(teacher: Teacher) -> None:
    prompt = random_prompts(1, seed=7)[0]
    text = references(teacher, [prompt])[0]
    lettered = wrap_model(tiny_model("llama"), _Letters(), check=False)
    stop = _Letters().decode(text[8:11])
    first = next(end for end in range(1, len(text) + 1) if stop in _Letters().decode(text[:end]))
    for predictor in (None, make_predictor(teacher, kind="firp", layer=1, steps=3)):
        got = Engine(lettered, predictor).generate([prompt], TOKENS, stop=[stop])[0]
        assert got.token_ids == text[:first]
        assert got.finish_reason == "stop"


def test_callback_hands_on_every_token(teacher: Teacher) -> None:
    prompts = random_prompts(3, seed=8)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    drafted = 0

    def on_tokens(number: int, tokens: list[int], accepted: int) -> None:
        nonlocal drafted
        seen[number] += tokens
        drafted += accepted

    expected = references(teacher, prompts)
    sequences = [prompt + text for prompt, text in zip(prompts, expected, strict=True)]
    engine = Engine(teacher, FakePredictor(teacher, sequences, 3, lambda n, i: True))
    got = engine.generate(prompts, TOKENS, on_tokens=on_tokens)
    assert [seen[number] for number in range(3)] == [item.token_ids for item in got]
    assert drafted >= sum(item.steps for item in got)


def test_limits(teacher: Teacher) -> None:
    engine = Engine(teacher)
    with pytest.raises(CapacityError, match="512"):
        engine.generate([[5] * 500], 20)
    with pytest.raises(UsageError, match="empty"):
        engine.generate([[]], 20)
    got = engine.generate([[5, 6]], 1)[0]
    assert len(got.token_ids) == 1
    assert got.steps == 0


def first_token_counts(teacher: Teacher, prompt: list[int], draws: int, predictor: object, place: int) -> torch.Tensor:
    counts = torch.zeros(VOCABULARY)
    for seed in range(draws // 50):
        engine = Engine(teacher, predictor, parse_tree("dynamic:6", 3), temperature=1.0, seed=seed)  # type: ignore[arg-type]
        for item in engine.generate([prompt] * 50, place + 1):
            if len(item.token_ids) > place:
                counts[item.token_ids[place]] += 1
    return counts


@pytest.mark.slow
def test_sampling_is_plain_sampling() -> None:
    """Chi-square over the second and third sampled token: trees against the teacher's exact distribution.

    The exact marginal sums over all first tokens. The prefix is drafted, so acceptance decides most draws.
    """
    from scipy.stats import chi2

    teacher = tiny_teacher("qwen3")
    soft = wrap_model(tiny_model("qwen3"), check=False)
    soft.eos_token_ids = ()
    prompt = random_prompts(1, seed=9)[0]
    head = soft.head
    soft.head = lambda normed: head(normed) * 0.25  # type: ignore[method-assign]  # flat: many outcomes
    text = greedy(teacher, prompt, 8)
    predictor = FakePredictor(teacher, [prompt + text], 3, lambda n, i: i % 2 == 1)
    draws = 4000
    with torch.no_grad():
        ids = torch.tensor([prompt])
        first = (teacher.model(ids).logits[0, -1] * 0.25).softmax(-1)
        pairs = torch.cat([ids.expand(VOCABULARY, -1), torch.arange(VOCABULARY)[:, None]], dim=1)
        second = first @ (teacher.model(pairs).logits[:, -1] * 0.25).softmax(-1)
    for place, exact in ((0, first), (1, second)):
        counts = first_token_counts(soft, prompt, draws, predictor, place)
        expected = exact * counts.sum()
        common = expected >= 5
        observed = torch.cat([counts[common], counts[~common].sum()[None]])
        expected = torch.cat([expected[common], expected[~common].sum()[None]])
        statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
        assert statistic < chi2.ppf(0.999, len(expected) - 1), (place, statistic)


@pytest.mark.parametrize(
    ("stack", "kind", "tree"), covered(STACKS, list(KINDS), ["dynamic:5", "static:2x2", "dynamic:5@2"])
)
def test_step_reads_no_value(stack: str, kind: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a step no tensor's value reaches Python."""
    teacher = tiny_teacher("qwen2-window", stack == "lean")
    engine = Engine(teacher, make_predictor(teacher, **KINDS[kind]), parse_tree(tree, 3))
    engine.generate([[5, 6, 7], [8, 9]], 12)  # makes the constants of the tree
    reads, steps = watch_steps(monkeypatch)
    engine.generate([[5, 6, 7], [8, 9]], 12)
    assert len(steps) > 3
    assert reads == []
    with monkeypatch.context() as patch:
        seen = count_reads(patch)
        torch.ones(1).item()
        assert torch.ones(1) > 0
        list(range(torch.tensor(1)))
    assert seen == ["item", "__bool__", "__index__"]
