"""Comparisons of a teacher's layers with the model's own forward, of its attention with `attend`, and of lean layers
with the library's.

An architecture that computes more between its layers than `Teacher` does fails the first comparison and is refused.
Lean layers run only where their logits equal the library's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from firp_cli.errors import TeacherError
from firp_cli.teacher.layer_kinds import SUPPORTED, difference_in_words
from firp_cli.teacher.lean_layers import UnsupportedLayersError
from firp_cli.teacher.library_layers import MissingLayer, OwnScoresError, Stack
from firp_cli.teacher.masks import AttentionMask, causal_allowed
from firp_cli.teacher.teacher import Teacher, rounding
from firp_cli.teacher.training_masks import CausalRows

# Greatest difference of lean logits in float32 on a CPU, relative to their size. Other dtypes round each operation, and
# on CUDA devices products of joined matrices sum in another order: there it is `rounding`.
LEAN_TOLERANCE = 1e-5
TOKENS = 24
LONGEST_CONTEXT = 1 << 20  # positions of a teacher whose config names no context
MODEL_ERRORS = (TypeError, ValueError, AttributeError, RuntimeError)  # raised by layers of an unknown kind


@torch.no_grad()
def check_against_model(teacher: Teacher) -> None:
    """Compare the states after each layer of this process, and the logits, with the model's own forward.

    Raises TeacherError on a difference.
    """
    ids = _token_ids(teacher)
    start = teacher.embed(ids) if teacher.first == 0 else _states(teacher, ids.shape[1])
    inputs = {"input_ids": ids} if teacher.first == 0 else {"inputs_embeds": start}
    states: list[Tensor] = []
    written = _WrittenShapes()
    try:
        with _passing_layers(teacher.layers):
            reference = teacher.model(**inputs, output_hidden_states=True, use_cache=False)
        positions, mask = _causal(teacher, start.shape[1])
        last = teacher.run(
            start, positions, mask, teacher.first, cache=written, on_layer=lambda _, hidden: states.append(hidden)
        )
        logits = teacher.head(teacher.norm(last))
    except (*MODEL_ERRORS, KeyError) as error:
        raise TeacherError(
            f"{teacher.name}: the layers of {type(teacher.model).__name__} cannot be run one by one ({error}); "
            f"{SUPPORTED}"
        ) from error
    written.check(teacher, start.shape[1])
    # a looped model of its own code may report one state per loop, or none, and the library reports a layer's state
    # before a norm that ends its loop: then only the logits are compared
    looped = teacher.looped
    comparable = not (looped and looped.norm_each_loop) and len(reference.hidden_states or ()) == len(states)
    expected_states = reference.hidden_states[:-1] if comparable else ()
    pairs = [(f"layer {layer}", pair) for layer, pair in enumerate(zip(expected_states, states, strict=False))]
    for place, (expected, got) in [*pairs, ("logits", (reference.logits, logits))]:
        difference = (expected.float() - got.float()).abs().max().item()
        if not difference <= rounding(teacher.dtype) * max(1.0, expected.float().abs().max().item()):
            words = difference_in_words(teacher.model, place, expected, got)
            raise TeacherError(f"{teacher.name}: {type(teacher.model).__name__} {words}")


class _WrittenShapes:
    """Cache that keeps nothing but the shapes of the keys and values that each layer writes."""

    def __init__(self) -> None:
        self._shapes: dict[int, list[tuple[int, ...]]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._shapes.setdefault(layer_index, []).append((*keys.shape[1:], *values.shape[1:]))
        return keys, values

    def check(self, teacher: Teacher, rows: int) -> None:
        """Raise TeacherError unless each layer wrote once, in the shape that a K/V cache has for all layers."""
        expected = [(teacher.kv_heads, rows, teacher.head_size) * 2]
        for layer in range(teacher.first, teacher.num_layers):
            found = self._shapes.get(layer, [])
            if found != expected:
                wrote = f"keys and values of {found} (heads, rows, size)" if found else "no keys and values"
                raise TeacherError(
                    f"{teacher.name}: {type(teacher.model).__name__} is not supported: its layer {layer} writes "
                    f"{wrote} to the cache, which holds {expected} for every layer; {SUPPORTED}"
                )


def inspect_attention(teacher: Teacher) -> None:
    """Set `standard_attention` and, where it is False for a known reason, `own_scores` of a teacher."""
    teacher.own_scores = None
    teacher.standard_attention = standard_attention(teacher)


def standard_attention(teacher: Teacher) -> bool:
    """Return True where the layers treat scores as `attend` does, found by running one layer of each window.

    Some architectures cap their scores, or add to them: these need written-out masks.
    """
    present = [index for index, layer in enumerate(teacher.layers) if not isinstance(layer, MissingLayer)]
    first_of_window = {teacher.windows[index]: index for index in reversed(present)}
    return all(_attends_as_standard(teacher, index) for index in first_of_window.values())


@torch.no_grad()
def _attends_as_standard(teacher: Teacher, index: int) -> bool:
    """Compare a layer's output under `CausalRows` with that under the dense mask."""
    states = _states(teacher, TOKENS)
    positions, mask = _causal(teacher, TOKENS)
    window = teacher.windows[index]
    try:
        rotary = teacher.rotary(states, positions)
        expected, got = (
            teacher.layer(index, states, rotary, positions, layer_mask, None).float()
            for layer_mask in (mask.additive(window), CausalRows(window))
        )
    except OwnScoresError as error:
        teacher.own_scores = f"its attention has {error}"
        return False
    except (*MODEL_ERRORS, KeyError):
        return False
    tolerance = 1e-4 if teacher.dtype == torch.float32 else 5e-2
    same = bool((expected - got).abs().max() <= tolerance * expected.abs().max().clamp(min=1.0))
    if not same:
        teacher.own_scores = "its attention treats scores in a way of its own"
    return same


