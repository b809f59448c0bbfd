"""A pipeline held still, so that its parts can be timed."""

from __future__ import annotations

import torch

from firp_cli.decoding.pipeline import PipelineEngine, PipelineRun
from firp_cli.decoding.ranks import Ranks
from firp_cli.decoding.sequences import Writer, Written
from firp_cli.predictors.early_exit import EarlyExitPredictor
from firp_cli.teacher.stack import Teacher
from firp_cli.teacher.stage_cache import StageCache

PROMPT_TOKEN = 1


class TickProbe:
    """One sequence of `context` cached tokens with a token at each of the first `stages` stages.

    Every call starts from that state again. The tokens are arbitrary: shapes, and so the cost, do not depend on them.
    """

    def __init__(self, teacher: Teacher, predictor: EarlyExitPredictor, context: int, stages: int) -> None:
        ranks = Ranks(predictor.loops)
        ranks.stages = range(stages)
        self.engine = PipelineEngine(teacher, predictor, guard=False, ranks=ranks)
        self.item = Written(0, context)
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
        self.run.layers(self.run.position[: len(self.engine.ranks.stages)])

    def heads(self) -> None:
        """Exit maps, final norm and head of all stages, and the choice of their tokens."""
        self.run.predict(self.out)

    def step(self) -> None:
        """A plain decoding step of one token."""
        self.run.step(self.writer)
        self._reset()
