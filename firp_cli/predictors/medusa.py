"""Medusa (arXiv 2401.10774, section 2.1.1): residual heads on the last hidden state, the baseline of both papers.

Head i has `resblocks` blocks x + SiLU(Linear(x)), whose linear layers start at zero, and a vocabulary matrix: its own,
which starts as a copy of the teacher's, or the teacher's, frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from firp_cli.config import MedusaConfig
from firp_cli.errors import PredictorError
from firp_cli.predictors.base import RowsHook, SequenceBatch, TreePredictor
from firp_cli.teacher.teacher import Teacher


class MedusaPredictor(TreePredictor):
    """k heads that read the normed final state of the anchor. It has no pseudo states."""

    def __init__(self, config: MedusaConfig, teacher: Teacher) -> None:
        super().__init__(config, config.steps)
        size = teacher.hidden_size
        self.blocks = nn.ModuleList(
            nn.Sequential(*(nn.Linear(size, size) for _ in range(config.resblocks))) for _ in range(self.steps)
        )
        self.heads = nn.ModuleList(
            nn.Linear(size, teacher.vocab_size, bias=False) for _ in range(self.steps if config.own_head else 0)
        )
        self.couple(teacher)

    @property
    def own_vocabulary(self) -> bool:
        return len(self.heads) > 0

    @property
    def teachers_head(self) -> bool:
        return not len(self.heads) and self.draft_tokens is None

    def _truncate(self, steps: int) -> None:
        self.blocks, self.heads = self.blocks[:steps], self.heads[:steps]
        self.config = self.config.model_copy(update={"steps": steps})

    def _states(self, final: Tensor) -> Tensor:
        """Return the heads' states (..., k, d) from normed final states (..., d)."""
        states = []
        for blocks in self.blocks:
            state = final
            for linear in _linears(blocks):
                state = state + functional.silu(linear(state.to(linear.weight.dtype))).to(final.dtype)
            states.append(state)
        return torch.stack(states, dim=-2)

    def draft_states(
        self, teacher: Teacher, batch: SequenceBatch, anchors: Tensor, on_layer: RowsHook | None = None
    ) -> Tensor:
        index = anchors[:, :, None].expand(-1, -1, batch.final.shape[-1])
        return self._states(batch.final.gather(1, index))

    def draft_hidden(self, teacher: Teacher, node_final: Tensor, pseudo: Tensor | None) -> Tensor:
        return self._states(node_final)

    def step_logits(self, teacher: Teacher, states: Tensor, step: int) -> Tensor:
        if not len(self.heads):
            return teacher.head(states)
        head = self.heads[step - 1]
        return head(states.to(head.weight.dtype)).float()  # type: ignore[arg-type]

    @torch.no_grad()
    def initialise(self, init: str, teacher: Teacher) -> None:
        if init == "ridge":
            raise PredictorError("medusa has no ridge start: set training.init to identity or random")
        super().initialise(init, teacher)
        for blocks in self.blocks:
            for linear in _linears(blocks):
                if init == "identity":
                    nn.init.zeros_(linear.weight)
                else:
                    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                nn.init.zeros_(linear.bias)
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            head.weight.copy_(teacher.head_weight())


def _linears(blocks: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a head's residual blocks; `_states` adds the skip connections."""
    return [module for module in blocks.children() if isinstance(module, nn.Linear)]
