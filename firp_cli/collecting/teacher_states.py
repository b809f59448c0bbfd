"""The teacher's hidden states of many conversations, several in one forward.

Conversations of similar length share a forward as rows of a right-padded batch. Under a causal mask no token attends to
the padding on its right, so the states equal those of the conversation alone. The alternative, packing conversations
into one row under a block mask, was measured (scripts/NOTES.md): attention costs the square of a row's length, so one
conversation per row is cheaper, and sorted lengths need little padding.

Shapes: B conversations, T positions, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from firp_cli.store.reader import FINAL
from firp_cli.teacher.teacher import Teacher

Sink = Callable[[list[int], dict[str, Tensor]], None]


def plan_batches(lengths: Sequence[int], pack_tokens: int) -> list[list[int]]:
    """Return the indices of each forward's conversations, longest first.

    A forward has at most `pack_tokens` positions, padding included; a longer conversation has a forward of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= pack_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.inference_mode()
def capture(
    teacher: Teacher,
    sequences: Sequence[Tensor],
    layers: Sequence[int],
    pack_tokens: int,
    sink: Sink,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> None:
    """Run `sequences` (token ids (T,) each) through the teacher.

    After each forward `sink(indices, states)` gets the states of its conversations, concatenated in the order of
    `indices`, on the teacher's device: `hidden.<l>` (sum of T, d) after l layers and `hidden.final` (sum of T, d) after
    the final norm. `on_tokens(n)` gets the forward's number of tokens without padding.
    """
    lengths = [len(ids) for ids in sequences]
    for batch in plan_batches(lengths, pack_tokens):
        width = lengths[batch[0]]
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for row, index in enumerate(batch):
            ids[row, : lengths[index]] = sequences[index]
        teacher.any_has_work(True)
        kept, final = _forward(teacher, ids, set(layers))
        real = [lengths[index] for index in batch]
        states = {f"hidden.{layer}": _real_rows(kept[layer], real) for layer in layers}
        states[FINAL] = _real_rows(final, real)
        sink(batch, states)
        on_tokens(sum(real))


@torch.inference_mode()
def accompany(teacher: Teacher) -> None:
    """Take part in the forwards of the ranks that share the teacher's weights, until none of them captures."""
    while teacher.any_has_work(False):
        _forward(teacher, torch.zeros(1, 1, dtype=torch.long), set())


def _forward(teacher: Teacher, ids: Tensor, layers: set[int]) -> tuple[dict[int, Tensor], Tensor]:
    """Return the states (B, T, d) of token ids (B, T) after `layers`, and the normed final state."""
    width = ids.shape[1]
    positions = torch.arange(width, device=teacher.device)[None]
    mask = teacher.causal_mask(width)
    kept: dict[int, Tensor] = {}

    def keep(layer: int, hidden: Tensor) -> None:
        if layer in layers:
            kept[layer] = hidden

    last = teacher.run(teacher.embed(ids.to(teacher.device)), positions, mask, on_layer=keep)
    return kept, teacher.norm(last)


def _real_rows(states: Tensor, lengths: list[int]) -> Tensor:
    """Return the states (B, T, d) without padding, concatenated: (sum of lengths, d)."""
    return torch.cat([states[row, :length] for row, length in enumerate(lengths)])
