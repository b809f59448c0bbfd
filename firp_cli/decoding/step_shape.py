"""Predictor, tree and sizes of a batch's decoding steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from firp_cli.decoding.tree_spec import TreeSpec
from firp_cli.predictors.base import PseudoStateMaker, TreePredictor
from firp_cli.teacher.teacher import Teacher


@dataclass(frozen=True)
class StepShape:
    """Sizes of the largest decoding step of a batch.

    Attributes:
        nodes: N. steps: k. anchors: A, 0 without pseudo states. rows: M. width: P, the most tokens that a step emits.
    """

    nodes: int = 1
    steps: int = 0
    anchors: int = 0
    rows: int = 1
    width: int = 1

    def cache(self, teacher: Teacher, batch: int, capacity: int) -> dict[str, Any]:
        """Return the arguments of the `KVCache` for such steps. The scratch holds the rows of the largest one."""
        return {
            "layers": teacher.num_layers,
            "batch": batch,
            "scratch": self.rows,
            "capacity": capacity,
            "heads": teacher.kv_heads,
            "head_size": teacher.head_size,
            "dtype": teacher.dtype,
            "spread": self.width,
        }


@dataclass(frozen=True)
class DraftSetup:
    """Predictor and tree of a batch's decoding steps. Without them decoding is autoregressive.

    Attributes:
        predictor: limited to the draft steps that the tree needs. make_pseudo_states: its maps, prepared for decoding.
        ratio: predicted cost of a step with this tree, in autoregressive steps.
    """

    predictor: TreePredictor | None = None
    tree: TreeSpec | None = None
    make_pseudo_states: PseudoStateMaker | None = None
    ratio: float | None = None
    shape: StepShape = StepShape()

    @staticmethod
    def of(
        predictor: TreePredictor, tree: TreeSpec, maker: PseudoStateMaker | None = None, ratio: float | None = None
    ) -> DraftSetup:
        """Return the setup of a predictor and a tree, with its step's shape."""
        pseudo = len(predictor.transfer_layers)
        anchors = (tree.budget or 1) if tree.limited else tree.nodes
        rows, width = tree.nodes + pseudo * anchors, tree.depth(predictor.steps) + 1
        shape = StepShape(tree.nodes, predictor.steps, anchors if pseudo else 0, rows, width)
        return DraftSetup(predictor, tree, maker or predictor.make_pseudo_states, ratio, shape)
