"""Sample answers of a bench: prompts that are chosen, and pieces by decoding step that join to the text."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from firp_cli.api.bench_run import load_bench_prompts
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.evaluation.samples import (
    MOST_CHARACTERS,
    MOST_TOKENS,
    SHOWN_END,
    make_samples,
    spread_over_sets,
    step_pieces,
)
from firp_cli.records import AnswerRecord
from firp_cli.teacher.teacher import Teacher
from helpers.chat import byte_tokenizer
from helpers.models import embedded_predictor, embedded_teacher, tiny_teacher

TEXT = "Naïve: 5 € für 🙂, 東京 and 👩‍👩‍👧! It is four.\n\tDone"


def record(method: str, prompt: int, token_ids: list[int] | None, lengths: list[int], **fields: object) -> AnswerRecord:
    made = AnswerRecord(
        method=method,
        dataset="set",
        category="",
        prompt=prompt,
        turn=0,
        process=0,
        repeat=0,
        batch=0,
        prompt_tokens=4,
        new_tokens=len(token_ids or []),
        steps=len(lengths),
        accepted_lengths=lengths,
        prefill_seconds=0.1,
        decode_seconds=1.0,
        finish_reason="length",
        token_ids=token_ids,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def random_lengths(tokens: int, seed: int, least: int = 1) -> list[int]:
    draw, lengths = random.Random(seed), list[int]()
    while sum(lengths) < tokens:
        lengths.append(min(draw.randint(least, 5), tokens - sum(lengths)))
    return lengths


@pytest.mark.parametrize("seed", range(5))
def test_pieces_join_to_the_text_where_characters_span_steps(seed: int) -> None:
    """Characters of two to four bytes, each byte a token; a pipeline's ticks may emit no token."""
    tokenizer = byte_tokenizer()
    ids = [*tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.eos_token_id]
    lengths = random_lengths(len(ids) - 1, seed, least=0)
    pieces = step_pieces(ids, lengths, tokenizer)
    assert "".join(text for text, _ in pieces) == TEXT
    assert [count for _, count in pieces] == [1, *(length for length in lengths if length)]
    assert not any("\ufffd" in text for text, _ in pieces)
    assert sum(bool(text) for text, _ in pieces) > 10


def test_answer_that_ends_inside_a_character_joins_to_its_text() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("is €", add_special_tokens=False)[:-1]
    pieces = step_pieces(ids, [1] * (len(ids) - 1), tokenizer)
    assert "".join(text for text, _ in pieces) == tokenizer.decode(ids) and pieces[-1][0].endswith("\ufffd")


def test_long_answers_are_cut_after_a_whole_step() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("€" * 200, add_special_tokens=False)
    assert len(ids) == 600
    lengths = random_lengths(len(ids) - 1, seed=3)
    pieces = step_pieces(ids, lengths, tokenizer)
    counts = [count for _, count in pieces]
    assert MOST_TOKENS - 5 < sum(counts) <= MOST_TOKENS and counts[1:] == lengths[: len(counts) - 1]
    assert "".join(text for text, _ in pieces) == "€" * (sum(counts) // 3)


def test_samples_show_every_method_of_the_first_repeat() -> None:
    tokenizer = byte_tokenizer()
    teacher = Teacher(tiny_teacher("llama").model, tokenizer)
    ids = tokenizer.encode("It is four.", add_special_tokens=False)
    question = "x" * 1000 + "middle" + "y" * 2000
    prompts = [BenchPrompt(tokenizer.encode("question"), "set", question=question), BenchPrompt([5], "set")]
    once = [1] * (len(ids) - 1)
    records = [
        record("ar", 0, ids, once),
        record("firp", 0, ids, [len(ids) - 1], teacher="one"),
        record("ar", 0, ids[:3], [2], repeat=1),
        record("ar", 0, ids[:3], [2], process=1),
        record("ar", 0, ids[:3], [2], turn=1),
        record("late", 1, None, []),
    ]
    samples = make_samples(records, prompts, teacher)
    assert [(item.method, item.prompt, item.teacher) for item in samples] == [("ar", 0, None), ("firp", 0, "one")]
    assert ["".join(text for text, _ in item.pieces) for item in samples] == ["It is four."] * 2
    assert samples[1].pieces[1:] == [("It is four."[len(samples[1].pieces[0][0]) :], len(ids) - 1)]
    asked = samples[0].asked
    assert len(asked) == MOST_CHARACTERS and asked.startswith("x" * 900) and asked.endswith("y" * SHOWN_END)
    untold = make_samples(records, [BenchPrompt(prompts[0].token_ids, "set"), prompts[1]], teacher, count=1)
    assert untold[0].asked == "question"
    assert make_samples(records, prompts, tiny_teacher("llama")) == []


def test_samples_spread_over_data_sets_and_categories() -> None:
    keys = [*(("a", category) for category in "xxxyyz"), ("b", ""), ("b", ""), ("c", "")]
    assert spread_over_sets(keys, 3) == [0, 6, 8]
    assert spread_over_sets(keys, 5) == [0, 3, 6, 7, 8]
    assert spread_over_sets(keys, 6) == [0, 3, 5, 6, 7, 8]
    assert spread_over_sets(keys, 99) == list(range(9)) and spread_over_sets([], 3) == []


def test_samples_of_decoded_answers_hold_question_and_text() -> None:
    """Prompts, questions and answers of the embedded teacher."""
    teacher, predictor = embedded_teacher(), embedded_predictor("firp")
    prompts = load_bench_prompts("arithmetic", None, 2, teacher)
    engine = Engine(teacher, predictor, parse_tree("dynamic:6", predictor.steps))
    made = [engine.generate([prompt.token_ids], 40)[0] for prompt in prompts]
    records = [record("firp", number, item.token_ids, item.accepted_lengths) for number, item in enumerate(made)]
    samples = make_samples(records, prompts, teacher)
    for sample, prompt, item in zip(samples, prompts, made, strict=True):
        assert sample.asked == prompt.question and sample.asked in teacher.tokenizer.decode(prompt.token_ids)
        assert "".join(text for text, _ in sample.pieces) == item.text
        assert [count for _, count in sample.pieces] == [1, *item.accepted_lengths]
