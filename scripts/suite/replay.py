"""Projection: accepted lengths of the bench of a trained or real teacher, replayed through a large random teacher.

The cost of a step of the large teacher is measured; the accepted lengths come from another, smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.tree_spec import TreeSpec
from suite.benches import Traced
from suite.probes import time_plain, time_step
from suite.shapes import random_predictor, shaped
from suite.subject import subject
from suite.work import Shared, Skipped, Table, Work

LABEL = "projection"
SMALLEST = 64  # least positions of the shorter measured context
Cost = Callable[[float], float]  # tokens in the cache to milliseconds of a step


@dataclass
class Projection:
    """Projected decoding: steps, tokens after the first of each answer, milliseconds with and without drafts."""

    tokens: int
    steps: int
    milliseconds: float
    ar_milliseconds: float

    @property
    def accepted_length(self) -> float:
        return self.tokens / self.steps if self.steps else float("nan")

    @property
    def speedup(self) -> float:
        return self.ar_milliseconds / self.milliseconds if self.milliseconds else float("nan")


def project(prompts: Sequence[int], emitted: Sequence[Sequence[int]], step: Cost, plain: Cost) -> Projection:
    """Go through the steps of all answers; each costs its time at the tokens present by then.

    Args:
        prompts: tokens of each prompt. emitted: tokens of each step after the first new token, which is prefill's.
    """
    tokens = steps = 0
    drafted = alone = 0.0
    for prompt, answer in zip(prompts, emitted, strict=True):
        cached = prompt
        for count in answer:
            drafted += step(cached)
            alone += sum(plain(cached + number) for number in range(count))
            cached += count
        tokens += sum(answer)
        steps += len(answer)
    return Projection(tokens, steps, drafted, alone)


def between(near: int, far: int, at_near: float, at_far: float) -> Cost:
    """Return the straight line through two measured contexts."""
    slope = (at_far - at_near) / (far - near)
    return lambda cached: at_near + slope * (cached - near)


def contexts(traces: Sequence[Traced]) -> tuple[int, int]:
    """Return two contexts that enclose all steps."""
    shortest = min(length for trace in traces for length in trace.prompts)
    longest = max(
        length + sum(answer) for trace in traces for length, answer in zip(trace.prompts, trace.emitted, strict=True)
    )
    near = max(SMALLEST, shortest)
    return near, max(2 * near, longest)


def replay(shared: Shared, work: Work) -> None:
    """Project the record of each method that drafts trees onto the large shape."""
    name = next(iter(shared.sizes.shapes))
    traces = [Traced(**fields) for fields in shared.found["traces"]]
    if not traces:
        raise Skipped("no method drafted trees")
    teacher = shaped(shared, name)
    near, far = contexts(traces)
    far = min(far, teacher.max_positions - 64)
    plain = [time_plain(shared, Engine(teacher), 1, context) for context in (near, far)]
    headers = ["predictor", "tree", "accepted length (its own teacher)", "ms a token", "speedup over ar"]
    table = Table(f"{LABEL.capitalize()}: these accepted lengths at the {name} shape's step times", headers)
    work.tables.append(table)
    work.values |= {"label": LABEL, "contexts": [near, far], "ar_milliseconds": [time.milliseconds for time in plain]}
    alone = between(near, far, *work.values["ar_milliseconds"])
    own = subject(shared).sections(teacher.num_layers)
    for trace in traces:
        if not work.clock.allows(3.0, f"replaying {trace.name}"):
            break
        predictor = random_predictor(teacher, own[trace.kind])
        engine = Engine(teacher, predictor, trace.spec)
        steps = [time_step(shared, engine, 1, context) for context in (near, far)]
        found = project(trace.prompts, trace.emitted, between(near, far, *(one.milliseconds for one in steps)), alone)
        work.values[trace.name] = described(found, trace.spec) | {
            "step_milliseconds": [one.milliseconds for one in steps]
        }
        table.cells.append(_cells(trace, found))
        work.key = f"{LABEL} on {name}: " + ", ".join(f"{line[0]} {line[4]} x ar" for line in table.cells)
        work.save()
        del engine, predictor
        shared.free()


def described(found: Projection, tree: TreeSpec) -> dict[str, Any]:
    """Return a projection for the JSON."""
    return {
        "label": LABEL,
        "tree": str(tree),
        "tokens": found.tokens,
        "steps": found.steps,
        "accepted_length": found.accepted_length,
        "milliseconds": found.milliseconds,
        "ar_milliseconds": found.ar_milliseconds,
        "speedup": found.speedup,
    }


def _cells(trace: Traced, found: Projection) -> list[str]:
    a_token = found.milliseconds / found.tokens if found.tokens else float("nan")
    return [trace.name, str(trace.spec), f"{found.accepted_length:.2f}", f"{a_token:.3f}", f"{found.speedup:.2f}"]
