"""Parameter-shared Llama for transformers: `unique_layers` decoder layers that run `loops` times in cyclic order.

Layers, norm, head, forward and `generate` are the library's own; only the list of layers is looped.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from firp_cli.config import LoopedSection
from firp_cli.teacher.looped import LoopedLayers


class LoopedLlamaConfig(LlamaConfig):
    """Llama configuration whose `num_hidden_layers` counts effective layers: `unique_layers` x `loops`."""

    model_type = "firp_looped_llama"

    unique_layers: int = 3
    loops: int = 4

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_hidden_layers = self.unique_layers * self.loops
        super().__post_init__(**kwargs)


class LoopedLlamaForCausalLM(LlamaForCausalLM):
    """`LlamaForCausalLM` over shared layers: u x r effective layers with the parameters of u."""

    config_class = LoopedLlamaConfig

    def __init__(self, config: LoopedLlamaConfig) -> None:
        super().__init__(config)
        unique = [layer for layer, _ in zip(self.model.layers, range(config.unique_layers), strict=False)]
        self.model.layers = LoopedLayers(unique, LoopedSection(block=config.unique_layers, loops=config.loops))


def register() -> None:
    """Let the library's `Auto` classes load a saved `LoopedLlamaForCausalLM`. Calling it again does nothing."""
    AutoConfig.register(LoopedLlamaConfig.model_type, LoopedLlamaConfig, exist_ok=True)
    AutoModelForCausalLM.register(LoopedLlamaConfig, LoopedLlamaForCausalLM, exist_ok=True)
