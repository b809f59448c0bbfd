"""Small collecting runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from firp_cli.collecting.corpus import Corpus
from firp_cli.config import DataConfig
from firp_cli.data.chat import EncodedConversation
from firp_cli.teacher.load import wrap_model
from firp_cli.teacher.teacher import Teacher
from helpers.chat import CHATML, with_template

EOS = "<|im_end|>"


def make_teacher(seed: int = 0, **settings: Any) -> Teacher:
    """Return a tiny Llama with the vocabulary of the byte tokenizer."""
    tokenizer = with_template(CHATML)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": tokenizer.convert_tokens_to_ids(EOS),
    }
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(options | settings)))
    return wrap_model(model, tokenizer, name="tiny")


def config(dataset: Path, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"dataset": str(dataset), "shard_tokens": 300, "pack_tokens": 200, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "provenance.json"}


def corpus_of(prompts: Sequence[Sequence[int]], **skipped: int) -> Corpus:
    corpus = Corpus(skipped=Counter({name.replace("_", " "): count for name, count in skipped.items()}))
    for ids in prompts:
        corpus.add(EncodedConversation(list(ids), []))
    return corpus
