"""Timing of whole decoding steps, as the engine runs them."""

from __future__ import annotations

from dataclasses import dataclass

from firp_cli.decoding.engine import Engine
from firp_cli.tuning.step_timing import TimedStep
from suite.timing import Run, milliseconds
from suite.work import Shared

UNTIMED = 3  # steps before the timing: with graphs the first is run, the second captured


@dataclass(frozen=True)
class Timed:
    """Time of a step. `graphed`: it is a CUDA graph."""

    milliseconds: float
    graphed: bool


def probe(engine: Engine, batch: int, context: int, plain: bool = False) -> Run:
    """Return a step of a batch with a number of tokens in the cache, ready to be run repeatedly."""
    held = TimedStep(engine, batch, context)
    run = held.plain if plain else held.step
    for _ in range(UNTIMED):
        run()
    return run


def time_step(shared: Shared, engine: Engine, batch: int, context: int, plain: bool = False) -> Timed:
    """Time a step with the engine's tree, or an autoregressive one."""
    spent = milliseconds(probe(engine, batch, context, plain), shared.device, shared.sizes.repeats)
    return Timed(spent, engine.graphs is not None)


def time_plain(shared: Shared, engine: Engine, batch: int, context: int) -> Timed:
    """Time an autoregressive step."""
    return time_step(shared, engine, batch, context, plain=True)
