"""Bench loop: all methods in one process, on the same prompts, warmed up and interleaved. Prefill and decoding are
timed separately.

Prefill gives the first new token, so decode seconds belong to `len(token_ids) - 1` tokens. The sequences of a batch
share its time: seconds are pooled over batches, and the bootstrap draws batches. The turns of a conversation are
decoded one after the other and belong to one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from firp_cli.decoding.engine import Engine
from firp_cli.errors import UsageError
from firp_cli.evaluation.bench_groups import teacher_labels
from firp_cli.evaluation.bench_prompts import (
    Batch,
    BenchPrompt,
    decode_turns,
    fit_prompts,
    longest_batch,
    make_batches,
)
from firp_cli.evaluation.environment import measurement_environment
from firp_cli.evaluation.lossless import compare_tokens
from firp_cli.evaluation.methods import BenchSettings, Method
from firp_cli.evaluation.rows import BatchRun, Runs, bench_rows, lossless, runs_of
from firp_cli.machine import readable_bytes
from firp_cli.results import UNDRAFTED, BenchReport, Divergence, Generation, Progress, no_progress
from firp_cli.teacher.teacher import Teacher


def memory_line(
    methods: Sequence[Method], prompts: Sequence[BenchPrompt], settings: BenchSettings, max_positions: int
) -> str:
    """Return one line with the K/V cache size of the largest batch, for each method with an engine of this package."""
    room = max_positions - settings.max_new_tokens
    fitting = [
        prompt.asked(max_positions, settings.max_new_tokens).longest
        for prompt in prompts
        if len(prompt.token_ids) <= room
    ] or [0]
    batch, longest = min(settings.batch_size, len(fitting)), max(fitting)
    sizes = [
        f"{method.name} {readable_bytes(method.engine.cache_bytes(batch, longest, settings.max_new_tokens))}"
        for method in methods
        if method.engine is not None
    ]
    positions = longest + settings.max_new_tokens
    return f"K/V cache for {batch} x {positions} positions: {', '.join(sizes) or 'none'}"


def measure(
    methods: Sequence[Method],
    prompts: Sequence[BenchPrompt],
    batches: Sequence[Batch],
    settings: BenchSettings,
    progress: Progress = no_progress,
    keep_partial: bool = False,
) -> Runs:
    """Decode every batch with every method `repeats` times and fold the repeats.

    Methods take turns within each batch, and the first one changes from batch to batch and from repeat to repeat, so
    that a slowdown of the machine affects all of them. With `keep_partial`, KeyboardInterrupt ends the measurement: the
    repeats that are complete by then are folded; without one it is raised again.
    """
    total = len(methods) * (settings.warmup + settings.repeats * len(batches))
    repeats: dict[str, list[list[list[Generation]]]] = {method.name: [[] for _ in batches] for method in methods}
    longest = longest_batch(prompts, batches)
    context = max(prompt.longest for prompt in prompts)
    sizes = {len(places) for batch in batches for places in batch.places()}
    for method in methods:
        if isinstance(method.engine, Engine):
            for size in sorted(sizes, reverse=True):  # a larger cache drops graphs
                method.engine.capture(size, context, settings.max_new_tokens)
    whole = settings.repeats
    try:
        for done, (method, place, counted) in enumerate(turns(methods, len(batches), settings, longest), start=1):
            generations = decode_turns(method.generate, prompts, batches[place], settings.max_new_tokens)
            if counted:
                repeats[method.name][place].append(generations)
            progress(done, total)
    except KeyboardInterrupt:
        whole = min(len(made) for each in repeats.values() for made in each)
        if not keep_partial or not whole:
            raise
    return {
        name: [fold(batch, made[:whole]) for batch, made in zip(batches, each, strict=True)]
        for name, each in repeats.items()
    }


def turns(
    methods: Sequence[Method], batches: int, settings: BenchSettings, warm: int = 0
) -> Iterator[tuple[Method, int, bool]]:
    """Yield (method, index of the batch, True if it counts) in the order of measuring. `warm`: the warm-up batch."""
    for method in methods:
        for _ in range(settings.warmup):
            yield method, warm, False
    for repeat in range(settings.repeats):
        for place in range(batches):
            turn = (repeat + place) % len(methods)
            for method in [*methods[turn:], *methods[:turn]]:
                yield method, place, True


def follow_bench(
    prompts: Sequence[BenchPrompt],
    methods: Sequence[Method],
    settings: BenchSettings,
    max_positions: int,
    skip_long: bool = False,
) -> None:
    """Run the part of a rank other than the first in `run_bench`: methods that all ranks share, in the same order."""
    fitting, _ = fit_prompts(prompts, max_positions, settings.max_new_tokens, skip_long)
    batches = make_batches(fitting, settings.batch_size)
    for method, place, _ in turns(methods, len(batches), settings, longest_batch(fitting, batches)):
        if method.on_all_ranks:
            decode_turns(method.generate, fitting, batches[place], settings.max_new_tokens)


def fold(batch: Batch, repeats: Sequence[Sequence[Generation]]) -> BatchRun:
    """Fold the repeats of a batch (answers in the order of `Batch.places`) into one run: the tokens of the first repeat
    at the median seconds per token. The times of a conversation's turns are summed.

    Greedy repeats write the same tokens, so this is the median time; sampled ones differ in length, so times are
    compared per token.
    """
    places = batch.places()
    turns = [turn for turn, asked in enumerate(places) for _ in asked]

    def total(repeat: Sequence[Generation], seconds: Callable[[Generation], float]) -> float:
        slowest = [0.0] * len(places)
        for turn, item in zip(turns, repeat, strict=True):
            slowest[turn] = max(slowest[turn], seconds(item))
        return sum(slowest)

    tokens = [sum(max(0, len(item.token_ids) - 1) for item in repeat) for repeat in repeats]
    times = [total(repeat, lambda item: item.decode_seconds) for repeat in repeats]
    per_token = median(time / max(1, count) for time, count in zip(times, tokens, strict=True))
    return BatchRun(
        dataset=batch.dataset,
        category=batch.category,
        numbers=[batch.numbers[place] for asked in places for place in asked],
        generations=list(repeats[0]),
        prefill_seconds=median(total(repeat, lambda item: item.prefill_seconds) for repeat in repeats),
        decode_seconds=per_token * tokens[0],
        decode_tokens=tokens[0],
        turns=turns,
        repeats=len(repeats),
    )


def _repeats_made(runs: Runs, settings: BenchSettings) -> dict[str, Any]:
    """Return the number of repeats as a setting of the report; `interrupted` where it is less than asked for."""
    made = min((run.repeats for each in runs.values() for run in each), default=settings.repeats)
    cut = {"interrupted": f"interrupted after {made} of {settings.repeats} repeats"} if made < settings.repeats else {}
    return {"repeats": made, **cut}


def reference_method(names: Sequence[str], temperature: float) -> str | None:
    """Return the method whose tokens the others must reproduce: `hf`, else `ar`; None when sampling."""
    if temperature > 0:
        return None
    return next((name for name in ("hf", "ar") if name in names), None)


def run_bench(
    teacher: Teacher,
    prompts: Sequence[BenchPrompt],
    methods: Sequence[Method],
    settings: BenchSettings,
    *,
    skip_long: bool = False,
    progress: Progress = no_progress,
    keep_partial: bool = False,
) -> BenchReport:
    """Measure the methods on the prompts; `keep_partial`: an interruption leaves the complete repeats.

    Raises CapacityError, UsageError.
    """
    if settings.batch_size < 1 or settings.repeats < 1:
        raise UsageError(f"batch size and repeats must be at least 1, got {settings.batch_size} and {settings.repeats}")
    methods = [method for method in methods if method.reason is None]
    fitting, skipped = fit_prompts(prompts, teacher.max_positions, settings.max_new_tokens, skip_long)
    batches = make_batches(fitting, settings.batch_size)
    runs = measure(methods, fitting, batches, settings, progress, keep_partial)
    names = [method.name for method in methods]
    reference = reference_method(names, settings.temperature)
    divergences: dict[str, dict[int, Divergence | None]] = {}
    against_ar: dict[str, dict[int, Divergence | None]] = {}
    for name in names:
        if reference and name != reference:
            divergences[name] = compare_tokens(teacher, fitting, runs[reference], runs[name])
        # in half precision `ar` itself differs from the reference, whose products round otherwise
        if reference == "hf" and teacher.dtype != torch.float32 and "ar" in names and name not in UNDRAFTED:
            against_ar[name] = compare_tokens(teacher, fitting, runs["ar"], runs[name])
    rows = []
    for method in methods:
        method_rows = bench_rows(method.name, runs, divergences.get(method.name, {}), settings.temperature)
        for row in method_rows:
            row.predictor, row.tree, row.batch_size = method.predictor, method.tree, settings.batch_size
            if method.name in against_ar:
                own = runs_of(row.dataset, row.category, runs[method.name])
                row.lossless_ar = lossless(own, against_ar[method.name])
        if method.add_details is not None:
            method.add_details(method_rows, runs[method.name], settings)
        rows += method_rows
    order = {name: place for place, name in enumerate(dict.fromkeys((row.dataset, row.category) for row in rows))}
    rows.sort(key=lambda row: order[row.dataset, row.category])
    return BenchReport(
        environment=measurement_environment(teacher),
        teacher=teacher.describe(),
        settings={
            **asdict(settings),
            **_repeats_made(runs, settings),
            "reference": reference,
            "methods": names,
            "prompts": len(fitting),
            "turns_asked": sum(prompt.turns for prompt in fitting),
            "turns_not_asked": sum(prompt.turns_not_asked for prompt in fitting),
        },
        rows=rows,
        skipped_long=skipped,
    )


def merge_reports(reports: Sequence[BenchReport]) -> BenchReport:
    """Return one report of several teachers' benches under the same settings, with each row labelled by its teacher.

    A single report is returned unchanged.
    """
    first = reports[0]
    if len(reports) == 1:
        return first
    labels = teacher_labels([str(report.teacher["name"]) for report in reports])
    methods = {label: report.settings["methods"] for label, report in zip(labels, reports, strict=True)}
    prompts = {label: report.settings["prompts"] for label, report in zip(labels, reports, strict=True)}
    settings = {
        **{key: value for report in reports for key, value in report.settings.items() if key == "interrupted"},
        "methods": list(dict.fromkeys(name for each in methods.values() for name in each)),
        "methods_by_teacher": methods,
        "prompts": max(prompts.values()),
        "prompts_by_teacher": prompts,
        "turns_by_teacher": {
            label: report.settings["turns_asked"] for label, report in zip(labels, reports, strict=True)
        },
        **{name: max(report.settings[name] for report in reports) for name in ("turns_asked", "turns_not_asked")},
    }
    return replace(
        first,
        settings={**first.settings, **settings},
        rows=[replace(row, teacher=label) for label, each in zip(labels, reports, strict=True) for row in each.rows],
        skipped_long=sum(report.skipped_long for report in reports),
        left_out_trained=max(report.left_out_trained for report in reports),
        teachers=[report.teacher for report in reports],
    )
