"""Bench loop: all methods in one process, on the same prompts, warmed up and interleaved. Prefill and decoding are
timed separately.

Prefill gives the first new token, so decode seconds belong to `len(token_ids) - 1` tokens. The sequences of a batch
share its time: seconds are pooled over batches, and the bootstrap draws batches. The turns of a conversation are
decoded one after the other and belong to one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from firp_cli.decoding.engine import Engine
from firp_cli.errors import MethodError, UsageError, first_line
from firp_cli.evaluation.answer_runs import Runs, batch_run, records_of, runs_of
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
from firp_cli.evaluation.methods import BASELINES, BenchSettings, Method
from firp_cli.evaluation.rows import bench_rows, drift_warnings, groups_of, lossless, row_without_figures
from firp_cli.machine import readable_bytes
from firp_cli.results import BenchReport, BenchRow, Divergence, Generation, Progress, no_progress
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
    """Decode every batch with every method `repeats` times.

    Methods take turns within each batch, and the first one changes from batch to batch and from repeat to repeat, so
    that a slowdown of the machine affects all of them. A method that raises MethodError in its warm-up is left out, and
    its `reason` is set. With `keep_partial`, KeyboardInterrupt ends the measurement: the repeats that are complete by
    then are returned; without one it is raised again.
    """
    running = [method for method in methods if not method.reason]
    _capture(running, prompts, batches, settings)
    total, done = len(running) * (settings.warmup + settings.repeats * len(batches)), 0
    longest = batches[longest_batch(prompts, batches)]
    for method in running:
        try:
            for _ in range(settings.warmup):
                decode_turns(method.generate, prompts, longest, settings.max_new_tokens)
                progress(done := done + 1, total)
        except MethodError as error:
            method.reason = first_line(error)
    running = [method for method in running if not method.reason]
    repeats: dict[str, list[list[list[Generation]]]] = {method.name: [[] for _ in batches] for method in running}
    whole, total = settings.repeats, done + len(running) * settings.repeats * len(batches)
    try:
        for method, place in turns(running, len(batches), settings.repeats):
            repeats[method.name][place].append(
                decode_turns(method.generate, prompts, batches[place], settings.max_new_tokens)
            )
            progress(done := done + 1, total)
    except KeyboardInterrupt:
        whole = min(len(made) for each in repeats.values() for made in each)
        if not keep_partial or not whole:
            raise
    return {
        name: [
            batch_run(batch, made[:whole], name, number, prompts)
            for number, (batch, made) in enumerate(zip(batches, each, strict=True))
        ]
        for name, each in repeats.items()
    }


def _capture(
    methods: Sequence[Method], prompts: Sequence[BenchPrompt], batches: Sequence[Batch], settings: BenchSettings
) -> None:
    """Capture the steps of every batch size as graphs, so that no timed answer does."""
    context = max(prompt.longest for prompt in prompts)
    sizes = {len(places) for batch in batches for places in batch.places()}
    for method in methods:
        if isinstance(method.engine, Engine):
            for size in sorted(sizes, reverse=True):  # a larger cache drops graphs
                method.engine.capture(size, context, settings.max_new_tokens)


def turns(methods: Sequence[Method], batches: int, repeats: int) -> Iterator[tuple[Method, int]]:
    """Yield (method, index of the batch) in the order of measuring."""
    for repeat in range(repeats):
        for place in range(batches):
            turn = (repeat + place) % max(1, len(methods))
            for method in [*methods[turn:], *methods[:turn]]:
                yield method, place


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
    longest = longest_batch(fitting, batches)
    warm_ups = [(method, longest) for method in methods for _ in range(settings.warmup)]
    for method, place in [*warm_ups, *turns(methods, len(batches), settings.repeats)]:
        if method.on_all_ranks:
            decode_turns(method.generate, fitting, batches[place], settings.max_new_tokens)


def _repeats_made(runs: Runs, settings: BenchSettings) -> dict[str, Any]:
    """Return the number of repeats as a setting of the report; `interrupted` where it is less than asked for."""
    made = min((len(run.repeats) for each in runs.values() for run in each), default=settings.repeats)
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
    fitting, skipped = fit_prompts(prompts, teacher.max_positions, settings.max_new_tokens, skip_long)
    runs = measure(methods, fitting, make_batches(fitting, settings.batch_size), settings, progress, keep_partial)
    if not runs:
        reasons = "; ".join(f"{method.name}: {method.reason}" for method in methods)
        raise UsageError(f"no method can be measured: {reasons}")
    reference = reference_method(list(runs), settings.temperature)
    return BenchReport(
        environment=measurement_environment(teacher),
        teacher=teacher.describe(),
        settings={
            **asdict(settings),
            **_repeats_made(runs, settings),
            "reference": reference,
            "methods": [method.name for method in methods],
            "prompts": len(fitting),
            "turns_asked": sum(prompt.turns for prompt in fitting),
            "turns_not_asked": sum(prompt.turns_not_asked for prompt in fitting),
        },
        rows=_rows(teacher, fitting, methods, runs, settings, reference),
        skipped_long=skipped,
        warnings=drift_warnings(runs),
        records=records_of(runs),
    )


def _rows(
    teacher: Teacher,
    prompts: Sequence[BenchPrompt],
    methods: Sequence[Method],
    runs: Runs,
    settings: BenchSettings,
    reference: str | None,
) -> list[BenchRow]:
    """Return the rows of all methods, by data set and category."""
    rows: list[BenchRow] = []
    datasets = list(dict.fromkeys(prompt.dataset for prompt in prompts))
    for method in methods:
        if method.reason:
            rows += [
                row_without_figures(name, method.name, method.reason, settings.batch_size, settings.temperature)
                for name in datasets
            ]
            continue
        name, own = method.name, runs[method.name]
        divergences: dict[int, Divergence | None] = {}
        if reference and name != reference:
            divergences = compare_tokens(teacher, prompts, runs[reference], own)
        made = bench_rows(name, runs, divergences, settings.temperature)
        for row in made:
            row.predictor, row.tree, row.batch_size = method.predictor, method.tree, settings.batch_size
        # in half precision `ar` itself differs from the reference, whose products round otherwise
        if reference == "hf" and teacher.dtype != torch.float32 and "ar" in runs and name not in BASELINES:
            against_ar = compare_tokens(teacher, prompts, runs["ar"], own)
            for row in made:
                row.lossless_ar = lossless(runs_of(row.dataset, row.category, own), against_ar)
        if method.add_details is not None:
            method.add_details(made, own, settings)
        rows += made
    order = {group: place for place, group in enumerate(groups_of(next(iter(runs.values()))))}
    return sorted(rows, key=lambda row: order[row.dataset, row.category])
