"""Choice of tokens from logits: greedy, or by temperature and top-p."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from firp_cli.errors import UsageError


class Sampler:
    """Chooses the teacher's token at every node: argmax at temperature 0, else a draw after temperature and top-p.

    The warpers are transformers' own, in the order of its `generate`. Raises UsageError.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, device: torch.device) -> None:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        if temperature < 0 or not 0 < top_p <= 1:
            raise UsageError(f"temperature must be >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
        self.greedy = temperature == 0.0
        self._warpers: list[Any] = []
        if not self.greedy:
            self._warpers.append(TemperatureLogitsWarper(float(temperature)))
            if top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(top_p))
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose tokens (B, N) from float32 logits (B, N, V)."""
        if self.greedy:
            return logits.max(-1).indices  # `argmax` uses one core for few rows on a CPU
        scores = logits.flatten(0, 1)
        for warp in self._warpers:
            scores = warp(None, scores)
        probabilities = scores.softmax(-1)
        # the first of independent exponential clocks with these rates is a draw; `multinomial` would wait for the host
        clocks = torch.empty_like(probabilities).exponential_(generator=self.generator)
        return (probabilities / clocks).argmax(-1).view(logits.shape[:2])
