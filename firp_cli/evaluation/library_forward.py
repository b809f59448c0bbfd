"""The library's own forward over a whole sequence, for checks of answers, and the noise of its rounding.

Only the head's product is made here, in chunks of rows, because all logits of a long answer would not fit the memory;
the library makes those of one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from firp_cli.teacher.teacher import Teacher

CHUNK = 1 << 22  # logits in memory at once, of each of a few tensors
ROWS, TOP = 256, 8  # of each sequence that measures the noise: rows, and their most probable tokens


def chunks(teacher: Teacher, rows: Tensor) -> tuple[Tensor, ...]:
    """Return rows (R, ...) in parts whose logits fit the memory."""
    return rows.split(max(1, CHUNK // teacher.vocab_size))


def library_logits(teacher: Teacher, normed: Tensor) -> Tensor:
    """Return the float32 logits (R, V) of normed states (R, d) by the library's head."""
    return teacher.capped(teacher.library.head(normed).float())


@torch.inference_mode()
def normed_states(teacher: Teacher, token_ids: Sequence[int]) -> Tensor:
    """Return the states (T, d) that the head reads, from the library's own forward over the tokens.

    The head gets the last row alone.
    """
    caught: list[Tensor] = []

    def catch(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        caught.append(arguments[0])
        return (arguments[0][:, -1:], *arguments[1:])

    ids = torch.tensor([list(token_ids)], device=teacher.device)
    handle = teacher.model.get_output_embeddings().register_forward_pre_hook(catch)
    try:
        teacher.model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return caught[0][0]


@torch.inference_mode()
def measured_noise(teacher: Teacher, sequences: Sequence[Sequence[int]]) -> float:
    """Return the root mean square of the change that a unit in the last place, in the input of every layer, makes in
    the distance of probable tokens' logits from the largest one.
    """
    total, count = 0.0, 0
    for number, ids in enumerate(sequences):
        places = torch.linspace(0, len(ids) - 1, min(ROWS, len(ids))).long().unique()
        exact = normed_states(teacher, ids)
        with _perturbed_layers(teacher, seed=number):
            changed = normed_states(teacher, ids)
        for part in chunks(teacher, places.to(exact.device)):
            one, two = (library_logits(teacher, states[part]) for states in (exact, changed))
            top = one.topk(min(TOP, one.shape[-1]))
            change = two.gather(-1, top.indices) - top.values
            squares = (change[:, 1:] - change[:, :1]).double().square()
            squares = squares[squares.isfinite()]
            total, count = total + squares.sum().item(), count + squares.numel()
    return math.sqrt(total / max(1, count))


@contextmanager
def _perturbed_layers(teacher: Teacher, seed: int) -> Iterator[None]:
    """Multiply the inputs of all layers by random factors within a unit in the last place of 1."""
    unit = torch.finfo(teacher.dtype).eps
    generator = torch.Generator().manual_seed(seed)

    def perturb(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        states = arguments[0] if arguments else options["hidden_states"]
        factors = 1 + unit * (2 * torch.rand(states.shape, generator=generator) - 1)
        changed = (states.float() * factors.to(states.device)).to(states.dtype)
        return ((changed, *arguments[1:]), options) if arguments else ((), {**options, "hidden_states": changed})

    handles = [layer.register_forward_pre_hook(perturb, with_kwargs=True) for layer in teacher.layers.children()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
