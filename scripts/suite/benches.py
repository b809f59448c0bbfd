"""Trees tuned for a teacher's predictors, their bench in the suite's dtype, the fp32 comparison, and SPEED on the
embedded looped teacher.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from firp_cli.config import TeacherConfig
from firp_cli.data.chat import encode_prompt
from firp_cli.data.datasets import load_prompts
from firp_cli.decoding.tree_file import described, spec_of
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.errors import FirpError
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.evaluation.methods import BenchSettings, LoadedPredictor, make_methods
from firp_cli.evaluation.speed_ticks import measure_tick
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.folder import load_predictor, predictor_folder
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.reports.speed_tables import pipeline_cells, pipeline_note
from firp_cli.reports.tables import bench_cells
from firp_cli.results import BenchReport, BenchRow, as_json
from firp_cli.teacher.load import load_teacher
from firp_cli.teacher.teacher import Teacher
from firp_cli.tune_results import TuneReport
from firp_cli.tuning.calibration import TuneSettings
from firp_cli.tuning.tuner import tune
from suite.bout import Bout
from suite.predictors import pack
from suite.sizes import Sizes
from suite.subject import keep_tree, lean, predictors, questions, saved, subject, tree_for, tree_of
from suite.work import Failed, Shared, Skipped, Table, Work

TUNE_SECONDS, TUNE_BRIEF_SECONDS = 60.0, 40.0  # of one predictor on a GPU, in full and at least: 33 were too few
LEAST_TUNING = 8  # prompts
PASSES_SHARE = 0.2  # share of a predictor's tuning for measuring passes
SLOW_SHARE = 0.35  # share of a bench's time for methods without CUDA graphs
ONE_DEVICE = "no gain expected: every tick runs all groups of layers"
LOOPED, LOOPED_PREDICTOR = "arithmetic-looped", "speed"
TICK_SECONDS, TICK_CONTEXT = 4.0, 192  # seconds of timing a pipeline's ticks, about; tokens in its cache
GUARD = False  # every step drafts


@dataclass
class Traced:
    """Record of a method's decoding: the predictor's kind, its tree as `described`, and by prompt its length and the
    tokens emitted by each step.
    """

    name: str
    kind: str
    tree: dict[str, Any]
    steps: int
    prompts: list[int]
    emitted: list[list[int]]

    @property
    def spec(self) -> TreeSpec:
        """Return the tree."""
        return tree_of(self.tree, self.steps)


def tune_trees(shared: Shared, work: Work) -> None:
    """Tune a tree for each trained predictor that drafts trees; later parts read `trees`, by kind, at the first batch
    size.
    """
    sizes, teacher = shared.sizes, subject(shared).teacher()
    sources = max(1, len(subject(shared).tests()))
    most = max(sizes.tune_prompts, -(-LEAST_TUNING // sources))
    prompts = questions(shared, teacher, most, skip=max(sizes.bench_prompts, sizes.exact_prompts))
    if not prompts:
        raise Skipped("no questions remain to tune on")
    headers = ["kind", "batch", "tree", "predicted length", "predicted speedup", "tried: length, speedup", "seconds"]
    table = Table("Tuned trees", headers)
    work.tables.append(table)
    made = predictors(shared, teacher)
    wanted = [(kind, predictor) for kind, predictor in made.items() if not predictor.pipeline][: sizes.tuned]
    whole_seconds, brief_seconds = TUNE_SECONDS, TUNE_BRIEF_SECONDS
    for number, (kind, predictor) in enumerate(wanted):
        seconds = work.clock.left() / (len(wanted) - number)
        brief = shared.device.type == "cuda" and seconds < whole_seconds
        if brief and not work.clock.allows(brief_seconds, f"tuning {kind}"):
            continue
        if brief:
            work.clock.cuts.append(f"{kind} tuned for batch {sizes.tune_batches[0]} alone and not tried")
        settings = tune_settings(sizes, seconds, brief)
        began = time.perf_counter()
        told = work.values.setdefault("told", {}).setdefault(kind, [])  # where a tuning was that was stopped

        def tell(line: str, told: list[str] = told, began: float = began) -> None:
            told.append(f"{time.perf_counter() - began:.1f} s: {line}")
            work.save()

        report = tune(teacher, predictor, [prompt.token_ids for prompt in prompts], settings, tell=tell)
        spent = time.perf_counter() - began
        if brief:
            brief_seconds = spent
        else:
            whole_seconds = spent
        tree = spec_of(report.entries[0], predictor.steps)
        keep_tree(shared, kind, tree)
        work.values[kind] = as_json(report)
        table.cells += _tuned_cells(kind, report, spent)
        work.key = ", ".join(f"{line[0]} {line[2]}" for line in table.cells)
        if kind in shared.found.get("saved", []):
            write_tree(saved(shared, kind), tree)
            pack(shared, work)
        work.save()


def write_tree(folder: Path, tree: TreeSpec) -> None:
    """Write the tree.json of a predictor's folder: the tree for any machine."""
    if tree.kind != "none":
        fields = {name: value for name, value in described(tree).items() if value is not None and name != "nodes"}
        (folder / "tree.json").write_text(json.dumps(fields) + "\n", encoding="utf-8")


