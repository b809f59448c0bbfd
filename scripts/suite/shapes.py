"""Random teachers of a given shape, made on the device in their dtype, and the bytes that a decoding step of them
reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from firp_cli.config import KINDS
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.folder import build_predictor
from firp_cli.teacher.check import use_lean_layers
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from suite.sizes import Shape
from suite.work import Shared

RANDOM = "random teacher"
PIPELINE_GROUPS = 4  # groups of a teacher's layers, for a predictor that feeds a pipeline
NO_TOKENS: Shape = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}  # nothing ends a random text


def empty_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a Llama with random weights, created on the device."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)


def shaped(shared: Shared, name: str) -> Teacher:
    """Return the random teacher of a shape on lean layers; one at a time is kept."""
    held = shared.found.get(RANDOM)
    if held is not None and held[0] == name:
        return held[1]
    del held
    shared.free(RANDOM)
    with torch.inference_mode(False):
        model = empty_model(shared.sizes.shapes[name] | NO_TOKENS, shared.device, shared.dtype)
        teacher = wrap_model(model, name=f"{name}-shaped, random weights")
    reason = use_lean_layers(teacher)
    if reason:
        raise RuntimeError(reason)
    shared.found[RANDOM] = (name, teacher)
    return teacher


def sections(layers: int, steps: int = 4) -> dict[str, dict[str, Any]]:
    """Return settings of every predictor kind for a teacher of so many layers, none shared. Kinds that are not named
    here use their defaults.
    """
    groups = min(PIPELINE_GROUPS, layers)
    places = [max(1, min(layers - 1, round(layers * step / (steps + 2)))) for step in range(1, steps + 1)]
    known: dict[str, dict[str, Any]] = {
        "firp": {"layer": max(1, layers // 3), "steps": steps},
        "firp_plus": {"layer": max(1, layers // 3), "steps": steps, "coupling": {"form": "recurrent"}},
        "hidden_transfer": {"layers": places},
        "medusa": {"steps": steps},
        "speed": {"loops": groups, "exits": list(range(max(1, groups // 2), groups))},
    }
    return {kind: {"kind": kind, **known.get(kind, {})} for kind in KINDS}


def random_predictor(teacher: Teacher, section: dict[str, Any]) -> Predictor:
    """Return a predictor with worthless drafts of the usual cost."""
    config = KINDS[section["kind"]].model_validate(section)
    with torch.inference_mode(False):
        predictor = build_predictor(config, teacher)
        predictor.initialise("identity", teacher)
    dtype = torch.float32 if teacher.device.type == "cpu" else teacher.dtype
    return predictor.to(dtype).eval().requires_grad_(False)


def weight_bytes(teacher: Teacher) -> int:
    """Return bytes of weights that a step reads: layers, norm and head; one row of the embedding."""
    looked_up: nn.Parameter = teacher.model.get_input_embeddings().weight
    tied = looked_up is teacher.model.get_output_embeddings().weight
    every = sum(value.nbytes for value in teacher.model.parameters())
    return every - (0 if tied else looked_up.nbytes)


def cache_bytes(teacher: Teacher, context: int) -> int:
    """Return bytes of keys and values of a sequence."""
    return 2 * teacher.num_layers * teacher.kv_heads * teacher.head_size * context * teacher.dtype.itemsize
