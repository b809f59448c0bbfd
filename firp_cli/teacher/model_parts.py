"""Where a library model keeps its parts, and what its config says of windows, positions and ends."""

from __future__ import annotations

from typing import Any

from firp_cli.config import LoopedSection
from firp_cli.errors import TeacherError


def part(base: Any, names: tuple[str, ...], teacher: str) -> Any:
    for name in names:
        if getattr(base, name, None) is not None:
            return getattr(base, name)
    raise TeacherError(
        f"{teacher}: {type(base).__name__} has no {' or '.join(names)}; supported: Llama, Mistral, Qwen2, Qwen3"
    )


def original_positions(config: Any, default: int) -> int:
    """Positions that a model with `longrope` was first trained on."""
    rope = getattr(config, "rope_parameters", None) or {}
    found = getattr(config, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    return int(found or default)


def windows(config: Any, layers: int, looped: LoopedSection | None) -> list[int | None]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * layers
    if looped is not None and len(kinds) == looped.unique:
        kinds = [kinds[number] for number in looped.order]
    return [window if kind == "sliding_attention" else None for kind in kinds]


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None) or model.config  # models that cannot `generate` have none
    found = getattr(generation, "eos_token_id", None)
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
