"""The least that must work before anything is measured."""

from __future__ import annotations

from firp_cli.decoding.engine import Engine
from suite.shapes import RANDOM, shaped
from suite.work import Shared, Work


def smoke(shared: Shared, work: Work) -> None:
    """Decode a few tokens."""
    teacher = shaped(shared, next(reversed(shared.sizes.shapes)))
    made = Engine(teacher).generate([[3, 4, 5]], 4)
    work.values["tokens"], work.key = len(made[0].token_ids), f"{len(made[0].token_ids)} tokens"
    shared.free(RANDOM)
