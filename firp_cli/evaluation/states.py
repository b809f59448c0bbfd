"""A whole sequence through the teacher, with the states that a predictor reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from firp_cli.predictors.base import Predictor, SequenceBatch
from firp_cli.teacher.stack import Teacher

LOGIT_ELEMENTS = 1 << 24  # logits held at once


@torch.inference_mode()
def sequence_states(teacher: Teacher, predictor: Predictor, token_ids: Sequence[int]) -> SequenceBatch:
    """One sequence with the states that the predictor reads, as a store would give them."""
    ids = torch.tensor([list(token_ids)], device=teacher.device)
    length = ids.shape[1]
    lengths = torch.full((1,), length, device=teacher.device)
    positions = torch.arange(length, device=teacher.device)[None]
    mask = teacher.causal_mask(length)
    hidden: dict[int, Tensor] = {}

    def keep(layer: int, states: Tensor) -> None:
        if layer in predictor.required_layers:
            hidden[layer] = states

    last = teacher.run(teacher.embed(ids), positions, mask, on_layer=keep)
    return SequenceBatch(ids, lengths, torch.ones_like(ids, dtype=torch.bool), teacher.norm(last), hidden)