def tune_settings(sizes: Sizes, seconds: float, brief: bool) -> TuneSettings:
    """Return the settings of `tune` for a number of seconds. `brief`: the first batch size alone, and no trial."""
    return TuneSettings(
        batches=sizes.tune_batches[:1] if brief else sizes.tune_batches,
        max_new_tokens=sizes.bench_tokens,
        most_rows=sizes.tune_rows,
        trial=not brief,
        repeats=1,
        again=True,
        seconds=min(sizes.tune_seconds, PASSES_SHARE * seconds),
        timing_rounds=sizes.tune_sittings,
    )


def _tuned_cells(kind: str, report: TuneReport, spent: float) -> list[list[str]]:
    """Return a line for each batch size; the seconds are those of all of them."""
    cells = []
    for entry, trial in zip(report.entries, report.batches, strict=True):
        predicted, tried = entry.predicted, trial.measured
        cells.append(
            [
                kind,
                str(entry.batch_size),
                entry.tree if entry.tree == trial.tree else f"{entry.tree} (best: {trial.tree})",
                f"{predicted.accepted_length:.2f}",
                f"{predicted.speedup:.2f}",
                f"{tried.accepted_length:.2f}, {tried.speedup:.2f}" if tried else "not tried",
                f"{spent:.0f}",
            ]
        )
    return cells


def bench(shared: Shared, work: Work) -> None:
    """Bench `hf`, `ar`, every predictor that drafts trees (with the tuned tree of its kind), the given predictors, and
    those that feed a pipeline, in the suite's dtype; later parts read `traces`, the records of the trees.
    """
    sizes, teacher = shared.sizes, subject(shared).teacher()
    loaded = contenders(shared, teacher, work)
    settings = BenchSettings(max_new_tokens=sizes.bench_tokens, repeats=sizes.bench_repeats, guard=GUARD)
    methods = make_methods(teacher, loaded, ["hf", "ar", *loaded], settings)
    prompts = questions(shared, teacher, sizes.bench_prompts)
    slow_share = None if shared.device.type == "cpu" else SLOW_SHARE
    bout = Bout(teacher, methods, prompts, sizes.bench_tokens, sizes.bench_repeats, work.clock, slow_share)
    work.values |= {"settings": as_json(settings), "teacher": teacher.describe()}

    def report() -> None:
        found = BenchReport({}, teacher.describe(), {"reference": "ar"}, bout.rows("ar"))
        shared.found["traces"] = [vars(one) for one in traced(bout, loaded)]
        work.values |= {"rows": [as_json(row) for row in found.rows], "identical": as_json(bout.identical())}
        work.values["texts"] = {name: made[0][0].text for name, made in bout.made.items() if 0 in made}
        work.values["note"] = pipeline_note(found)
        work.key = speeds(found)
        headers, cells = bench_cells(found)
        cells = [[*line, str(row.prompts)] for line, row in zip(cells, found.rows, strict=True)]
        work.tables[:] = [
            Table(f"Bench, {teacher.describe()['dtype']}: lossless is against `ar`", [*headers, "answered"], cells),
            _pipelines(found),
            _identical(bout),
        ]
        work.save()

    bout.run(report)


def contenders(shared: Shared, teacher: Teacher, work: Work) -> dict[str, LoadedPredictor]:
    """Return the trained predictors by kind and the given ones by the names of their folders; those that cannot be
    loaded are recorded.
    """
    found = {
        kind: LoadedPredictor(predictor, tree_for(shared, predictor), Path(kind))
        for kind, predictor in predictors(shared, teacher).items()
    }
    for folder in shared.predictors:
        try:
            predictor = load_predictor(predictor_folder(str(folder)), teacher)
        except FirpError as error:
            work.values.setdefault("errors", {})[str(folder)] = str(error)
            work.clock.cuts.append(f"{folder}: {str(error).splitlines()[0]}")
            continue
        name = folder.name if folder.name not in {"hf", "ar", *found} else str(folder)
        found[name] = LoadedPredictor(predictor, tree_for(shared, predictor), folder)
    return found


def traced(bout: Bout, loaded: dict[str, LoadedPredictor]) -> list[Traced]:
    """Return the records of the methods that draft trees, so far."""
    return [
        Traced(
            name,
            item.predictor.kind,
            described(item.tree),
            item.predictor.steps,
            [runs[0].prompt_tokens for runs in bout.made[name].values()],
            [runs[0].accepted_lengths for runs in bout.made[name].values()],
        )
        for name, item in loaded.items()
        if isinstance(item.tree, TreeSpec) and bout.made[name]
    ]


def whole(report: BenchReport) -> list[BenchRow]:
    """Return one row of each method: over all data sets if there are several."""
    rows = [row for row in report.rows if row.category == "all"]
    return [row for row in rows if row.dataset == "all"] or rows


