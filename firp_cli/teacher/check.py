"""Checks that a teacher's layers give the model's own numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from firp_cli.teacher.masks import causal_allowed
from firp_cli.teacher.training_masks import CausalRows

if TYPE_CHECKING:
    from firp_cli.teacher.teacher import Teacher

TRIED_ROWS = 24


@torch.no_grad()
def attends_plainly(teacher: Teacher, index: int) -> bool:
    """Whether a layer gives under `CausalRows` what it gives under the dense mask: some cap their scores, or add to
    them.
    """
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, TRIED_ROWS, teacher.hidden_size, generator=generator).to(teacher.device, teacher.dtype)
    positions = torch.arange(TRIED_ROWS, device=teacher.device)[None]
    allowed = causal_allowed(positions.new_full((1,), TRIED_ROWS), TRIED_ROWS)
    window, rotary = teacher.windows[index], teacher.rotary(states, positions)
    dense = teacher.sequence_mask(allowed, positions).additive(window)
    try:
        expected, found = (
            teacher.layer(index, states, rotary, positions, mask, None).float() for mask in (dense, CausalRows(window))
        )
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError):
        return False
    tolerance = 1e-4 if teacher.dtype == torch.float32 else 5e-2
    return bool((expected - found).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0))
