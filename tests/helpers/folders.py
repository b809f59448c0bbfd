"""Teachers and prompts as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.models import VOCABULARY, random_prompts, tiny_model

TEMPLATE = (
    "{% for message in messages %}w{{ 3 if message['role'] == 'user' else 4 }} {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %} w1{% endif %} {% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
)


def save_teacher(folder: Path, model: Any = None) -> Path:
    """Save a tiny teacher with a word tokenizer and a chat template; return the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", pad_token="w0", bos_token="w2")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    (model or tiny_model("llama")).save_pretrained(folder)
    return folder


def save_prompts(path: Path, count: int = 4, seed: int = 41) -> Path:
    """Save random questions with answers; return the file."""
    lines = []
    for number, prompt in enumerate(random_prompts(count, seed=seed, low=4, high=9)):
        words = " ".join(f"w{token}" for token in prompt)
        lines.append(json.dumps({"question": words, "answer": f"w{number + 5} w6 w7"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
