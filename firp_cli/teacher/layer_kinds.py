"""Kinds of decoders whose layers cannot run in a tree of drafts, found by config and parts and named in words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

RECURRENT = "such layers keep a recurrent state, of which a rejected draft cannot be undone"
CHUNKED = "a token in such layers sees its own chunk of positions alone, and there is no mask for that"
REASONS = {
    **dict.fromkeys(("linear_attention", "mamba", "mamba2", "hybrid", "conv", "recurrent"), RECURRENT),
    "chunked_attention": CHUNKED,
}
SERVED = ("full_attention", "sliding_attention", "attention")
SUPPORTED = "use a Llama, Mistral, Qwen2, Qwen3 or similar model (docs/reference.md, Architectures)"
SHOWN = 6  # numbers of layers that a message lists
SCALED = 0.9999  # cosine between logits, or embeddings, of which one is the other times a number


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
        return f"it has chunked attention: {CHUNKED}"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    if shared := getattr(config, "num_kv_shared_layers", None):
        return f"its last {shared} layers read the keys and values of earlier layers"
    if getattr(config, "kv_lora_rank", None):
        return "it has latent attention (MLA), whose keys and values have different sizes"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its attention adds a bias by distance (ALiBi), which masks of draft trees lack"
    return None


def refused_positions(model: Any, base: nn.Module, config: Any) -> str | None:
    """Return in words how the decoder `base` embeds positions, where that is not by one rotary table for all layers."""
    rotary = getattr(base, "rotary_emb", None)
    if rotary is not None:
        more = needed(rotary.forward, ("x", "hidden_states", "position_ids"))
        kinds = ", ".join(sorted(set(getattr(config, "layer_types", None) or [])))
        if more == ["layer_type"]:
            return f"its rotary tables differ by kind of layer ({kinds}), and one table has to serve all layers"
        return f"its rotary tables depend on more than the position ({', '.join(more)})" if more else None
    tokens = {id(part) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    count = getattr(config, "max_position_embeddings", None) or 1
    tables = [part for part in base.modules() if isinstance(part, nn.Embedding) and id(part) not in tokens]
    if any(table.num_embeddings >= count > 1 for table in tables):
        return "it has learned absolute positions, added to the embeddings, where rotary ones are needed"
    return "it has no rotary position embeddings that all its layers share"


def needed(function: Callable[..., Any], given: Collection[str]) -> list[str]:
    """Return the parameters without default of a module's forward that are not among the given ones."""
    parameters = inspect.signature(function).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        item.name
        for item in parameters
        if item.default is item.empty and item.kind not in variadic and item.name not in given
    ]


def difference_in_words(model: Any, place: str, expected: Tensor, got: Tensor) -> str:
    """Return why states of layers that run one by one differ from those of the model's own forward, `expected`, which
    has another value at `place`: a damaged weight, a number too large for the dtype, or an operation that is missing.
    """
    if not (torch.isfinite(expected).all() and torch.isfinite(got).all()):
        if damaged := damaged_weight(model):
            return f"cannot be used: {damaged}"
        kind = str(expected.dtype).removeprefix("torch.")
        return f"cannot be used: NaN or infinity at {place}, as of numbers too large for {kind}; set teacher.dtype"
    expected, got = expected.float().flatten(), got.float().flatten()
    part = {"layer 0": "embeddings", "logits": "logits"}.get(place)
    if part and functional.cosine_similarity(expected, got, dim=0) > SCALED:
        factor = (expected @ got / (got @ got)).item()
        return (
            f"is not supported: it multiplies its {part} by {factor:.3g}, which no part of it does alone; {SUPPORTED}"
        )
    difference = (expected - got).abs().max().item()
    return (
        f"is not supported: run layer by layer, its states differ from its own forward at {place} by "
        f"{difference:.2g}; {SUPPORTED}"
    )


def damaged_weight(model: nn.Module) -> str | None:
    """Return in words the first parameter with NaN or infinity, and the remedy; None where there is none."""
    for name, parameter in model.named_parameters():
        count = 0 if parameter.is_meta else int((~torch.isfinite(parameter)).sum())
        if count:
            share = f"{count:,} of {parameter.numel():,} values"
            return f"its weight {name} contains NaN or infinity ({share}): get its file again"
    return None


def _listed(places: Sequence[int]) -> str:
    more = ", ..." if len(places) > SHOWN else ""
    numbers = ", ".join(map(str, places[:SHOWN]))
    return f"layer {numbers} is" if len(places) == 1 else f"layers {numbers}{more} are"