def speeds(report: BenchReport) -> str:
    """Return `firp 2.1 tokens a step, 1.50 x ar, ...`; a pipeline's tokens are counted over as many ticks as it has
    loops.
    """
    texts = []
    for row in whole(report):
        if row.method not in ("ar", "hf"):
            unit = f"in {row.pipeline.loops} ticks" if row.pipeline else "a step"
            texts.append(
                f"{row.method} {row.accepted_length:.2f} tokens {unit}, {row.speedup or float('nan'):.2f} x ar"
                f" ({row.lossless.identical}/{row.lossless.compared} identical)"
            )
    return ", ".join(texts)


def _pipelines(report: BenchReport) -> Table:
    """Report ticks and correctness of pipelines, whose speedup a bench on one device cannot show."""
    rows = [row for row in whole(report) if row.pipeline]
    headers, cells = pipeline_cells(replace(report, rows=rows))
    same = [f"{row.lossless.identical}/{row.lossless.compared}" for row in rows]
    cells = [[*line, identical] for line, identical in zip(cells, same, strict=True)]
    return Table(f"Pipelines on one device ({ONE_DEVICE})", [*headers, "identical"], cells)


def _identical(bout: Bout) -> Table:
    """Report answers identical with those of `ar` and of `generate`, and the logit gaps where the others differ."""
    cells = []
    for name, by_reference in bout.identical().items():
        for reference, one in by_reference.items():
            gaps = [one["median_ulps"], one["largest_ulps"]]
            quantiles = ["" if gap is None else f"{gap:.1f}" for gap in gaps]
            cells.append([name, reference, f"{one['identical']}/{one['compared']}", *quantiles])
    headers = ["method", "against", "identical", "median gap, units in the last place", "largest"]
    return Table("Answers compared", headers, cells)


def exact(shared: Shared, work: Work) -> None:
    """Compare in fp32 with the same weights: every method must write the tokens of `generate`. Raises Failed."""
    sizes, own = shared.sizes, subject(shared)
    made: dict[str, Predictor] = predictors(shared, own.teacher())
    teacher = own.teacher(torch.float32)
    settings = BenchSettings(max_new_tokens=sizes.exact_tokens, repeats=1, guard=GUARD)
    loaded = {
        kind: LoadedPredictor(copy.deepcopy(predictor).float(), tree_for(shared, predictor), Path(kind))
        for kind, predictor in made.items()
    }
    methods = make_methods(teacher, loaded, ["hf", "ar", *loaded], settings)
    prompts = questions(shared, teacher, sizes.exact_prompts)
    bout = Bout(teacher, methods, prompts, sizes.exact_tokens, 1, work.clock)
    work.values |= {"reference": "hf", "layers": teacher.stack.name}

    def report() -> None:
        found = {name: by_reference["hf"] for name, by_reference in bout.identical().items() if "hf" in by_reference}
        work.values["methods"] = as_json(found)
        work.key = ", ".join(f"{name} {one['identical']}/{one['compared']}" for name, one in found.items())
        work.tables[:] = [replace(_identical(bout), title="fp32: answers compared")]
        work.save()

    bout.run(report)
    found = work.values["methods"]
    if not found or any(one["identical"] < one["compared"] for one in found.values()):
        raise Failed(f"fp32 outputs differ from generate's: {work.key or 'nothing was compared'}")


def looped(shared: Shared, work: Work) -> None:
    """Bench SPEED on the embedded looped teacher with its embedded predictor, on embedded questions."""
    sizes = shared.sizes
    name = str(shared.dtype).removeprefix("torch.")
    teacher = load_teacher(TeacherConfig.model_validate({"model": LOOPED, "dtype": name}), shared.device)
    lean(teacher)
    predictor = load_predictor(predictor_folder(LOOPED_PREDICTOR), teacher, force=True)
    found = load_prompts("arithmetic", None, sizes.bench_prompts)
    prompts = [BenchPrompt(encode_prompt(item.messages, teacher.tokenizer), "arithmetic") for item in found]
    settings = BenchSettings(max_new_tokens=sizes.bench_tokens, repeats=1, guard=GUARD)
    loaded = {"speed": LoadedPredictor(predictor, None, Path(LOOPED_PREDICTOR))}
    methods = make_methods(teacher, loaded, ["hf", "ar", "speed"], settings)
    bout = Bout(teacher, methods, prompts, sizes.bench_tokens, 1, work.clock)

    def report() -> None:
        rows = BenchReport({}, teacher.describe(), {"reference": "hf"}, bout.rows("hf"))
        work.values |= {"rows": [as_json(row) for row in rows.rows], "identical": as_json(bout.identical())}
        work.key = speeds(rows)
        headers, cells = bench_cells(rows)
        work.tables[:] = [Table(f"SPEED on the embedded looped teacher, {name}", headers, cells), _pipelines(rows)]
        work.save()

    bout.run(report)
    if work.clock.allows(TICK_SECONDS if shared.device.type == "cuda" else 0.0, "the timing of ticks"):
        assert isinstance(predictor, SpeedPredictor)
        bout.tick = measure_tick(teacher, predictor, TICK_CONTEXT)
        report()
