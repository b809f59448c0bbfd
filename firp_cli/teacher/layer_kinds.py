"""Kinds of decoder layers that cannot run in a tree of drafts, found by a model's config and named in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

RECURRENT = "such layers keep a recurrent state, of which a rejected draft cannot be undone"
REASONS = {
    "linear_attention": RECURRENT,
    "mamba": RECURRENT,
    "mamba2": RECURRENT,
    "hybrid": RECURRENT,
    "conv": RECURRENT,
    "recurrent": RECURRENT,
    "chunked_attention": "a token in such layers sees its own chunk of positions alone, and there is no mask for that",
}
SERVED = ("full_attention", "sliding_attention", "attention")
SUPPORTED = "use a Llama, Mistral, Qwen2, Qwen3 or similar model"
SHOWN = 6  # numbers of layers that a message lists


def refused_kind(model: Any, config: Any) -> str | None:
    """Return in words what layers of the model have that draft trees cannot serve; None for attention with K/V of its
    own. `config`: of the text model.
    """
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    for kind in dict.fromkeys(kinds):
        if kind not in SERVED:
            reason = REASONS.get(kind, "there is no mask for that kind")
            return f"{_listed([place for place, each in enumerate(kinds) if each == kind])} {kind}: {reason}"
    if getattr(model, "_is_stateful", False):
        return f"some of its layers are no attention: {RECURRENT}"
    if getattr(config, "attention_chunk_size", None):
        return f"it has chunked attention: {REASONS['chunked_attention']}"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    if shared := getattr(config, "num_kv_shared_layers", None):
        return f"its last {shared} layers read the keys and values of earlier layers"
    if getattr(config, "kv_lora_rank", None):
        return "it has latent attention (MLA), whose keys and values have different sizes"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its attention adds a bias by distance (ALiBi), which masks of draft trees lack"
    return None


def _listed(places: Sequence[int]) -> str:
    more = ", ..." if len(places) > SHOWN else ""
    numbers = ", ".join(map(str, places[:SHOWN]))
    return f"layer {numbers} is" if len(places) == 1 else f"layers {numbers}{more} are"
