"""Decoding steps and pipelines held still, so that they can be timed."""

from __future__ import annotations

from copy import copy

import torch

from firp_cli.decoding.batch import DecodeBatch
from firp_cli.decoding.engine import Engine
from firp_cli.decoding.sequences import OutputSequence, Writer
from firp_cli.decoding.step import Mode
from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.evaluation.timing import PROMPT_TOKEN


class TimedStep:
    """A batch of sequences with `context` tokens in the cache, one root each, and its draft.

    Every call starts from that state again and is a step as the engine's loop makes it: launched, through graphs where
    the engine has them, read when its group is, and written. On CUDA devices nothing waits that would not wait there,
    so synchronise around many calls. The tokens are arbitrary: shapes, and so the cost, do not depend on them.

    Args:
        spec: None takes the engine's own tree for such a batch; `none` steps are plain. With graphs an engine serves
            the newest of its probes alone.

    Raises CapacityError where the batch does not fit into memory.
    """

    @torch.inference_mode()
    def __init__(self, engine: Engine, batch: int, context: int, spec: TreeSpec | None = None) -> None:
        setup = engine.setup(batch, context, 0) if spec is None else engine.setup_of(spec)
        self.engine, self.context = engine, context
        self.mode: Mode = "drafted" if setup.predictor else "autoregressive"
        self.stepper = engine.stepper(setup, batch, context + engine.ahead(setup))
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
        """A whole step."""
        self._step(self.mode)

    def plain(self) -> None:
        """A whole step without a draft, which makes none either: what plain decoding does."""
        self._step("autoregressive")

    @torch.inference_mode()
    def _step(self, mode: Mode) -> None:
        assert self.engine.graphs is None or self.stepper is self.engine.kept, "a newer batch took the graphs"
        for tensor, value in self.state:
            tensor.copy_(value)
        for item in self.items:
            item.committed = self.context
            for record in (item.tokens, item.accepted_lengths):
                record.clear()
        self.run.step(mode)
