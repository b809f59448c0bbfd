"""Rows of every shape: layouts, columns, tools, odd rows, token ids, and any JSON at all."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firp_cli.data.datasets import Selection, load_prompts, load_rows
from firp_cli.data.formats import read_conversation
from firp_cli.data.odd_rows import OddRow, OddRows
from firp_cli.errors import DatasetError

QA = [("user", "Q"), ("assistant", "A")]
ASKED, ANSWERED = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
GOOD = {"messages": [ASKED, ANSWERED]}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def said(row: dict[str, Any], **columns: str) -> list[tuple[str, str]]:
    return [(item["role"], item["content"]) for item in read_conversation(row, columns or None).messages]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "Q", "solution": "A", "answer": "7"},
        {"query": "Q", "response": "A"},
        {"conversation": [ASKED, ANSWERED]},
        {"conversation": [{"input": "Q", "output": "A"}]},
        {"conversations": [{"from": "Human", "value": "Q"}, {"from": "GPT", "value": "A"}]},
        {"prompt": "Q", "completion": "A"},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [{"role": "assistant", "content": "bad"}]},
        {"prompt": "Q", "chosen": [ASKED, ANSWERED], "rejected": [ASKED]},
        {"prompt": "Q", "chosen": "A", "rejected": "bad"},
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
        {"input": [ASKED], "output": "A"},
        {"input": [ASKED], "output": [ANSWERED]},
        {"input": "Q", "output": "A"},
        {"messages": json.dumps([ASKED, ANSWERED])},
        {"messages": [ASKED, ANSWERED], "prompt": "x"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, {"role": "gpt", "content": "A"}]},
        {"id": 1, "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {
            "conversations": [
                {"from": side, "value": text} for side, text in (("gpt", "x"), ("human", "Q"), ("gpt", "A"))
            ]
        },
        {"question": "Q", "answer": "A<<1+1=2>>"},
        {"prompt": "Q", "response": "A"},
        {"instruction": "Q", "input": "", "output": "A", "text": "x"},
        {"messages": None, "question": "Q", "answer": "A"},
    ],
)
def test_row_layouts_of_public_sets_are_read(row: dict[str, Any]) -> None:
    assert said(row) == QA


def test_row_of_code_is_read_with_and_without_tests() -> None:
    answer = ("assistant", "```python\nx = 1\n```")
    assert said({"text": "Q", "code": "x = 1"}) == [("user", "Q"), answer]
    plain = {"task_id": 1, "prompt": "Q", "code": "x = 1", "test_list": ["assert x == 1"]}
    assert said(plain) == [("user", "Q\nYour code should satisfy these tests:\nassert x == 1"), answer]


def test_layouts_with_a_wording_of_their_own_are_read() -> None:
    assert said({"instruction": "Add", "input": "1 2", "output": "3"}) == [("user", "Add\n\n1 2"), ("assistant", "3")]
    assert said({"article": "long", "highlights": "short", "id": "x"})[1] == ("assistant", "short")
    assert said({"document": "long", "summary": "short"})[0][1].endswith("long")
    asked, answer = said(
        {"prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "", "entry_point": "f"}
    )
    assert "def f():\n" in asked[1] and "return" not in asked[1]
    assert answer[1] == "```python\ndef f():\n    return 1\n```"


def test_calculator_marks_are_removed() -> None:
    row = {"question": "q << 1", "answer": "48/2 = <<48/2=24>>24 clips, 2 << 3\n#### 24"}
    assert said(row)[1][1] == "48/2 = 24 clips, 2 << 3\n#### 24"


@pytest.mark.parametrize(
    ("row", "place", "words"),
    [
        ({"text": "x", "label": 1}, "", r"no conversation in its fields \(text, label\)\naccepted: messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0]", "unknown role 'wizard'"),
        ({"messages": ["x"]}, "messages[0]", "expected a mapping"),
        ({"question": "x", "answer": {"value": "y"}}, "answer", "expected text, got dict"),
        ({}, "", "none"),
    ],
)
def test_row_without_conversation_is_refused(row: dict[str, Any], place: str, words: str) -> None:
    with pytest.raises(OddRow, match=words) as refused:
        read_conversation(row)
    assert refused.value.place == place


def test_side_columns_reach_the_conversation() -> None:
    system = {"system": "Answer in French.", "conversations": [{"from": "human", "value": "Q"}]}
    assert said(system) == [("system", "Answer in French."), ("user", "Q")]
    assert said({"system_prompt": "S", "question": "Q", "response": "A"}) == [("system", "S"), *QA]
    turns = {"conversations": [{"from": "system", "value": "S"}, {"from": "user", "value": "Q"}]}
    assert said(turns) == [("system", "S"), ("user", "Q")]
    assert said({"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada"})[0][1] == "Who?\n\nAda wrote it."
    assert said({"question": "Sum?", "input": "3 4", "answer": "7"}) == [("user", "Sum?\n\n3 4"), ("assistant", "7")]
    both = {"system": "S", "context": "C", "messages": [{"role": "system", "content": "T"}, ASKED]}
    assert read_conversation(both).left_out == ("system", "context")


NAMED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"question": "Q", "prompt": "P", "answer": "A", "response": "R"}, ("prompt", "response")),
    ({"question": "Q", "choices": ["A", "B"], "answer": "A"}, ("choices",)),
    (
        {"question": "Q", "documents": [{"text": "D"}], "hint": "H", "userPrompt": "U"},
        ("documents", "hint", "userPrompt"),
    ),
    (
        {**GOOD, "conversations": [{"from": "human", "value": "x"}], "history": [["a", "b"]]},
        ("conversations", "history"),
    ),
    ({"messages": [ASKED, {**ANSWERED, "citations": ["C"]}], "images": ["x.png"]}, ("images", "messages.citations")),
    ({"question": "Q", "answer": "A", "tools": [{"name": "t"}], "functions": [{"name": "f"}]}, ("functions",)),
    ({"system": "", "system_prompt": "S", "question": "Q", "messages": "none"}, ("messages",)),
    ({"problem": "Q", "solution": "A", "answer": "7"}, ()),
    ({**GOOD, "prompt": "Q", "prompt_id": "x", "data_source": "s", "sourceUrl": "u", "rejected": "no"}, ()),
    ({"question": "Q", "hint": "", "score": 3, "vector": [1.5], "metadata": {"by": "me"}}, ()),
    ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED]}, ()),
]


@pytest.mark.parametrize(("row", "names"), NAMED, ids=[str(place) for place in range(len(NAMED))])
def test_fields_that_are_not_read_are_named(row: dict[str, Any], names: tuple[str, ...]) -> None:
    assert read_conversation(row).left_out == names


def test_history_comes_before_its_question() -> None:
    """LLaMA-Factory's pairs, as JSON text in CSV files, or messages."""
    turns = [("user", "a"), ("assistant", "b"), *QA]
    for history in ([["a", "b"]], '[["a", "b"]]', [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]):
        row = {"instruction": "Q", "input": "", "output": "A", "history": history}
        assert said(row) == turns and read_conversation(row).left_out == ()


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0, "train": True}])
def test_answers_of_weight_0_are_not_learned(mark: dict[str, Any]) -> None:
    greeting, system = {**ANSWERED, **mark}, {"system": "S"}
    row = {**system, "messages": [greeting, ASKED, {**ANSWERED, **mark}, ASKED, {**ANSWERED, "weight": 1}]}
    found = read_conversation(row)
    assert (found.unlearned, found.answered, found.left_out) == ({2}, True, ())
    assert found.messages[2] == ANSWERED and read_conversation(found.row()) == found
    assert not read_conversation({"messages": row["messages"][:3]}).answered


