"""Known sets of published benches: sources, fields of their rows, local names, terms of use, and placeholders."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from firp_cli.api.bench_run import find_prompts
from firp_cli.collecting.corpus import check_dataset
from firp_cli.config import DataConfig
from firp_cli.data.datasets import Selection, load_prompts, load_rows
from firp_cli.data.formats import read_conversation
from firp_cli.data.known_sets import KNOWN, known_set
from firp_cli.errors import DatasetError
from helpers.commands import invoke

NOTE = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
SPEED_BENCH = {
    **{"question_id": "a1", "category": "coding", "sub_category": "python", "source": "humanevalpack"},
    **{"src_id": "HumanEval/1", "difficulty": "easy", "multiturn": True},
}
CONTEST = {
    **{"question_title": "Sum", "question_content": "Add two numbers.", "platform": "atcoder", "question_id": "abc1"},
    **{"contest_id": "abc", "contest_date": "2025-01-04T00:00:00", "starter_code": "", "difficulty": "easy"},
    **{"public_test_cases": "[{}]", "private_test_cases": "eJxrYJ", "metadata": "{}"},
}
MATH = {"problem": "What is $1+1$?", "solution": "It is $2$.", "answer": "2"}
ROWS: dict[str, dict[str, Any]] = {
    "math500": {**MATH, "subject": "Algebra", "level": 1, "unique_id": "test/algebra/1.json"},
    "aime24": {"id": 60, **MATH, "url": "https://example.org/1", "year": "2024"},
    "aime25": {"problem": MATH["problem"], "answer": "70", "id": "0"},
    "livecodebench": CONTEST,
    "speed_bench": {**SPEED_BENCH, "turns": ["one", "two"]},
}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def speed_row(text: str, category: str = "coding") -> dict[str, Any]:
    return {**SPEED_BENCH, "category": category, "turns": [text]}


def test_new_sets_are_asked_of_the_hub_by_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    asking: list[str] = []

    def answer(hub: str, **options: Any) -> Any:
        asked.append((hub, options["split"], options.get("name")))
        return datasets.Dataset.from_list([ROWS[asking[-1]]])

    monkeypatch.setattr(datasets, "load_dataset", answer)
    monkeypatch.delenv("FIRP_DATA_DIR", raising=False)
    for name in ROWS:
        asking.append(name)
        (prompt,) = load_prompts(name)
        assert prompt.conversation.left_out == (), name  # no column is named as left out
    (prompt,) = load_prompts("speed_bench:throughput_8k")
    assert prompt.category == "coding" and len(prompt.conversation.turns()) == 2
    assert asked == [
        ("HuggingFaceH4/MATH-500", "test", None),
        ("HuggingFaceH4/aime_2024", "train", None),
        ("math-ai/aime25", "test", None),
        ("lighteval/code_generation_lite", "test", "v6"),
        ("nvidia/SPEED-Bench", "test", "qualitative"),
        ("nvidia/SPEED-Bench", "test", "throughput_8k"),
    ]


def test_contest_problem_asks_for_a_program_or_from_its_code() -> None:
    (program,) = read_conversation(CONTEST).messages
    assert program["content"].startswith("Add two numbers.\n\n") and "standard input" in program["content"]
    code = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        "
    (started,) = read_conversation({**CONTEST, "starter_code": code}).messages
    assert f"```python\n{code.rstrip()}\n```" in started["content"] and "standard input" not in started["content"]


def test_math_answer_is_the_worked_solution() -> None:
    assert [item["content"] for item in read_conversation(ROWS["math500"]).messages] == ["What is $1+1$?", "It is $2$."]
    assert read_conversation(ROWS["aime25"]).messages[1]["content"] == "70"


def test_prepared_speed_bench_messages_are_turns() -> None:
    messages = [{"role": "user", "content": text} for text in ("one", "two")]
    prepared = read_conversation({**SPEED_BENCH, "messages": messages})
    assert [[item["content"] for item in turn] for turn in prepared.turns()] == [["one"], ["two"]]
    assert len(read_conversation({"messages": messages}).turns()) == 1  # other files: said before one answer


@pytest.mark.parametrize("place", ["qualitative.jsonl", "qualitative/test.jsonl", "test.jsonl"])
def test_speed_bench_is_found_by_configuration(tmp_path: Path, place: str) -> None:
    write(tmp_path / "speed_bench" / place, speed_row("one"))
    write(tmp_path / "speed_bench" / "throughput_1k.jsonl", speed_row("long"))
    for name, text in (("speed_bench", "one"), ("speed_bench:throughput_1k", "long")):
        assert load_prompts(name, str(tmp_path))[0].messages[0]["content"] == text


def test_unknown_or_missing_configuration_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match=r"no configuration 'throughput_3k': qualitative, throughput_16k"):
        load_prompts("speed_bench:throughput_3k")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write(tmp_path / "speed_bench" / "throughput_1k.jsonl", speed_row("long"))
    with pytest.raises(
        DatasetError, match=r"tried: .*speed_bench/qualitative\.jsonl(?s:.*)at DIR/speed_bench/qual"
    ) as caught:
        load_prompts("speed_bench", str(tmp_path))
    assert len(str(caught.value).splitlines()) == 2


def test_terms_are_told_and_forbid_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By known name, by hub id, and by the fields of a file's rows."""
    monkeypatch.setattr(logging.getLogger("firp"), "propagate", True)
    path = write(tmp_path / "own.jsonl", *(speed_row(f"q{number}") for number in range(3)))
    with caplog.at_level(logging.INFO, "firp"):
        assert len(find_prompts(str(path), None, None)) == 3
    assert [text for text in caplog.messages if "NVIDIA Evaluation Dataset License" in text]
    assert load_rows(str(path), Selection()).terms and not load_rows("arithmetic", Selection(limit=1)).terms
    for name in (path, "speed_bench", "speed_bench:throughput_1k", "nvidia/SPEED-Bench:qualitative"):
        data = DataConfig(dataset=f"arithmetic,{name}", regenerate=True)
        with pytest.raises(DatasetError, match=r"not for training \(NVIDIA Evaluation Dataset License"):
            check_dataset(data, training=True)
    check_dataset(DataConfig(dataset=str(path), regenerate=True))  # to measure drafts on it
    done = invoke("collect", "--teacher", "arithmetic", "--dataset", path, "--regenerate", "--output", tmp_path / "s")
    assert isinstance(done.exception, DatasetError) and not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["speed_bench", "rows.jsonl"])
