"""Forward passes that training, evaluation and decoding share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from firp_cli.predictors.base import Predictor, PseudoStateMaker, RowsHook, SequenceBatch
from firp_cli.teacher.kv_cache import SequenceCache
from firp_cli.teacher.library_layers import Cache
from firp_cli.teacher.masks import Mask, pseudo_positions
from firp_cli.teacher.teacher import Teacher
from firp_cli.teacher.training_masks import AnchoredMask

LOGIT_ELEMENTS = 1 << 24  # most logits in memory at once


@torch.inference_mode()
def sequence_states(teacher: Teacher, predictor: Predictor, token_ids: Sequence[int]) -> SequenceBatch:
    """Return one sequence with the states that the predictor reads, as a store holds them."""
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


def forward_rows(
    teacher: Teacher,
    real: Tensor,
    positions: Tensor,
    mask: Mask | None,
    *,
    start: int = 0,
    transfer_layers: tuple[int, ...] = (),
    make_pseudo_states: PseudoStateMaker | None = None,
    anchors: Tensor | None = None,
    cache: Cache | None = None,
    rotary: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run decoding's forward: h^start of R real rows (B, R, d) through layers start..L-1; the step-i pseudo states of A
    rows join at layer t_i. All rows of a layer run in one call.

    Args:
        positions: (B, M). mask: of the M = R + kA rows, in the order of teacher/masks.py; None only for one row
            that sees every slot and has no pseudo states.
        anchors: (B, A) the real rows that have pseudo states; None: every row.
        rotary: position embeddings of all rows, if the caller has them.

    Returns the real rows (B, R, d) and the pseudo states (B, k, A, d), both before the final norm.
    """
    batch, count, size = real.shape
    rotary = teacher.rotary(real, positions) if rotary is None else rotary
    rows, started = real, 0
    index = None if anchors is None else anchors[:, :, None].expand(-1, -1, size)
    joining = sorted({layer for layer in transfer_layers if layer > start})
    for first, last in pairwise([start, *joining, teacher.num_layers]):
        entering = transfer_layers.count(first)
        if entering:
            assert make_pseudo_states is not None
            source = rows[:, :count] if index is None else rows.gather(1, index)
            rows = torch.cat([rows, make_pseudo_states(started + 1, started + entering, source)], dim=1)
            started += entering
        present = rows.shape[1]
        places = positions[:, :present]
        rows = teacher.layers_between(first, last, rows, [part[:, :present] for part in rotary], places, mask, cache)
    pseudo = rows[:, count:].view(batch, len(transfer_layers), -1, size) if transfer_layers else None
    return rows[:, :count], pseudo


def forward_anchors(
    teacher: Teacher,
    real: Tensor,
    positions: Tensor,
    mask: AnchoredMask,
    anchors: Tensor,
    *,
    start: int,
    transfer_layers: tuple[int, ...],
    make_pseudo_states: PseudoStateMaker,
    on_layer: RowsHook | None = None,
) -> Tensor:
    """Run training's forward: the rows and mask of `forward_rows` for chosen anchors (B, A), in two calls a layer. So
    the frozen real rows keep no graph, and gradients run through the pseudo states only.

    Returns pseudo states (B, k, A, d) after the last layer.
    """
    batch, count, size = real.shape
    steps, width = len(transfer_layers), anchors.shape[1]
    all_positions = torch.cat([positions, pseudo_positions(positions, anchors, steps)], dim=1)
    rotary = teacher.rotary(real, all_positions)
    cosine, sine = (part.expand(batch, *part.shape[1:]) for part in rotary)
    gather = anchors[:, :, None].expand(batch, width, size)
    pseudo = real.new_zeros(batch, 0, size)
    started = 0
    for index in range(start, teacher.num_layers):
        entering = transfer_layers.count(index)
        if entering:
            pseudo = torch.cat(
                [pseudo, make_pseudo_states(started + 1, started + entering, real.gather(1, gather))], dim=1
            )
            started += entering
        if on_layer and started:
            on_layer(index, real, pseudo.view(batch, started, width, size).transpose(1, 2))
        end = count + pseudo.shape[1]
        window = teacher.windows[index]
        kept = SequenceCache()
        with torch.no_grad():
            real_rotary = (cosine[:, :count], sine[:, :count])
            real = teacher.layer(index, real, real_rotary, positions, mask.real(window), kept)
        kept.recording = False
        if started:
            pseudo_rotary = (cosine[:, count:end], sine[:, count:end])
            rows_mask = mask.pseudo(window, started)
            pseudo = teacher.layer(index, pseudo, pseudo_rotary, all_positions[:, count:end], rows_mask, kept)
    pseudo = pseudo.view(batch, steps, width, size)
    if on_layer:
        on_layer(teacher.num_layers, real, pseudo.transpose(1, 2))
    return pseudo
