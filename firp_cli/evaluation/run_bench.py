"""Fair measuring: every method in one process, on the same prompts, warmed up, interleaved, prefill apart from decode.

The first new token comes from prefill, so decode seconds pay for `len(token_ids) - 1` tokens. With several sequences in
a batch the batch shares its time: seconds are pooled over batches, and the bootstrap draws batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_file import TunedTrees
from firp_cli.errors import CapacityError, UsageError
from firp_cli.evaluation.bench_groups import teacher_labels
from firp_cli.evaluation.environment import measurement_environment
from firp_cli.evaluation.lossless import compare_tokens
from firp_cli.evaluation.methods import BenchSettings, Method
from firp_cli.evaluation.rows import ALL, BatchRun, Runs, bench_rows
from firp_cli.evaluation.speed_ticks import measure_tick, pipeline_report
from firp_cli.machine import readable_bytes
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.results import BenchReport, BenchRow, Divergence, Generation, Progress
from firp_cli.teacher.teacher import Teacher


@dataclass(frozen=True)
class BenchPrompt:
    """One question, ready for the teacher."""

    token_ids: list[int]
    dataset: str
    category: str = ""


@dataclass
class Batch:
    """Prompts decoded together: one data set, one category. `numbers` are their places in the prompt list."""

    dataset: str
    category: str
    numbers: list[int] = field(default_factory=list)


def fit_prompts(
    prompts: Sequence[BenchPrompt], max_positions: int, max_new_tokens: int, skip_long: bool
) -> tuple[list[BenchPrompt], int]:
    """The prompts that leave room for the answer, and how many were skipped.

    Raises CapacityError when one is too long and `skip_long` is off, or when none is left.
    """
    room = max_positions - max_new_tokens
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= room]
    skipped = len(prompts) - len(fitting)
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    if skipped and not skip_long:
        raise CapacityError(
            f"{skipped} of {len(prompts)} prompts are too long (the longest has {longest} tokens): the teacher's "
            f"context of {max_positions} leaves {room} beside {max_new_tokens} new tokens\n"
            "--skip-long leaves them out and counts them, a smaller --max-new-tokens makes room"
        )
    if not fitting:
        raise CapacityError(
            f"no prompt fits: the shortest has {min((len(prompt.token_ids) for prompt in prompts), default=0)} tokens, "
            f"the teacher's context of {max_positions} leaves {room} beside {max_new_tokens} new tokens"
        )
    return fitting, skipped


def spread(categories: Sequence[str], limit: int) -> list[int]:
    """Places of at most `limit` prompts, in order, taken from every category in turn, so that none is left out."""
    queues: dict[str, list[int]] = {}
    for place, category in enumerate(categories):
        queues.setdefault(category, []).append(place)
    rounds = max((len(queue) for queue in queues.values()), default=0)
    in_turn = [queue[turn] for turn in range(rounds) for queue in queues.values() if turn < len(queue)]
    return sorted(in_turn[:limit])


def make_batches(prompts: Sequence[BenchPrompt], size: int) -> list[Batch]:
    """Batches of `size` prompts that share data set and category, in the order of the prompts."""
    open_batches: dict[tuple[str, str], Batch] = {}
    batches = []
    for number, prompt in enumerate(prompts):
        key = (prompt.dataset, prompt.category)
        batch = open_batches.get(key)
        if batch is None or len(batch.numbers) == size:
            batch = open_batches[key] = Batch(*key)
            batches.append(batch)
        batch.numbers.append(number)
    return batches


def memory_line(
    methods: Sequence[Method], prompts: Sequence[BenchPrompt], settings: BenchSettings, max_positions: int
) -> str:
    """What the K/V caches of the largest batch will take, for each method that runs in our engine."""
    fitting = [len(prompt.token_ids) for prompt in prompts]
    fitting = [length for length in fitting if length + settings.max_new_tokens <= max_positions] or [0]
    batch, longest = min(settings.batch_size, len(fitting)), max(fitting)
    sizes = [
        f"{method.name} {readable_bytes(method.engine.cache_bytes(batch, longest, settings.max_new_tokens))}"
        for method in methods
        if method.engine is not None
    ]
    positions = longest + settings.max_new_tokens
    return f"K/V cache for {batch} x {positions} positions: {', '.join(sizes) or 'none of ours'}"


def measure(
    methods: Sequence[Method],
    prompts: Sequence[BenchPrompt],
    batches: Sequence[Batch],
    settings: BenchSettings,
    progress: Progress = lambda done, total: None,
) -> Runs:
    """Decode every batch with every method `repeats` times and fold the repeats.

    Methods take turns within each batch, and the one that begins changes from batch to batch and repeat to repeat, so
    that a machine that slows down slows them all.
    """
    total = len(methods) * (settings.warmup + settings.repeats * len(batches))
    repeats: dict[str, list[list[list[Generation]]]] = {method.name: [[] for _ in batches] for method in methods}
    longest = longest_batch(prompts, batches)
    for done, (method, place, counted) in enumerate(turns(methods, len(batches), settings, longest), start=1):
        generations = method.generate(_tokens(prompts, batches[place]), settings.max_new_tokens)
        if counted:
            repeats[method.name][place].append(generations)
        progress(done, total)
    return {
        name: [fold(batch, runs) for batch, runs in zip(batches, each, strict=True)] for name, each in repeats.items()
    }


def turns(
    methods: Sequence[Method], batches: int, settings: BenchSettings, warm: int = 0
) -> Iterator[tuple[Method, int, bool]]:
    """(method, number of the batch, whether it counts) in the order of measuring. `warm`: the batch to warm up with."""
    for method in methods:
        for _ in range(settings.warmup):
            yield method, warm, False
    for repeat in range(settings.repeats):
        for place in range(batches):
            turn = (repeat + place) % len(methods)
            for method in [*methods[turn:], *methods[:turn]]:
                yield method, place, True


def longest_batch(prompts: Sequence[BenchPrompt], batches: Sequence[Batch]) -> int:
    """The batch to warm up with: behind the longest prompt no buffer has to grow, and no step is captured anew."""
    lengths = [max(len(ids) for ids in _tokens(prompts, batch)) for batch in batches]
    return max(range(len(batches)), key=lambda place: lengths[place], default=0)


def _tokens(prompts: Sequence[BenchPrompt], batch: Batch) -> list[list[int]]:
    return [prompts[number].token_ids for number in batch.numbers]


def follow_bench(
    prompts: Sequence[BenchPrompt],
    methods: Sequence[Method],
    settings: BenchSettings,
    max_positions: int,
    skip_long: bool = False,
) -> None:
    """What a rank other than the first does during `run_bench`: its part of every pipeline, in the same order."""
    fitting, _ = fit_prompts(prompts, max_positions, settings.max_new_tokens, skip_long)
    batches = make_batches(fitting, settings.batch_size)
    for method, place, _ in turns(methods, len(batches), settings, longest_batch(fitting, batches)):
        if method.exits is not None:
            method.generate(_tokens(fitting, batches[place]), settings.max_new_tokens)


def fold(batch: Batch, repeats: Sequence[Sequence[Generation]]) -> BatchRun:
    """One run of a batch from its repeats: the first one's tokens at the median seconds per token.

    Greedy repeats write the same tokens, so this is the median time; sampled ones differ in length, so time is
    compared per token.
    """
    tokens = [sum(max(0, len(item.token_ids) - 1) for item in repeat) for repeat in repeats]
    seconds = [max(item.decode_seconds for item in repeat) for repeat in repeats]
    per_token = median(second / max(1, count) for second, count in zip(seconds, tokens, strict=True))
    return BatchRun(
        dataset=batch.dataset,
        category=batch.category,
        numbers=batch.numbers,
        generations=list(repeats[0]),
        prefill_seconds=median(max(item.prefill_seconds for item in repeat) for repeat in repeats),
        decode_seconds=per_token * tokens[0],
        decode_tokens=tokens[0],
    )


def reference_method(names: Sequence[str], temperature: float) -> str | None:
    """The method whose tokens the others must reproduce: transformers' `generate`, else `ar`; none when sampling."""
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
    progress: Progress = lambda done, total: None,
) -> BenchReport:
    """Measure the methods on the prompts. Raises CapacityError, UsageError."""
    if settings.batch_size < 1 or settings.repeats < 1:
        raise UsageError(f"batch size and repeats must be at least 1, got {settings.batch_size} and {settings.repeats}")
    fitting, skipped = fit_prompts(prompts, teacher.max_positions, settings.max_new_tokens, skip_long)
    batches = make_batches(fitting, settings.batch_size)
    runs = measure(methods, fitting, batches, settings, progress)
    names = [method.name for method in methods]
    reference = reference_method(names, settings.temperature)
    token_ids = [prompt.token_ids for prompt in fitting]
    divergences: dict[str, dict[int, Divergence | None]] = {}
    if reference:
        for name in names:
            if name != reference:
                divergences[name] = compare_tokens(teacher, token_ids, runs[reference], runs[name])
    rows = []
    for method in methods:
        own = bench_rows(method.name, runs, divergences.get(method.name, {}), settings.temperature)
        for row in own:
            row.predictor, row.tree, row.batch_size = method.predictor, method.tree, settings.batch_size
        _add_tuned(own, method, fitting, batches, settings)
        if method.exits is not None:
            _add_pipeline(own, method.exits, runs[method.name], teacher, settings)
        rows += own
    order = {name: place for place, name in enumerate(dict.fromkeys((row.dataset, row.category) for row in rows))}
    rows.sort(key=lambda row: order[row.dataset, row.category])
    return BenchReport(
        environment=measurement_environment(teacher),
        teacher=teacher.describe(),
        settings={**asdict(settings), "reference": reference, "methods": names, "prompts": len(fitting)},
        rows=rows,
        skipped_long=skipped,
    )