def use_lean_layers(teacher: Teacher, compiled: bool = False) -> str | None:
    """Run the lean layers from now on if they give the library's logits; return the reason why not, or None.

    The library's parameters become views into joined matrices. Call it again after moving the model.
    """
    kept = f"{type(teacher.model).__name__} keeps the library's layers"
    if teacher.peers is not None:
        return f"{kept}: its weights are shared over ranks"
    if teacher.own_scores:
        return f"{kept}: {teacher.own_scores}"
    exact = teacher.device.type == "cpu" and teacher.dtype == torch.float32
    tolerance = LEAN_TOLERANCE if exact else rounding(teacher.dtype)
    teacher.stack = teacher.library
    whole = not any(isinstance(layer, MissingLayer) for layer in teacher.layers)
    difference = 0.0
    try:
        for kernels in (False,) if compiled else (True, False):  # they round otherwise than the library
            lean = teacher.lean_stack(compiled, kernels)
            difference = _difference(teacher, lean) if whole else 0.0  # a part was compared when it was whole
            if difference <= tolerance:
                teacher.stack = lean
                return None
    except (UnsupportedLayersError, *MODEL_ERRORS) as error:
        return f"{kept}: {error}"
    return f"{kept}: lean ones differ by {difference:.2g}"


@torch.inference_mode()
def _difference(teacher: Teacher, stack: Stack) -> float:
    """Return the greatest difference of another stack's logits from the teacher's, relative to their size. The
    positions are the context's last: some attention changes with the distance from the start.
    """
    trial = copy.copy(teacher)
    trial.stack = stack
    ids = _token_ids(teacher)
    positions, mask = _causal(teacher, ids.shape[1])
    positions = positions + max(0, min(teacher.max_positions, LONGEST_CONTEXT) - ids.shape[1])
    expected, got = (item.head(item.norm(item.run(item.embed(ids), positions, mask))) for item in (teacher, trial))
    return ((expected - got).abs().max() / expected.abs().max().clamp(min=1.0)).item()


def _token_ids(teacher: Teacher) -> Tensor:
    """Return random tokens (1, T), enough to pass short sliding windows."""
    tokens = max([TOKENS, *(window + 8 for window in teacher.windows if window and window <= 256)])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, teacher.vocab_size, (1, tokens), generator=generator).to(teacher.device)


def _states(teacher: Teacher, tokens: int) -> Tensor:
    """Return random states (1, T, d)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, tokens, teacher.hidden_size, generator=generator).to(teacher.device, teacher.dtype)


def _causal(teacher: Teacher, rows: int) -> tuple[Tensor, AttentionMask]:
    """Return the positions (1, T) of one sequence, and its written-out causal mask."""
    positions = torch.arange(rows, device=teacher.device)[None]
    return positions, teacher.sequence_mask(causal_allowed(positions.new_full((1,), rows), rows), positions)


@contextmanager
def _passing_layers(layers: nn.ModuleList) -> Iterator[None]:
    """Let states pass missing layers unchanged, so that the model's own forward runs with the layers present."""
    missing = [layer for layer in layers if isinstance(layer, MissingLayer)]
    for layer in missing:
        layer.passes = True
    try:
        yield
    finally:
        for layer in missing:
            layer.passes = False
