"""SPEED (arXiv 2310.12072): predictions of the next token from the states after early loops.

An exit head is a learned linear map before the teacher's own norm and head: after loop g the state h_n predicts the
token that the teacher puts after position n once all r loops have run. Decoding starts the next token from it.
Shapes: E exits, B sequences, T positions, A anchors, d hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from firp_cli.config import SpeedConfig
from firp_cli.errors import PredictorError
from firp_cli.predictors.base import ExitPredictor, LinearMapPredictor, RowsHook, SequenceBatch
from firp_cli.teacher.teacher import Teacher


class SpeedPredictor(LinearMapPredictor, ExitPredictor):
    """W_g for each exit loop g: from the state after loop g to the one that the final norm reads, at its position."""

    def __init__(self, config: SpeedConfig, teacher: Teacher) -> None:
        boundaries = teacher.boundaries(config.loops)
        exits = config.exit_loops(len(boundaries))
        if not exits or exits[-1] >= len(boundaries):
            reach = f"1 to {len(boundaries) - 1}" if len(boundaries) > 1 else "none: it has one loop"
            raise PredictorError(
                f"predictor.exits {list(exits)} is out of range for {teacher.name}: exits follow loops {reach}"
            )
        super().__init__(config, len(exits), teacher.hidden_size, config.bias)
        self.exits = exits
        self.loops = len(boundaries)
        self.threshold = config.threshold
        self.grouping = config.loops  # groups of a teacher without sharing
        self._layers = config.required_layers(teacher)
        self._weights = config.exit_weights or [float(loop) for loop in exits]

    @property
    def required_layers(self) -> tuple[int, ...]:
        return self._layers

    def loss_weights(self, decay: float) -> list[float]:
        """Return the weights of the exits; later ones weigh more, as in the paper (which gives no numbers)."""
        return self._weights

    def draft_states(
        self, teacher: Teacher, batch: SequenceBatch, anchors: Tensor, on_layer: RowsHook | None = None
    ) -> Tensor:
        index = anchors[:, :, None].expand(-1, -1, batch.final.shape[-1])
        states = torch.stack([batch.hidden[layer].gather(1, index) for layer in self._layers])
        return teacher.norm(torch.stack(self._map(states, range(self.steps)))).movedim(0, 2)

    def _map(self, states: Iterable[Tensor], places: Iterable[int]) -> list[Tensor]:
        """Map states (..., d) after the exit loops in `places` to states before the final norm."""
        linears: list[Any] = [self.maps[place] for place in places]
        pairs = zip(linears, states, strict=True)
        return [linear(state.to(linear.weight.dtype)).to(state.dtype) for linear, state in pairs]

    def step_logits(self, teacher: Teacher, states: Tensor, step: int) -> Tensor:
        return teacher.head(states)

    def pipeline_logits(
        self, teacher: Teacher, exits: Mapping[int, Tensor], final: Tensor | None, normed: bool = False
    ) -> Tensor:
        rows = self._map(exits.values(), exits)
        if final is None or not normed:
            return teacher.head(teacher.norm(torch.stack(rows if final is None else [*rows, final])))
        early = [teacher.norm(torch.stack(rows))] if rows else []
        return teacher.head(torch.cat([*early, final[None]]))

    def ridge_layers(self) -> tuple[int, ...]:
        return self._layers

    def ridge_target(self, teacher: Teacher, batch: SequenceBatch, hidden: Tensor) -> Tensor:
        return exit_target(teacher, batch, hidden)


def exit_target(teacher: Teacher, batch: SequenceBatch, hidden: Tensor) -> Tensor:
    """Return (B, T, d): the target of an exit map for the states `hidden` (B, T, d), to which the final norm is applied
    before the head.
    """
    # the norm removes a state's length; the input's length keeps the maps near the identity
    length = hidden.float().square().mean(dim=-1, keepdim=True).sqrt().to(hidden.dtype)
    return teacher.unnorm(batch.final) * length
