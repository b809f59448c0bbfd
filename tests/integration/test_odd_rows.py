"""Odd rows, tools and tokenized rows through whole commands: skipped and counted alike everywhere."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from firp_cli.api.collect_run import collect
from firp_cli.collecting.collect_store import collect_store
from firp_cli.collecting.corpus import build_corpus, load_messages
from firp_cli.collecting.engine_responder import EngineResponder
from firp_cli.data.datasets import load_prompts
from firp_cli.data.encode_rows import encode_prompts
from firp_cli.errors import DatasetError, RecipeError, UsageError
from firp_cli.recipe import load_recipe
from firp_cli.store.reader import Store
from firp_cli.teacher.teacher import Teacher
from helpers.chat import CHATML
from helpers.collecting import config, make_teacher
from helpers.commands import invoke

ASKED, ANSWERED = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}
GOOD = {"messages": [ASKED, ANSWERED]}
ODD = [
    {"conversations": []},
    {"conversations": None},
    {"conversations": [{"from": "gpt", "value": "x"}]},
    {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    {"question": 5, "answer": "x"},
    {"other": "x"},
    "[1]",
    '{"question": ',
    '{"question": "cut \\ud83d off", "answer": "x"}',
    {"messages": [{"role": "wizard", "content": "x"}]},
]
TOOL_TEMPLATE = (
    "{% if tools %}{{ '<s>' + (tools | tojson) }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.reasoning_content or '') + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ 'call ' + call.function.name }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": "{}"}}]}
TOOLS = {
    "messages": [ASKED, CALL, {"role": "tool", "content": "9"}, ANSWERED],
    "tools": [{"name": "look"}],
}
REASONED = {"messages": [ASKED, {**ANSWERED, "reasoning_content": "hm "}]}


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let caplog hear the logger, which commands of earlier tests in this process keep to themselves."""
    monkeypatch.setattr(logging.getLogger("firp"), "propagate", True)


@pytest.fixture(scope="module")
def byte_teacher() -> Teacher:
    return make_teacher()


@pytest.fixture
def tool_teacher(byte_teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    monkeypatch.setattr(byte_teacher.tokenizer, "chat_template", TOOL_TEMPLATE)
    return byte_teacher


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(teacher: Teacher, path: Path, **options: Any) -> list[str]:
    """Return the tokenized rows as text, with answers in brackets."""
    data = config(path, **options)
    corpus = build_corpus(load_messages(data), teacher, data)
    found = []
    for ids, mask in zip(corpus.input_ids, corpus.loss_mask, strict=True):
        parts = [teacher.tokenizer.decode(int(token)) for token in ids]
        inside = [*mask.tolist(), False]
        text = ""
        for place, part in enumerate(parts):
            before = place > 0 and inside[place - 1]
            text += ("[" if inside[place] and not before else "]" if before and not inside[place] else "") + part
        found.append(text + ("]" if inside[len(parts) - 1] else ""))
    return found


@pytest.mark.parametrize("regenerate", [False, True])
def test_collect_skips_odd_rows(
    byte_teacher: Teacher, tmp_path: Path, regenerate: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, *ODD, GOOD])
    responder = EngineResponder(byte_teacher, 2) if regenerate else None
    data = config(path, regenerate=regenerate, max_new_tokens=4)
    with caplog.at_level(logging.WARNING, "firp"):
        summary = collect_store(byte_teacher, data, [2], tmp_path / "store", responder=responder)
    assert summary.conversations == 2 and sum(summary.skipped.values()) == len(ODD)
    assert summary.skipped["no messages"] == 2 and summary.skipped["broken JSON"] == 1
    (line,) = [text for text in caplog.messages if text.startswith("skipped")]
    assert line.startswith(f"skipped 10 of 12 rows of {path}: 2 with no messages (first: row 2)")


def test_commands_skip_odd_rows_alike(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [GOOD, *ODD, GOOD])
    model, limits = ["--teacher", "arithmetic"], ["--max-new-tokens", 3]
    lines = []
    for arguments in (
        ["bench", "--methods", "ar", *model, "--dataset", path, "--repeats", 1, *limits],
        ["generate", "--method", "ar", *model, "--prompts", path, *limits],
    ):
        done = invoke(*arguments, "--output", tmp_path / str(arguments[0]))
        assert done.exit_code == 0, (done.output, done.exception)
        lines += [line for line in done.output.splitlines() if line.startswith("skipped")]
    report = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert {row["prompts"] for row in report["rows"]} == {2}
    assert len((tmp_path / "generate").read_text().splitlines()) == 2
    assert len(lines) == 2 and lines[0] == lines[1]
    assert lines[0].startswith(f"skipped 10 of 12 rows of {path}: 2 with no messages (first: row 2)")


def test_empty_files_have_no_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "empty.jsonl", [])
    for arguments in (
        ["bench", "firp", "--dataset", path],
        ["generate", "--prompts", path],
        ["collect", f"data.dataset={path}", "--regenerate", "--output", tmp_path / "store"],
        ["eval", "firp", "--dataset", path],
    ):
        done = invoke(*arguments)
        assert isinstance(done.exception, DatasetError) and done.exception.exit_code == 2, done.output
        assert str(done.exception).startswith(f"no prompts in {path}")


def test_prompt_that_is_not_utf8_is_refused() -> None:
    done = invoke("generate", "--prompt", b"2+\xff".decode("utf-8", "surrogateescape"))
    assert isinstance(done.exception, UsageError) and "not UTF-8" in str(done.exception)