def test_systems_and_tools_stay_with_their_question() -> None:
    """What a tool gave to a call in a given answer is left out where the teacher answers instead."""
    one, two, late, result = (
        {"role": role, "content": text} for role, text in (("user", "1"), ("user", "2"), ("system", "s"), ("tool", "9"))
    )
    cases = [
        ([one, late, ANSWERED], [[one, late]], [one, late]),
        ([late, ANSWERED, one, late], [[late, one, late]], [late, one, late]),
        ([one, result, two, ANSWERED], [[one, result, two]], [one, result, two]),
        ([one, ANSWERED, late], [[one]], [one]),
        ([one, ANSWERED, result, two, ANSWERED], [[one], [two]], [one, ANSWERED, result, two]),
        ([one, ANSWERED, two, result, ANSWERED], [[one], [two, result]], [one, ANSWERED, two, result]),
        ([one, ANSWERED, result], [[one]], [one, ANSWERED, result]),
    ]
    for messages, turns, history in cases:
        found = read_conversation({"messages": messages})
        assert (found.turns(), found.history()) == (turns, history)


def test_named_columns_are_read(tmp_path: Path) -> None:
    row = {"q": "Q", "a": "A", "s": "S", "kind": "math"}
    names = {"question": "q", "answer": "a", "system": "s", "category": "kind"}
    assert said(row, **names) == [("system", "S"), *QA]
    assert said({"m": [ASKED, ANSWERED], "question": "other"}, messages="m") == QA
    (prompt,) = load_prompts(str(write(tmp_path / "a.jsonl", [row])), selection=Selection(columns=names))
    assert prompt.category == "math" and prompt.conversation.messages[-1]["content"] == "A"
    with pytest.raises(OddRow, match=r"no column 'x' \(data\.columns\) among q, a, s, kind"):
        read_conversation(row, {"question": "x"})


