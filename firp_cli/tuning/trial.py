"""Trial of tuned trees: how many prompts, repeats and trees fit into its time, and decoding with the trees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.evaluation.answer_runs import ALL
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.evaluation.methods import BenchSettings, Method
from firp_cli.evaluation.run_bench import run_bench
from firp_cli.predictors.base import TreePredictor
from firp_cli.results import Prediction
from firp_cli.teacher.teacher import Teacher
from firp_cli.tune_results import Trial
from firp_cli.tuning.calibration import TuneSettings
from firp_cli.tuning.search import NO_TREE
from firp_cli.tuning.step_timing import make_tree_engine

TRIAL_SECONDS = 90.0  # of decoding, about
FEWEST_PROMPTS = 2
WARMUP = 1  # uncounted batches of each method, as in a bench


@dataclass(frozen=True)
class Bout:
    """Trees that are tried at one batch size.

    `ar`, `trees`: predicted seconds of a batch by autoregressive decoding and with each tree. The first tree is always
    tried.
    """

    batch: int
    ar: float
    trees: tuple[float, ...]

    def prompts(self, wanted: int) -> int:
        """Return the number of prompts to decode for `wanted` ones: at least a batch."""
        return max(wanted, self.batch)

    def seconds(self, wanted: int, repeats: int, trees: int) -> float:
        """Return the predicted time of decoding with the first `trees` trees and autoregressively."""
        batches = math.ceil(self.prompts(wanted) / self.batch)
        return (WARMUP + repeats * batches) * (self.ar + sum(self.trees[:trees]))


@dataclass(frozen=True)
class TrialSize:
    """Size of a trial: `prompts` of `held` (more where a batch needs more), repeats, trees of the first batch size;
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
    """Return the bout of trees at their batch size, for answers of `tokens` new tokens."""
    predicted = [trial.predicted for trial in trials]
    ar = tokens * predicted[0].ar_milliseconds / 1000
    return Bout(trials[0].batch_size, ar, tuple(ar / prediction.speedup for prediction in predicted))


def trial_size(bouts: Sequence[Bout], held: int, repeats: int, limit: float = TRIAL_SECONDS) -> TrialSize:
    """Return the largest trial that is predicted to take at most `limit` seconds, else the smallest one.

    Prompts vary more than repeats do, so repeats are reduced first, down to one; then prompts, down to FEWEST_PROMPTS
    or a whole batch; then trees of the first bout, down to its first one.

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
    return next((fitting for fitting in sizes if fitting.seconds <= limit), sizes[-1])


def decode_trees(
    teacher: Teacher,
    predictor: TreePredictor,
    prompts: Sequence[Sequence[int]],
    specs: Sequence[TreeSpec],
    batch: int,
    repeats: int,
    settings: TuneSettings,
) -> list[Prediction]:
    """Decode prompts with each tree and autoregressively; return the measured performance of each tree."""
    shared: dict[str, Any] = {"engine": settings.engine, **settings.sampling}
    bench_settings = BenchSettings(settings.max_new_tokens, batch, repeats=repeats, warmup=WARMUP, **shared)
    trees = {str(number): spec for number, spec in enumerate(specs)} | {"ar": NO_TREE}
    engines = {name: make_tree_engine(teacher, predictor, spec, settings) for name, spec in trees.items()}
    methods = [Method(name, engine.generate, engine=engine) for name, engine in engines.items()]
    report = run_bench(teacher, [BenchPrompt(list(ids), "held") for ids in prompts], methods, bench_settings)
    rows = {row.method: row for row in report.rows if row.category == ALL}
    ar = rows["ar"].step_milliseconds
    measured = [rows[str(number)] for number in range(len(specs))]
    return [Prediction(row.accepted_length, row.step_milliseconds, ar, row.speedup or math.nan) for row in measured]
