"""Paired comparison of two benches: the figures of each method over the batches that both decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firp_cli.assets import nearest
from firp_cli.errors import UsageError, first_line
from firp_cli.evaluation.answer_runs import BatchRun, Times, runs_of, runs_of_records, teacher_labels
from firp_cli.evaluation.rows import groups_of
from firp_cli.files import read_json
from firp_cli.metrics import bootstrap
from firp_cli.provenance import differences
from firp_cli.records import ANSWERS, Comparison, ComparisonReport, read_answers
from firp_cli.results import BenchReport

Table = NDArray[np.float64]
FIGURES = ("speedup over ar", "tokens/s", "accepted length")
SETTINGS = ("max_new_tokens", "batch_size", "temperature", "top_p", "turns", "guard", "interrupted")
MACHINE = ("processor", "device_name", "torch_threads", "layers", "driver", "versions", "git_commit")


@dataclass
class SavedBench:
    """A bench that was written to a folder. `runs`: its batches by the teacher's name in reports, and by method.
    `method`: the only one to compare, if the user names it.
    """

    folder: Path
    report: BenchReport
    runs: dict[str, dict[str, list[BatchRun]]]
    method: str | None = None

    @staticmethod
    def open(text: str) -> SavedBench:
        """Return the bench that `FOLDER` or `FOLDER:METHOD` names; FOLDER may be its bench.json. Raises UsageError."""
        path, method = Path(text), None
        if not path.exists() and ":" in text:
            head = next((text[:at] for at, mark in enumerate(text) if mark == ":" and Path(text[:at]).exists()), "")
            path, method = (Path(head), text[len(head) + 1 :]) if head else (path, None)
        folder = path.parent if path.name == "bench.json" else path
        try:
            report = BenchReport.from_json(read_json(folder / "bench.json"))
            records = read_answers(folder / ANSWERS)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{text} is no folder that `firp bench` wrote, with bench.json and {ANSWERS}: {first_line(error)}"
            ) from error
        alone = teacher_labels([str(report.teacher.get("name"))])[0]
        labels = dict.fromkeys(record.teacher for record in records)
        runs = {label or alone: runs_of_records(item for item in records if item.teacher == label) for label in labels}
        names = list(dict.fromkeys(name for each in runs.values() for name in each))
        if method is not None and method not in names:
            raise UsageError(f"{folder} has no method {method!r}, but {', '.join(names)}{nearest(method, names)}")
        return SavedBench(folder, report, runs, method)


def compare(first: SavedBench, second: SavedBench) -> ComparisonReport:
    """Compare the methods that both benches have, or the two that the user names.

    Raises UsageError where they share no method or no batch of prompts.
    """
    found: list[Comparison] = []
    pairs = [(name, name) for name in first.runs if name in second.runs]
    if not pairs and len(first.runs) == len(second.runs) == 1:  # the conditions name what differs
        pairs = [(next(iter(first.runs)), next(iter(second.runs)))]
    for one_teacher, other in pairs:
        ours, theirs = first.runs[one_teacher], second.runs[other]
        for one, two in _pairs_of_methods(first, second, list(ours), list(theirs)):
            made = _compare_methods(ours, theirs, one, two, same=first.folder.samefile(second.folder))
            owner = f" ({one_teacher})" if len(pairs) > 1 else ""
            found += [replace(item, method=item.method + owner) for item in made]
    if not found:
        raise UsageError(
            f"{first.folder} and {second.folder} have no method with the same prompts: compare benches of one teacher "
            "and data set, or name the methods as FOLDER:METHOD"
        )
    return ComparisonReport(_name(first), _name(second), found, _conditions(first.report, second.report))


def _name(bench: SavedBench) -> str:
    return f"{bench.folder}:{bench.method}" if bench.method else str(bench.folder)


def _pairs_of_methods(
    first: SavedBench, second: SavedBench, ours: Sequence[str], theirs: Sequence[str]
) -> list[tuple[str, str]]:
    """Return the methods to compare: named ones, else those of the same name."""
    if first.method or second.method:
        one, two = first.method or second.method, second.method or first.method
        return [(one, two)] if one in ours and two in theirs else []  # type: ignore[list-item]
    return [(name, name) for name in ours if name in theirs]


def _compare_methods(
    ours: dict[str, list[BatchRun]], theirs: dict[str, list[BatchRun]], one: str, two: str, same: bool
) -> list[Comparison]:
    """Compare two methods on each data set, its categories, and all together. `same`: both are of one bench, whose
    repeats are drawn together.
    """
    common = _key_places(ours[one]), _key_places(theirs[two])
    keys = [key for key in common[0] if key in common[1]]
    if not keys:
        return []
    sides = []
    for runs, places, name in ((ours, common[0], one), (theirs, common[1], two)):
        names = [name, "ar"] if "ar" in runs else [name]
        sides.append({each: [runs[each][places[key]] for key in keys] for each in names})
    label = one if one == two else f"{one} / {two}"
    compared: list[Comparison] = []
    for dataset, category in groups_of(sides[0][one]):
        chosen = [{name: runs_of(dataset, category, runs) for name, runs in side.items()} for side in sides]
        compared += _figures(label, dataset, category, _Side(chosen[0], one), _Side(chosen[1], two), same)
    return compared


def _key_places(runs: Sequence[BatchRun]) -> dict[Any, int]:
    """Return the place of each batch by what it asks: data set, category, and rows of its prompts."""
    keys = [(run.dataset, run.category, tuple((item.row, item.turn) for item in run.first)) for run in runs]
    return {key: place for place, key in enumerate(keys)}


class _Side:
    """Tables of one bench's method and of its `ar`: times, tokens and steps of n batches."""

    def __init__(self, runs: dict[str, list[BatchRun]], method: str) -> None:
        self.times = Times.of(runs[method])
        self.base = Times.of(runs["ar"]) if "ar" in runs and method != "ar" else None
        counts = [[_counts(repeat) for repeat in run.repeats[: len(self.times.processes)]] for run in runs[method]]
        self.emitted, self.steps = (np.array(counts, dtype=np.float64)[:, :, place].T for place in (0, 1))

    def fold(self, repeats: NDArray[np.int64]) -> list[Table]:
        """Return decode seconds, tokens, emitted tokens, steps, and the baseline's seconds and tokens: (S, n) each."""
        own = self.times.fold(repeats)
        base = (self.base or self.times).fold(repeats)
        counts = (self.emitted[repeats].mean(axis=1), self.steps[repeats].mean(axis=1))
        return [own.decode, own.tokens, *counts, base.decode, base.tokens]