def test_tool_calls_and_reasoning_are_kept() -> None:
    written = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [written], "reasoning_content": "look"},
        {"role": "tool", "content": "9 C", "tool_call_id": "1", "name": "weather"},
    ]
    found = read_conversation({"messages": messages, "tools": json.dumps([{"name": "weather"}])})
    assert found.tools == [{"name": "weather"}]
    assert found.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", **CALL}],
        "reasoning_content": "look",
    }
    assert found.messages[2] == {"role": "tool", "content": "9 C", "tool_call_id": "1", "name": "weather"}


def test_role_aliases_are_mapped() -> None:
    roles = ["User", "function_call", "observation", "function", "ipython", "Model"]
    values = ["Q", '{"name": "weather", "arguments": {"city": "Oslo"}}', "r", "r", "r", "A"]
    rows = [{"from": role, "value": value} for role, value in zip(roles, values, strict=True)]
    found = read_conversation({"conversations": rows}).messages
    assert [item["role"] for item in found] == ["user", "assistant", "tool", "tool", "tool", "assistant"]
    assert found[1]["tool_calls"] == [CALL]


ODD: list[tuple[Any, str]] = [
    ({"conversations": []}, "no messages"),
    ({"conversations": None}, "no messages"),
    ({"turns": []}, "no messages"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "no user turn"),
    ({"messages": [{"role": "system", "content": "x"}]}, "no user turn"),
    ({"messages": [{"role": "user", "content": " "}]}, "an empty user turn"),
    ({"messages": [{"role": "user", "content": None}, ANSWERED]}, "an empty user turn"),
    ({"question": None, "answer": "A"}, "an empty user turn"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "an unknown role 'wizard'"),
    ({"messages": [{"role": None, "content": "x"}]}, "an unknown role None"),
    ({"messages": [{"from": "function_call", "value": "call it"}]}, "tool calls that cannot be read"),
    ({"messages": [ASKED], "tools": ["weather"]}, "tools that cannot be read"),
    ({"messages": ["x"]}, "an item that is no message"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "a part of type 'image_url' in place of text",
    ),
    ({"question": 5}, "a value of type int in place of text"),
    ({"other": "x"}, "no conversation in its fields (other)"),
    ("[1]", "a list in place of an object"),
    ('{"question": ', "broken JSON"),
    ('{"question": "cut \\ud83d off"}', "a lone surrogate, which is no character"),
    ({"messages": [ASKED, {**ANSWERED, "reasoning_content": "\udc00"}]}, "a lone surrogate, which is no character"),
    (
        {"turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"]},
        "a placeholder in place of a text",
    ),
    ({"input_ids": [1, 2, 3], "loss_mask": [0, 1]}, "input_ids and loss_mask of different lengths"),
    ({"input_ids": [1, 2], "labels": [-100, 9]}, "labels that differ from input_ids"),
    ({"input_ids": [], "loss_mask": []}, "input_ids without tokens"),
    ({"input_ids": [1, 2]}, "input_ids without loss_mask or labels"),
    ({"input_ids": "1 2", "loss_mask": "0 1"}, "input_ids that is no list"),
    ({"question": "a <image>?", "answer": "5", "images": ["x.png"]}, "an image, video or sound in the text"),
    ({"messages": [{**ASKED, "content": "<video>", "videos": ["x"]}]}, "an image, video or sound in the text"),
    ({"messages": [ASKED, {**ANSWERED, "weight": 0.5}]}, "an answer of another weight than 0 and 1"),
    ({"question": "Q", "history": [["q"]]}, "a history that is no list of questions and answers"),
]


@pytest.mark.parametrize(("row", "reason"), ODD, ids=[str(place) for place in range(len(ODD))])
def test_one_odd_row_is_skipped_for_prompts_and_training(row: Any, reason: str, tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", [GOOD, row, GOOD]))
    for rows in (load_prompts(path), load_rows(path, Selection())):
        assert [prompt.row for prompt in rows] == ["row 1", "row 3"]
        assert rows.odd[0].counts == {reason: 1}
        assert rows.odd[0].first[reason][0] == "row 2"


def test_odd_rows_are_told_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("firp"), "propagate", True)  # commands of earlier tests keep it to themselves
    empty, odd = {"question": ""}, {"messages": [{"role": "x", "content": "y"}]}
    path = str(write(tmp_path / "rows.jsonl", [GOOD, empty, GOOD, odd, empty]))
    with caplog.at_level(logging.WARNING, "firp"):
        load_prompts(path)
    words = "2 with an empty user turn (first: row 2), 1 with an unknown role 'x' (first: row 4, messages[0])"
    told = {id(item): item.getMessage() for item in caplog.records}  # two handlers may have caught the same record
    assert list(told.values()) == [f"skipped 3 of 5 rows of {path}: {words}"]


