"""Trees tuned for the trained teacher's predictors, the bench of all in the suite's dtype, the fp32 comparison, and
SPEED on the embedded looped teacher.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from firp_cli.data.conversations import encode_prompt
from firp_cli.data.prompts import load_prompts
from firp_cli.decoding.pipeline import PipelineEngine
from firp_cli.decoding.tree import TreeSpec, parse_tree
from firp_cli.decoding.tuned import spec_of
from firp_cli.evaluation.bench import (
    BenchPrompt,
    BenchSettings,
    LoadedPredictor,
    Method,
    eager_reasons,
    make_methods,
    run_bench,
)
from firp_cli.evaluation.calibration import TuneSettings
from firp_cli.evaluation.pipeline import pipeline_report
from firp_cli.evaluation.tune import tune
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.registry import load_predictor, predictor_folder
from firp_cli.recipe import TeacherConfig
from firp_cli.records import BenchReport, BenchRow, Generation, TuneReport, plain
from firp_cli.reports.pipeline import pipeline_cells, pipeline_note
from firp_cli.reports.tables import bench_cells
from firp_cli.teacher.stack import Teacher
from suite.sizes import Sizes
from suite.teacher import trained
from suite.work import Failed, Shared, Table, Work

DEFAULT_TREE = "dynamic:8"
TUNE_SECONDS, TUNE_BRIEF_SECONDS = 26.0, 8.0  # of one predictor on a GPU, all of it and the least of it, about
PASSES_SHARE = 0.2  # of a predictor's tuning, for measuring passes
GRAPHED = 1.0  # all methods that run as graphs over transformers' `generate`, about
ONE_DEVICE = "no gain there: every tick runs all groups of layers"
LOOPED, LOOPED_PREDICTOR = "arithmetic-looped", "speed"


@dataclass
class Traced:
    """How a method decoded: its tree, and by prompt its length and the tokens that each step emitted."""

    kind: str
    tree: TreeSpec
    prompts: list[int]
    emitted: list[list[int]]


def questions(shared: Shared, teacher: Teacher, most: int, skip: int = 0) -> list[BenchPrompt]:
    """Held-out questions of every source, those behind the first `skip`."""
    found = []
    for source, asked in shared.found["corpus"].questions.items():
        encoded = [encode_prompt(messages, teacher.tokenizer) for messages in asked[skip : skip + most]]
        found += [BenchPrompt(ids, source) for ids in encoded]
    return found


def tune_trees(shared: Shared, work: Work) -> None:
    """Trees of each predictor that drafts them; later parts find `trees`, kind to specification at the first batch
    size.
    """
    sizes, teacher = shared.sizes, trained(shared)
    prompts = questions(shared, teacher, sizes.tune_prompts, skip=max(sizes.bench_prompts, sizes.exact_prompts))
    trees: dict[str, TreeSpec] = {}
    shared.found["trees"] = trees
    headers = ["kind", "batch", "tree", "foretold length", "foretold speedup", "tried: length, speedup", "seconds"]
    table = Table("Tuned trees", headers)
    work.tables.append(table)
    wanted = [(kind, predictor) for kind, predictor in made(shared) if not predictor.pipeline][: sizes.tuned]
    whole_seconds = TUNE_SECONDS
    for number, (kind, predictor) in enumerate(wanted):
        seconds = work.clock.left() / (len(wanted) - number)
        brief = shared.device.type == "cuda" and seconds < whole_seconds
        if brief and not work.clock.allows(TUNE_BRIEF_SECONDS, f"tuning {kind}"):
            continue
        if brief:
            work.clock.cuts.append(f"{kind} tuned for batch {sizes.tune_batches[0]} alone and not tried")
        settings = tune_settings(sizes, seconds, brief)
        began = time.perf_counter()
        report = tune(teacher, predictor, [prompt.token_ids for prompt in prompts], settings)
        spent = time.perf_counter() - began
        if not brief:
            whole_seconds = spent
        trees[kind] = spec_of(report.entries[0], predictor.steps)
        work.values[kind] = plain(report)
        table.cells += _tuned_cells(kind, report, spent)
        work.key = ", ".join(f"{kind} {tree}" for kind, tree in trees.items())


def tune_settings(sizes: Sizes, seconds: float, brief: bool) -> TuneSettings:
    """What `tune` may do in so many seconds. `brief`: the first batch size alone, and no trial."""
    return TuneSettings(
        batches=sizes.tune_batches[:1] if brief else sizes.tune_batches,
        max_new_tokens=sizes.bench_tokens,
        most_rows=sizes.tune_rows,
        trial=not brief,
        repeats=1,
        again=True,
        seconds=min(sizes.tune_seconds, PASSES_SHARE * seconds),
        sittings=sizes.tune_sittings,
    )


def _tuned_cells(kind: str, report: TuneReport, spent: float) -> list[list[str]]:
    """A line for each batch size; the seconds are those of all of them."""
    cells = []
    for entry, trial in zip(report.entries, report.batches, strict=True):
        foretold, tried = entry.predicted, trial.measured
        cells.append(
            [
                kind,
                str(entry.batch_size),
                entry.tree if entry.tree == trial.tree else f"{entry.tree} (best: {trial.tree})",
                f"{foretold.accepted_length:.2f}",
                f"{foretold.speedup:.2f}",
                f"{tried.accepted_length:.2f}, {tried.speedup:.2f}" if tried else "not tried",
                f"{spent:.0f}",
            ]
        )
    return cells


def bench(shared: Shared, work: Work) -> None:
    """`hf`, `ar`, every predictor that drafts trees with its tuned one, and those that feed a pipeline, in the suite's
    dtype; later parts find `traces`, of the trees.
    """
    sizes, teacher = shared.sizes, trained(shared)
    settings = BenchSettings(max_new_tokens=sizes.bench_tokens, repeats=sizes.bench_repeats, guard=False)
    loaded = {kind: LoadedPredictor(predictor, tree_for(shared, kind), Path(kind)) for kind, predictor in made(shared)}
    methods = make_methods(teacher, loaded, ["hf", "ar", *loaded], settings)
    count = affordable(shared, teacher, work, methods, sizes.bench_prompts, settings)
    prompts = questions(shared, teacher, count)
    kept: dict[str, list[Generation]] = {}
    report = run_bench(teacher, prompts, [recorded(method, kept) for method in untimed(methods)], settings)
    for row in whole(report):
        if loaded.get(row.method) and loaded[row.method].predictor.pipeline:
            row.pipeline = pipeline_report(kept[row.method][-len(prompts) :], shared=False)
    work.values |= plain(report)
    work.values |= {"prompts_of_each_source": count, "without_graphs_because": eager_reasons(methods)}
    work.values["texts"] = {name: made[0].text for name, made in kept.items()}
    shared.found["traces"] = [
        Traced(
            kind,
            item.tree,
            [one.prompt_tokens for one in kept[kind][-len(prompts) :]],
            [one.emitted for one in kept[kind][-len(prompts) :]],
        )
        for kind, item in loaded.items()
        if isinstance(item.tree, TreeSpec)
    ]
    work.key = speeds(report)
    headers, cells = bench_cells(report)
    work.tables.append(Table(f"Bench, {work.values['teacher']['dtype']}", headers, cells))
    work.tables += [_pipelines(report), _divergences(report)]
    work.values["note"] = pipeline_note(report)


def made(shared: Shared) -> list[tuple[str, Predictor]]:
    """The predictors that there are."""
    return list(shared.found["predictors"].items())


def tree_for(shared: Shared, kind: str) -> TreeSpec | None:
    """The tuned tree, or DEFAULT_TREE where none was tuned or none pays; None for a pipeline."""
    tuned, predictor = shared.found.get("trees", {}).get(kind), shared.found["predictors"][kind]
    if predictor.pipeline:
        return None
    return parse_tree(DEFAULT_TREE, predictor.steps) if tuned is None or tuned.kind == "none" else tuned


def affordable(
    shared: Shared, teacher: Teacher, work: Work, methods: Sequence[Method], most: int, settings: BenchSettings
) -> int:
    """Prompts of each source that there is time for, at most so many: the methods without graphs (transformers'
    `generate`, pipelines) answer the first of each, and the others take GRAPHED of `generate`.
    """
    first = questions(shared, teacher, 1)
    slow = [method for method in methods if method.engine is None or isinstance(method.engine, PipelineEngine)]
    spent: dict[str, float] = {}
    for method in slow:
        method.generate([first[0].token_ids], 2)
        began = time.perf_counter()
        for prompt in first:
            method.generate([prompt.token_ids], settings.max_new_tokens)
        spent[method.name] = time.perf_counter() - began
    one = (sum(spent.values()) + GRAPHED * spent["hf"]) * settings.repeats
    count = int(work.clock.left() / one)
    if count < most:
        work.clock.cuts.append(f"{max(1, count)} prompts of each source instead of {most}")
    return max(1, min(most, count))


def untimed(methods: Sequence[Method]) -> list[Method]:
    """The methods without the timing of a pipeline's ticks, which takes seconds; the part `speed` has one."""
    return [replace(method, exits=None) for method in methods]


