"""Continuous batches: the tokens of `generate` after each prompt alone, in fp32."""

from __future__ import annotations

import pytest

from firp_cli.decoding import continuous
from firp_cli.decoding.continuous import ContinuousBatcher, Decoded
from firp_cli.decoding.cuda_graphs import StepGraphs
from firp_cli.decoding.engine import EngineOptions
from firp_cli.decoding.reference import greedy
from firp_cli.decoding.step import DecodeStep
from firp_cli.errors import CapacityError, UsageError
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from helpers.decoding import references
from helpers.models import VOCABULARY, described_model, looped_teacher, random_prompts, tiny_teacher

LIMITS = [20, 3, 11, 1, 24]  # in turn


def limits_of(count: int) -> list[int]:
    return [LIMITS[number % len(LIMITS)] for number in range(count)]


def decoded(teacher: Teacher, prompts: list[list[int]], limits: list[int], batch: int) -> list[list[int]]:
    answers = list(ContinuousBatcher(teacher).decode(prompts, limits, batch))
    assert sorted(item.number for item in answers) == list(range(len(prompts)))
    assert all(item.finite for item in answers)
    return [item.token_ids for item in sorted(answers, key=lambda item: item.number)]


def test_every_family_writes_the_tokens_of_generate(stacked_teacher: Teacher) -> None:
    """Llama, Mistral and Qwen2 with sliding windows shorter than the prompts, Qwen3; lean and library layers."""
    prompts = random_prompts(9, seed=5)
    limits = limits_of(len(prompts))
    expected = [text[:limit] for text, limit in zip(references(stacked_teacher, prompts), limits, strict=True)]
    assert len({tuple(text) for text in expected}) > 6
    assert decoded(stacked_teacher, prompts, limits, 4) == expected


def test_looped_teachers_write_the_reference_tokens() -> None:
    teacher = looped_teacher(2, 3)
    prompts = random_prompts(6, seed=2)
    assert decoded(teacher, prompts, [9] * 6, 3) == [greedy(teacher, prompt, 9) for prompt in prompts]


@pytest.mark.parametrize("batch", [1, 2, 5, 13, 40])
def test_batch_size_changes_no_token(batch: int) -> None:
    teacher, prompts = tiny_teacher("llama", True), random_prompts(13, seed=8)
    limits = limits_of(13)
    expected = [greedy(teacher, *pair) for pair in zip(prompts, limits, strict=True)]
    assert decoded(teacher, prompts, limits, batch) == expected


