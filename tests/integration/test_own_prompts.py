"""Prompts that a chat model writes itself: whole messages, none twice, the same for the same seed."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from firp_cli.api.collect_run import write_prompts
from firp_cli.collecting.own_prompts import PromptSettings, own_prompts
from firp_cli.data.chat import encode_prompt
from firp_cli.data.datasets import load_prompts
from firp_cli.decoding.engine import Engine
from firp_cli.errors import CapacityError, DatasetError, TeacherError, UsageError
from firp_cli.results import Generation
from firp_cli.store.reader import Store
from firp_cli.teacher.teacher import Teacher
from helpers.chat import CHATML, with_template
from helpers.commands import invoke, succeed
from helpers.models import embedded_teacher, tiny_teacher

VICUNA = "{% for m in messages %}{{ m['role']|upper + ': ' + m['content'] + ' ' }}{% endfor %}ASSISTANT:"


def settings(**changed: Any) -> PromptSettings:
    return PromptSettings(**({"max_new_tokens": 96, "batch_size": 16} | changed))


def test_messages_are_whole_and_distinct() -> None:
    """The teacher itself ends each message: its chance of going on is that of a sample, not of a cut."""
    teacher, done = embedded_teacher(), []
    texts = list(own_prompts(teacher, 40, settings(), lambda *counts: done.append(counts)))
    assert len(texts) == len({text.casefold() for text in texts}) == 40 and done[-1] == (40, 40)
    assert all(text == text.strip() and "<|" not in text for text in texts)
    assert sum(text.endswith("?") for text in texts) > 30  # as the conversations that it was trained on
    answers = Engine(teacher).generate(
        [encode_prompt([{"role": "user", "content": text}], teacher.tokenizer) for text in texts[:8]], 160
    )
    assert sum(answer.finish_reason == "eos" for answer in answers) >= 6


def test_same_seed_gives_the_same_messages() -> None:
    first, again, other = (list(own_prompts(embedded_teacher(), 12, settings(seed=seed))) for seed in (3, 3, 4))
    assert first == again and not set(first) & set(other)
    assert list(own_prompts(embedded_teacher(), 5, settings(seed=3))) == first[:5]


def test_long_messages_are_left_out() -> None:
    teacher = embedded_teacher()
    texts = list(own_prompts(teacher, 6, settings(max_new_tokens=22)))
    assert texts and all(len(teacher.tokenizer(text)["input_ids"]) < 22 for text in texts)


def scripted(monkeypatch: pytest.MonkeyPatch, template: str, messages: list[str]) -> Teacher:
    """Return a teacher that continues every opening with the next of these messages."""
    teacher = tiny_teacher("llama", lean=True)
    monkeypatch.setattr(teacher, "tokenizer", with_template(template))
    rest = iter(messages)

    def write(engine: Engine, prompts: Any, limit: int, stop: Any = ()) -> list[Generation]:
        return [made(engine.teacher, next(rest, "no end"), stop) for _ in prompts]

    def made(writer: Teacher, text: str, stop: Any) -> Generation:
        ids = teacher.tokenizer(text, add_special_tokens=False)["input_ids"]
        ended = "eos" if ids[-1] in writer.eos_token_ids else "stop" if any(end in text for end in stop) else "length"
        return Generation(0, ids, 0, [], 0.0, 0.0, ended)

    monkeypatch.setattr(Engine, "generate", write)
    return teacher


@pytest.mark.parametrize(
    ("template", "messages", "kept"),
    [
        (CHATML, ["One?<|im_end|>", " one? <|im_end|>", "Two\n2<|im_end|>", "<|im_end|>"], ["One?", "Two\n2"]),
        (CHATML, ["cut", "A<|im_start|>user\nB<|im_end|>", "Three</s>"], ["Three"]),
        (VICUNA, ["One? ASSISTANT:", "Any A, of ASS. ASSISTANT: I", "cut"], ["One?", "Any A, of ASS."]),
    ],
)
def test_end_of_a_message_is_the_templates(
    template: str, messages: list[str], kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = scripted(monkeypatch, template, messages)
    monkeypatch.setattr(teacher, "eos_token_ids", (teacher.tokenizer.eos_token_id,))
    assert list(own_prompts(teacher, 4, settings(batch_size=len(messages)))) == kept
    assert teacher.eos_token_ids == (teacher.tokenizer.eos_token_id,)


def test_special_token_without_a_role_is_none_of_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the openings of turns in some tokenizers, which `all_special_ids` lacks."""
    tokenizer = deepcopy(with_template(CHATML))
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    assert tokenizer.convert_tokens_to_ids("<|turn|>") not in tokenizer.all_special_ids
    teacher = scripted(monkeypatch, CHATML, ["A<|turn|>B<|im_end|>", "One?<|im_end|>"])
    monkeypatch.setattr(teacher, "tokenizer", tokenizer)
    assert list(own_prompts(teacher, 2, settings(batch_size=2))) == ["One?"]


def test_system_message_precedes_the_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = scripted(monkeypatch, CHATML, ["One?<|im_end|>"] * 4)
    seen: list[list[int]] = []
    write = Engine.generate

    def noting(engine: Engine, prompts: Any, *rest: Any) -> Any:
        seen.extend(prompts)
        return write(engine, prompts, *rest)

    monkeypatch.setattr(Engine, "generate", noting)
    assert list(own_prompts(teacher, 1, settings(batch_size=2, system="Sums."))) == ["One?"]
    opening = "<|im_start|>system\nSums.<|im_end|>\n<|im_start|>user\n"
    assert [teacher.tokenizer.decode(ids) for ids in seen] == [opening] * 2


def test_unusable_teachers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_teacher("llama", lean=True)
    for template, message in ((None, "no chat template"), ("{{ messages[0]['content'] }}", "does not mark")):
        monkeypatch.setattr(teacher, "tokenizer", with_template(template))
        with pytest.raises(TeacherError, match=message):
            list(own_prompts(teacher, 2, settings()))
    with pytest.raises(DatasetError, match=r"none of 64 messages .* raise --max-new-tokens"):
        list(own_prompts(embedded_teacher(), 2, settings(max_new_tokens=2)))
    with pytest.raises(CapacityError):
        list(own_prompts(embedded_teacher(), 2, settings(max_new_tokens=100_000)))


def test_command_writes_a_data_set(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "own.jsonl"
    made = succeed("prompts", "arithmetic", "--count", 9, "--batch-size", 8, "--output", path)
    assert "9 prompts" in made.output and len(path.read_text().splitlines()) == 9
    assert [prompt.messages[-1]["role"] for prompt in load_prompts(str(path))] == ["user"] * 9
    refused = invoke("prompts", "arithmetic", "--output", path)
    assert isinstance(refused.exception, UsageError) and "another --output" in str(refused.exception)
    store = tmp_path / "store"
    succeed("collect", "--dataset", path, "--regenerate", "--output", store, "--layers", "3")
    collected = Store.open(store)
    assert len(collected) == 9 and all(bool(collected[number].loss_mask.any()) for number in range(9))
    first = json.loads(path.read_text().splitlines()[0])["messages"][0]["content"]
    ids = encode_prompt([{"role": "user", "content": first}], embedded_teacher().tokenizer)
    assert torch.equal(collected[0].input_ids[: len(ids)], torch.tensor(ids))


def test_file_of_another_ending_is_refused_before_the_teacher_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"y\.txt does not end in \.jsonl"):
        write_prompts("absent", tmp_path / "y.txt", 1)