def test_placeholders_name_where_the_texts_are() -> None:
    odd = OddRows("speed", 4)
    odd.add("a placeholder in place of a text", "row 1")
    assert "github.com/NVIDIA-NeMo/Skills" in odd.line()


def test_many_odd_rows_are_refused(tmp_path: Path) -> None:
    """Ten may be odd in any file, and 5% in a long one."""
    for good, bad, share in ((1, 10, 0.05), (209, 11, 0.05), (30, 11, 0.5)):
        path = str(write(tmp_path / "rows.jsonl", [*[GOOD] * good, *[{"x": 1}] * bad]))
        assert len(load_rows(path, Selection(max_odd=share))) == good
    for good, bad in ((30, 11), (208, 12)):
        path = str(write(tmp_path / "rows.jsonl", [*[GOOD] * good, *[{"x": 1}] * bad]))
        with pytest.raises(DatasetError, match=rf"(?s)more than 5%.*skipped {bad} of {good + bad} .*data\.max_odd"):
            load_rows(path, Selection())
    path = str(write(tmp_path / "rows.jsonl", [{"x": 1}]))
    with pytest.raises(
        DatasetError, match=r"(?s)no row can be used: skipped 1 of 1 .*accepted: messages.*data\.columns"
    ):
        load_prompts(path)
    with pytest.raises(DatasetError, match="no prompts in"):
        load_prompts(str(write(tmp_path / "rows.jsonl", [])))


def test_limit_counts_usable_rows_and_sample_takes_others(tmp_path: Path) -> None:
    rows = [{"question": f"q{number}" if number % 3 else ""} for number in range(30)]
    path = str(write(tmp_path / "rows.jsonl", rows))
    assert [prompt.row for prompt in load_prompts(path, limit=3)] == ["row 2", "row 3", "row 5"]
    drawn = [[prompt.row for prompt in load_rows(path, Selection(limit=5, sample=seed))] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and all(len(set(places)) == 5 for places in drawn)
    numbers = [int(place.split()[1]) for place in drawn[0]]
    assert numbers == sorted(numbers) and numbers != [2, 3, 5, 6, 8]


def test_tokenized_rows_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    path = str(write(tmp_path / "rows.jsonl", rows))
    for row in load_rows(path, Selection()):
        assert (row.conversation.input_ids, row.conversation.loss_mask) == ([5, 6, 7], [False, True, True])
    with pytest.raises(DatasetError, match="2 with token ids without a text"):
        load_prompts(path)


def test_questions_are_turns_of_their_own() -> None:
    found = read_conversation({"turns": ["one", "two"]})
    assert [[item["content"] for item in turn] for turn in found.turns()] == [["one"], ["two"]]


TEXTS = st.one_of(
    st.text(max_size=6), st.sampled_from(["user", "gpt", "tool", "[]", '[{"role": "user"}]', "\ud800", ""])
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-200, 200), st.floats(), TEXTS)
NAMES = """messages conversations conversation turns prompt completion chosen question answer problem solution input
output context system tools role from content value type text code test_list tool_calls function name arguments
function_call article highlights input_ids loss_mask labels category reasoning_content"""
KEYS = st.sampled_from(re.findall(r"\w+", NAMES))
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
STABLE = settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


@STABLE
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_row_is_a_conversation_or_odd(row: dict[str, Any]) -> None:
    try:
        found = read_conversation(row)
    except OddRow as odd:
        assert odd.reason and str(odd).encode()
        return
    assert found.messages or found.input_ids
    assert all(isinstance(item["content"], str) for item in found.messages)
    json.dumps([found.messages, found.tools], ensure_ascii=False).encode()
    if found.messages:
        assert found.turns() and found.history()[-1]["role"] != "assistant"


@STABLE
@given(st.lists(st.one_of(st.binary(max_size=20), VALUES.map(lambda value: json.dumps(value).encode())), max_size=6))
def test_any_file_is_rows_or_an_error_in_words(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    folder = tmp_path_factory.getbasetemp()
    for suffix in (".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet", ".arrow"):
        path = folder / f"any{suffix}"
        path.write_bytes(b"\n".join(lines))
        try:
            rows = load_rows(str(path), Selection())
        except DatasetError as error:
            assert str(error).encode()
            continue
        assert rows and sum((odd.counts for odd in rows.odd), Counter()).total() + len(rows) == rows.odd[0].rows
