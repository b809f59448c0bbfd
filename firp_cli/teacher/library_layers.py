"""A transformers model seen as layers: where it keeps its parts, and `LibraryStack`, which runs its own layers one by
one.

`LibraryStack` is the reference of the lean layers, and serves architectures that these do not support.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any, Protocol

from torch import Tensor, nn

from firp_cli.config import LoopedSection
from firp_cli.errors import TeacherError
from firp_cli.teacher.attention import attend
from firp_cli.teacher.layer_kinds import SUPPORTED, needed
from firp_cli.teacher.looped import CACHE_NAMES
from firp_cli.teacher.masks import LayerMask

LOG = logging.getLogger("firp")  # commands print it on stderr
ARGUMENTS = ("position_ids", "use_cache", "position_embeddings")  # of every layer, besides states, mask and cache
KERNEL = "firp_tree"  # name of `attend` in transformers' attention interface


class Cache(Protocol):
    """Key/value cache, as a decoder layer uses it."""

    def update(self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]: ...


class Stack(Protocol):
    """Decoder layers that run one by one."""

    name: str

    def rotary(self, hidden: Tensor, positions: Tensor) -> list[Tensor]:
        """Return position embeddings of rows at `positions` (B, R) for this stack's layers: each (B, R, ..., D)."""
        ...

    def norm(self, hidden: Tensor, /) -> Tensor:
        """Apply the final norm."""
        ...

    def head(self, normed: Tensor, /) -> Tensor:
        """Return the logits (..., V) of normed states (..., d), in the teacher's dtype or in float32."""
        ...

    def layer(
        self,
        index: int,
        hidden: Tensor,
        rotary: Sequence[Tensor],
        positions: Tensor,
        mask: LayerMask,
        cache: Cache | None,
    ) -> Tensor:
        """Return h^(index+1) of h^index (B, R, d)."""
        ...


