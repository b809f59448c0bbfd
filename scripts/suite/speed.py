"""Autoregressive decoding of random teachers against the bandwidth of the device, beside transformers' `generate`;
prompts and batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.evaluation.hf_generate import HuggingFaceGenerate
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.teacher import Teacher
from suite.probes import Timed, time_plain, time_step
from suite.shapes import cache_bytes, random_predictor, sections, shaped, weight_bytes
from suite.work import Failed, Shared, Table, Work

REPEATS = 3
TREES = ("chain", "dynamic:8@3", "dynamic:16@4")  # trees of the batches
PROMPT_SEED = 5
HF_SECONDS = 6.0  # seconds of `generate` for REPEATS + 1 answers, about
LEAN_COMPILE_SECONDS = 20.0  # seconds of compiling and timing the lean layers, about
COMPILE_SECONDS = 10.0, 1.2  # seconds of compiling a static cache's forward, and each of its layers, about


def random_prompts(teacher: Teacher, count: int, length: int) -> list[list[int]]:
    """Return random token ids."""
    generator = torch.Generator().manual_seed(PROMPT_SEED)
    return torch.randint(3, teacher.vocab_size, (count, length), generator=generator).tolist()


def decoding(engine: Engine | HuggingFaceGenerate, prompts: list[list[int]], tokens: int) -> float:
    """Return milliseconds a step of an answer of a number of tokens, without prefill: the median after an uncounted
    answer.
    """
    engine.generate(prompts, tokens)
    made = [engine.generate(prompts, tokens)[0] for _ in range(REPEATS)]
    return 1e3 * median(item.decode_seconds / (len(item.token_ids) - 1) for item in made)


def ar(shared: Shared, work: Work, name: str) -> None:
    """Time an `ar` step with graphs, within `Engine.generate`, and without graphs; and its bytes at the copy's rate."""
    teacher, sizes = shaped(shared, name), shared.sizes
    engine, without = Engine(teacher), Engine(teacher, options=EngineOptions(graphs=False))
    step = time_plain(shared, engine, 1, sizes.context)
    weights, cached = weight_bytes(teacher), cache_bytes(teacher, sizes.context)
    rate = shared.found.get("bytes_per_second")
    floor = 1e3 * (weights + cached) / rate if rate else None
    work.values |= {
        "teacher": teacher.describe(),
        "context": sizes.context,
        "weight_bytes": weights,
        "cache_bytes": cached,
        "step_milliseconds": step.milliseconds,
        "graphed": engine.graphs is not None,
        "floor_milliseconds": floor,
        "share_of_bandwidth": floor / step.milliseconds if floor else None,
    }
    work.key = f"{step.milliseconds:.3f} ms a token"
    if floor:
        work.key += f", {100 * floor / step.milliseconds:.0f}% of the copy's bandwidth"
    later = {
        "generate_milliseconds": lambda: decoding(engine, random_prompts(teacher, 1, sizes.context), sizes.new_tokens),
        "eager_step_milliseconds": lambda: time_plain(shared, without, 1, sizes.context).milliseconds,
    }
    _ar_table(name, work)
    for what, measure in later.items():
        work.values[what] = measure()
        _ar_table(name, work)


def _ar_table(name: str, work: Work) -> None:
    """Report the results so far."""
    values = work.values
    floor, share = values["floor_milliseconds"], values["share_of_bandwidth"]
    eager, whole = (values.get(what) for what in ("eager_step_milliseconds", "generate_milliseconds"))
    step = "step (graph)" if values["graphed"] else "step"
    headers = ["read a token", "at the copy's rate", step, "of bandwidth", "step (no graph)", "in `generate`"]
    line = [
        f"{(values['weight_bytes'] + values['cache_bytes']) / 2**20:.1f} MiB",
        f"{floor:.3f} ms" if floor else "not measured",
        f"{values['step_milliseconds']:.3f} ms",
        f"{100 * share:.1f}%" if share else "not measured",
        f"{eager:.3f} ms" if eager else "not measured",
        f"{whole:.3f} ms" if whole else "not measured",
    ]
    title = f"{name}: autoregressive decoding, {values['context']} tokens of context"
    work.tables[:] = [Table(title, headers, [line])]
    work.save()


def hf(shared: Shared, work: Work, name: str) -> None:
    """Time transformers' `generate` with its dynamic cache, batch 1."""
    teacher, sizes = shaped(shared, name), shared.sizes
    cuda = shared.device.type == "cuda"
    if cuda and not work.clock.allows(HF_SECONDS, "dynamic cache"):
        return
    found = decoding(HuggingFaceGenerate(teacher), random_prompts(teacher, 1, sizes.context), sizes.new_tokens)
    table = Table(f"{name}: transformers' `generate`", ["", "ms a token"])
    work.tables.append(table)
    _add(work, table, "dynamic cache", found)


