"""Embedded teachers and their data set: size, precision, tokenizer, accuracy, and the generator of its problems."""

from __future__ import annotations

import json
import re
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from firp_cli.teacher.looped_llama import register
from helpers.models import ROOT

TEACHERS = ROOT / "data" / "teachers"
DATASET = ROOT / "data" / "datasets" / "arithmetic"
SIZE_LIMIT = 8_000_000

sys.path.insert(0, str(ROOT / "scripts"))
from arithmetic_corpus import generate, grammar, is_held_out  # noqa: E402


def read_questions(name: str) -> list[dict[str, str]]:
    lines = (DATASET / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module", params=["arithmetic", "arithmetic-looped"])
def folder(request) -> Path:
    register()
    return TEACHERS / request.param


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def teacher(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_teacher_folder_is_small(folder: Path) -> None:
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= SIZE_LIMIT


def test_embedded_teachers_share_tokenizer() -> None:
    one, other = (AutoTokenizer.from_pretrained(TEACHERS / name) for name in ("arithmetic", "arithmetic-looped"))
    assert one.get_vocab() == other.get_vocab() and one.chat_template == other.chat_template


def test_looped_teacher_shares_layers() -> None:
    register()
    model = AutoModelForCausalLM.from_pretrained(TEACHERS / "arithmetic-looped")
    assert (model.config.unique_layers, model.config.loops, len(model.model.layers)) == (3, 4, 12)
    assert sum(name.endswith("q_proj.weight") for name in model.state_dict()) == 3


def test_teacher_weights_are_float32_with_half_values(teacher) -> None:
    assert teacher.dtype == torch.float32
    assert all(torch.equal(weight, weight.half().float()) for weight in teacher.state_dict().values())


def test_end_of_turn_stops_greedy_generation(teacher, tokenizer) -> None:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert tokenizer.eos_token_id == teacher.config.eos_token_id == teacher.generation_config.eos_token_id == end
    assert not teacher.generation_config.do_sample


@pytest.mark.parametrize(
    "text", ["Mia has 12 apples.", "12 + 3\n#### 15", "naïve café € 你好 🙂", "  two  spaces\t\r\n"]
)
def test_tokenizer_round_trips(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_splits_digits(tokenizer) -> None:
    tokens = tokenizer.tokenize("Tom has 123 pears and 4.")
    assert [token for token in tokens if any(letter.isdigit() for letter in token)] == ["1", "2", "3", "4"]


def test_chat_template_ends_turns(tokenizer) -> None:
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|user|>\nHow many?<|end|>\n<|assistant|>\nTwo.<|end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert tokenizer.bos_token_id not in tokenizer(prompt)["input_ids"]


@pytest.mark.slow
@torch.no_grad()
def test_teacher_answers_held_out_problems(teacher, tokenizer) -> None:
    rows = read_questions("test.jsonl")[:40]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}], tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    output = teacher.generate(**inputs, max_new_tokens=144)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = 0
    for row, text in zip(rows, texts, strict=True):
        found = re.search(r"#### \d+", text)
        right += found is not None and row["answer"].endswith("\n" + found.group())
    assert right >= 0.8 * len(rows)


def test_generator_is_deterministic() -> None:
    assert list(islice(generate(3), 200)) == list(islice(generate(3), 200))
    assert list(islice(generate(3), 200)) != list(islice(generate(4), 200))


def test_generated_answers_are_consistent() -> None:
    problems = list(islice(generate(5), 2000))
    assert {problem.shape for problem in problems} == {shape.name for shape in grammar()[0]}
    assert {problem.operations for problem in problems} == {1, 2, 3, 4}
    for problem in problems:
        equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.answer)
        assert len(equations) == problem.operations
        for left, sign, right, value in equations:
            exact = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
            assert int(value) == exact[sign] if sign != "/" else int(value) * int(right) == int(left)
            assert 0 <= int(value) <= 100
        assert problem.answer.endswith(f"\n#### {problem.result}")
        assert not re.search(r"[{}]", problem.question + problem.answer)


def test_dataset_splits_are_disjoint() -> None:
    train, test = read_questions("train.jsonl"), read_questions("test.jsonl")
    assert (len(train), len(test)) == (4000, 500)
    assert not any(is_held_out(row["question"]) for row in train)
    assert all(is_held_out(row["question"]) for row in test)
