"""The library's own decoder layers behind the interface that the lean ones share: the reference, and the way for
architectures that the lean stack does not know.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any, Protocol

from torch import Tensor, nn

from firp_cli.errors import TeacherError
from firp_cli.teacher.attention import attend
from firp_cli.teacher.looped import CACHE_NAMES
from firp_cli.teacher.masks import LayerMask

KERNEL = "firp_tree"  # what the library's attention interface knows our kernel as


class Cache(Protocol):
    """What a decoder layer asks of a cache."""

    def update(self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]: ...


class Stack(Protocol):
    """Decoder layers that run one by one."""

    name: str

    def rotary(self, hidden: Tensor, positions: Tensor) -> list[Tensor]:
        """Position embeddings of rows at `positions` (B, R), as this stack's layers read them: each (B, R, ..., D)."""
        ...

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm."""
        ...

    def head(self, normed: Tensor) -> Tensor:
        """Normed states (..., d) to logits (..., V), in the teacher's dtype or in float32."""
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
        """h^index (B, R, d) to h^(index+1)."""
        ...


class LibraryStack:
    """Runs the library's modules as they are. Raises TeacherError where a layer takes no cache that is known."""

    name = "library"

    def __init__(
        self, teacher: str, layers: nn.ModuleList, norm: nn.Module, rotary: nn.Module, head: nn.Module, config: Any
    ) -> None:
        self.layers, self._norm, self._rotary, self._head, self._config = layers, norm, rotary, head, config
        # not `layers[0]`: the passes of a looped teacher have no signature of their own
        first = next(iter(layers.children()))
        parameters = inspect.signature(first.forward).parameters
        named = [cache for cache in CACHE_NAMES if cache in parameters]
        if not named:  # a wrong name would vanish among a layer's further arguments
            raise TeacherError(
                f"{teacher}: {type(first).__name__} takes no cache that is known ({', '.join(CACHE_NAMES)})"
            )
        self._cache_name = named[0]
        self._within, self._guard, self._own = 0, Lock(), ""

    def rotary(self, hidden: Tensor, positions: Tensor) -> list[Tensor]:
        return list(self._rotary(hidden, positions))

    def norm(self, hidden: Tensor) -> Tensor:
        return self._norm(hidden)

    def head(self, normed: Tensor) -> Tensor:
        return self._head(normed)

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
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _kernel(self) -> Iterator[None]:
        """The library's layers look up their attention by name at every call; `generate` must not find ours.

        Threads may run layers side by side (states made on the fly, while a step trains): the last one out restores.
        """
        register_kernel()
        with self._guard:
            if not self._within:
                self._own = self._config._attn_implementation
                self._config._attn_implementation = KERNEL
            self._within += 1
        try:
            yield
        finally:
            with self._guard:
                self._within -= 1
                if not self._within:
                    self._config._attn_implementation = self._own


def register_kernel() -> None:
    """Tell the library's attention interface of `attend`. Calling it again does nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(KERNEL, _library_attention)


def _library_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    structured_mask: LayerMask = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The library's contract: heads behind rows in what comes back, and no weights."""
    output = attend(query, key, value, attention_mask if structured_mask is None else structured_mask, scaling)
    return output.transpose(1, 2), None