class MissingLayer(nn.Identity):
    """Stand-in for a layer or an embedding that this process does not hold. Raises TeacherError when it runs, unless it
    `passes` its input.
    """

    passes = False

    def forward(self, input: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.passes:
            return input
        raise TeacherError("this process does not hold all of the teacher's layers; load the whole teacher")


class LibraryStack:
    """The library's modules as they are; rows return from the devices where the library placed them.

    Raises TeacherError where a layer takes no known cache.
    """

    name = "library"

    def __init__(
        self, teacher: str, layers: nn.ModuleList, norm: nn.Module, rotary: nn.Module, head: nn.Module, config: Any
    ) -> None:
        self.layers, self._norm, self._rotary, self._head, self._config = layers, norm, rotary, head, config
        # not `layers[0]`: a pass of a looped teacher has no signature of its own
        first = next(iter(layers.children()))
        parameters = inspect.signature(first.forward).parameters
        named = [cache for cache in CACHE_NAMES if cache in parameters]
        if not named:  # a layer would silently ignore a cache of another name
            raise TeacherError(
                f"{teacher}: {type(first).__name__} has no cache argument of a known name ({', '.join(CACHE_NAMES)})"
            )
        if more := needed(first.forward, ("hidden_states", "attention_mask", *ARGUMENTS, named[0])):
            raise TeacherError(
                f"{teacher}: {type(first).__name__} is not supported: it needs {', '.join(more)} beside states, "
                f"positions, mask and cache; {SUPPORTED}"
            )
        self._cache_name = named[0]
        self._calls, self._lock, self._library_attention = 0, Lock(), ""

    @property
    def attention(self) -> str:
        """Name of the attention that the library chose for these layers."""
        return str(self._library_attention if self._calls else self._config._attn_implementation)

    def rotary(self, hidden: Tensor, positions: Tensor) -> list[Tensor]:
        return [part.to(hidden.device) for part in self._rotary(hidden, positions)]

    def norm(self, hidden: Tensor) -> Tensor:
        return self._norm(hidden).to(hidden.device)

    def head(self, normed: Tensor) -> Tensor:
        return self._head(normed).to(normed.device)

    def layer(
        self,
        index: int,
        hidden: Tensor,
        rotary: Sequence[Tensor],
        positions: Tensor,
        mask: LayerMask,
        cache: Cache | None,
    ) -> Tensor:
        kernel = not (mask is None or isinstance(mask, Tensor))
        attending = {"attention_mask": None, "structured_mask": mask} if kernel else {"attention_mask": mask}
        with self._kernel() if kernel else nullcontext():
            output = self.layers[index](
                hidden,
                position_ids=positions,
                use_cache=cache is not None,
                position_embeddings=tuple(rotary),
                **{self._cache_name: cache},
                **attending,
            )
        return (output[0] if isinstance(output, tuple) else output).to(hidden.device)

    @contextmanager
    def _kernel(self) -> Iterator[None]:
        """Let the library's layers attend by `attend`. They look their attention up by name at every call.

        The name is restored afterwards, because the model's own `generate` must not use `attend`. Threads may run
        layers at the same time (collecting on the fly, beside training): the last one restores the name.
        """
        from transformers import AttentionInterface

        AttentionInterface.register(KERNEL, _attend)
        with self._lock:
            if not self._calls:
                self._library_attention = self._config._attn_implementation
                self._config._attn_implementation = KERNEL
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    self._config._attn_implementation = self._library_attention


SCORES = {"s_aux": "attention sinks", "softcap": "a cap on its scores", "position_bias": "a bias on its scores"}


class OwnScoresError(Exception):
    """Treatment of scores that `attend` does not compute, in words."""


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    structured_mask: LayerMask = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Call `attend` as the library does: the result has heads after rows, and no attention weights follow.

    Raises OwnScoresError where the layer asks for more than `attend` computes.
    """
    for option, words in SCORES.items():
        if options.get(option) is not None:
            raise OwnScoresError(words)
    output = attend(query, key, value, attention_mask if structured_mask is None else structured_mask, scaling)
    return output.transpose(1, 2), None


def placement_hook(module: nn.Module) -> Any:
    """Return the hook by which accelerate moves a module's inputs to its device; None for a module without one."""
    return getattr(module, "_hf_hook", None)


def part(base: Any, names: tuple[str, ...], teacher: str, words: str) -> Any:
    """Return the decoder's part that has one of these names; `words` describe it. Raises TeacherError without one."""
    for name in names:
        if getattr(base, name, None) is not None:
            return getattr(base, name)
    raise TeacherError(
        f"{teacher}: {type(base).__name__} is not supported: it has no {words} under a known name "
        f"({', '.join(names)}); {SUPPORTED}"
    )


def max_positions(config: Any, rope_type: str | None) -> int:
    """Return the length of the context; with `longrope` the original one, because longer sequences get other factors
    at all positions.

    Frequencies of YaRN and linear ones serve the original context times their factor, also where the config still names
    the original one. Dynamic ones change from there on, and llama3's factor is not that of the context.
    """
    count: int = getattr(config, "max_position_embeddings", None) or 1 << 30
    rope = getattr(config, "rope_parameters", None) or {}
    original = getattr(config, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    if rope_type == "longrope":
        return min(count, int(original or count))
    factor = rope.get("factor")
    if rope_type not in ("yarn", "linear") or not original or not factor or int(original * factor) <= count:
        return count
    LOG.info(
        f"context of {int(original * factor):,} positions: rope_parameters extend {original:,} by {rope_type}'s factor "
        f"{factor:g}; the config's max_position_embeddings is {count:,}"
    )
    return int(original * factor)


def windows(config: Any, layers: int, looped: LoopedSection | None) -> list[int | None]:
    """Return the sliding window of each layer in positions, or None."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * layers
    if looped is not None and len(kinds) == looped.unique:
        kinds = [kinds[number] for number in looped.order]
    return [window if kind == "sliding_attention" else None for kind in kinds]


def eos_token_ids(model: Any, tokenizer: Any, vocabulary: int) -> tuple[int, ...]:
    """Return the ids of tokens that end an answer: from the generation config, else from the tokenizer. Ids that are no
    tokens are dropped, with a line.
    """
    generation = getattr(model, "generation_config", None) or model.config  # a model without `generate` has none
    for source in (generation, tokenizer):
        named = getattr(source, "eos_token_id", None)
        named = [] if named is None else list(named) if isinstance(named, (list, tuple)) else [named]
        ids = [token for token in named if type(token) is int and 0 <= token < vocabulary]
        if dropped := [token for token in named if token not in ids]:
            LOG.info(f"eos_token_id {str(dropped)[1:-1]} is no token of the {vocabulary}: it ends no answer")
        if ids:
            return tuple(dict.fromkeys(ids))
    if tokenizer is not None:
        LOG.info("no token ends an answer: set eos_token_id in the teacher's generation_config.json")
    return ()