def test_places_are_refilled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step runs with a free place while a prompt waits; at the end the batch shrinks."""
    teacher, prompts, limits = tiny_teacher("llama", True), random_prompts(12, seed=1), [2, 9, 4] * 4
    batches: list[int] = []
    step = DecodeStep.step

    def counted(self: DecodeStep, longest: int, mode: str, exact: bool = False) -> None:
        batches.append(self.batch)
        step(self, longest, mode, exact)  # type: ignore[arg-type]

    monkeypatch.setattr(DecodeStep, "step", counted)
    texts = decoded(teacher, prompts, limits, 4)
    assert sum(batches) == sum(map(len, texts))  # every row of every step emitted a token of an answer
    assert batches == sorted(batches, reverse=True) and batches.count(4) >= len(batches) // 2


def test_answers_are_yielded_as_they_end() -> None:
    teacher, prompts = tiny_teacher("llama", True), random_prompts(6, seed=1, low=3)
    order = [item.number for item in ContinuousBatcher(teacher).decode(prompts, [12, 2, 2, 2, 2, 2], 2)]
    assert order[:4] == [1, 2, 3, 4] and set(order[4:]) == {0, 5}


def test_stop_tokens_end_an_answer_and_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, prompts = tiny_teacher("llama", True), random_prompts(9, seed=3)
    monkeypatch.setattr(teacher, "eos_token_ids", ())
    texts = [greedy(teacher, prompt, 16) for prompt in prompts]
    stops = (texts[0][4], texts[1][0])
    monkeypatch.setattr(teacher, "eos_token_ids", stops)
    found = decoded(teacher, prompts, [16] * 9, 3)
    for text, answer in zip(texts, found, strict=True):
        ends = [place for place, token in enumerate(text) if token in stops]
        assert answer == text[: ends[0] + 1 if ends else 16]
    assert len(found[1]) == 1 and len(found[0]) <= 5


def test_prompts_of_one_token_and_of_the_whole_context() -> None:
    teacher = tiny_teacher("qwen3", True)
    full = [random_prompts(1, seed=4, low=506, high=506)[0], [5], [6]]
    assert decoded(teacher, full, [6, 7, 7], 2) == [
        greedy(teacher, prompt, limit) for prompt, limit in zip(full, [6, 7, 7], strict=True)
    ]
    with pytest.raises(CapacityError, match="context holds 512"):
        list(ContinuousBatcher(teacher).decode(full, [7, 7, 7], 2))
    assert list(ContinuousBatcher(teacher).decode([], [], 2)) == []


@pytest.mark.parametrize(("bad", "words"), [([], "is empty"), ([3, VOCABULARY], "token id outside"), ([-1], "outside")])
def test_bad_prompt_is_refused_when_it_is_admitted(bad: list[int], words: str) -> None:
    teacher, prompts = tiny_teacher("llama", True), random_prompts(4, seed=6)
    found: list[Decoded] = []
    with pytest.raises(UsageError, match=words):
        found.extend(ContinuousBatcher(teacher).decode([*prompts, bad], [5] * 5, 2))
    found = []
    decoding = ContinuousBatcher(teacher).decode([*prompts, bad], [5] * 5, 2)
    with pytest.raises(UsageError):
        while True:
            found.append(next(decoding))
    assert {item.number for item in found} >= {0, 1, 2}  # earlier answers were yielded


def test_nan_stays_with_its_prompt() -> None:
    """A NaN sequence affects neither its neighbours nor the next sequence in its place."""
    teacher = wrap_model(described_model("llama"), name="nan")
    prompts = random_prompts(9, seed=7, low=4)
    expected = [greedy(teacher, prompt, 10) for prompt in prompts]
    rare = next(token for token in range(VOCABULARY) if all(token not in text for text in prompts + expected))
    teacher.model.get_input_embeddings().weight.data[rare] = float("nan")
    poisoned = [*prompts[:3], [5] * 40 + [rare, 5], *prompts[3:]]
    found = sorted(ContinuousBatcher(teacher).decode(poisoned, [10] * 10, 3), key=lambda item: item.number)
    assert [item.finite for item in found] == [number != 3 for number in range(10)]
    assert [item.token_ids for item in found if item.finite] == expected


def test_long_prompts_are_admitted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, prompts = tiny_teacher("mistral-window", True), random_prompts(7, seed=9, low=2, high=90)
    monkeypatch.setattr(continuous, "ADMITTED", 2)
    options = EngineOptions(prefill_chunk=16)
    found = sorted(ContinuousBatcher(teacher, options).decode(prompts, [12] * 7, 4), key=lambda item: item.number)
    assert [item.token_ids for item in found] == [greedy(teacher, prompt, 12) for prompt in prompts]


@pytest.mark.usefixtures("late")
def test_late_reads_and_replayed_steps_change_no_token() -> None:
    """As on a CUDA device: with graphs and late reads, so that finished sequences are decoded for a while."""
    teacher, prompts = tiny_teacher("llama", True), random_prompts(15, seed=11)
    limits = limits_of(15)
    batcher = ContinuousBatcher(teacher)
    batcher.engine.graphs = StepGraphs(lambda step: step)
    found = sorted(batcher.decode(prompts, limits, 4), key=lambda item: item.number)
    assert [item.token_ids for item in found] == [
        greedy(teacher, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)
    ]
    again = sorted(batcher.decode(prompts[:5], limits[:5], 4), key=lambda item: item.number)  # in the kept buffers
    assert [item.token_ids for item in again] == [item.token_ids for item in found[:5]]


def test_cache_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher("llama", True)
    monkeypatch.setattr("firp_cli.decoding.sequences.free_bytes", lambda _: 1 << 16)
    with pytest.raises(CapacityError, match="decode fewer at once"):
        list(ContinuousBatcher(teacher).decode(random_prompts(8), [40] * 8, 8))
