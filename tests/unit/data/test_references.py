"""References of rows: read from the fields of public sets and of a user's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from firp_cli.data.datasets import Prompt, Selection, load_prompts, load_rows
from firp_cli.data.references import Reference, last_boxed, trailing_tests

TESTS = 'assert double("a") == "aa"\nassert double("bc") == (\n    "bcbc"\n)'
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(text: str) -> str:\n    """Return the text twice."""\n',
    "canonical_solution": "    return text + text\n",
    "test": "def check(candidate):\n    assert candidate('a') == 'aa'\n",
    "entry_point": "double",
}


def read(tmp_path: Path, row: dict[str, Any], **selection: Any) -> Prompt:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (prompt,) = load_prompts(str(path), selection=Selection(**selection))
    return prompt


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "How many?", "answer": "2+3=<<2+3=5>>5\n#### 5"}, Reference(final="5")),
        ({"question": "How many?", "answer": "so\n#### 1,250 "}, Reference(final="1,250")),
        ({"problem": "Find x.", "answer": "204", "id": 3}, Reference(final="204")),
        ({"problem": "Find x.", "answer": 204}, Reference(final="204")),
        (
            {"problem": "Find it.", "solution": "It is $p-q$.", "answer": "p - q", "unique_id": "a"},
            Reference(final="p - q"),
        ),
        ({"problem": "Find it.", "answer": r"336^\circ", "id": "5"}, Reference(final=r"336^\circ")),
        ({"problem": "Find it.", "answer": r"\frac{\pi}{2}"}, Reference(final=r"\frac{\pi}{2}")),
        (
            {"problem": "Find it.", "solution": r"First \boxed{3}, so \boxed{\frac{1}{2}}."},
            Reference(final="\\frac{1}{2}"),
        ),
        ({"question": "How many?", "answer": "7"}, Reference(final="7")),
        ({"turns": ["How many?", "And then?"], "expected": ["8.50"]}, Reference(final="8.50", turn=1)),
        ({"turns": ["When?"], "expected": "10:14"}, Reference(final="10:14")),
        ({"question": "Who?", "expected": ["Ada", 12]}, Reference(contained=("Ada", "12"))),
        (
            HUMANEVAL,
            Reference(
                tests="def check(candidate):\n    assert candidate('a') == 'aa'\n\ncheck(double)\n",
                entry_point="double",
                head='def double(text: str) -> str:\n    """Return the text twice."""\n',
            ),
        ),
        (
            {
                "text": "Write a function.",
                "code": "def double(x): return x + x",
                "test_setup_code": "import math",
                "test_list": ["assert set(double('a')) == {'a'}", "assert double('b') == 'bb'"],
                "challenge_test_list": ["assert double('') == 'x'"],
            },
            Reference(
                tests="import math\nassert set(double('a')) == {'a'}\nassert double('b') == 'bb'", entry_point="double"
            ),
        ),
        (
            {"prompt": "Write it.", "code": "x", "test_imports": ["import re"], "test_list": ["assert double(1) == 2"]},
            Reference(tests="import re\nassert double(1) == 2", entry_point="double"),
        ),
        (
            {"messages": [{"role": "user", "content": f"Write it.\nYour code should satisfy these tests:\n{TESTS}"}]},
            Reference(tests=TESTS, entry_point="double"),
        ),
    ],
)
def test_reference_is_read_from_the_fields_of_a_row(tmp_path: Path, row: dict[str, Any], expected: Reference) -> None:
    prompt = read(tmp_path, row)
    assert prompt.reference == expected
    assert prompt.conversation.left_out == ()


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Why?", "answer": "Because 5 is odd."},
        {"problem": "My printer is out of order.", "answer": "Turn it off."},
        {"turns": ["Why?"], "reference": ["Because."]},
        {"question": "Why does\nassert f(1) == 2 fail?", "answer": "It is not defined."},
        {"messages": [{"role": "user", "content": "Why?"}], "answer": True},
    ],
)
def test_rows_without_a_short_right_answer_have_no_reference(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read(tmp_path, row).reference is None


def test_unusable_expectation_is_named_as_left_out(tmp_path: Path) -> None:
    prompt = read(tmp_path, {"turns": ["Why?"], "expected": {"text": "Because."}})
    assert prompt.reference is None and prompt.conversation.left_out == ("expected",)


def test_reference_is_read_from_named_columns(tmp_path: Path) -> None:
    row = {"ask": "How many?", "said": "Two and three.\n#### 5"}
    prompt = read(tmp_path, row, columns={"question": "ask", "answer": "said"})
    assert prompt.reference == Reference(final="5") and prompt.conversation.left_out == ()


def test_reference_belongs_to_the_last_question(tmp_path: Path) -> None:
    row = {"question": "And 3 more?", "history": [["What is 1+1?", "2"]], "answer": "#### 5"}
    assert read(tmp_path, row).reference == Reference(final="5", turn=1)


def test_tests_of_an_earlier_question_belong_to_its_turn(tmp_path: Path) -> None:
    said = [("user", f"Write it.\n{TESTS}"), ("assistant", "..."), ("user", "Thanks. How does it work?")]
    prompt = read(tmp_path, {"messages": [{"role": role, "content": text} for role, text in said]})
    assert prompt.reference == Reference(tests=TESTS, entry_point="double", turn=0)


def test_only_statements_at_the_end_of_a_question_are_its_tests() -> None:
    assert trailing_tests(f"This fails:\nassert 1 == 2\nWhy? Write one with\n```python\n{TESTS}\n```") == TESTS
    assert trailing_tests("Fix it:\nassert f(1) == 2\nreturn f") == ""


def test_last_complete_box_is_found() -> None:
    assert last_boxed(r"\boxed{1} and \boxed{\frac{2}{3}} and \boxed{4") == r"\frac{2}{3}"
    assert last_boxed("no box") is None


def test_chat_set_has_ten_closed_questions() -> None:
    rows = load_prompts("chat")
    closed = {row.id: row.reference for row in rows if row.reference is not None}
    assert len(closed) == 10 and closed["chat-test-001"] == Reference(final="8.34")
    assert closed["chat-test-057"] == Reference(contained=("10:14", "8:27"))
    assert not any(row.conversation.left_out or row.conversation.answered for row in rows)
    assert all("expected" not in row.conversation.row() for row in rows)


def test_embedded_arithmetic_has_a_number_for_each_row() -> None:
    rows = load_rows("arithmetic", Selection("test"))
    assert all(row.reference is not None and row.reference.final.isdigit() for row in rows)
