"""Results of `firp tune`: measured costs, acceptance, trials and trees. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from firp_cli.results import TUNE_SCHEMA, Prediction

TREES_SCHEMA = "firp.trees/1"


@dataclass
class CostCurve:
    """Times of passes of `rows` rows per sequence, by part, in milliseconds. `lower`: layers below the first transfer
    layer; `upper`: layers from there on; `head`: final norm and head. Between two row counts the time is linear.
    """

    batch_size: int
    context: int
    rows: list[int]
    lower: list[float]
    upper: list[float]
    head: list[float]


@dataclass
class CostCheck:
    """Time of a whole pass that no curve contains, in milliseconds: predicted by the curves, and measured."""

    batch_size: int
    context: int
    rows: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the prediction: predicted / measured - 1."""
        return self.predicted / self.measured - 1


@dataclass
class CostReport:
    """Cost of passes on one machine. `split`: layers of the lower part, out of `layers`. `seconds`: of measuring."""

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
        """Largest relative error of the checks, as a fraction."""
        return max((abs(check.error) for check in self.checks), default=0.0)

    @staticmethod
    def from_json(value: dict[str, Any]) -> CostReport:
        """Return the report that JSON values describe."""
        curves = [CostCurve(**curve) for curve in value["curves"]]
        checks = [CostCheck(**check) for check in value["checks"]]
        return CostReport(**{**value, "curves": curves, "checks": checks})


@dataclass
class TunedTree:
    """Best tree for one batch size: an entry of tree.json.

    Attributes:
        machine: key of the machine; the entry is used only where it is equal. teacher: weight fingerprint.
        tree: specification; `none` where no tree is faster than autoregressive decoding.
        paths: nodes as positions among the candidates of each step, from the root; for a dynamic tree the most likely
            nodes.
        steps: draft steps that are run. budget: nodes with pseudo rows. None stands for all.
        nodes, rows: real rows of a decoding step, and all of its rows, per sequence.
        probabilities: by node, the root first, probability that the node is accepted.
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
        """Return the entry that JSON values describe."""
        return TunedTree(**{**value, "predicted": Prediction(**value["predicted"])})


@dataclass
class Trial:
    """Predicted performance of a tree. `measured`: by decoding prompts that were not used to choose the tree."""

    tree: str
    batch_size: int
    nodes: int
    rows: int
    predicted: Prediction
    measured: Prediction | None = None


@dataclass
class CandidateRate:
    """Acceptance of one candidate of a draft step: the share of `count` accepted parents whose next token was the
    candidate at position `rank` (0: the most probable).
    """

    step: int
    rank: int
    count: int
    rate: float


@dataclass
class Reliability:
    """Candidates of one draft step in one bin of probability: the mean drafted probability, and the accepted share."""

    step: int
    count: int
    drafted: float
    accepted: float


@dataclass
class TuneReport:
    """Results of `firp tune`.

    Attributes:
        calibration: data set, prompts, tokens, anchors, size of the trial. acceptance: by draft step and candidate.
            reliability: by draft step and bin.
        entries: the choice for each batch size. ladder: the best tree of each number of nodes, at the first batch
            size. batches: the best tree at each batch size, also where it is slower than autoregressive decoding.
            break_even: smallest batch size at which every tree is slower.
    """

    environment: dict[str, Any]
    teacher: dict[str, Any]
    predictor: dict[str, Any]
    settings: dict[str, Any]
    calibration: dict[str, Any]
    acceptance: list[CandidateRate]
    reliability: list[Reliability]
    cost: CostReport
    entries: list[TunedTree]
    ladder: list[Trial]
    batches: list[Trial]
    break_even: int | None = None
    schema: str = TUNE_SCHEMA