def test_split_of_bench_and_eval_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    write(folder / "train.jsonl", [GOOD])
    for command in ("bench", "eval"):
        done = invoke(command, "firp", "--dataset", folder)
        assert isinstance(done.exception, DatasetError) and "no split 'test'; it has: train" in str(done.exception)
    output, limits = tmp_path / "bench", ["--repeats", 1, "--max-new-tokens", 3]
    done = invoke(
        "bench", "firp", "--methods", "ar", "--dataset", folder, "--split", "train", "--output", output, *limits
    )
    assert done.exit_code == 0, done.exception
    assert json.loads((output / "bench.json").read_text())["rows"][0]["dataset"] == "own"


def test_tools_and_reasoning_reach_the_template(tool_teacher: Teacher, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [TOOLS, REASONED])
    start, end = "<|im_start|>", "<|im_end|>"
    called = f"{start}assistant\n[call look{end}]\n{start}tool\n9{end}\n{start}assistant\n[A{end}]\n"
    assert texts(tool_teacher, path) == [
        f'<s>[{{"name": "look"}}]{start}user\nQ?{end}\n{called}',
        f"{start}user\nQ?{end}\n{start}assistant\n[hm A{end}]\n",
    ]
    data = config(path, regenerate=True)
    asked = build_corpus(load_messages(data), tool_teacher, data).input_ids[0].tolist()
    assert tool_teacher.tokenizer.decode(asked).startswith('<s>[{"name": "look"}]')


def test_no_lone_end_of_turn_is_trained(
    byte_teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A template without tools or reasoning: what it leaves out is named, and an answer of nothing is skipped."""
    assert byte_teacher.tokenizer.chat_template == CHATML
    only = {"messages": [ASKED, {"role": "assistant", "content": "", "reasoning_content": "hm"}]}
    empty = {"messages": [ASKED, {"role": "assistant", "content": " "}, ASKED, ANSWERED]}
    path = write(tmp_path / "rows.jsonl", [GOOD, TOOLS, REASONED, only, empty])
    with caplog.at_level(logging.WARNING, "firp"):
        data = config(path)
        corpus = build_corpus(load_messages(data), byte_teacher, data)
    assert corpus.skipped == {"tool calls that the chat template leaves out": 1, "empty answer": 2}
    assert len(corpus.input_ids) == 2
    assert "3 of 5 rows" in caplog.text and "columns left out: reasoning_content, tool_calls, tools (" in caplog.text


def test_tokenized_rows_are_stored_as_they_are(byte_teacher: Teacher, tmp_path: Path) -> None:
    size = byte_teacher.vocab_size
    rows = [
        {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]},
        {"input_ids": [5, size], "labels": [-100, size]},
        {"input_ids": [9, 10], "labels": [-100, 10]},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    summary = collect_store(byte_teacher, config(path), [2], tmp_path / "store")
    assert summary.skipped == {"token ids beyond the teacher's embedding": 1}
    store = Store.open(tmp_path / "store")
    assert [store[place].input_ids.tolist() for place in range(2)] == [[5, 6, 7, 8], [9, 10]]
    assert store[0].loss_mask.tolist() == [False, False, True, True]


def test_sample_and_columns_are_settings_of_a_store(byte_teacher: Teacher, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"q": f"question {number}?", "a": "A"} for number in range(20)])
    manifests = []
    for place, sample in enumerate((None, 3)):
        options: dict[str, Any] = {"columns": {"question": "q", "answer": "a"}, "limit": 4, "sample": sample}
        collect_store(byte_teacher, config(path, **options), [2], tmp_path / str(place))
        manifests.append(json.loads((tmp_path / str(place) / "manifest.json").read_text()))
    first, sampled = (manifest["settings"] for manifest in manifests)
    assert "sample" not in first and sampled["sample"] == 3 and first["columns"] == sampled["columns"]
    assert first["data_fingerprint"] != sampled["data_fingerprint"]


def test_refused_rows_are_counted_beyond_their_share(
    byte_teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    monkeypatch.setattr(byte_teacher.tokenizer, "chat_template", strict)
    refused = {"messages": [{"role": "user", "content": "no"}, ANSWERED]}
    path = write(tmp_path / "rows.jsonl", [GOOD, *[refused] * 11])
    data = config(path)
    with pytest.raises(
        DatasetError, match=r"(?s)more than 5%.*11 refused by the chat template \(first: row 2, .*not this"
    ):
        build_corpus(load_messages(data), byte_teacher, data)
    data = config(path, max_odd=1.0)
    assert build_corpus(load_messages(data), byte_teacher, data).skipped == {"refused by the chat template": 11}
    prompts = load_prompts(str(write(path, [GOOD, refused])))
    encoded = encode_prompts(prompts, byte_teacher.tokenizer, byte_teacher.vocab_size)
    assert encoded[0] and encoded[1] is None
    with pytest.raises(DatasetError, match="no prompt can be used: skipped 1 of 1"):
        encode_prompts(prompts[1:], byte_teacher.tokenizer, byte_teacher.vocab_size)


def test_data_is_refused_before_a_teacher_is_loaded(tmp_path: Path) -> None:
    """The teacher does not exist, and it is not what is complained about."""
    (tmp_path / "rows.txt").write_text("hello")
    bad = write(tmp_path / "bad.jsonl", [GOOD, *[{"x": 1}] * 20])
    for dataset, words in (
        (tmp_path / "rows.txt", "firp reads"),
        ("absent.parquet", "no such file"),
        (bad, "more than 5%"),
    ):
        with pytest.raises(DatasetError, match=words):
            collect(None, ["teacher.model=/absent", f"data.dataset={dataset}"], output=tmp_path / "store")


def test_unknown_column_key_names_the_accepted_ones() -> None:
    with pytest.raises(RecipeError, match=r"data\.columns\.reply.*'question', 'answer'"):
        load_recipe(None, ["data.columns={reply: a}"])
    assert load_recipe(None, ["data.columns.question=q"]).data.columns == {"question": "q"}
