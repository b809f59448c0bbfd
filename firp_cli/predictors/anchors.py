"""Anchors of the predictions, and their targets.

An anchor n is a position whose next token belongs to the response. Step i at n drafts token n+i+1 and is compared with
the teacher's own row at n+i. It counts only while token n+i+1 is a response token of the same conversation.
Shapes: B sequences, T positions, A anchors, k steps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from firp_cli.predictors.base import SequenceBatch


class Sequenced(Protocol):
    """A stored conversation: input_ids (T,), loss_mask (T,), final (T, d), hidden layer -> (T, d)."""

    input_ids: Tensor
    loss_mask: Tensor
    final: Tensor
    hidden: dict[int, Tensor]


def collate(sequences: Sequence[Sequenced]) -> SequenceBatch:
    """Right-pad stored conversations into one batch."""

    def padded(rows: list[Tensor]) -> Tensor:
        return pad_sequence(rows, batch_first=True)

    return SequenceBatch(
        input_ids=padded([item.input_ids.long() for item in sequences]),
        lengths=torch.tensor([item.input_ids.shape[0] for item in sequences]),
        loss_mask=padded([item.loss_mask.bool() for item in sequences]),
        final=padded([item.final for item in sequences]),
        hidden={layer: padded([item.hidden[layer] for item in sequences]) for layer in sequences[0].hidden},
    )


@dataclass
class Anchors:
    """Positions `index` (B, A), and the steps that count `valid` (B, A, k) bool. Padding anchors have none."""

    index: Tensor
    valid: Tensor


def choose_anchors(
    batch: SequenceBatch, steps: int | Sequence[int], limit: int | None = None, seeds: Sequence[int] | None = None
) -> Anchors:
    """Choose the anchors of every sequence: at most `limit`, drawn without replacement by its own seed (None: all).

    The draw depends on the sequence's seed alone, so it is the same in every batch and on every rank.

    Args:
        steps: k, or the distance of each step's row from the anchor (`Predictor.offsets`).
    """
    offsets = list(range(1, steps + 1)) if isinstance(steps, int) else list(steps)
    length, nearest = batch.loss_mask.shape[1], min(offsets) + 1
    nothing = torch.zeros_like(batch.loss_mask[:, :1])
    response = torch.cat([batch.loss_mask, nothing.expand(-1, max(offsets) + 1)], dim=1)
    chosen = []
    for row in range(response.shape[0]):
        usable = response[row, nearest : length + nearest] & response[row, 1 : length + 1]
        places = usable.nonzero()[:, 0]
        if limit is not None and len(places) > limit:
            assert seeds is not None
            generator = torch.Generator().manual_seed(seeds[row])
            picks = torch.randperm(len(places), generator=generator)[:limit].sort().values
            places = places[picks.to(places.device)]
        chosen.append(places)
    width = max(1, *(len(places) for places in chosen))
    index = torch.zeros(len(chosen), width, dtype=torch.long, device=response.device)
    real = torch.zeros(len(chosen), width, dtype=torch.bool, device=response.device)
    for row, places in enumerate(chosen):
        index[row, : len(places)] = places
        real[row, : len(places)] = True
    ahead = index[:, :, None] + torch.tensor(offsets, device=index.device) + 1
    drafted = response.gather(1, ahead.flatten(1)).view(ahead.shape)
    return Anchors(index, drafted.cumprod(dim=-1).bool() & real[:, :, None])


def target_states(batch: SequenceBatch, anchors: Anchors, offsets: Sequence[int] | None = None) -> Tensor:
    """Return the teacher's normed final states at n+i, or n + offsets[i-1]: (B, A, k, d). Steps past the last position
    have the last position's state.
    """
    offsets = offsets or range(1, anchors.valid.shape[-1] + 1)
    ahead = anchors.index[:, :, None] + torch.tensor(list(offsets), device=anchors.index.device)
    ahead = ahead.clamp(max=batch.final.shape[1] - 1)
    size = batch.final.shape[-1]
    rows = batch.final.gather(1, ahead.flatten(1)[:, :, None].expand(-1, -1, size))
    return rows.view(*ahead.shape, size)


@dataclass
class Agreement:
    """Comparison of rows (M,): divergences of the draft q from the teacher p in nats (total variation: 0..1), and hits.

    `top1`: q's argmax is p's argmax; `top5`: p's argmax is among q's five most probable tokens.
    """

    kl: Tensor
    cross_entropy: Tensor
    total_variation: Tensor
    top1: Tensor
    top5: Tensor


def compare_rows(draft_logits: Tensor, teacher_logits: Tensor) -> Agreement:
    """Compare float32 logits (M, V) of draft and teacher row by row. Differentiable in the draft logits."""
    draft = draft_logits.log_softmax(-1)
    teacher = teacher_logits.log_softmax(-1)
    measured = {name: divergence(draft, teacher) for name, divergence in DIVERGENCES.items()}
    top1, top5 = hits(draft_logits, teacher_logits.argmax(-1))
    return Agreement(**measured, top1=top1, top5=top5)


@torch.no_grad()
def hits(draft_logits: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the teacher's token `best` (M,) is the draft's first, and among its first five: (M,) bool each."""
    likeliest = draft_logits.topk(min(5, draft_logits.shape[-1]), dim=-1).indices
    return likeliest[:, 0] == best, (likeliest == best[:, None]).any(-1)


def _kl(draft: Tensor, teacher: Tensor) -> Tensor:
    return (teacher.exp() * (teacher - draft)).sum(-1)


def _cross_entropy(draft: Tensor, teacher: Tensor) -> Tensor:
    return -draft.gather(-1, teacher.argmax(-1, keepdim=True))[:, 0]


def _total_variation(draft: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (teacher.exp() - draft.exp()).abs().sum(-1)


# log-probabilities (M, V) of draft and teacher to (M,), differentiable in the draft's
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": _kl,
    "cross_entropy": _cross_entropy,
    "total_variation": _total_variation,
}
