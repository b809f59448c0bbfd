"""Results of `firp tune`: measured costs, acceptance, trials and trees. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from firp_cli.results import TUNE_SCHEMA, Prediction

TREES_SCHEMA = "firp.trees/1"


@dataclass
class CostCurve:
    """Time of a pass of `rows` rows per sequence, by part, in milliseconds: layers below the first transfer layer,
    layers from there on, final norm with head. Between two row counts the time is taken as linear.
    """

    batch_size: int
    context: int
    rows: list[int]
    lower: list[float]
    upper: list[float]
    head: list[float]


@dataclass
class CostCheck:
    """A point that the curves were not made from: the whole pass in milliseconds, and what the curves say of it."""

    batch_size: int
    context: int
    rows: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1


@dataclass
class CostReport:
    """The cost of passes on one machine. `split`: layers of the lower part, of `layers`; `seconds`: what it took."""

    environment: dict[str, Any]
    machine: dict[str, Any]
    teacher: dict[str, Any]
    split: int
    layers: int
    curves: list[CostCurve]
    checks: list[CostCheck]
    seconds: float

    @property
    def residual(self) -> float:
        """Largest relative error of the checks."""
        return max((abs(check.error) for check in self.checks), default=0.0)

    @staticmethod
    def from_json(value: dict[str, Any]) -> CostReport:
        """The report read back from its JSON form."""
        curves = [CostCurve(**curve) for curve in value["curves"]]
        checks = [CostCheck(**check) for check in value["checks"]]
        return CostReport(**{**value, "curves": curves, "checks": checks})


@dataclass
class TunedTree:
    """The best tree found for one batch size: an entry of tree.json.

    Attributes:
        machine: what must be the same for the entry to be used. teacher: weight fingerprint.
        tree: its specification, `none` where no tree pays. paths: nodes of a static tree, as ranks from the root; of a
            dynamic one those that it most likely has.
        steps, budget: draft steps that are run, nodes with pseudo rows; None: all.
        nodes, rows: real rows of a step, and all of its rows, per sequence.
        probabilities: by node, the root first, how likely it is accepted.
    """

    machine: dict[str, Any]
    teacher: str
    batch_size: int
    context: int
    temperature: float
    tree: str
    predicted: Prediction
    paths: list[list[int]] | None = None
    steps: int | None = None
    budget: int | None = None
    nodes: int = 1
    rows: int = 1
    probabilities: list[float] | None = None

    @staticmethod
    def from_json(value: dict[str, Any]) -> TunedTree:
        """The entry read back from its JSON form."""
        return TunedTree(**{**value, "predicted": Prediction(**value["predicted"])})


@dataclass
class Trial:
    """A tree that was tried. `measured`: decoded for real, on calibration prompts that did not choose the tree."""

    tree: str
    batch_size: int
    nodes: int
    rows: int
    predicted: Prediction
    measured: Prediction | None = None


@dataclass
class RankRate:
    """Of `count` accepted parents, the share whose successor was the candidate of `rank` (0: the most probable)."""

    step: int
    rank: int
    count: int
    rate: float


@dataclass
class Reliability:
    """Candidates of step `step` by the draft's own probability: the mean of a bin, and the share that was right."""

    step: int
    count: int
    drafted: float
    accepted: float


@dataclass
class TuneReport:
    """What `firp tune` measured and chose.

    Attributes:
        calibration: data set, prompts, tokens, anchors, size of the trial. acceptance: by step and rank. reliability:
            by step and bin.
        entries: the choice for each batch size. ladder: the best tree of each number of nodes, at the first batch
            size. batches: the chosen tree at each batch size. break_even: smallest batch size at which no tree pays.
    """

    environment: dict[str, Any]
    teacher: dict[str, Any]
    predictor: dict[str, Any]
    settings: dict[str, Any]
    calibration: dict[str, Any]
    acceptance: list[RankRate]
    reliability: list[Reliability]
    cost: CostReport
    entries: list[TunedTree]
    ladder: list[Trial]
    batches: list[Trial]
    break_even: int | None = None
    schema: str = TUNE_SCHEMA
