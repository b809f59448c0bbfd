"""Baseline `hf`: transformers' own `generate`, with times and counts defined as in this package's engine.

At temperature 0 all other methods must reproduce its token ids.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from firp_cli.results import Generation
from firp_cli.teacher.teacher import Teacher


class HuggingFaceGenerate:
    """Method `hf`: `model.generate` with the given sampling options only; the model's generation config is not used.

    Args:
        temperature: 0 is greedy. top_p: applied after temperature.
    """

    def __init__(self, teacher: Teacher, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        self.teacher = teacher
        self.temperature = temperature
        self.top_p = top_p
        self._seed = seed

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Generation]:
        """Decode the prompts (token ids) as one left-padded batch. Returned token ids include EOS.

        Prefill ends when the first new token is chosen; `decode_seconds` is the rest of the call, the same for all
        sequences of the batch.
        """
        device = self.teacher.device
        width = max(map(len, prompts))
        padding = self._padding()
        ids = torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        first_token = _FirstToken(device)
        began = time.perf_counter()
        with _bare_generation(self.teacher.model), self._seeded(device):
            output = self.teacher.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._config(max_new_tokens),
                stopping_criteria=[first_token],
            )
        rows = output[:, width:].tolist()
        ended = time.perf_counter()
        prefill, decode = first_token.seconds - began, ended - first_token.seconds
        return [self._generation(len(prompt), row, prefill, decode) for prompt, row in zip(prompts, rows, strict=True)]

    def _padding(self) -> int:
        """Return a padding token; any will do, since the attention mask hides it."""
        padding = getattr(self.teacher.tokenizer, "pad_token_id", None)
        if padding is not None:
            return int(padding)
        return self.teacher.eos_token_ids[0] if self.teacher.eos_token_ids else 0

    def _config(self, max_new_tokens: int) -> Any:
        from transformers import GenerationConfig

        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            repetition_penalty=1.0,
            eos_token_id=list(self.teacher.eos_token_ids) or None,
            pad_token_id=self._padding(),
            use_cache=True,
            **sampling,
        )

    @contextmanager
    def _seeded(self, device: torch.device) -> Iterator[None]:
        """Seed torch's global generator, from which `generate` samples, and restore it afterwards."""
        if not self.temperature:
            yield
            return
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed)
            self._seed += 1
            yield

    def _generation(self, prompt_tokens: int, row: list[int], prefill: float, decode: float) -> Generation:
        ends = [index for index, token in enumerate(row) if token in self.teacher.eos_token_ids]
        tokens = row[: ends[0] + 1] if ends else row
        ones = [1] * (len(tokens) - 1)
        tokenizer = self.teacher.tokenizer
        return Generation(
            prompt_tokens=prompt_tokens,
            token_ids=tokens,
            steps=len(ones),
            accepted_lengths=ones,
            prefill_seconds=prefill,
            decode_seconds=decode,
            finish_reason="eos" if ends else "length",
            text=tokenizer.decode(tokens, skip_special_tokens=True) if tokenizer else "",
        )


class _FirstToken:
    """Stopping criterion that never stops: it records the time of the first new token."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self.seconds:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextmanager
def _bare_generation(model: Any) -> Iterator[None]:
    """Remove the model's generation config for the duration: `generate` takes unset options (penalties, suppressed
    tokens) from it.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
