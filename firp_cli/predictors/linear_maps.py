"""Predictors made of one linear map (d, d) per step, and their start values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from firp_cli.config import PredictorSection
from firp_cli.predictors.base import Predictor


class LinearMapPredictor(Predictor):
    """Holds `maps`, one linear layer per step; each starts at the identity, at random, or at its ridge solution."""

    def __init__(self, config: PredictorSection, steps: int, size: int, bias: bool) -> None:
        super().__init__(config, steps)
        self.maps = nn.ModuleList(nn.Linear(size, size, bias=bias) for _ in range(steps))

    def initialise(self, init: str, teacher: object) -> None:
        for linear in self.maps:
            assert isinstance(linear, nn.Linear)
            if init == "random":
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            else:
                nn.init.eye_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    @torch.no_grad()
    def set_map(self, step: int, weight: Tensor, bias: Tensor | None) -> None:
        linear = self.maps[step - 1]
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(weight)
        if linear.bias is not None and bias is not None:
            linear.bias.copy_(bias)
