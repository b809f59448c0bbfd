"""Timing of whole decoding steps: batches that return to the same state before every step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import copy

import torch

from firp_cli.decoding.batch import DecodeBatch
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.sequences import OutputSequence, Writer
from firp_cli.decoding.step import Mode
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.evaluation.timing import PROMPT_TOKEN, enough_calls, milliseconds
from firp_cli.predictors.base import TreePredictor
from firp_cli.teacher.teacher import Teacher
from firp_cli.tuning.calibration import TuneSettings

STEP_SECONDS = 8.0  # of one round of timing
LEAST_REPEATS = 3
LONG = 100.0  # milliseconds of a step that needs no call before it to fill the caches


class TimedStep:
    """Batch of sequences with `context` tokens in the K/V cache, one root each, and its draft.

    Every call starts from that state again and runs a step as the engine's loop does: it is launched, through graphs
    where the engine has them, read when its group is read, and written. On CUDA devices a call does not synchronise
    more than the loop does, so synchronise around many calls. The tokens are arbitrary: shapes, and so the cost, do not
    depend on them.

    Args:
        spec: None takes the engine's own tree for such a batch; `none` decodes without a draft. With graphs an engine
            serves only the newest of its timed steps.

    Raises CapacityError when the batch does not fit into memory.
    """

    @torch.inference_mode()
    def __init__(self, engine: Engine, batch: int, context: int, spec: TreeSpec | None = None) -> None:
        setup = engine.setup(batch, context, 0) if spec is None else engine.setup_of(spec)
        self.engine, self.context = engine, context
        self.mode: Mode = "drafted" if setup.predictor else "autoregressive"
        self.stepper = engine.stepper(setup, batch, context + 2 * setup.shape.width)
        endless = copy(engine.teacher)
        endless.eos_token_ids = ()
        self.items = [OutputSequence(number, context, context - 1) for number in range(batch)]
        self.run = DecodeBatch(self.stepper, self.items, Writer(endless, max_new_tokens=1 << 30), engine.graphs)
        self.run.prefill([[PROMPT_TOKEN] * context] * batch, engine.options.prefill_chunk)
        self.state = [(tensor, tensor.clone()) for tensor in self.stepper.buffers()]

    @property
    def rows(self) -> int:
        """Rows of a step per sequence, pseudo rows included."""
        return self.stepper.cache.scratch

    def step(self) -> None:
        """Run a whole step."""
        self._step(self.mode)

    def ar_step(self) -> None:
        """Run a whole step of autoregressive decoding: no draft is verified, and none is made."""
        self._step("autoregressive")

    @torch.inference_mode()
    def _step(self, mode: Mode) -> None:
        assert self.engine.graphs is None or self.stepper is self.engine.kept, "a newer batch took the graphs"
        for tensor, value in self.state:
            tensor.copy_(value)
        for item in self.items:
            item.committed = self.context
            for values in (item.tokens, item.accepted_lengths):
                values.clear()
        self.run.step(mode)


def make_tree_engine(teacher: Teacher, predictor: TreePredictor, spec: TreeSpec, settings: TuneSettings) -> Engine:
    """Return an engine that decodes with one tree; with `none` it decodes autoregressively."""
    return Engine(teacher, predictor, spec, options=settings.engine, **settings.sampling)


def time_steps(
    teacher: Teacher,
    predictor: TreePredictor,
    order: Sequence[TreeSpec],
    batch: int,
    context: int,
    settings: TuneSettings,
    repeats: int,
) -> dict[TreeSpec, list[float]]:
    """Return the milliseconds of whole steps by tree (`none`: of autoregressive decoding).

    Trees are timed one after the other in this order, `repeats` times at most; a tree may occur in it several times.
    """
    steps = {
        spec: TimedStep(make_tree_engine(teacher, predictor, spec, settings), batch, context) for spec in set(order)
    }
    device = teacher.device
    calls = {spec: enough_calls(timed.step, device) for spec, timed in steps.items()}
    times: dict[TreeSpec, list[float]] = {spec: [] for spec in steps}
    until = time.perf_counter() + STEP_SECONDS
    for number in range(repeats):
        if number >= LEAST_REPEATS and time.perf_counter() > until:
            break
        for spec in order:
            warm = 0 if times[spec] and times[spec][-1] > LONG else calls[spec]
            times[spec].append(milliseconds(steps[spec].step, calls[spec], device, warm))
    return times