def merge_reports(reports: Sequence[BenchReport]) -> BenchReport:
    """One report of several teachers' benches, which ran under the same settings: every row says whose it is.

    A single report is returned as it is.
    """
    first = reports[0]
    if len(reports) == 1:
        return first
    labels = teacher_labels([str(report.teacher["name"]) for report in reports])
    methods = {label: report.settings["methods"] for label, report in zip(labels, reports, strict=True)}
    prompts = {label: report.settings["prompts"] for label, report in zip(labels, reports, strict=True)}
    settings = {
        "methods": list(dict.fromkeys(name for each in methods.values() for name in each)),
        "methods_by_teacher": methods,
        "prompts": max(prompts.values()),
        "prompts_by_teacher": prompts,
    }
    return replace(
        first,
        settings={**first.settings, **settings},
        rows=[replace(row, teacher=label) for label, each in zip(labels, reports, strict=True) for row in each.rows],
        skipped_long=sum(report.skipped_long for report in reports),
        teachers=[report.teacher for report in reports],
    )


def _add_tuned(
    rows: Sequence[BenchRow],
    method: Method,
    prompts: Sequence[BenchPrompt],
    batches: Sequence[Batch],
    settings: BenchSettings,
) -> None:
    """Give the rows of tuned trees the one that a typical batch took, and what was foretold of it."""
    trees = method.engine.tree if isinstance(method.engine, Engine) else None
    if not isinstance(trees, TunedTrees):
        return
    longest = median(max(map(len, _tokens(prompts, batch))) for batch in batches)
    context = int(longest) + settings.max_new_tokens // 2
    entry = trees.entry(settings.batch_size, context)
    for row in rows:
        row.tree = str(trees.at(settings.batch_size, context))
        row.predicted = entry.predicted if entry else None


def _add_pipeline(
    rows: Sequence[BenchRow],
    predictor: SpeedPredictor,
    runs: Sequence[BatchRun],
    teacher: Teacher,
    settings: BenchSettings,
) -> None:
    """Give a method's rows their pipeline's record, with the cost of a tick at the middle of a typical answer."""
    middle = [item.prompt_tokens + len(item.token_ids) // 2 for run in runs for item in run.generations]
    cost = measure_tick(teacher, predictor, int(median(middle))) if settings.ranks == 1 else None
    for row in rows:
        chosen = [run for run in runs if row.dataset in (ALL, run.dataset) and row.category in (ALL, run.category)]
        generations = [item for run in chosen for item in run.generations]
        row.pipeline = pipeline_report(generations, teacher.looped is not None, settings.ranks, cost)
