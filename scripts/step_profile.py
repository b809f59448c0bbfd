#!/usr/bin/env python3
"""Time of a decoding step by part on the CPU: layers, heads, maps, and the engine's own work around them.

The parts are those of `firp_cli/evaluation/step_parts.py`. The same prompts are decoded unwrapped in turns with the
profiled runs: the difference is the cost of wrapping.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch

from firp_cli.api.bench_run import load_bench_prompts
from firp_cli.api.loading import LayerBackend, load_named_teacher
from firp_cli.assets import DEFAULT_TEACHER
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_spec import default_tree, parse_tree
from firp_cli.errors import FirpError
from firp_cli.evaluation.environment import measurement_environment
from firp_cli.evaluation.step_parts import (
    COUPLING,
    DRAFT_HEAD,
    DRAFTED,
    HEAD,
    LAYERS,
    OWN,
    PARTS,
    PSEUDO,
    StepClock,
    average,
    profiled,
)
from firp_cli.files import write_json
from firp_cli.machine import set_threads
from firp_cli.predictors.folder import load_predictor, predictor_folder
from firp_cli.reports.cells import markdown_table
from firp_cli.teacher.teacher import Teacher

TEACHER = (LAYERS, HEAD, DRAFT_HEAD)
PREDICTOR = (PSEUDO, OWN, COUPLING, DRAFTED)
WRAPPED_CALLS = 20_000  # calls for measuring the cost of a wrapper


@dataclass
class Part:
    """A part of a step: microseconds and share of the step, over the faster half of the steps and over all of them."""

    name: str
    microseconds: float
    share: float
    all_microseconds: float
    all_share: float


@dataclass
class Profile:
    """Times of the parts of a method's steps, in microseconds.

    Attributes:
        rows: rows through the last layer in one step. tokens_per_step: emitted tokens.
        plain: an unwrapped step, median over prompts and repeats.
        slowdown: a wrapped step over an unwrapped one of the same prompt and repeat, median.
        wrapping: calls of wrapped functions in a step x the cost of wrapping an empty function.
        outside: share outside layers, norm and head, over the faster half of the steps. all_outside: over all steps.
        engine: `outside` without the predictor's own matrices.
    """

    method: str
    tree: str
    rows: int
    steps: int
    tokens_per_step: float
    plain: float
    slowdown: float
    wrapping: float
    outside: float
    all_outside: float
    engine: float
    parts: list[Part]


@dataclass
class Subject:
    """A method to profile, and the results of its runs."""

    method: str
    engine: Engine
    clock: StepClock = field(default_factory=StepClock)
    plain: list[float] = field(default_factory=list)  # seconds of a step, by run
    profiled: list[float] = field(default_factory=list)
    emitted: int = 0


def subjects(teacher: Teacher, methods: Sequence[str], trees: Sequence[str]) -> list[Subject]:
    """Return an engine for `ar`, and one for every predictor and tree; the default is the predictor's own tree.

    Raises FirpError on unknown names and on predictors without trees.
    """
    found = []
    for name in methods:
        if name == "ar":
            found.append(Subject(name, Engine(teacher)))
            continue
        folder = predictor_folder(name)
        predictor = load_predictor(folder, teacher, force=False)
        if predictor.pipeline:
            raise FirpError(f"{name} feeds a pipeline: scripts/pipeline_ablations.py prints the breakdown of its tick")
        specs = [parse_tree(text, predictor.steps) for text in trees] or [default_tree(folder, predictor)]
        found += [Subject(name, Engine(teacher, predictor, spec)) for spec in specs]
    return found


def run(found: Sequence[Subject], prompts: Sequence[list[int]], max_new_tokens: int, repeats: int) -> None:
    """Decode every prompt with every method, unwrapped and wrapped in turns, after an uncounted warm-up."""
    for subject in found:
        subject.engine.generate(prompts[:1], max_new_tokens)
    for repeat in range(repeats):
        for place, prompt in enumerate(prompts):
            turn = (repeat + place) % len(found)
            for subject in [*found[turn:], *found[:turn]]:
                for wrapped in (False, True) if (repeat + place) % 2 else (True, False):
                    decode(subject, prompt, max_new_tokens, wrapped)


def decode(subject: Subject, prompt: list[int], max_new_tokens: int, wrapped: bool) -> None:
    """Decode one prompt and record its seconds per step."""
    with profiled(subject.clock, subject.engine) if wrapped else nullcontext():
        made = subject.engine.generate([prompt], max_new_tokens)[0]
    if made.steps:  # an answer of one token comes from the prefill
        (subject.profiled if wrapped else subject.plain).append(made.decode_seconds / made.steps)
    if wrapped:
        subject.emitted += sum(made.accepted_lengths)


def wrapper_seconds() -> float:
    """Return the seconds that wrapping adds to a call, measured on an empty function."""
    clock = StepClock()

    def nothing() -> None:
        return None

    spent = []
    for function in (clock.wrap(nothing, LAYERS), nothing):
        began = time.perf_counter()
        for _ in range(WRAPPED_CALLS):
            function()
        spent.append(time.perf_counter() - began)
    return (spent[0] - spent[1]) / WRAPPED_CALLS


def summarise(subject: Subject, wrapper: float) -> Profile:
    """Return means over the profiled steps. `wrapper`: seconds that wrapping adds to a call."""
    clock, engine = subject.clock, subject.engine
    setup = engine.setup(1, 1, 1)
    if not clock.steps:
        raise FirpError(f"{subject.method} made no decoding step: the answers have one token")
    faster, every = clock.faster_half(), average(clock.steps)
    parts = [
        Part(name, 1e6 * quick, quick / sum(faster), 1e6 * mean, mean / sum(every))
        for name, quick, mean in zip(PARTS, faster, every, strict=True)
        if mean
    ]
    around = [part for part in parts if part.name not in TEACHER]
    count = len(clock.steps)
    return Profile(
        method=subject.method,
        tree=str(engine.tree) if engine.tree else "-",
        rows=setup.shape.rows,
        steps=count,
        tokens_per_step=subject.emitted / count,
        plain=median(subject.plain) * 1e6,
        slowdown=median(wrapped / plain for wrapped, plain in zip(subject.profiled, subject.plain, strict=True)),
        wrapping=clock.calls / count * wrapper * 1e6,
        outside=sum(part.share for part in around),
        all_outside=sum(part.all_share for part in around),
        engine=sum(part.share for part in around if part.name not in PREDICTOR),
        parts=parts,
    )


def report(profile: Profile) -> str:
    """Return a Markdown table of a method, with a line about the whole step."""
    lines = [*profile.parts, total(profile.parts)]
    cells = [
        [
            part.name,
            f"{part.microseconds:.0f}",
            f"{100 * part.share:.1f}%",
            f"{part.all_microseconds:.0f}",
            f"{100 * part.all_share:.1f}%",
        ]
        for part in lines
    ]
    headers = ["part", "us, faster half", "share", "us, all steps", "share"]
    outside, all_outside, engine = (100 * share for share in (profile.outside, profile.all_outside, profile.engine))
    return (
        f"{profile.method}, tree {profile.tree}: {profile.rows} rows a step, {profile.steps} steps, "
        f"{profile.tokens_per_step:.2f} tokens a step\n\n{markdown_table(headers, cells)}\n"
        f"Outside layers and heads: {outside:.1f}% of the step ({all_outside:.1f}% over all steps), {engine:.1f}% "
        f"without the predictor's own matrices. A step takes {profile.plain:.0f} us unwrapped, {profile.slowdown:.3f} "
        f"of that wrapped; calling wrappers costs about {profile.wrapping:.0f} us.\n"
    )


def total(parts: Sequence[Part]) -> Part:
    """Return the sum of all parts."""
    columns = zip(
        *((part.microseconds, part.share, part.all_microseconds, part.all_share) for part in parts), strict=True
    )
    return Part("all", *(sum(column) for column in columns))


def names(text: str) -> list[str]:
    """Parse `a,b` into a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=DEFAULT_TEACHER, help="folder, embedded name or hub id")
    parser.add_argument("--methods", type=names, default=["ar", "firp"], help="ar, predictors' folders or names")
    parser.add_argument("--tree", type=names, default=[], help="specs with commas (each predictor's own)")
    parser.add_argument("--dataset", default="arithmetic")
    parser.add_argument("--data-dir")
    parser.add_argument("--limit", type=int, default=10, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: OMP_NUM_THREADS, else the usable cores")
    parser.add_argument("--library", action="store_true", help="run the library's layers in place of the lean ones")
    parser.add_argument("--output", type=Path, help="JSON file")
    known = parser.parse_args(arguments)
    if not known.methods:
        parser.error("--methods names no method")
    if min(known.limit, known.max_new_tokens - 1, known.repeats, known.threads or 1) < 1:
        parser.error("--limit, --repeats and --threads are at least 1, --max-new-tokens at least 2")
    return known


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print Markdown, write JSON."""
    known = parse(arguments)
    set_threads(known.threads)
    backend = LayerBackend("library" if known.library else "lean")
    teacher = load_named_teacher(known.teacher, None, device="cpu", backend=backend)
    prompts = load_bench_prompts(known.dataset, known.data_dir, known.limit, teacher)
    found = subjects(teacher, known.methods, known.tree)
    run(found, [prompt.token_ids for prompt in prompts], known.max_new_tokens, known.repeats)
    wrapper = wrapper_seconds()
    profiles = [summarise(subject, wrapper) for subject in found]
    print(f"{teacher.name}, {teacher.stack.name} stack, threads: {torch.get_num_threads()}, {len(prompts)} prompts\n")
    print("\n".join(report(profile) for profile in profiles), end="")
    if known.output:
        settings = {name: value for name, value in vars(known).items() if name != "output"}
        described = {
            "environment": measurement_environment(teacher),
            "settings": settings,
            "teacher": teacher.describe(),
        }
        write_json(known.output, {**described, "profiles": [asdict(profile) for profile in profiles]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