def recorded(method: Method, kept: dict[str, list[Generation]]) -> Method:
    """The method, which remembers what it wrote."""

    def generate(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Generation]:
        written = method.generate(prompts, max_new_tokens)
        kept.setdefault(method.name, []).extend(written)
        return written

    return replace(method, generate=generate)


def whole(report: BenchReport) -> list[BenchRow]:
    """One row of each method: over all data sets where there are several."""
    rows = [row for row in report.rows if row.category == "all"]
    return [row for row in rows if row.dataset == "all"] or rows


def speeds(report: BenchReport) -> str:
    """`firp 2.1 tokens a step, 1.50 x ar, ...`; a pipeline's are tokens in as many ticks as it has loops."""
    told = []
    for row in whole(report):
        if row.method not in ("ar", "hf"):
            unit = f"in {row.pipeline.loops} ticks" if row.pipeline else "a step"
            told.append(
                f"{row.method} {row.accepted_length:.2f} tokens {unit}, {row.speedup or float('nan'):.2f} x ar"
                f" ({row.lossless.identical}/{row.lossless.compared} identical)"
            )
    return ", ".join(told)


def _pipelines(report: BenchReport) -> Table:
    """What pipelines did, which a bench on one device cannot show in speed, and whether their outputs are right."""
    rows = [row for row in whole(report) if row.pipeline]
    headers, cells = pipeline_cells(replace(report, rows=rows))
    same = [f"{row.lossless.identical}/{row.lossless.compared}" for row in rows]
    cells = [[*line, identical] for line, identical in zip(cells, same, strict=True)]
    return Table(f"Pipelines on one device ({ONE_DEVICE})", [*headers, "identical"], cells)


