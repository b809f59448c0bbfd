"""Spec-Bench's answer files: its own formula on them gives the speedup with prefill, and its layout is complete."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from firp_cli.evaluation.answer_runs import BatchRun, batch_run, records_of
from firp_cli.evaluation.bench_prompts import Batch, BenchPrompt
from firp_cli.evaluation.rows import bench_rows
from firp_cli.evaluation.spec_bench import MT_BENCH, answer_files, published_categories
from firp_cli.results import BenchReport, Generation, PipelineTrace
from helpers.reports import bench_report

IDS = (83, 84, 95, 161, 401)
CATEGORIES = ("mt_bench", "mt_bench", "mt_bench", "translation", "math_reasoning")
PUBLISHED = ("writing", "writing", "roleplay", "translation", "math_reasoning")


def answers(method: str, question: int, turn: int, repeat: int, sampled: bool) -> Generation:
    """Return an invented answer: each repeat at another time, and if sampled of another length."""
    draw = np.random.default_rng([len(method), question, turn, repeat])
    shape = np.random.default_rng([len(method), question, turn, repeat if sampled else 0])
    emitted = [int(count) for count in shape.integers(1, 5 if method == "firp" else 2, 6 + question)]
    ids = list(range(10, 11 + sum(emitted)))
    seconds = draw.uniform(0.5, 2.0, 2) * (1.0 if method == "firp" else 2.5)
    text = f" answer {question} {turn} "
    return Generation(4, ids, len(emitted), emitted, 0.1 * seconds[0], seconds[1], "eos", text)


def report_of(repeats: int, sampled: bool = False) -> BenchReport:
    """Return a report on five questions, of which MT-Bench's have two turns, by `hf` and `firp`."""
    runs: dict[str, list[BatchRun]] = {"hf": [], "firp": []}
    prompts = [
        BenchPrompt([1, 2], "spec_bench", category, id=number) for number, category in zip(IDS, CATEGORIES, strict=True)
    ]
    for method, own in runs.items():
        for place, prompt in enumerate(prompts):
            turns = 2 if prompt.category == "mt_bench" else 1
            batch = Batch("spec_bench", prompt.category, [place], [turns])
            made = [
                [answers(method, place, turn, repeat, sampled) for turn in range(turns)] for repeat in range(repeats)
            ]
            own.append(batch_run(batch, made, method, place, prompts))
    rows = [row for method in runs for row in bench_rows(method, runs, {}, 0.0)]
    return replace(bench_report(), rows=rows, records=records_of(runs))


def lines_of(files: dict[str, str], method: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in files[f"spec-bench/{method}.jsonl"].splitlines()]


def published_speed(lines: list[dict[str, Any]], task: str) -> float:
    """Return the tokens per second of one of Spec-Bench's tables: the mean over its questions."""
    chosen = [
        line["choices"][0]
        for line in lines
        if task in ("overall", line["category"]) or (task == "mt_bench" and line["category"] in MT_BENCH)
    ]
    return float(np.mean([sum(choice["new_tokens"]) / sum(choice["wall_time"]) for choice in chosen]))


@pytest.mark.parametrize(("repeats", "sampled"), [(1, False), (3, False), (4, True)])
def test_published_formula_gives_the_speedup_with_prefill(repeats: int, sampled: bool) -> None:
    report = report_of(repeats, sampled)
    files = answer_files(report)
    assert set(files) == {"spec-bench/hf.jsonl", "spec-bench/firp.jsonl"}
    own, base = lines_of(files, "firp"), lines_of(files, "hf")
    rows = {row.category: row for row in report.rows if row.method == "firp"}
    for task, category in (("overall", "all"), ("mt_bench", "mt_bench"), ("translation", "translation")):
        ratio = published_speed(own, task) / published_speed(base, task)
        assert ratio == pytest.approx(rows[category].speedup_with_prefill_hf) and ratio > 1


def test_published_accept_lengths_are_those_of_the_steps() -> None:
    report = report_of(2)
    lines = lines_of(answer_files(report), "firp")
    lengths = [length for line in lines for length in line["choices"][0]["accept_lengths"]]
    (row,) = (row for row in report.rows if (row.method, row.category) == ("firp", "all"))
    assert np.mean(lengths) == pytest.approx(row.accepted_length)
    for line in lines:
        choice = line["choices"][0]
        assert sum(choice["decoding_steps"]) == len(choice["accept_lengths"])
        # prefill gives one token of each turn, which belongs to no step
        assert sum(choice["new_tokens"]) == sum(choice["accept_lengths"]) + len(choice["turns"])


def test_lines_have_the_published_layout() -> None:
    report = report_of(1)
    lines = lines_of(answer_files(report, 12.5), "firp")
    assert [line["question_id"] for line in lines] == list(IDS)
    assert [line["category"] for line in lines] == list(PUBLISHED)
    fields = {"question_id", "category", "answer_id", "model_id", "choices", "tstamp"}
    assert all(set(line) == fields and line["model_id"] == "arithmetic-firp" for line in lines)
    assert len({line["answer_id"] for line in lines}) == 5 and lines[0]["tstamp"] == 12.5
    choice = lines[0]["choices"][0]
    assert choice["index"] == 0 and choice["turns"] == ["answer 0 0", "answer 0 1"]
    first = [record for record in report.records if (record.method, record.prompt) == ("firp", 0)]
    assert choice["wall_time"] == pytest.approx([item.prefill_seconds + item.decode_seconds for item in first])


def test_ticks_of_a_pipeline_count_as_steps_of_r() -> None:
    ticks = [1, 0, 1, 1, 0, 0, 1]
    trace = PipelineTrace(3, [1, 2])
    answer = Generation(4, [1, 2, 3, 4, 5], 7, ticks, 0.1, 1.0, "eos", "text", trace)
    run = batch_run(Batch("spec_bench", "qa", [0], [1]), [[answer]], "speed")
    (line,) = lines_of(answer_files(replace(bench_report(), records=records_of({"speed": [run]}))), "speed")
    assert line["choices"][0]["accept_lengths"] == [2, 1, 1] and line["choices"][0]["decoding_steps"] == [3]
    assert (line["question_id"], line["category"]) == (0, "qa")


def test_files_are_of_spec_bench_alone_and_of_single_questions() -> None:
    report = report_of(1)
    other = [replace(record, dataset="gsm8k", category="") for record in report.records]
    assert answer_files(replace(report, records=other)) == {}
    together = [replace(record, batch=0) for record in report.records]
    assert answer_files(replace(report, records=together)) == {}
    own = [record for record in report.records if record.method == "hf"]
    two = [replace(record, teacher=name, method=f"assisted:a/{name}") for name in "xy" for record in own]
    names = set(answer_files(replace(report, records=two)))
    assert names == {f"spec-bench/{name}/assisted-a-{name}.jsonl" for name in "xy"}


def test_categories_of_other_sets_are_their_own() -> None:
    assert published_categories("mt_bench", ["writing", "math"]) == ["writing", "math"]
    assert published_categories("speed_bench", ["coding", "qa"]) == ["coding", "qa"]
    assert published_categories("spec_bench", ["coding", "qa"]) == ["mt_bench", "qa"]
