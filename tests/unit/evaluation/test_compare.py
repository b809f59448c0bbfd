"""Figures of a bench recounted from its records in plain NumPy, and paired comparisons of two benches."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from firp_cli.api.write_report import write_report
from firp_cli.errors import UsageError
from firp_cli.evaluation.answer_runs import Times, batch_run, records_of
from firp_cli.evaluation.bench_prompts import Batch, BenchPrompt
from firp_cli.evaluation.merge import merge_processes, merge_teachers
from firp_cli.evaluation.paired import FIGURES, SavedBench, compare
from firp_cli.evaluation.rows import bench_rows, drift_warnings
from firp_cli.records import Comparison, ComparisonReport, Verified
from firp_cli.reports.comparison import comparison_tables
from firp_cli.results import BenchReport, Generation

PROMPTS, REPEATS, K = 24, 3, 4


def made_report(seed: int, factor: float = 1.0, prompts: int = PROMPTS) -> BenchReport:
    """Return a report of simulated measurements: `firp` is `factor` times as fast as its tokens per step say."""
    generator = np.random.default_rng(seed)
    lengths = np.random.default_rng(99)  # the tokens are the same in all benches
    asked = [BenchPrompt([1] * (5 + place), "set", "ab"[place % 2], place=f"row {place}") for place in range(prompts)]
    runs: dict[str, list[Any]] = {"ar": [], "hf": [], "firp": []}
    for place in range(prompts):
        steps = lengths.integers(1, K + 2, size=int(lengths.integers(5, 12))).tolist()
        tokens, speed = sum(steps), 1.0 + 0.2 * lengths.random()
        for name, each in (("ar", [1] * tokens), ("hf", [1] * tokens), ("firp", steps)):
            cost = {"ar": 0.02, "hf": 0.05, "firp": 0.025 / factor}[name] * len(each) * speed
            times = cost * generator.lognormal(0.0, 0.05, REPEATS)
            answers = [
                [Generation(5 + place, list(range(tokens + 1)), len(each), each, 0.1 * speed, float(time), "length")]
                for time in times
            ]
            runs[name].append(batch_run(Batch("set", "ab"[place % 2], [place]), answers, name, place, asked))
    rows = [row for name in runs for row in bench_rows(name, runs, {}, 0.0)]
    settings = {"repeats": REPEATS, "methods": list(runs), "max_new_tokens": 64, "temperature": 0.0, "batch_size": 1}
    settings |= {"prompts": prompts, "turns_asked": prompts, "turns_not_asked": 0, "reference": None}
    teacher = {"name": "made", "dtype": "float32", "device": "cpu", "fingerprint": "f"}
    return BenchReport({"processor": "made"}, teacher, settings, rows, records=records_of(runs))


def test_rows_agree_with_a_recount_in_numpy(tmp_path: Path) -> None:
    """From the lines of answers.jsonl alone, with no code of the package."""
    write_report(made_report(0), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    report = json.loads((tmp_path / "bench.json").read_text())
    assert len(lines) == 3 * PROMPTS * REPEATS and "records" not in report
    shown = {(row["method"], row["category"]): row for row in report["rows"]}
    assert len(shown) == 9

    def table(method: str, name: str, category: str) -> np.ndarray:
        chosen = [line for line in lines if line["method"] == method and category in ("all", line["category"])]
        return np.array([[line[name] for line in chosen if line["repeat"] == repeat] for repeat in range(REPEATS)])

    for (method, category), row in shown.items():

        def per_token(name: str, category: str = category) -> float:
            tokens = table(name, "new_tokens", category) - 1
            seconds = np.median(table(name, "decode_seconds", category) / tokens, axis=0)
            return float((seconds * tokens[0]).sum() / tokens[0].sum())

        def rate(name: str, category: str = category) -> float:
            written = table(name, "new_tokens", category)
            seconds = np.median(table(name, "decode_seconds", category) / (written - 1), axis=0) * (written[0] - 1)
            return float((written[0] / (seconds + np.median(table(name, "prefill_seconds", category), axis=0))).mean())

        first = [line for line in lines if line["method"] == method and line["repeat"] == 0]
        first = [line for line in first if category in ("all", line["category"])]
        lengths = np.concatenate([line["accepted_lengths"] for line in first])
        assert row["accepted_length"] == pytest.approx(lengths.mean())
        assert row["accepted_histogram"] == np.bincount(lengths).tolist()
        assert row["steps"] == len(lengths) and row["prompts"] == len(first)
        assert row["tokens_per_second"] == pytest.approx(1 / per_token(method))
        assert row["speedup"] == pytest.approx(per_token("ar") / per_token(method))
        assert row["speedup_hf"] == pytest.approx(per_token("hf") / per_token(method))
        assert row["speedup_with_prefill"] == pytest.approx(rate(method) / rate("ar"))
        assert row["speedup_with_prefill_hf"] == pytest.approx(rate(method) / rate("hf"))
        for name in ("speedup", "speedup_hf", "speedup_with_prefill", "speedup_with_prefill_hf"):
            interval = row[f"{name}_interval"]
            if method == {"s": "ar", "f": "hf"}["f" if name.endswith("hf") else "s"]:
                assert interval is None, "a baseline is not compared with itself"
            else:
                assert interval[0] < row[name] < interval[1]


def save(report: BenchReport, folder: Path) -> str:
    write_report(report, folder)
    return str(folder)


def test_interval_of_one_run_covers_the_point_of_another() -> None:
    """At least nine of ten simulated repetitions of a bench."""
    rows = [next(row for row in made_report(seed).rows if row.method == "firp") for seed in range(11)]
    low, high = rows[0].speedup_interval or (0.0, 0.0)
    assert sum(low <= (row.speedup or 0.0) <= high for row in rows[1:]) >= 9


def test_comparison_tells_a_difference_from_noise(tmp_path: Path) -> None:
    first, same = (SavedBench.open(save(made_report(seed), tmp_path / str(seed))) for seed in (1, 2))
    faster = SavedBench.open(save(made_report(3, factor=1.15), tmp_path / "3"))
    verdicts = {(item.method, item.figure): item for item in compare(first, same).comparisons if item.category == "all"}
    assert verdicts["firp", "speedup over ar"].verdict == "noise"
    assert verdicts["firp", "accepted length"].verdict == "same"
    assert ("ar", "speedup over ar") not in verdicts
    (found,) = [
        item
        for item in compare(first, faster).comparisons
        if (item.method, item.figure) == ("firp", "tokens/s") and item.category == "all"
    ]
    assert found.verdict == "higher" and found.ratio == pytest.approx(1.15, abs=0.05) and found.pairs == PROMPTS
    assert found.interval is not None and found.interval[0] <= 1.15 <= found.interval[1]


def test_comparison_pairs_the_prompts_that_both_have(tmp_path: Path) -> None:
    first = SavedBench.open(save(made_report(1), tmp_path / "a"))
    fewer = SavedBench.open(save(made_report(2, prompts=6), tmp_path / "b"))
    report = compare(first, fewer)
    assert {item.pairs for item in report.comparisons if item.category == "all"} == {6}
    assert {item.verdict for item in report.comparisons} == {"too few"}


def test_two_methods_of_one_bench_are_compared(tmp_path: Path) -> None:
    folder = save(made_report(1), tmp_path / "a")
    report = compare(SavedBench.open(f"{folder}:hf"), SavedBench.open(f"{folder}:firp"))
    (found,) = [item for item in report.comparisons if item.figure == "tokens/s" and item.category == "all"]
    assert found.method == "hf / firp" and found.verdict == "higher"
    with pytest.raises(UsageError, match="did you mean 'firp'"):
        SavedBench.open(f"{folder}:fir")
    with pytest.raises(UsageError, match="no folder that `firp bench` wrote"):
        SavedBench.open(str(tmp_path / "nothing"))


def test_comparison_fits_a_terminal_of_80_columns() -> None:
    """Long names are folded; no figure is cut."""
    names = ("hidden_transfer / a-long-folder-name", "math_reasoning", "all", FIGURES[0])
    item = Comparison(*names, pairs=480, first=12.5, second=10.25, ratio=0.82, interval=(0.71, 0.94))
    console = Console(width=80, file=io.StringIO())
    for table in comparison_tables(ComparisonReport("a", "b", [item], [])):
        console.print(table)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and any("0.82 [0.71, 0.94]" in line and "lower" in line for line in lines)


def test_teachers_are_compared_by_name(tmp_path: Path) -> None:
    """A bench of several teachers with one of them alone, and two benches of one teacher each, whatever its name."""
    one, other = made_report(1), made_report(2)
    other.teacher = {**other.teacher, "name": "/models/other", "fingerprint": "g"}
    both = merge_teachers([one, other])
    alone = SavedBench.open(save(other, tmp_path / "other"))
    found = compare(SavedBench.open(save(both, tmp_path / "both")), alone).comparisons
    speeds = [item for item in found if item.figure == "tokens/s" and item.category == "all"]
    assert {item.method: item.ratio for item in speeds} == pytest.approx({"ar": 1.0, "hf": 1.0, "firp": 1.0})
    report = compare(SavedBench.open(save(one, tmp_path / "one")), alone)
    assert report.comparisons and any("weights of made" in line for line in report.differences)
    twice = SavedBench.open(save(both, tmp_path / "both"))
    assert {item.method for item in compare(twice, twice).comparisons} >= {"firp (made)", "firp (other)"}


def test_conditions_that_differ_are_named(tmp_path: Path) -> None:
    other = made_report(2)
    other.settings["max_new_tokens"] = 128
    first, second = SavedBench.open(save(made_report(1), tmp_path / "a")), SavedBench.open(save(other, tmp_path / "b"))
    assert compare(first, second).differences == ["max_new_tokens (first: 64, second: 128)"]


def test_processes_are_pooled(tmp_path: Path) -> None:
    reports = [made_report(seed) for seed in (1, 2, 3)]
    merged = merge_processes(reports)
    row = next(row for row in merged.rows if row.method == "firp")
    singles = [next(row for row in report.rows if row.method == "firp").speedup for report in reports]
    assert row.speedup_by_process == pytest.approx(singles) and min(singles) < (row.speedup or 0) < max(singles)
    assert merged.settings["processes"] == 3 and len(merged.records) == 3 * len(reports[0].records)
    assert {record.process for record in merged.records} == {0, 1, 2}
    wrong = Verified(tokens=100, above=1, tolerance=1e-3, gap=4.0)
    for report, check in zip(reports, (Verified(100, 0, 1e-3, 0.0), wrong, None), strict=True):
        for each in report.rows:
            each.verified = check if each.method == "firp" else None
    pooled = next(row for row in merge_processes(reports).rows if row.method == "firp")
    assert pooled.verified == wrong, "a wrong token of any process shows"
    reports[2].records = [record for record in reports[2].records if record.method != "firp"]
    assert len(next(row for row in merge_processes(reports).rows if row.method == "firp").speedup_by_process) == 2
    with pytest.raises(UsageError, match="different prompts"):
        merge_processes([reports[0], made_report(1, prompts=6)])


def test_groups_of_repeats_are_processes_or_repeats() -> None:
    def groups(*processes: int) -> list[list[int]]:
        table = np.ones((len(processes), 2))
        return Times(table, table, table, table, table, list(processes)).groups.tolist()

    assert groups(0, 0, 0) == [[0], [1], [2]] and groups(0) == [[0]]
    assert groups(0, 0, 1, 1) == [[0, 1], [2, 3]]
    assert groups(0, 0, 2) == [[0], [2]], "a process that was interrupted has fewer repeats"


def test_drift_of_ar_is_flagged() -> None:
    def runs(*seconds: float) -> dict[str, Any]:
        answers = [[Generation(3, [1, 2, 3], 2, [1, 1], 0.1, value, "length")] for value in seconds]
        return {"ar": [batch_run(Batch("set", "", [0]), answers, "ar")]}

    assert drift_warnings(runs(1.0, 1.05)) == [] and drift_warnings(runs(1.0)) == []
    assert "500 ms a token in one repeat and 600 ms in another" in drift_warnings(runs(1.0, 1.2))[0]
