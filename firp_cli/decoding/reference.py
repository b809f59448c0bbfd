"""Reference for tests: greedy decoding with the model's own forward, without cache or tree, one token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from firp_cli.teacher.teacher import Teacher


@torch.no_grad()
def greedy(teacher: Teacher, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """Return the new tokens after `prompt`, EOS included, from a whole forward for each of them."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        ids = torch.tensor([tokens], device=teacher.device)
        logits = teacher.model(ids, use_cache=False).logits[0, -1].float()
        tokens.append(int(logits.argmax()))
        if tokens[-1] in teacher.eos_token_ids:
            break
    return tokens[len(prompt) :]
