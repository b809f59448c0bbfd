"""How much of a tuning's trial fits into its time: prompts, repeats and trees, from predicted times of decoding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from firp_cli.tune_results import Trial

TRIAL_SECONDS = 90.0  # of decoding, about
FEWEST_PROMPTS = 2
WARMUP = 1  # times that each method decodes a batch uncounted, as run_bench does


@dataclass(frozen=True)
class Bout:
    """Trees that are tried at one batch size. `plain`, `trees`: predicted seconds that a batch takes without drafting
    and with each tree; the tree that may not be left out comes first.
    """

    batch: int
    plain: float
    trees: tuple[float, ...]

    def prompts(self, wanted: int) -> int:
        """Prompts that are decoded where `wanted` are to be: enough for a batch."""
        return max(wanted, self.batch)

    def seconds(self, wanted: int, repeats: int, trees: int) -> float:
        """Predicted time of decoding with the first `trees` trees and plainly."""
        batches = math.ceil(self.prompts(wanted) / self.batch)
        return (WARMUP + repeats * batches) * (self.plain + sum(self.trees[:trees]))


@dataclass(frozen=True)
class TrialSize:
    """What is tried: `prompts` of `held` (more where a batch needs more), repeats, trees of the first batch size;
    `seconds`: predicted time.
    """

    prompts: int
    held: int
    repeats: int
    trees: int
    seconds: float

    def __str__(self) -> str:
        def count(number: int, name: str) -> str:
            return f"{number} {name}{'' if number == 1 else 's'}"

        counts = f"{self.prompts} of {count(self.held, 'prompt')}, {count(self.repeats, 'repeat')}"
        return f"{counts}, {count(self.trees, 'tree')}, about {self.seconds:.0f} s"


def make_bout(trials: Sequence[Trial], tokens: float) -> Bout:
    """The bout of trees at their batch size, with answers of so many new tokens."""
    predicted = [trial.predicted for trial in trials]
    plain = tokens * predicted[0].ar_milliseconds / 1000
    return Bout(trials[0].batch_size, plain, tuple(plain / each.speedup for each in predicted))


def trial_size(bouts: Sequence[Bout], held: int, repeats: int, limit: float = TRIAL_SECONDS) -> TrialSize:
    """The largest trial that is predicted to take at most `limit` seconds, else the smallest one.

    Prompts differ more than repeats do, so repeats go first, down to one; then prompts, down to FEWEST_PROMPTS or a
    whole batch; then trees of the first bout, down to its first one.

    Args:
        bouts: of all batch sizes, each of at most `held` prompts.
        held: prompts that were kept back.
    """

    def size(prompts: int, counted: int, trees: int) -> TrialSize:
        seconds = sum(bout.seconds(prompts, counted, trees) for bout in bouts)
        return TrialSize(prompts, held, counted, trees, seconds)

    most = max((len(bout.trees) for bout in bouts), default=1)
    fewest = min(FEWEST_PROMPTS, held)
    sizes = [size(held, counted, most) for counted in range(repeats, 0, -1)]
    sizes += [size(prompts, 1, most) for prompts in range(held - 1, fewest - 1, -1)]
    sizes += [size(fewest, 1, trees) for trees in range(most - 1, 0, -1)]
    return next((found for found in sizes if found.seconds <= limit), sizes[-1])
