"""Statistics of a SPEED pipeline, and the cost of its tick, measured separately from decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

from firp_cli.decoding.sequences import OutputSequence, Writer
from firp_cli.decoding.speed.pipeline import PipelineEngine, PipelineRun
from firp_cli.decoding.speed.stages import PipelineStages
from firp_cli.decoding.speed.tick_log import total
from firp_cli.evaluation.timing import PROMPT_TOKEN, milliseconds
from firp_cli.predictors.speed import SpeedPredictor
from firp_cli.results import Generation, PipelineReport, TickCost
from firp_cli.teacher.teacher import Teacher

ROUNDS = 7  # timings, of which the median is taken
TICKS = 24  # ticks, or autoregressive steps, of one timing


def pipeline_report(
    generations: Sequence[Generation], shared: bool, ranks: int = 1, cost: TickCost | None = None
) -> PipelineReport | None:
    """Return the statistics over these sequences; None if no pipeline decoded them."""
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
    """Time a tick with a token at every stage, its parts and an autoregressive step, at `context` cached tokens.

    Timings take turns. The tokens are arbitrary: the cost does not depend on them.
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
    medians = {name: median(times) for name, times in measured.items()}
    rows = [medians[f"rows {count}"] for count in range(1, predictor.loops + 1)]
    return TickCost(
        context=context,
        tick=medians["tick"],
        step=medians["step"],
        loop=medians["step"] / predictor.loops,
        layers=rows[-1],
        heads=medians["heads"],
        decision=max(0.0, medians["tick"] - rows[-1] - medians["heads"]),
        rows=rows,
    )


class TimedTick:
    """Sequence of `context` cached tokens with a token at each of the first `stages` stages.

    Every call starts from that state. The tokens are arbitrary: shapes, and so the cost, do not depend on them.
    """

    def __init__(self, teacher: Teacher, predictor: SpeedPredictor, context: int, stages: int) -> None:
        part = PipelineStages(predictor.loops)
        part.mine = range(stages)
        self.engine = PipelineEngine(teacher, predictor, guard=False, stages=part)
        self.item = OutputSequence(0, context)
        self.run = PipelineRun(self.engine, [self.item], context + predictor.loops)
        self.writer = Writer(teacher, max_new_tokens=1 << 30)
        self.context = context
        if stages == predictor.loops:
            self.run.prefill([[PROMPT_TOKEN] * context])
        self._reset()
        self.run.fill()
        positions = torch.arange(context + predictor.loops - 1, context - 1, -1, device=teacher.device)
        self.run.position = positions[:, None].contiguous()
        self.state = (self.run.position, self.run.expected, self.run.hidden)
        self.out = self.run.layers()

    def _reset(self) -> None:
        self.item.committed, self.item.tokens, self.item.finish_reason = self.context, [PROMPT_TOKEN], ""

    def tick(self) -> None:
        """Run a whole tick, with the copy of the emitted token to the host."""
        self.run.position, self.run.expected, self.run.hidden = self.state
        self.run.tick(self.writer)
        self._reset()

    def layers(self) -> None:
        """Run the layer groups over the stages that hold a token."""
        self.run.position, self.run.expected, self.run.hidden = self.state
        self.run.layers()

    def heads(self) -> None:
        """Run the exit maps, final norm and head of all stages, and choose their tokens."""
        self.run.predict(self.out)

    def step(self) -> None:
        """Run an autoregressive decoding step of one token."""
        self.run.step(self.writer)
        self._reset()
