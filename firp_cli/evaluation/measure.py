"""Bench loop: all methods in one process, on the same prompts, warmed up and interleaved. Prefill and decoding are
timed separately.

Prefill gives the first new token, so decode seconds belong to `len(token_ids) - 1` tokens. The sequences of a batch
share its time: seconds are pooled over batches, and the bootstrap draws batches. The turns of a conversation are
decoded one after the other and belong to one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from firp_cli.decoding.engine import Engine
from firp_cli.errors import MethodError, UsageError, first_line
from firp_cli.evaluation.answer_runs import Runs, batch_run
from firp_cli.evaluation.baselines import STATIC
from firp_cli.evaluation.bench_prompts import (
    Batch,
    BenchPrompt,
    decode_turns,
    fit_prompts,
    longest_batch,
    make_batches,
)
from firp_cli.evaluation.environment import device_state, machine_line, measurement_environment
from firp_cli.evaluation.execution import execution, reset_captures
from firp_cli.evaluation.methods import BenchSettings, Method
from firp_cli.machine import readable_bytes
from firp_cli.records import Execution
from firp_cli.results import Generation, Progress, no_progress
from firp_cli.teacher.teacher import Teacher


@dataclass
class Measured:
    """Answers of a bench, not yet checked.

    Attributes:
        prompts: those that were decoded. skipped: number of those that were too long.
        environment: of the measurement. executions: how each method ran.
    """

    prompts: list[BenchPrompt]
    batches: list[Batch]
    runs: Runs
    skipped: int
    environment: dict[str, Any]
    executions: dict[str, Execution]


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
    that a slowdown of the machine affects all of them. A method that raises MethodError is left out, and its `reason`
    is set. With `keep_partial`, KeyboardInterrupt ends the measurement: the repeats that are complete by then are
    returned; without one it is raised again.
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
    reset_captures(running)
    repeats: dict[str, list[list[list[Generation]]]] = {method.name: [[] for _ in batches] for method in running}
    whole, total = settings.repeats, done + len(running) * settings.repeats * len(batches)
    try:
        for method, place in turns(running, len(batches), settings.repeats):
            if not method.reason:
                try:
                    made = decode_turns(method.generate, prompts, batches[place], settings.max_new_tokens)
                    repeats[method.name][place].append(made)
                except MethodError as error:
                    method.reason = first_line(error)
                    del repeats[method.name]
            progress(done := done + 1, total)
    except KeyboardInterrupt:
        whole = min((len(made) for each in repeats.values() for made in each), default=0)
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


def measure_bench(
    teacher: Teacher,
    prompts: Sequence[BenchPrompt],
    methods: Sequence[Method],
    settings: BenchSettings,
    *,
    skip_long: bool = False,
    progress: Progress = no_progress,
    keep_partial: bool = False,
) -> Measured:
    """Measure the methods on the prompts; `keep_partial`: an interruption leaves the complete repeats.

    Raises CapacityError, UsageError.
    """
    if settings.batch_size < 1 or settings.repeats < 1:
        raise UsageError(f"batch size and repeats must be at least 1, got {settings.batch_size} and {settings.repeats}")
    fitting, skipped = fit_prompts(prompts, teacher.max_positions, settings.max_new_tokens, skip_long)
    batches, environment = make_batches(fitting, settings.batch_size), measurement_environment(teacher)
    runs = measure(methods, fitting, batches, settings, progress, keep_partial)
    if not runs:
        reasons = "; ".join(f"{method.name}: {method.reason}" for method in methods)
        raise UsageError(f"no method can be measured: {reasons}")
    environment |= {"device_state_after": state} if (state := device_state(teacher.device)) else {}
    measured = [method for method in methods if method.name in runs]
    executions = {method.name: execution(method, teacher, method.name == STATIC) for method in measured}
    for ran in executions.values():
        ran.machine = machine_line(environment)
    return Measured(fitting, batches, runs, skipped, environment, executions)
