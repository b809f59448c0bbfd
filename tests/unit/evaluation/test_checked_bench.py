"""Whole benches with a known truth: drafts that are never or always right, and a planted wrong token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from firp_cli.config import TeacherConfig
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.evaluation.measure import measure_bench
from firp_cli.evaluation.methods import BenchSettings, LoadedPredictor, make_methods
from firp_cli.evaluation.run_bench import bench_report, complete_report, run_bench
from firp_cli.reports.verification import lossless_failures
from firp_cli.results import BenchReport, Generation
from firp_cli.teacher.load import load_teacher
from firp_cli.teacher.teacher import Teacher
from helpers.models import FakePredictor, embedded_prompts, embedded_teacher, generate_reference

STEPS, PROMPT, PLACE = 3, 2, 11


def test_drafts_that_are_never_and_always_right() -> None:
    teacher, prompts = embedded_teacher(), embedded_prompts(3)
    outputs = [[*prompt, *generate_reference(teacher.model, prompt, 40)] for prompt in prompts]
    predictors = {
        name: LoadedPredictor(
            FakePredictor(teacher, outputs, STEPS, lambda *_, right=right: right),
            parse_tree("chain", STEPS),
            Path(name),
        )
        for name, right in (("never", False), ("always", True))
    }
    settings = BenchSettings(max_new_tokens=1 + 4 * (STEPS + 1), repeats=1)
    methods = make_methods(teacher, predictors, ["ar", "never", "always"], settings)
    report = run_bench(teacher, [BenchPrompt(ids, "set") for ids in prompts], methods, settings)
    rows = {row.method: row for row in report.rows}
    assert rows["never"].accepted_length == 1.0 and rows["never"].acceptance_by_step == []
    assert rows["always"].accepted_length == STEPS + 1.0 and rows["always"].acceptance_by_step == [1.0] * STEPS
    assert rows["never"].lossless.identical == rows["always"].lossless.identical == 3


def planted_bench(teacher: Teacher, temperature: float, planted: int) -> BenchReport:
    """Return the checked report of a bench in which method `firp` emits a wrong token."""
    settings = BenchSettings(max_new_tokens=24, repeats=1, temperature=temperature, seed=3)
    prompts = [BenchPrompt(ids, "set", place=f"row {number} of set") for number, ids in enumerate(embedded_prompts(4))]
    methods: list[Any] = make_methods(teacher, {}, ["ar", "prompt-lookup"], settings)
    generate, asked = methods[1].generate, prompts[PROMPT].token_ids

    def faulty(batch: list[list[int]], limit: int) -> list[Generation]:
        made = generate(batch, limit)
        if list(batch[0]) == asked:
            made[0].token_ids[PLACE] = planted
        return list(made)

    methods[1].generate = faulty
    measured = measure_bench(teacher, prompts, methods, settings)
    report = bench_report(teacher, methods, measured, settings)
    complete_report(report, teacher, methods, measured, settings)
    return report


@pytest.mark.parametrize(("dtype", "temperature"), [("float32", 0.0), ("bfloat16", 0.0), ("float32", 1.0)])
def test_planted_token_is_found_at_its_place(dtype: Any, temperature: float) -> None:
    teacher = embedded_teacher() if dtype == "float32" else load_teacher(TeacherConfig(model="arithmetic", dtype=dtype))
    report = planted_bench(teacher, temperature, planted=7)
    rows = {row.method: row for row in report.rows}
    found = rows["prompt-lookup"].verified
    assert found is not None and found.worst is not None and found.above >= 1
    assert (found.worst.prompt, found.worst.turn, found.worst.position, found.worst.emitted) == (PROMPT, 0, PLACE, 7)
    assert rows["ar"].verified is not None and rows["ar"].verified.above == 0
    (line,) = lossless_failures(report)
    assert "prompt-lookup" in line and f"row {PROMPT} of set" in line and f"token {PLACE}" in line
