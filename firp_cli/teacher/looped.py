"""Parameter sharing: decoder layers that run several times, as the list of effective layers.

A looped decoder runs `prelude` layers once, then a block of layers `loops` times in cyclic order, then `coda` layers
once (arXiv 2310.12072 shares parameters this way, and so do looped models such as Ouro and Raven). All other files
count *effective* layers: layer l of L = prelude + block * loops + coda. A library layer takes its cache slot from its
own number; `LayerPass` gives each pass the slot of its effective layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from firp_cli.config import LoopedSection
from firp_cli.errors import TeacherError

CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")  # names of the cache argument in library layers


class _EffectiveSlot:
    """Cache of one pass: the K/V go to the slot of the effective layer, not to that of the number its layer passes."""

    def __init__(self, cache: Any, index: int) -> None:
        self._cache = cache
        self._index = index

    def update(self, keys: Any, values: Any, _layer_index: int, *args: Any, **options: Any) -> Any:
        return self._cache.update(keys, values, self._index, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class LayerPass:
    """One pass through a shared layer. Called like the layer; writes its K/V under the effective layer's number.

    Args:
        norm: applied to the pass's output, for models that norm the state at the end of every loop.
    """

    def __init__(self, layer: nn.Module, index: int, norm: nn.Module | None = None) -> None:
        self.layer = layer
        self.index = index
        self.norm = norm

    def __call__(self, *args: Any, **options: Any) -> Any:
        for name in CACHE_NAMES:
            if options.get(name) is not None:
                options[name] = _EffectiveSlot(options[name], self.index)
        output = self.layer(*args, **options)
        if self.norm is None:
            return output
        return (self.norm(output[0]), *output[1:]) if isinstance(output, tuple) else self.norm(output)

    def __getattr__(self, name: str) -> Any:
        if name == "layer":  # unset while `copy` makes a copy
            raise AttributeError(name)
        return getattr(self.layer, name)


class LoopedLayers(nn.ModuleList):
    """Module list of the unique layers, with their parameters and names; as a sequence, the effective layers.

    A library decoder that iterates over `self.layers` runs looped once this list replaces them.
    """

    def __init__(self, layers: Iterable[nn.Module], shape: LoopedSection, norm: nn.Module | None = None) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)
        self.shape = shape
        # the last loop's norm is the model's own final norm, unless a coda follows
        normed = [stop - 1 for stop in shape.boundaries if stop < shape.effective] if shape.norm_each_loop else []
        unique = self.unique
        # passes are no modules: parameters and hooks are the layers'
        self._passes = [
            LayerPass(unique[number], index, norm if index in normed else None)
            for index, number in enumerate(shape.order)
        ]

    @property
    def unique(self) -> list[nn.Module]:
        return list(self._modules.values())

    def __len__(self) -> int:
        return self.shape.effective

    def __iter__(self) -> Iterator[Any]:
        return iter(self._passes)

    def __getitem__(self, index: Any) -> Any:
        return self._passes[index]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shape!r}, {self.unique!r})"


def loop_layers(model: Any, base: Any, layers: nn.ModuleList, norm: nn.Module, shape: LoopedSection) -> LoopedLayers:
    """Return the effective layers of a model that a recipe describes as looped.

    A model whose own code loops keeps its forward. A model whose code runs each layer once (a looped model saved as an
    ordinary decoder) gets the looped layers in place of its own, so that its own forward and `generate` loop too.

    Raises TeacherError when the description does not fit the model.
    """
    if isinstance(layers, LoopedLayers):
        raise TeacherError(
            f"teacher.looped is {shape}, the model's own shape is {layers.shape}: leave teacher.looped out"
        )
    if len(layers) != shape.unique:
        raise TeacherError(
            f"teacher.looped describes {shape.prelude} + {shape.block} + {shape.coda} = {shape.unique} layers, the "
            f"model has {len(layers)}: correct prelude, block or coda"
        )
    looped = LoopedLayers(list(layers), shape, norm)
    if model.device.type == "meta":  # a model without memory, for a plan, cannot run
        return looped
    calls = _calls(model, layers[shape.prelude])
    if calls == 1 and shape.loops > 1:
        name = next(name for name, part in base.named_children() if part is layers)
        setattr(base, name, looped)
        config = model.config.get_text_config()  # the library sizes its caches and masks by it
        config.num_hidden_layers = shape.effective
        if kinds := getattr(config, "layer_types", None):
            config.layer_types = [kinds[number] for number in shape.order]
    elif calls != shape.loops:
        raise TeacherError(
            f"teacher.looped.loops is {shape.loops}, the model's own code runs its block {calls} times; correct it"
        )
    return looped


@torch.no_grad()
def _calls(model: Any, layer: nn.Module) -> int:
    """Return the number of times that the model's own forward runs a layer."""
    seen: list[int] = []
    hook = layer.register_forward_hook(lambda *_: seen.append(1))
    try:
        model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        hook.remove()
    return len(seen)


@dataclass(frozen=True)
class LayerGroup:
    """Layers that one tick of a pipeline runs once, for the tokens at all of its stages together.

    Attributes:
        layers: effective layers at the first of the stages.
        stages: stage s (from 0) runs loop s + 1.
        stride: effective layers from a stage to the next.
    """

    layers: range
    stages: range
    stride: int = 0

    def within(self, stages: range) -> LayerGroup | None:
        """Return the part of this group within `stages`, or None."""
        first, last = max(self.stages.start, stages.start), min(self.stages.stop, stages.stop)
        if first >= last:
            return None
        moved = (first - self.stages.start) * self.stride
        return LayerGroup(range(self.layers.start + moved, self.layers.stop + moved), range(first, last), self.stride)

    def effective(self, stage: int, layer: int) -> int:
        """Return the effective number of the group's layer `layer` (from 0) at a stage."""
        return self.layers.start + (stage - self.stages.start) * self.stride + layer


def layer_groups(boundaries: tuple[int, ...], num_layers: int, looped: LoopedSection | None) -> list[LayerGroup]:
    """Return the groups of a tick in running order, for the loops that end at `boundaries`.

    Shared layers form one group over all stages, with a prelude at the first stage and a coda at the last. Without
    sharing, each stage has its own group.
    """
    last = len(boundaries) - 1
    if looped is None:
        starts = (0, *boundaries[:-1])
        return [
            LayerGroup(range(start, stop), range(stage, stage + 1))
            for stage, (start, stop) in enumerate(zip(starts, boundaries, strict=True))
        ]
    groups = [
        LayerGroup(range(looped.prelude), range(1)),
        LayerGroup(range(looped.prelude, looped.prelude + looped.block), range(last + 1), looped.block),
        LayerGroup(range(boundaries[-1], num_layers), range(last, last + 1)),
    ]
    return [group for group in groups if group.layers]
