"""Data sets by name: order of lookup, splits, and errors for unavailable sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from firp_cli.data.datasets import KNOWN, Rows, Selection, load_prompts, load_rows
from firp_cli.errors import DatasetError
from helpers.models import ROOT

REAL = os.environ.get("FIRP_DATA_DIR")
needs_real = pytest.mark.skipif(not REAL, reason="FIRP_DATA_DIR names no folder of real data sets")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Make every request to the hub fail as it does offline."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach it on the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    if "real" not in request.node.name:
        monkeypatch.delenv("FIRP_DATA_DIR", raising=False)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_rows(name: str, data_dir: Path | None = None) -> Rows:
    return load_rows(name, Selection("train", str(data_dir) if data_dir else None))


def test_local_file_is_first(tmp_path: Path) -> None:
    path = write(tmp_path / "gsm8k.jsonl", [{"prompt": f"q{n}", "response": f"a{n}"} for n in range(5)])
    rows = load_rows(str(path), Selection("no such split", limit=2))
    assert [row.messages[0]["content"] for row in rows] == ["q0", "q1"]
    (prompt,) = load_prompts(str(path), limit=1)
    assert prompt.messages == [{"role": "user", "content": "q0"}]
    assert (prompt.conversation.messages[1]["content"], prompt.category) == ("a0", "")
    with pytest.raises(DatasetError, match=r"no such file: .*absent\.jsonl"):
        train_rows(str(tmp_path / "absent.jsonl"))


def test_json_list_is_read(tmp_path: Path) -> None:
    path = tmp_path / "share.json"
    path.write_text(json.dumps([{"conversations": [{"from": "human", "value": "q"}]}]))
    assert load_prompts(str(path))[0].messages[0]["content"] == "q"


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"a": 1}\n{"b": \n', "first: row 2, not valid JSON"), ("[1]\n", "row 1, expected a JSON object, got list")],
)
def test_faulty_lines_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DatasetError, match=words):
        train_rows(str(path))


def test_embedded_sets_need_no_folder() -> None:
    train, test = (load_rows("arithmetic", Selection(split, limit=3)) for split in ("train", "test"))
    assert all(row.conversation.answered for row in train)
    assert train != test
    with pytest.raises(DatasetError, match=r"no split 'validation'.*test, train"):
        load_rows("arithmetic", Selection("validation"))


def test_data_folder_by_option_and_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "gsm8k" / "test.jsonl", [{"question": "q", "answer": "a"}])
    write(tmp_path / "mt_bench" / "question.jsonl", [{"turns": ["one", "two"], "category": "writing"}])
    write(tmp_path / "own" / "name" / "train.jsonl", [{"prompt": "p", "response": "r"}])
    assert load_prompts("gsm8k", str(tmp_path))[0].messages[0]["content"] == "q"
    monkeypatch.setenv("FIRP_DATA_DIR", str(tmp_path))
    (asked,) = load_prompts("mt_bench")
    assert [item["content"] for item in asked.messages] == ["one"]
    assert asked.category == "writing" and not asked.conversation.answered
    assert len(train_rows("own/name")) == 1
    with pytest.raises(DatasetError, match=r"no split 'test' in .*own/name; it has: train"):
        load_prompts("own/name")


def test_missing_split_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "train.jsonl", [{"question": "q", "answer": "a"}])
    write(tmp_path / "mt_bench" / "question.jsonl", [{"turns": ["one"]}])
    with pytest.raises(DatasetError, match=r"gsm8k has no split 'test' in .*; it has: train"):
        load_prompts("gsm8k", str(tmp_path))
    with pytest.raises(DatasetError, match=r"mt_bench has no split 'train' in .*; it has: question"):
        train_rows("mt_bench", tmp_path)
    with pytest.raises(DatasetError, match=r"humaneval has no split 'train'; it has: test"):
        train_rows("humaneval", tmp_path)


def test_single_split_serves_prompts(tmp_path: Path) -> None:
    write(tmp_path / "alpaca" / "train.jsonl", [{"instruction": "i", "input": "", "output": "o"}])
    assert load_prompts("alpaca", str(tmp_path))[0].messages[0]["content"] == "i"


def test_unreachable_set_lists_tried_places(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        train_rows("gsm8k", tmp_path)
    text = str(caught.value)
    assert len(text.splitlines()) == 2 and caught.value.exit_code == 2
    assert f"{tmp_path}/gsm8k/train.jsonl" in text
    assert "hub or its cache as 'openai/gsm8k'" in text and "Couldn't reach it on the Hub" in text
    assert "second line" not in text
    assert "DIR/gsm8k/train.jsonl and give --data-dir DIR" in text
    with pytest.raises(DatasetError, match=r"did you mean 'gsm8k'; tried: no --data-dir"):
        train_rows("gsm9k")
    with pytest.raises(DatasetError, match=r"hemingkx/Spec-Bench"):
        load_prompts("spec_bench")
    with pytest.raises(DatasetError, match=r"the data folder .*/nowhere does not exist"):
        train_rows("gsm8k", tmp_path / "nowhere")


def test_hub_gets_published_name_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answer(*arguments: Any, **options: Any) -> Any:
        asked.append((*arguments, options))
        return datasets.Dataset.from_list([{"prompt": ["one", "two"], "category": "math"}] * 3)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    prompts = load_prompts("mt_bench", limit=2)
    assert [(item.messages[0]["content"], item.category) for item in prompts] == [("one", "math")] * 2
    for name, split in (("ultrachat", "test"), ("gsm8k", "test"), ("someone/set", "train")):
        load_rows(name, Selection(split))
    assert [(hub, options["split"], options.get("name")) for hub, options in asked] == [
        ("HuggingFaceH4/mt_bench_prompts", "train", None),
        ("HuggingFaceH4/ultrachat_200k", "test_sft", None),
        ("openai/gsm8k", "test", "main"),
        ("someone/set", "train", None),
    ]


def test_offline_hub_fails_without_retries() -> None:
    """With HF_HUB_OFFLINE the real library gives one short error and does not retry."""
    code = (
        "from firp_cli.data.datasets import load_prompts\nfrom firp_cli.errors import DatasetError\n"
        "try: load_prompts('gsm8k', split='train')\nexcept DatasetError as error: print(error)"
    )
    values = {key: value for key, value in os.environ.items() if key != "FIRP_DATA_DIR"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=values, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "offline: HF_HUB_OFFLINE is set" in done.stdout and "--data-dir DIR" in done.stdout
    assert len(done.stdout.splitlines()) == 2


@needs_real
@pytest.mark.parametrize(
    ("name", "count", "categories"),
    [("gsm8k", 1319, 1), ("humaneval", 164, 1), ("mt_bench", 80, 8), ("spec_bench", 480, 13)],
)
def test_real_sets_are_read(name: str, count: int, categories: int) -> None:
    prompts = load_prompts(name)
    assert len(prompts) == count
    assert len({item.category for item in prompts}) == categories
    assert all(item.messages[-1]["role"] == "user" and item.messages[-1]["content"] for item in prompts)
    assert all(item.conversation.answered for item in prompts) == (name in ("gsm8k", "humaneval"))


@needs_real
def test_real_gsm8k_train_split() -> None:
    rows = train_rows("gsm8k")
    assert len(rows) == 7473
    assert not any("<<" in item["content"] for row in rows for item in row.conversation.messages)


def test_known_sets_have_a_source() -> None:
    for name, known in KNOWN.items():
        assert known.hub or known.source or (ROOT / "data" / "datasets" / name).is_dir()


def test_several_sets_are_concatenated(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k" / "train.jsonl", [{"question": f"g{n}", "answer": "1"} for n in range(3)])
    write(tmp_path / "mbpp" / "train.jsonl", [{"text": "t", "code": "c = 1", "test_list": ["assert c == 1"]}] * 3)
    found = load_prompts("gsm8k, mbpp", str(tmp_path), 2, "train")
    asked = [prompt.messages[0]["content"] for prompt in found]
    assert asked == ["g0", "g1", *["t\nYour code should satisfy these tests:\nassert c == 1"] * 2]
    assert found[2].conversation.messages[1]["content"] == "```python\nc = 1\n```"
    assert len(load_rows("gsm8k,mbpp", Selection("train", str(tmp_path), 1))) == 2
    for nothing in ("", " , "):
        with pytest.raises(DatasetError, match="names no data set; known: arithmetic"):
            load_prompts(nothing)
    path = write(tmp_path / "a,b.jsonl", [{"prompt": "one"}])
    assert len(load_prompts(str(path))) == 1


def test_chat_set_has_eight_categories_of_unique_prompts() -> None:
    train, test = (load_prompts("chat", split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (200, 80)
    for prompts in (train, test):
        categories = [prompt.category for prompt in prompts]
        assert len(set(categories)) == 8
        assert {categories.count(name) for name in categories} == {len(prompts) // 8}
    texts = [prompt.messages[0]["content"] for prompt in (*train, *test)]
    assert len(set(texts)) == 280
    assert all(len(row.conversation.turns()) == (2 if row.category == "chat" else 1) for row in test)