def _counts(records: Sequence[Any]) -> tuple[float, float]:
    """Return tokens of the decoding steps, and steps in the unit of the accepted length."""
    return sum(item.emitted for item in records), sum(item.steps / (item.loops or 1) for item in records)


def _values(tables: Sequence[Table]) -> list[Table]:
    """Return the FIGURES (S,) from the tables of `_Side.fold`."""
    decode, tokens, emitted, steps, base_decode, base_tokens = (table.sum(axis=1) for table in tables)
    with np.errstate(divide="ignore", invalid="ignore"):
        return [base_decode / base_tokens * tokens / decode, tokens / decode, emitted / steps]


def _figures(method: str, dataset: str, category: str, first: _Side, second: _Side, same: bool) -> list[Comparison]:
    """Return the comparisons of all figures on one group of batches."""
    sides = (first, second)
    whole = [side.fold(side.times.everything) for side in sides]
    own = [side.fold(side.times.groups) for side in sides]

    def ratios(*tables: Table) -> list[Table]:
        half = len(tables) // 2
        return [two / one for one, two in zip(_values(tables[:half]), _values(tables[half:]), strict=True)]

    together = [*own[0], *own[1]]
    groups = [together] if same and len(own[0][0]) == len(own[1][0]) else [[*own[0], *whole[1]], [*whole[0], *own[1]]]
    tables = [*whole[0], *whole[1]]
    # what makes a process slower changes times; tokens and steps differ by prompt alone
    intervals = [*bootstrap(ratios, tables, groups)[:2], bootstrap(ratios, tables)[2]]
    pairs = first.times.decode.shape[1]
    made = []
    for place, (figure, interval) in enumerate(zip(FIGURES, intervals, strict=True)):
        one, two = (float(_values(side)[place][0]) for side in whole)
        if np.isfinite(one) and np.isfinite(two) and not (figure == FIGURES[0] and first.base is None):
            made.append(Comparison(method, dataset, category, figure, pairs, one, two, two / one, interval))
    return made


def _conditions(first: BenchReport, second: BenchReport) -> list[str]:
    """Return what differs between the conditions of two benches."""

    def facts(report: BenchReport) -> dict[str, Any]:
        teachers = report.teachers or [report.teacher]
        weights = {f"weights of {item.get('name')}": item.get("fingerprint") for item in teachers}
        dtypes = {"dtype": ", ".join(str(item.get("dtype")) for item in teachers)}
        settings = {name: report.settings[name] for name in SETTINGS if report.settings.get(name) is not None}
        return weights | dtypes | settings | {name: report.environment.get(name) for name in MACHINE}

    one, two = facts(first), facts(second)
    return [text.replace("now: ", "second: ") for text in differences(one, two, "first")]
