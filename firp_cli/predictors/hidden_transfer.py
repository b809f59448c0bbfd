"""Hidden Transfer (arXiv 2404.12022): linear maps that predict the intermediate hidden states of future tokens, each
step at its own transfer layer.

FIRP (predictors/firp.py) is the case t_1 = ... = t_k.
Shapes: B sequences, A anchors, k steps, d hidden size, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from firp_cli.config import FirpConfig, HiddenTransferConfig, PredictorSection
from firp_cli.errors import PredictorError
from firp_cli.predictors.base import LinearMapPredictor, PseudoStateMaker, RowsHook, SequenceBatch, TreePredictor
from firp_cli.predictors.forward import forward_anchors
from firp_cli.teacher.masks import pseudo_positions
from firp_cli.teacher.packed_linear import PackedLinear, is_bfloat16
from firp_cli.teacher.teacher import Teacher


class HiddenTransferPredictor(LinearMapPredictor, TreePredictor):
    """W_1..W_k: h~^{t_i}_{n+i} = W_i h_n^{t_i} runs through the frozen layers t_i..L-1 and the teacher's head."""

    def __init__(self, config: FirpConfig | HiddenTransferConfig, teacher: Teacher) -> None:
        super().__init__(config, config.steps, teacher.hidden_size, config.bias)
        self.sees_earlier = True
        last = teacher.num_layers - 1
        if any(layer > last for layer in self.transfer_layers):
            raise PredictorError(
                f"transfer layer {max(self.transfer_layers)} is out of range: "
                f"{teacher.name} has {teacher.num_layers} layers, so 1 <= t <= {last}"
            )
        self.couple(teacher)

    @property
    def teachers_head(self) -> bool:
        return self.draft_tokens is None

    def isolated(self) -> HiddenTransferPredictor:
        """Return the predictor on the same weights whose `draft_states` hide the pseudo states of earlier steps from
        later ones. For analysis alone: the decoder has no such mask.
        """
        other = self._copy()
        assert isinstance(other, HiddenTransferPredictor)
        other.sees_earlier = False
        return other

    def _truncate(self, steps: int) -> None:
        self.maps = self.maps[:steps]
        self.config = self._first_config(steps)

    def _first_config(self, steps: int) -> PredictorSection:
        """Return the configuration of the first `steps` steps."""
        return self.config.model_copy(update={"layers": list(self.transfer_layers[:steps])})

    def make_pseudo_states(self, first: int, last: int, hidden: Tensor) -> Tensor:
        maps = [self.maps[step - 1] for step in range(first, last + 1)]
        # (B * A, d): with three dimensions torch takes a batched product, several times slower
        inputs = hidden.reshape(-1, hidden.shape[-1]).to(maps[0].weight.dtype)  # type: ignore[arg-type]
        return torch.cat([linear(inputs).view_as(hidden) for linear in maps], dim=1).to(hidden.dtype)

    def pseudo_state_maker(self) -> PseudoStateMaker:
        """Return a maker that joins all maps of a layer to one matrix: they read the same rows."""
        joined: dict[tuple[int, int], PackedLinear] = {}
        for layer in set(self.transfer_layers):
            first = self.transfer_layers.index(layer) + 1
            last = first + self.transfer_layers.count(layer) - 1
            parts = [linear for linear in self.maps[first - 1 : last] if isinstance(linear, nn.Linear)]
            bias = None if parts[0].bias is None else torch.cat([linear.bias for linear in parts])
            weight = torch.cat([linear.weight for linear in parts])
            joined[first, last] = PackedLinear(weight, bias, half=is_bfloat16(weight))

        def make_pseudo_states(first: int, last: int, hidden: Tensor) -> Tensor:
            batch, rows, size = hidden.shape
            maps = joined[first, last]
            product = maps(hidden.reshape(-1, size).to(maps.weight.dtype)).to(hidden.dtype)
            by_step = product.view(batch, rows, last - first + 1, size).transpose(1, 2)
            return by_step.reshape(batch, -1, size)

        return make_pseudo_states

    def draft_states(
        self, teacher: Teacher, batch: SequenceBatch, anchors: Tensor, on_layer: RowsHook | None = None
    ) -> Tensor:
        start = self.transfer_layers[0]
        real = batch.hidden[start]
        rows = real.shape[1]
        positions = torch.arange(rows, device=real.device).expand(real.shape[0], rows)
        mask_positions = torch.cat([positions, pseudo_positions(positions, anchors, self.steps)], dim=1)
        mask = teacher.anchored_mask(batch.lengths, mask_positions, anchors, self.steps, self.sees_earlier)
        pseudo = forward_anchors(
            teacher,
            real,
            positions,
            mask,
            anchors,
            start=start,
            transfer_layers=self.transfer_layers,
            make_pseudo_states=self.make_pseudo_states,
            on_layer=on_layer,
        )
        return teacher.norm(pseudo).transpose(1, 2)

    def draft_hidden(self, teacher: Teacher, node_final: Tensor, pseudo: Tensor | None) -> Tensor:
        assert pseudo is not None
        return teacher.norm(pseudo)

    def step_logits(self, teacher: Teacher, states: Tensor, step: int) -> Tensor:
        return teacher.head(states)

    def logits(self, teacher: Teacher, states: Tensor) -> Tensor:
        return teacher.head(states)

    def ridge_layers(self) -> tuple[int, ...]:
        return self.transfer_layers
