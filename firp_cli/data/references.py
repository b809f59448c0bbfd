"""References of data set rows: what an answer to the row is judged by.

| fields of a row | reference |
|---|---|
| `expected` | a number or time at the end of the answer; a list of values or a text: all are in the answer |
| `test`, `entry_point`, `prompt` (HumanEval) | tests of the function |
| `test_list`, `test_setup_code` or `test_imports` (MBPP) | tests of the code; the challenge tests are left out |
| `answer` with a last line `#### N` (GSM8K), or that is a number (AIME) | the number |
| `problem`, `solution`, `answer` (MATH-500) | the answer, a LaTeX expression |
| `problem`, `solution` (MATH) | the last `\\boxed{...}` of the solution |
| none of them, and a question that ends with `assert` statements | these are the tests |
"""

from __future__ import annotations

import ast
import builtins
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from firp_cli.data.formats import Conversation
from firp_cli.data.messages import parse_json

BOXED = re.compile(r"\\f?boxed\s*\{")
NUMBER = re.compile(r"\s*[-+]?[$€£]?\d[\d,]*(\.\d+)?%?\s*")
TIME = re.compile(r"\s*\d{1,2}:\d{2}\s*")
LONGEST_VALUE = 200  # characters
MOST_STARTS = 16  # places where the tests of a question are sought


@dataclass(frozen=True)
class Reference:
    """Reference of a row; an answer is judged by the final value, by contained values or by tests.

    Attributes:
        final: value that the answer ends with: a number, a time or a LaTeX expression.
        contained: numbers, times and texts that are all in the answer.
        tests: Python statements that fail on wrong code. entry_point: function that they call.
        head: Python that the question gives, which runs before the answer's code.
        turn: number of the user turn that asks for it, from 0.
    """

    final: str = ""
    contained: tuple[str, ...] = ()
    tests: str = ""
    entry_point: str = ""
    head: str = ""
    turn: int = 0


def read_reference(row: Mapping[str, Any], conversation: Conversation) -> tuple[Reference | None, frozenset[str]]:
    """Return the reference of a row, None for a row without one, and the names of the fields that it comes from.

    It belongs to the last user turn of the conversation, or to the last one whose question ends with tests.
    """
    turns = conversation.turns()
    for fields, read in _READERS:
        reference = read(row)
        if reference is not None:
            return replace(reference, turn=max(len(turns) - 1, 0)), frozenset(fields)
    for turn in reversed(range(len(turns))):
        said = [message["content"] for message in turns[turn] if message["role"] == "user"]
        if said and (tests := trailing_tests(said[-1])):
            return Reference(tests=tests, entry_point=called_function(tests), turn=turn), frozenset()
    return None, frozenset()


def last_boxed(text: str) -> str | None:
    """Return the content of the last complete `\\boxed{...}`."""
    for start in reversed([match.end() for match in BOXED.finditer(text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place]
    return None


def trailing_tests(question: str) -> str:
    """Return the `assert` statements that a question ends with, "" if it has none."""
    starts = [match.start() for match in re.finditer(r"^assert ", question, re.MULTILINE)]
    for start in starts[:MOST_STARTS]:
        tests = question[start:].strip().removesuffix("```").strip()
        if (parsed := parse_code(tests)) and all(isinstance(item, ast.Assert) for item in parsed.body):
            return tests
    return ""


def called_function(tests: str) -> str:
    """Return the first function that tests call and that Python does not have, "" if there is none."""
    parsed = parse_code(tests)
    calls = (item.func for item in ast.walk(parsed) if isinstance(item, ast.Call)) if parsed else ()
    names = (func.id for func in calls if isinstance(func, ast.Name))
    return next((name for name in names if not hasattr(builtins, name)), "")


def parse_code(code: str) -> ast.Module | None:
    """Return the syntax tree of Python code, None for other text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escape sequences in the code
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _expected(row: Mapping[str, Any]) -> Reference | None:
    """Read values that the row's author states."""
    given = row.get("expected")
    listed = given if isinstance(given, list) else [given]
    if not listed or not all(_is_value(item) for item in listed):
        return None
    values = tuple(str(item).strip() for item in listed)
    alone = len(values) == 1 and (NUMBER.fullmatch(values[0]) or TIME.fullmatch(values[0]))
    return Reference(final=values[0]) if alone else Reference(contained=values)


def _function_tests(row: Mapping[str, Any]) -> Reference | None:
    """Read HumanEval."""
    head, tests, name = (row.get(field) for field in ("prompt", "test", "entry_point"))
    if not (isinstance(head, str) and isinstance(tests, str) and isinstance(name, str) and name.isidentifier()):
        return None
    return Reference(tests=f"{tests}\ncheck({name})\n", entry_point=name, head=head)


def _test_list(row: Mapping[str, Any]) -> Reference | None:
    """Read MBPP."""
    listed, setup, imports = (parse_json(row.get(name)) for name in ("test_list", "test_setup_code", "test_imports"))
    if not (isinstance(listed, list) and listed and all(isinstance(test, str) for test in listed)):
        return None
    before = [*(imports if isinstance(imports, list) else ()), *([setup] if isinstance(setup, str) else ())]
    return Reference(tests="\n".join(map(str, (*before, *listed))), entry_point=called_function("\n".join(listed)))


def _result(row: Mapping[str, Any]) -> Reference | None:
    """Read `answer`: its last line after ####, its boxed expression, a number, or the result beside a solution."""
    answer = row.get("answer")
    if isinstance(answer, str):
        marked = answer.rpartition("####")
        if marked[1] and _is_value(marked[2]):
            return Reference(final=marked[2].strip())
        if boxed := last_boxed(answer):
            return Reference(final=boxed)
    if not _is_value(answer):
        return None
    beside = isinstance(row.get("problem"), str) and (isinstance(row.get("solution"), str) or "\\" in str(answer))
    return Reference(final=str(answer).strip()) if beside or NUMBER.fullmatch(str(answer)) else None


def _boxed_solution(row: Mapping[str, Any]) -> Reference | None:
    """Read the result that a solution boxes."""
    solution = row.get("solution")
    boxed = last_boxed(solution) if isinstance(solution, str) else None
    return Reference(final=boxed) if boxed else None


def _is_value(value: Any) -> bool:
    """Return True for a number, and for a short text of one line."""
    if isinstance(value, str):
        return 0 < len(value.strip()) <= LONGEST_VALUE and "\n" not in value.strip()
    return isinstance(value, int | float) and not isinstance(value, bool)


_READERS = (
    (("expected",), _expected),
    (("prompt", "test", "entry_point"), _function_tests),
    (("test_list", "challenge_test_list", "test_setup_code", "test_imports"), _test_list),
    (("answer",), _result),
    (("solution",), _boxed_solution),
)