def _divergences(report: BenchReport) -> Table:
    """First differences from the reference, with the gap between the reference's logits of the two tokens."""
    cells = [
        [row.method, str(mark.prompt), str(mark.position), f"{mark.logit_gap:.4g}"]
        for row in whole(report)
        for mark in row.lossless.divergences
    ]
    return Table(
        f"First differences from `{report.settings['reference']}`", ["method", "prompt", "token", "gap"], cells
    )


def exact(shared: Shared, work: Work) -> None:
    """The same weights in fp32: every method must write what `generate` writes, token for token. Raises Failed."""
    sizes = shared.sizes
    teacher = trained(shared, torch.float32)
    settings = BenchSettings(max_new_tokens=sizes.bench_tokens, repeats=1, warmup=0, guard=False)
    loaded = {
        kind: LoadedPredictor(copy.deepcopy(predictor).float(), tree_for(shared, kind), Path(kind))
        for kind, predictor in made(shared)
    }
    methods = make_methods(teacher, loaded, ["hf", "ar", *loaded], settings)
    count = affordable(shared, teacher, work, methods, sizes.exact_prompts, settings)
    report = run_bench(teacher, questions(shared, teacher, count), untimed(methods), settings)
    rows = {row.method: row.lossless for row in whole(report) if row.method != "hf"}
    work.values |= {"reference": "hf", "methods": {name: plain(lossless) for name, lossless in rows.items()}}
    work.key = ", ".join(f"{name} {one.identical}/{one.compared}" for name, one in rows.items())
    cells = [[name, f"{one.identical}/{one.compared}"] for name, one in rows.items()]
    work.tables += [Table("fp32 against `generate`", ["method", "identical"], cells), _divergences(report)]
    different = [name for name, one in rows.items() if one.identical < one.compared]
    if different:
        raise Failed(f"fp32 outputs differ from generate's: {work.key}")


def looped(shared: Shared, work: Work) -> None:
    """SPEED on the embedded looped teacher with its embedded predictor, on embedded questions."""
    sizes = shared.sizes
    name = str(shared.dtype).removeprefix("torch.")
    teacher = Teacher.load(TeacherConfig.model_validate({"model": LOOPED, "dtype": name}), shared.device)
    reason = teacher.fuse()
    if reason:
        raise RuntimeError(reason)
    predictor = load_predictor(predictor_folder(LOOPED_PREDICTOR), teacher, force=True)
    found = load_prompts("arithmetic", None, sizes.bench_prompts)
    prompts = [BenchPrompt(encode_prompt(item.messages, teacher.tokenizer), "arithmetic") for item in found]
    settings = BenchSettings(max_new_tokens=sizes.bench_tokens, repeats=sizes.bench_repeats, guard=False)
    loaded = {"speed": LoadedPredictor(predictor, None, Path(LOOPED_PREDICTOR))}
    report = run_bench(teacher, prompts, make_methods(teacher, loaded, ["hf", "ar", "speed"], settings), settings)
    work.values |= plain(report)
    work.key = speeds(report)
    headers, cells = bench_cells(report)
    work.tables.append(Table(f"SPEED on the embedded looped teacher, {name}", headers, cells))
