"""Verdict on the check of every token, and the exit status of `firp bench --require-lossless`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from firp_cli.records import TokenPlace, Verified
from firp_cli.reports.verification import fault, is_lossless, lossless_failures, verified_cell
from firp_cli.results import BenchReport, as_json
from helpers.commands import invoke
from helpers.reports import bench_report

GREEDY = Verified(3214, 0, 0.5, gap=0.03, worst=TokenPlace(3, 0, 12, 5, 6, 0.03))
WRONG = Verified(3214, 2, 0.5, 9.0, None, TokenPlace(7, 1, 31, 55, 66, 4.2, "line 7 of set", " Paris", " London"))
SAMPLED = Verified(500, 0, 1e-6, tail=0.002, log_prob=-1.2, deviation=0.4, p_value=0.3)


def report(**checks: Verified | None) -> BenchReport:
    made = bench_report()
    for row in made.rows:
        row.verified = checks.get(row.method, GREEDY)
    return made


@pytest.mark.parametrize(
    ("check", "words", "cell"),
    [
        (GREEDY, None, "all 3,214"),
        (SAMPLED, None, "all 500"),
        (
            WRONG,
            "line 7 of set (prompt 7), turn 2, token 31: ' Paris' (55), where ' London' (66) has the largest logit: "
            "gap 4.2 (tolerance 0.5), the worst of 2 such tokens",
            "2 of 3,214: prompt 7, token 31, gap 4.2",
        ),
        (
            Verified(9, 1, 0.5, worst=TokenPlace(0, 0, 9, -1, 4)),
            "prompt 0, turn 1, token 9: the answer's end: it has no end token and is not at its limit",
            "1 of 9: prompt 0, token 9",
        ),
        (
            replace(SAMPLED, above=1, tail=0.0, worst=TokenPlace(1, 0, 3, 5, 6, 0.0)),
            "prompt 1, turn 1, token 3: token id 5, where token id 6 is the most probable: a token so improbable is "
            "drawn with probability 0 (tolerance 1e-06)",
            "1 of 500: prompt 1, token 3, tail 0",
        ),
        (
            replace(SAMPLED, deviation=-7.25),
            "its tokens are more probable than those of exact sampling, by 7.2 standard deviations of 500 tokens' "
            "surprisal",
            "all 500, but improbable together",
        ),
        (
            replace(SAMPLED, p_value=5e-5),
            "its answers are not as probable as those of ar (p = 5e-05)",
            "all 500, but improbable together",
        ),
    ],
)
def test_verdict_names_the_fault(check: Verified, words: str | None, cell: str) -> None:
    assert (fault(check), is_lossless(check), verified_cell(check)) == (words, words is None, cell)


def test_failures_name_methods_that_are_not_lossless_or_not_verified() -> None:
    assert lossless_failures(report()) == []
    made = report(medusa=WRONG, hf=None)
    lines = lossless_failures(made)
    assert len(lines) == 2 and lines[0] == "hf was not verified"
    assert lines[1].startswith("medusa is not lossless: line 7 of set (prompt 7), turn 2, token 31")
    for row in made.rows:
        row.reason = "needs another teacher" if row.method == "hf" else None
    assert len(lossless_failures(made)) == 1
    again = BenchReport.from_json(json.loads(json.dumps(as_json(made))))
    assert [row.verified for row in again.rows] == [row.verified for row in made.rows]


@pytest.mark.parametrize("faulty", ["ar", "hf", "firp"])
def test_bench_exits_with_1_where_a_method_is_not_lossless(
    faulty: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("firp_cli.api.bench_run.bench", lambda *_, **__: report(**{faulty: WRONG}))
    command = ["bench", "--dataset", "arithmetic", "--output"]
    failed = invoke(*command, tmp_path / "one", "--require-lossless")
    assert failed.exit_code == 1 and f"firp: {faulty} is not lossless: line 7 of set" in failed.stderr
    assert (tmp_path / "one" / "bench.json").is_file() and "arithmetic" in failed.stdout
    assert invoke(*command, tmp_path / "two").exit_code == 0
    monkeypatch.setattr("firp_cli.api.bench_run.bench", lambda *_, **__: report())
    assert invoke(*command, tmp_path / "three", "--require-lossless").exit_code == 0
