"""Time of a decoding step by part, measured in a separate run in which functions of the engine are wrapped by a clock.

The clock knows which part runs and charges all time to exactly one part, so the parts of a step add up to the step;
time that no part claims is the host loop. A step ends when the host has written the tokens that it could read.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch

from firp_cli.decoding import step as step_module
from firp_cli.decoding.batch import DecodeBatch
from firp_cli.decoding.cpu_accept import AcceptKernel
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.output_buffer import OutputBuffer
from firp_cli.decoding.sampling import Sampler
from firp_cli.decoding.speed.pipeline import PipelineEngine
from firp_cli.decoding.step import DecodeStep
from firp_cli.predictors import base as predictor_module
from firp_cli.predictors.base import TreePredictor
from firp_cli.predictors.draft_kernel import DraftKernel
from firp_cli.teacher.kv_cache import KVCache
from firp_cli.teacher.masks import AttentionMask, KernelMask

LAYERS = "layers"
HEAD = "final norm and head: verification"
DRAFT_HEAD = "final norm and head: drafting"
PSEUDO = "pseudo states (the predictor's maps)"
TREE = "tree building"
MASKS = "positions and masks"
ROTARY = "rotary look-up"
EMBED = "embedding"
ROWS = "joining rows"
CHOICE = "choice of the tokens (argmax)"
ACCEPT = "acceptance"
COMMIT = "K/V commit"
STATES = "draft: picking the accepted node's states"
OWN = "draft: the predictor's own blocks and heads"
TOPK = "draft: log-softmax and top-k"
COUPLING = "draft: coupling, candidates of the tree's nodes"
CHOSEN = "one call: choice of the tokens, acceptance"
DRAFTED = "one call: final norm and head of drafts, top-k, coupling's states"
GLUE = "step: calls between these, copies of roots and drafts"
PUSH = "output"
READ = "read"
HOST = "host loop"
PARTS = (
    *(LAYERS, HEAD, DRAFT_HEAD, PSEUDO, TREE, MASKS, ROTARY, EMBED, ROWS),
    *(CHOICE, ACCEPT, COMMIT, STATES, OWN, TOPK, COUPLING, CHOSEN, DRAFTED, GLUE, PUSH, READ, HOST),
)
SUMMARY = {  # the parts of a report, each the sum of finer ones
    "layers": (LAYERS, ROWS, ROTARY, EMBED),
    "head": (HEAD,),
    "tree": (TREE, MASKS),
    "pseudo states and drafts": (PSEUDO, STATES, OWN, DRAFT_HEAD, TOPK, COUPLING, DRAFTED),
    "acceptance": (CHOICE, ACCEPT, CHOSEN),
    "K/V commit": (COMMIT,),
    "host": (GLUE, PUSH, READ, HOST),
}
FIRST_TOKENS, MOST_TOKENS = 8, 32  # new tokens of the first batch of a profile, and of the others
ENOUGH_STEPS, MOST_SECONDS = 48, 5.0  # of a profile: no further batch begins then


class StepClock:
    """Clock that charges time to the running part, step by step.

    Args:
        now: seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.steps: list[list[float]] = []  # seconds by part
        self.calls = 0  # calls of wrapped functions, in the steps that are kept
        self._now = now
        self._seconds = [0.0] * len(PARTS)
        self._count = 0
        self._part = PARTS.index(HOST)
        self._mark = now()

    def wrap(self, function: Callable[..., Any], part: str, inside: dict[str, str] | None = None) -> Callable[..., Any]:
        """Return the function with its time charged to `part`; wrapped functions that it calls are charged separately.

        Args:
            inside: other parts to charge if the calling part is one of these.
        """
        own = PARTS.index(part)
        others = {PARTS.index(caller): PARTS.index(other) for caller, other in (inside or {}).items()}
        now = self._now

        def timed(*arguments: Any, **options: Any) -> Any:
            begins = now()
            outer = self._part
            self._seconds[outer] += begins - self._mark
            self._mark = begins
            self._part = others.get(outer, own)
            self._count += 1
            try:
                return function(*arguments, **options)
            finally:
                ends = now()
                self._seconds[self._part] += ends - self._mark
                self._mark = ends
                self._part = outer

        return timed

    def ends(self, function: Callable[..., Any], keep: Callable[[DecodeBatch], bool]) -> Callable[..., Any]:
        """Return a method of `DecodeBatch` that ends a step. `keep`: False where the step does not count."""

        def timed(run: DecodeBatch, *arguments: Any) -> Any:
            result = function(run, *arguments)
            now = self._now()
            self._seconds[self._part] += now - self._mark
            if keep(run):
                self.steps.append(self._seconds)
                self.calls += self._count
            self._seconds, self._count, self._mark = [0.0] * len(PARTS), 0, now
            return result

        return timed

    def faster_half(self) -> list[float]:
        """Return mean seconds by part over the faster half of the steps.

        On a machine with other work, a long part is interrupted more often, so medians of single parts do not add up
        to a step. The faster half of the steps is used whole instead.
        """
        ordered = sorted(self.steps, key=sum)
        return average(ordered[: (len(ordered) + 1) // 2])


def average(steps: Sequence[list[float]]) -> list[float]:
    """Return mean seconds by part."""
    return [fmean(seconds) for seconds in zip(*steps, strict=True)]


@contextmanager
def profiled(clock: StepClock, engine: Engine) -> Iterator[None]:
    """Wrap the functions that a step calls, and restore them at the end. The engine must run its steps without graphs,
    and in buffers that it makes anew.
    """
    teacher = engine.teacher
    wrapped: list[tuple[Any, str, str]] = [
        (teacher, "layers_between", LAYERS),
        (teacher, "embed", EMBED),
        (step_module, "forward_rows", ROWS),
        (step_module, "next_draft", STATES),
        (predictor_module, "most_probable_tokens", TOPK),
        (DecodeStep, "step", GLUE),
        (DecodeStep, "_build", TREE),
        (DecodeStep, "_rows", MASKS),
        (DecodeStep, "_forward", MASKS),
        (DecodeStep, "_rotary", ROTARY),
        (DecodeStep, "_accept", ACCEPT),
        (DecodeStep, "_draft_next", STATES),
        (DecodeStep, "_draft_in_kernel", GLUE),
        (AcceptKernel, "__call__", CHOSEN),
        (DraftKernel, "write", DRAFTED),
        *((kind, "at", MASKS) for kind in (AttentionMask, KernelMask)),
        (Sampler, "__call__", CHOICE),
        (KVCache, "commit", COMMIT),
        (OutputBuffer, "write", PUSH),
        (OutputBuffer, "launched", READ),
    ]
    with ExitStack() as stack:
        for owner, name, part in wrapped:
            stack.enter_context(patch.object(owner, name, clock.wrap(getattr(owner, name), part)))
        for name in ("norm", "head"):
            timed = clock.wrap(getattr(teacher, name), HEAD, {OWN: DRAFT_HEAD})
            stack.enter_context(patch.object(teacher, name, timed))
        stack.enter_context(patch.object(DecodeBatch, "prefill", clock.ends(DecodeBatch.prefill, lambda _: False)))
        stack.enter_context(patch.object(DecodeBatch, "step", clock.ends(DecodeBatch.step, _whole)))
        made = _with_predictor(clock, DecodeStep.__init__, stack)
        stack.enter_context(patch.object(DecodeStep, "__init__", made))
        yield


def _whole(run: DecodeBatch) -> bool:
    """Return True while no sequence has left the batch: steps of fewer sequences take less time."""
    return len(run.live) == run.stepper.most


def _with_predictor(clock: StepClock, make: Callable[..., None], stack: ExitStack) -> Callable[..., None]:
    """Return a maker of a `DecodeStep` whose predictor is wrapped, until `stack` is closed."""
    seen: list[TreePredictor] = []

    def made(stepper: DecodeStep, *arguments: Any, **options: Any) -> None:
        make(stepper, *arguments, **options)
        if stepper.make_pseudo_states is not None:
            stepper.make_pseudo_states = clock.wrap(stepper.make_pseudo_states, PSEUDO)
        predictor = stepper.predictor
        if predictor is None or any(predictor is one for one in seen):
            return
        seen.append(predictor)
        wrapped: list[tuple[Any, str, str]] = [(predictor, name, OWN) for name in ("draft_hidden", "logits")]
        if predictor._draft_head is not None:
            wrapped.append((predictor, "_draft_head", DRAFT_HEAD))
        if predictor.coupling is not None:
            wrapped += [(predictor, "child_candidates", COUPLING), (predictor.coupling, "context", COUPLING)]
        for owner, name, part in wrapped:
            stack.enter_context(patch.object(owner, name, clock.wrap(getattr(owner, name), part)))

    return made


def step_parts(
    engine: Engine | PipelineEngine | None, batches: Sequence[Sequence[Sequence[int]]], max_new_tokens: int
) -> dict[str, float]:
    """Return the milliseconds of a decoding step by the parts of SUMMARY, which add up to the profiled step. Empty for
    other engines (a pipeline reports its own `TickCost`), and where no answer has a second token.

    It decodes some of the `batches` (token ids), after and outside the timed runs. Every step is drafted, also where a
    guard would pause drafting. On CUDA devices steps run eagerly, and the host waits for the device around each part: a
    captured step takes less than the sum of these parts. Frees the buffers and graphs that the engine keeps.
    """
    if not isinstance(engine, Engine):
        return {}
    engine.forget()
    eager = copy.copy(engine)
    eager.graphs, eager._guard = None, False
    device = engine.teacher.device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    clock, until = StepClock(now), time.perf_counter() + MOST_SECONDS
    with profiled(clock, eager):
        for number, batch in enumerate(batches):
            eager.generate(batch, min(max_new_tokens, MOST_TOKENS if number else FIRST_TOKENS))
            if len(clock.steps) >= ENOUGH_STEPS or time.perf_counter() > until:
                break
    if not clock.steps:
        return {}
    seconds = dict(zip(PARTS, clock.faster_half(), strict=True))
    found = {name: 1000 * sum(seconds[part] for part in parts) for name, parts in SUMMARY.items()}
    return {name: time for name, time in found.items() if time}
