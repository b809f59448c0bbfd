"""A SPEED pipeline's diagnostics: its records added up, and the cost of its tick measured apart from decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

from firp_cli.decoding.sequences import OutputSequence, Writer
from firp_cli.decoding.speed.pipeline import PipelineEngine, PipelineRun
from firp_cli.decoding.speed.stage_cache import StageCache
from firp_cli.decoding.speed.stages import PipelineStages
from firp_cli.decoding.speed.tick_log import total
from firp_cli.evaluation.timing import PROMPT_TOKEN, milliseconds
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.results import Generation, PipelineReport, TickCost
from firp_cli.teacher.teacher import Teacher

ROUNDS = 7  # timings whose median counts
TICKS = 24  # ticks, or plain steps, of one timing


def pipeline_report(
    generations: Sequence[Generation], shared: bool, ranks: int = 1, cost: TickCost | None = None
) -> PipelineReport | None:
    """What the pipeline did over these sequences; None where none went through one."""
    traces = [item.pipeline for item in generations if item.pipeline is not None]
    whole = total(traces)
    if whole is None:
        return None
    rate = whole.left / whole.ticks if whole.ticks else float("nan")
    running = [sum(1 for trace in traces if tick < len(trace.occupancy)) for tick in range(len(whole.occupancy))]
    return PipelineReport(
        loops=whole.loops,
        exits=whole.exits,
        shared=shared,
        ranks=ranks,
        ticks=whole.ticks,
        tokens=whole.left,
        plain_tokens=whole.autoregressive_tokens,
        tokens_per_tick=rate,
        idle=1.0 - rate,
        flushes=whole.flushes,
        flushed=_share(whole.flushed, whole.started),
        corrected=_share(whole.corrected, whole.left),
        exit_accuracy=[_share(hits, whole.left) for hits in whole.hits],
        occupancy=[tokens / count for tokens, count in zip(whole.occupancy, running, strict=True)],
        cost=cost,
        predicted_speedup=rate * whole.loops / cost.relative if cost else None,
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


@torch.inference_mode()
def measure_tick(teacher: Teacher, predictor: SpeedPredictor, context: int) -> TickCost:
    """Time a tick with a token at every stage, its parts, and a plain step, all at `context` cached tokens, in turns.

    The tokens are arbitrary: a tick costs the same whatever it holds.
    """
    stages = [TimedTick(teacher, predictor, context, count) for count in range(1, predictor.loops + 1)]
    whole = stages[-1]
    parts: dict[str, Callable[[], object]] = {
        "tick": whole.tick,
        "step": whole.step,
        "heads": whole.heads,
        **{f"rows {count}": probe.layers for count, probe in enumerate(stages, start=1)},
    }
    measured: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS):
        for name, run in parts.items():
            measured[name].append(milliseconds(run, TICKS, teacher.device, warm=1))
    found = {name: median(times) for name, times in measured.items()}
    rows = [found[f"rows {count}"] for count in range(1, predictor.loops + 1)]
    return TickCost(
        context=context,
        tick=found["tick"],
        step=found["step"],
        loop=found["step"] / predictor.loops,
        layers=rows[-1],
        heads=found["heads"],
        decision=max(0.0, found["tick"] - rows[-1] - found["heads"]),
        rows=rows,
    )


class TimedTick:
    """One sequence of `context` cached tokens with a token at each of the first `stages` stages.

    Every call starts from that state again. The tokens are arbitrary: shapes, and so the cost, do not depend on them.
    """

    def __init__(self, teacher: Teacher, predictor: SpeedPredictor, context: int, stages: int) -> None:
        part = PipelineStages(predictor.loops)
        part.mine = range(stages)
        self.engine = PipelineEngine(teacher, predictor, guard=False, stages=part)
        self.item = OutputSequence(0, context)
        cache = StageCache(self.engine.groups, 1, context + predictor.loops, teacher.device)
        self.run = PipelineRun(self.engine, cache, [self.item])
        self.writer = Writer(teacher, max_new_tokens=1 << 30)
        self.context = context
        if stages == predictor.loops:
            self.run.prefill([[PROMPT_TOKEN] * context])
        self._reset()
        self.run.fill()
        positions = torch.arange(context + predictor.loops - 1, context - 1, -1, device=teacher.device)
        self.run.position = positions[:, None].contiguous()
        self.run.hidden = self.run.hidden + self.run.hidden[:1]
        self.state = (self.run.position, self.run.expected, self.run.hidden)
        self.out = self.run.layers(self.run.position[:stages])

    def _reset(self) -> None:
        self.item.committed, self.item.tokens, self.item.finish_reason = self.context, [PROMPT_TOKEN], ""

    def tick(self) -> None:
        """A whole tick, the read of what left included."""
        self.run.position, self.run.expected, self.run.hidden = self.state
        self.run.tick(self.writer)
        self._reset()

    def layers(self) -> None:
        """The layer groups over the stages that hold a token."""
        self.run.position, self.run.expected, self.run.hidden = self.state
        self.run.layers(self.run.position[: len(self.engine.stages.mine)])

    def heads(self) -> None:
        """Exit maps, final norm and head of all stages, and the choice of their tokens."""
        self.run.predict(self.out)

    def step(self) -> None:
        """A plain decoding step of one token."""
        self.run.step(self.writer)
        self._reset()