@pytest.mark.parametrize("text", [NOTE, f"{NOTE}\n\n{'Play the role of {{role_name}}. ' * 30}"], ids=["note", "frame"])
def test_set_with_placeholder_is_refused_for_measuring(tmp_path: Path, name: str, text: str) -> None:
    """One row in sixty is enough, whatever the file's name and however long the frame that follows the note is."""
    rows = [{"turns": [f"question {number}"]} for number in range(60)]
    rows[7] = {"turns": ["first", text]}
    path = write(tmp_path / ("rows.jsonl" if name == "rows.jsonl" else "speed_bench/qualitative.jsonl"), *rows)
    with pytest.raises(DatasetError) as caught:
        find_prompts(str(path) if name == "rows.jsonl" else name, str(tmp_path), None)
    words = str(caught.value)
    assert "1 of 41 rows is a placeholder in place of a text (first: row 8, 'FULL BENCHMARK" in words
    assert "prepare.py" in words and "--data-dir DIR" in words and len(words.splitlines()) == 2
    assert len(find_prompts(str(path), str(tmp_path), 7)) == 7  # rows that are not measured do not matter
    assert len(load_prompts(str(path))) == 59  # collecting skips and counts it


def test_set_of_placeholders_names_the_remedy(tmp_path: Path) -> None:
    rows = [speed_row(NOTE, category) for category in ("coding", "math") for _ in range(20)]
    path = write(tmp_path / "all.jsonl", *rows, speed_row("real"))
    with pytest.raises(DatasetError, match=r"40 of 41 rows are placeholders (?s:.*)prepare\.py"):
        find_prompts(str(path), None, 41)
    done = invoke("bench", "--teacher", "arithmetic", "--dataset", path, "--output", tmp_path / "out")
    assert isinstance(done.exception, DatasetError) and done.exception.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_known_set_is_found_by_name_and_hub_id() -> None:
    assert known_set("speed_bench:qualitative") is known_set("NVIDIA/speed-bench") is KNOWN["speed_bench"]
    assert known_set("gsm8k") is known_set("openai/gsm8k:main") is KNOWN["gsm8k"]
    assert known_set("chat") is KNOWN["chat"] and known_set("someone/chat") is None and known_set("x.jsonl") is None
