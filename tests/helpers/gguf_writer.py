"""Tiny models as GGUF files, with tensors named, permuted and quantised as llama.cpp's converter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from helpers.models import ROOT

TOKENIZER = ROOT / "data" / "teachers" / "arithmetic"


def write_gguf(
    path: Path,
    model: Any,
    architecture: str = "llama",
    quantised: gguf.GGMLQuantizationType | None = None,
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    left_out: tuple[str, ...] = (),
) -> Path:
    """Write `model` with the embedded teacher's tokenizer and chat template.

    Args:
        quantised: kind of every matrix; None: float32. fields, tensors: added to the model's. left_out: omitted.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for name, value in (fields or {}).items():
        kind = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
        kind[type(value)](name, value)
    for name, values in ({**_tensors(model, architecture), **(tensors or {})}).items():
        if name in left_out:
            continue
        if quantised is not None and values.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: Any, architecture: str) -> dict[str, np.ndarray]:
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    found = {}
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        values = parameter.detach().float().numpy()
        for part, heads in (
            ("q_proj", model.config.num_attention_heads),
            ("k_proj", model.config.num_key_value_heads),
        ):
            if part in name and architecture == "llama":
                halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        found[f"{names.get_name(stem)}.{suffix}"] = np.ascontiguousarray(values)
    return found


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    state = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["id"]: token["content"] for token in state["added_tokens"]}
    vocabulary = {index: token for token, index in state["model"]["vocab"].items()} | special
    tokens = [vocabulary[index] for index in range(len(vocabulary))]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    settings = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index in special else 1 for index in range(len(tokens))])
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "pad"):
        token = settings.get(f"{name}_token")
        if token in tokens:
            {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "pad": writer.add_pad_token_id}[name](
                tokens.index(token)
            )
    writer.add_chat_template((TOKENIZER / "chat_template.jinja").read_text(encoding="utf-8"))