def compiled(shared: Shared, work: Work, name: str) -> None:
    """Time an `ar` step of our lean layers, uncompiled and compiled; then transformers' `generate` with its static
    cache, which it compiles on CUDA devices. Raises Failed after all if the lean layers could not be compiled.
    """
    teacher, sizes = shaped(shared, name), shared.sizes
    cuda = shared.device.type == "cuda"
    table = Table(f"{name}: compiled lean layers, and transformers' static cache", ["", "ms a token"])
    work.tables.append(table)
    reason = None
    if work.clock.allows(LEAN_COMPILE_SECONDS, "lean layers, compiled"):
        reason = _compiled_lean(shared, work, teacher, table)
    label = "static cache, compiled" if cuda else "static cache"
    seconds = HF_SECONDS + COMPILE_SECONDS[0] + COMPILE_SECONDS[1] * teacher.num_layers
    if not cuda or work.clock.allows(seconds, label):
        try:
            found = decoding(
                HuggingFaceGenerate(teacher, static=True), random_prompts(teacher, 1, sizes.context), sizes.new_tokens
            )
        finally:
            if cuda:
                torch._dynamo.reset()  # its graphs hold memory
        _add(work, table, label, found)
    if reason:
        raise Failed(reason)


def _compiled_lean(shared: Shared, work: Work, teacher: Teacher, table: Table) -> str | None:
    """Add the milliseconds of an `ar` step with the teacher's lean layers, and with compiled ones. Returns the reason
    why these did not run, or None.
    """
    context, stack = shared.sizes.context, teacher.stack
    _add(work, table, "lean layers", time_plain(shared, Engine(teacher), 1, context).milliseconds)
    try:
        reason = use_lean_layers(teacher, compiled=True)
        if not reason:
            _add(work, table, "lean layers, compiled", time_plain(shared, Engine(teacher), 1, context).milliseconds)
    finally:
        teacher.stack = stack  # later parts share the teacher
        torch._dynamo.reset()
    work.save()
    return reason


def _add(work: Work, table: Table, label: str, milliseconds: float) -> None:
    """Add a row to the results."""
    work.values[label] = {"milliseconds": milliseconds}
    work.key = f"{label} {milliseconds:.3f} ms a token"
    table.cells.append([label, f"{milliseconds:.3f}"])


def prefill(shared: Shared, work: Work, name: str) -> None:
    """Measure tokens of a prompt per second, its first new token chosen."""
    teacher = shaped(shared, name)
    engine = Engine(teacher)
    table = Table(f"{name}: prefill", ["prompt", "ms", "tokens/s"])
    work.tables.append(table)
    for length in shared.sizes.prompts:
        if not work.clock.allows(1.0, f"prompts of {length}"):
            break
        prompts = random_prompts(teacher, 1, length)
        engine.generate(prompts, 1)
        seconds = median(engine.generate(prompts, 1)[0].prefill_seconds for _ in range(REPEATS))
        work.values[str(length)] = {"milliseconds": 1e3 * seconds, "tokens_per_second": length / seconds}
        table.cells.append([str(length), f"{1e3 * seconds:.2f}", f"{length / seconds:.0f}"])
        work.key = f"{length / seconds:.0f} tokens/s at {length}"
        work.save()


def batches(shared: Shared, work: Work, name: str) -> None:
    """Time `ar` steps and tree steps of FIRP over the batch size; and the accepted length at which a tree breaks
    even."""
    teacher, sizes = shaped(shared, name), shared.sizes
    predictor = random_predictor(teacher, sections(teacher.num_layers)["firp"])
    headers = ["batch", "ar ms", "ar tokens/s", *(f"{spec}: ms, over ar" for spec in TREES)]
    title = f"{name}: batches at {sizes.context} tokens of context (a tree pays above this accepted length)"
    table = Table(title, headers)
    work.tables.append(table)
    for batch in sizes.batches:
        if not work.clock.allows(2.0, f"batch {batch}"):
            break
        plain = time_plain(shared, Engine(teacher), batch, sizes.context)
        trees = {}
        for spec in TREES:  # no variable keeps an engine: its cache would stay beside the next one's
            tree = parse_tree(spec, predictor.steps)
            trees[spec] = time_step(shared, Engine(teacher, predictor, tree), batch, sizes.context)
        work.values[str(batch)] = _batch_values(batch, plain, trees)
        table.cells.append(_batch_cells(batch, plain, list(trees.values())))
        work.key = f"batch {batch}: {1e3 * batch / plain.milliseconds:.0f} tokens/s ar"
        work.save()
        shared.free()


def _batch_values(batch: int, plain: Timed, trees: dict[str, Timed]) -> dict[str, Any]:
    return {
        "ar_milliseconds": plain.milliseconds,
        "ar_tokens_per_second": 1e3 * batch / plain.milliseconds,
        "trees": {
            spec: {"milliseconds": step.milliseconds, "over_ar": step.milliseconds / plain.milliseconds}
            for spec, step in trees.items()
        },
    }


def _batch_cells(batch: int, plain: Timed, trees: Sequence[Timed]) -> list[str]:
    ratios = [f"{step.milliseconds:.3f}, {step.milliseconds / plain.milliseconds:.2f}" for step in trees]
    return [str(batch), f"{plain.milliseconds:.3f}", f"{1e3 * batch / plain.milliseconds:.0f}", *ratios]
