"""One report of several benches: of the same command in several processes, or of several teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from firp_cli.errors import UsageError
from firp_cli.evaluation.answer_runs import BatchRun, Runs, runs_of, runs_of_records, teacher_labels
from firp_cli.evaluation.rows import DRIFTED, bench_row, drift_warnings, speedup
from firp_cli.records import AnswerRecord, Verified
from firp_cli.results import BenchReport, BenchRow

# fields of a row that do not depend on times: those of the first process are kept
FACTS = (
    *("predictor", "batch_size", "tree", "pipeline", "predicted", "lossless_ar", "teacher", "parts"),
    *("accuracy", "execution"),
)


def merge_processes(reports: Sequence[BenchReport]) -> BenchReport:
    """Return one report of the same bench in several processes: all their repeats count, and rows have the speedup of
    each process and the worst check of their tokens. Other facts are those of the first one.

    Raises UsageError where the processes decoded other prompts.
    """
    first = reports[0]
    records: list[AnswerRecord] = []
    asked = [{(item.teacher, item.batch, item.prompt, item.row) for item in report.records} for report in reports]
    if any(each != asked[0] for each in asked):
        raise UsageError("the processes decoded different prompts: their measurements cannot be pooled")
    for number, report in enumerate(reports):
        records += [replace(record, process=number) for record in report.records]
    teachers = list(dict.fromkeys(row.teacher for row in first.rows))
    runs = {name: runs_of_records(item for item in records if item.teacher == name) for name in teachers}
    warnings = [f"{name}: {text}" if name else text for name in teachers for text in drift_warnings(runs[name])]
    repeats = min(report.settings["repeats"] for report in reports)
    cut = [report.settings["interrupted"] for report in reports if report.settings.get("interrupted")]
    return replace(
        first,
        settings={
            **first.settings,
            "processes": len(reports),
            "repeats": repeats,
            **({"interrupted": cut[0]} if cut else {}),
        },
        rows=[_pooled(row, runs[row.teacher], reports) for row in first.rows],
        warnings=[*_other_warnings(first), *warnings],
        records=records,
    )


def _other_warnings(report: BenchReport) -> list[str]:
    return [text for text in report.warnings if DRIFTED not in text]


def _pooled(row: BenchRow, runs: Runs, reports: Sequence[BenchReport]) -> BenchRow:
    """Return a row computed from the records of all processes."""
    if row.reason or row.method not in runs:
        return row
    chosen = {name: runs_of(row.dataset, row.category, each) for name, each in runs.items()}
    made = bench_row(row.dataset, row.category, row.method, chosen, {}, row.temperature)
    sides = [[_of_process(chosen.get(name, []), place) for name in ("ar", row.method)] for place in range(len(reports))]
    by_process = [speedup(base, own) for base, own in sides]
    key = (row.teacher, row.dataset, row.category, row.method)
    alike = [
        item
        for report in reports
        for item in report.rows
        if (item.teacher, item.dataset, item.category, item.method) == key and not item.reason
    ]
    return replace(
        made,
        **{name: getattr(row, name) for name in FACTS},
        verified=max((item.verified for item in alike if item.verified), key=_distance, default=None),
        lossless=max((item.lossless for item in alike), key=lambda item: len(item.divergences)),
        speedup_by_process=[value for value in by_process if value is not None],
    )


def _distance(check: Verified) -> tuple[float, ...]:
    """Return how far a check is from the teacher: wrong tokens first."""
    return (check.above, check.gap or 0.0, abs(check.deviation or 0.0), -(1.0 if check.tail is None else check.tail))


def _of_process(runs: Sequence[BatchRun], process: int) -> list[BatchRun]:
    """Return the runs with the repeats of one process; none where it could not run the method."""
    own = [replace(run, repeats=[each for each in run.repeats if each[0].process == process]) for run in runs]
    return [run for run in own if run.repeats]


def merge_teachers(reports: Sequence[BenchReport]) -> BenchReport:
    """Return one report of several teachers' benches under the same settings, with each row labelled by its teacher.

    A single report is returned unchanged.
    """
    first = reports[0]
    if len(reports) == 1:
        return first
    labels = teacher_labels([str(report.teacher["name"]) for report in reports])
    labelled = list(zip(labels, reports, strict=True))
    methods = {label: report.settings["methods"] for label, report in labelled}
    prompts = {label: report.settings["prompts"] for label, report in labelled}
    settings = {
        **{key: value for report in reports for key, value in report.settings.items() if key == "interrupted"},
        "methods": list(dict.fromkeys(name for each in methods.values() for name in each)),
        "methods_by_teacher": methods,
        "prompts": max(prompts.values()),
        "prompts_by_teacher": prompts,
        "turns_by_teacher": {label: report.settings["turns_asked"] for label, report in labelled},
        **{name: max(report.settings[name] for report in reports) for name in ("turns_asked", "turns_not_asked")},
    }
    return replace(
        first,
        settings={**first.settings, **settings},
        rows=[replace(row, teacher=label) for label, each in labelled for row in each.rows],
        skipped_long=sum(report.skipped_long for report in reports),
        left_out_trained=max(report.left_out_trained for report in reports),
        teachers=[report.teacher for report in reports],
        samples=[replace(item, teacher=label) for label, each in labelled for item in each.samples],
        warnings=[f"{label}: {text}" for label, each in labelled for text in each.warnings],
        records=[replace(record, teacher=label) for label, each in labelled for record in each.records],
    )
