"""Task accuracy: final values of answers, judgement of records, intervals."""

from __future__ import annotations

from fractions import Fraction

import pytest

from firp_cli.data.references import Reference
from firp_cli.evaluation import accuracy as module
from firp_cli.evaluation.accuracy import accuracy, judge, judge_answers, wilson_interval
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.evaluation.final_values import contains, ends_with, numbers, single_number
from firp_cli.records import Accuracy, AnswerRecord

NUMBERS = [
    ("She has 18.", ["18"]),
    ("= $1,234.50 in all", ["1234.5"]),
    ("12,345,678 of 1,00,000", ["12345678", "100000"]),
    ("5, 6 and 7,8", ["5", "6", "7", "8"]),
    ("-5, -$6 and $-7", ["-5", "-6", "-7"]),
    ("\u22123", ["-3"]),
    ("20-5 or 20 - 5 or (3)-2", ["20", "5", "20", "5", "3", "2"]),
    ("- 4 apples", ["4"]),
    ("3/4, 2 1/2 and 5/0", ["0.75", "2.5"]),
    (r"\frac{3}{4}, \dfrac12, -\frac{1}{2}, 2\frac{1}{2}, \frac{-1}{4}", ["0.75", "0.5", "-0.5", "2.5", "-0.25"]),
    (".5 and 0.50", ["0.5", "0.5"]),
    (r"1{,}000 and 10\,000 and \$18", ["1000", "10000", "18"]),
    ("1\u202f000 and 2\u00a0000", ["1000", "2000"]),
    ("**18** or __19__", ["18", "19"]),
    ("24 m^2, x_1, 3 cm^{2}, CO2, H2O, 4 m\u00b2", ["24", "3", "4"]),
    ("50% and 18th, Rs.20, \u517118\u5143", ["50", "18", "20", "18"]),
    ("at 7:30, or at 8:00", ["8"]),
    (r"\boxed{18 \text{ dollars}} \approx18.5", ["18", "18.5"]),
    ("no number", []),
    ("1" * 9000, []),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_numbers_of_a_text(text: str, expected: list[str]) -> None:
    assert numbers(text) == [Fraction(value) for value in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("18", "18"),
        (r"\$18.90", "18.9"),
        (r"x = \frac{14}{3}", "14/3"),
        (r"90^\circ", "90"),
        (r"36^{\circ}", "36"),
        (r"5\%", "5"),
        (r"18\text{ cm}^2", "18"),
        ("total: 18", None),
        (r"11\sqrt2", None),
        ("2k+2", None),
        ("(3,4)", None),
        ("5x", None),
        ("2516_8", None),
        ("10^5", None),
        ("p - q", None),
    ],
)
def test_number_of_an_expression(text: str, expected: str | None) -> None:
    assert single_number(text) == (None if expected is None else Fraction(expected))


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("16 - 3 = 13, so she makes 13 * 2 = $26.", "26", True),
        ("She makes $26.00 a day.", "26", True),
        ("She makes 26 dollars, not 27.", "26", False),
        ("It is 26.\n#### 26\n\nQuestion: What is 2 + 2?", "26", True),
        (r"Thus \boxed{26}, as 2 < 3.", "26", True),
        (r"Thus \boxed{26x}", "26", False),
        (r"26, thus \boxed{27}", "26", False),
        ("I do not know.", "26", False),
        ("", "26", False),
        ("So it is 0.5", "1/2", True),
        (r"so $x = \frac{1}{2}$", "0.5", True),
        ("about 1250 people", "1,250", True),
        ("so it is -3", "3", False),
        ("at 9:59, no, at 10:14", "10:14", True),
        ("at 10:14, after 8:47", "10:14", False),
        (r"\boxed{\left( 3, \dfrac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", True),
        (r"\boxed{(3, \frac{\pi}{3})}", r"(3,\frac{\pi}{2})", False),
        ("The sum is $S = p-q$.", "p - q", True),
        (r"The sum is \(q-p\).", "p - q", False),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
    ],
)
def test_final_value_of_an_answer(text: str, expected: str, right: bool) -> None:
    assert ends_with(text, expected) is right
    assert judge(Reference(final=expected), text) is right


def test_contained_values_are_all_needed() -> None:
    reference = Reference(contained=("48", "10:14", "{4: 'wren'}"))
    text = 'They are 48 at 10:14.\nIt prints `{4:  "Wren"}` and 12.'
    assert judge(reference, text) is True
    for part in ("48", "10:14", "Wren"):
        assert judge(reference, text.replace(part, "7")) is False
    assert not contains("It is 480 or 4.8.", "48")


def test_thinking_is_no_answer() -> None:
    assert judge(Reference(final="5"), "<think>6? No.</think>It is 5.") is True
    assert judge(Reference(final="5"), "<think>5, perhaps") is False
    assert judge(Reference(final="5"), "perhaps 6</think>5") is True


def test_wilson_interval_matches_published_values() -> None:
    for right, total, low, high in ((0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)):
        assert wilson_interval(right / total, total) == pytest.approx((low, high), abs=1e-4)
    assert wilson_interval(1.0, 40)[1] == 1.0


def record(prompt: int, text: str | None, method: str = "ar", repeat: int = 0, **fields: object) -> AnswerRecord:
    made = AnswerRecord(method, "set", "", prompt, 0, 0, repeat, 0, 4, 9, 8, [1] * 8, 0.1, 0.2, "eos", text=text)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


PROMPTS = [
    BenchPrompt([1], "set", reference=Reference(final="5")),
    BenchPrompt([1], "set", reference=Reference(final="6", turn=1)),
    BenchPrompt([1], "set"),
]


def test_answers_to_the_turn_that_asks_are_judged() -> None:
    records = [record(0, "5"), record(1, "6"), record(1, "it is 6", turn=1), record(2, "7"), record(0, None, repeat=1)]
    assert judge_answers(records, PROMPTS) == []
    assert [item.correct for item in records] == [True, None, True, None, None]
    found = accuracy(records)
    assert found is not None and (found.right, found.judged) == (2, 2)
    assert found.interval == pytest.approx((0.3424, 1.0), abs=1e-4)
    assert accuracy(records[3:]) is None


def test_repeats_of_sampled_answers_count_and_widen_no_interval() -> None:
    records = [record(0, "4"), record(0, "5", repeat=1), record(0, None, repeat=2), record(0, "5", "firp")]
    judge_answers(records, PROMPTS, sampled=True)
    assert [item.correct for item in records] == [False, True, False, True]
    found = accuracy(records[:3])
    assert found is not None and (found.right, found.judged) == (1, 3)
    assert found.interval == wilson_interval(1 / 3, 1), "one prompt is one draw"


def test_cut_answers_are_counted_in_a_warning() -> None:
    records = [record(0, "5", finish_reason="length"), record(0, "5", "firp"), record(2, "5", finish_reason="length")]
    assert judge_answers(records, PROMPTS) == [
        "accuracy: 1 of 2 judged answers were cut at --max-new-tokens and count as they stand"
    ]


def test_code_waits_for_run_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "passes_tests", lambda *_: pytest.fail("code was run"))
    prompts = [BenchPrompt([1], "humaneval", reference=Reference(tests="assert f() == 1", entry_point="f"))]
    records = [record(0, "def f(): return 1", dataset="humaneval")]
    (warning,) = judge_answers(records, prompts)
    assert warning == "accuracy on humaneval: --run-code runs the tests on the answers' code"
    assert records[0].correct is None
    assert accuracy(records) is None and accuracy(records, prompts) == Accuracy(0, 0)
