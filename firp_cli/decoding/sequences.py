"""Output sequences on the host, for every decoding loop: the tokens written so far, and where each sequence ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from firp_cli.errors import CapacityError, NumericsError, UsageError
from firp_cli.machine import free_bytes, readable_bytes
from firp_cli.results import Generation
from firp_cli.teacher.layer_kinds import damaged_weight
from firp_cli.teacher.teacher import Teacher

OnTokens = Callable[[int, list[int], int], None]  # (sequence, tokens of this step, number of drafted ones)
Label = Callable[[int], str]  # name, for messages, of a prompt by its number from 0


def prompt_label(number: int) -> str:
    """Return the name of a prompt in messages, counted from 1."""
    return f"prompt {number + 1}"


@dataclass
class OutputSequence:
    """One prompt's output so far. `committed`: its tokens in the K/V cache; `autoregressive_steps`: steps without a
    draft, with a predictor; `limit`: most tokens, if not the writer's.
    """

    number: int
    prompt_tokens: int
    committed: int = 0
    tokens: list[int] = field(default_factory=list)
    accepted_lengths: list[int] = field(default_factory=list)
    finish_reason: str = ""
    decode_seconds: float = 0.0
    autoregressive_steps: int = 0
    limit: int | None = None


class Writer:
    """Appends tokens to sequences up to their ends: EOS, a stop string, or the limit.

    Args:
        label: names prompts in messages. fails: end a sequence without a token (`sampling.NO_TOKEN`) with the reason
            `failed`; False: raise NumericsError.

    Raises UsageError on an empty stop string.
    """

    def __init__(
        self,
        teacher: Teacher,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        on_tokens: OnTokens | None = None,
        label: Label = prompt_label,
        fails: bool = False,
    ) -> None:
        self.teacher, self.max_new_tokens, self.on_tokens = teacher, max_new_tokens, on_tokens
        self.stop, self.label, self.fails = check_stop(stop, teacher.tokenizer), label, fails

    def write(self, item: OutputSequence, tokens: list[int], drafted: int) -> int:
        """Append the tokens of a step up to the sequence's end, call `on_tokens`, and return how many were kept.

        Raises NumericsError where the teacher's logits are NaN or infinite.
        """
        kept = 0
        for token in tokens:
            if token < 0:
                item.finish_reason = "failed"
                if self.fails:
                    break
                made = len(item.tokens)
                error = NumericsError(
                    f"{self.label(item.number)}: the logits of {self.teacher.name} are NaN or infinite at position "
                    f"{item.prompt_tokens + made - 1}, where new token {made + 1} is chosen\n"
                    + (damaged_weight(self.teacher.model) or "load it in another number format (float32, bfloat16)")
                )
                error.prompt = item.number
                raise error
            kept += 1
            item.tokens.append(token)
            if token in self.teacher.eos_token_ids:
                item.finish_reason = "eos"
            elif self.stop and self._stopped(item.tokens):
                item.finish_reason = "stop"
            elif len(item.tokens) >= (item.limit or self.max_new_tokens):
                item.finish_reason = "length"
            if item.finish_reason:
                break
        if self.on_tokens:
            self.on_tokens(item.number, tokens[:kept], min(drafted, kept))
        return kept

    def _stopped(self, tokens: list[int]) -> bool:
        """Return True if the end of the text contains a stop string. A token may be as short as one byte of it."""
        window = 4 * max(map(len, self.stop)) + 8
        tail = self.teacher.tokenizer.decode(tokens[-window:])
        return any(text in tail for text in self.stop)

    def generation(self, item: OutputSequence, prefill_seconds: float) -> Generation:
        """Return the record of a finished sequence."""
        tokenizer = self.teacher.tokenizer
        return Generation(
            prompt_tokens=item.prompt_tokens,
            token_ids=item.tokens,
            steps=len(item.accepted_lengths),
            accepted_lengths=item.accepted_lengths,
            prefill_seconds=prefill_seconds,
            decode_seconds=item.decode_seconds,
            finish_reason=item.finish_reason,
            text=tokenizer.decode(item.tokens, skip_special_tokens=True) if tokenizer else "",
            autoregressive_steps=item.autoregressive_steps,
        )


def check_stop(stop: Sequence[str], tokenizer: Any) -> list[str]:
    """Return the stop strings; a single string is one of them. Raises UsageError on an empty one, which every text
    contains, and without a tokenizer.
    """
    strings = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(text, str) and text for text in strings):
        raise UsageError("a stop string is empty: every text contains it, so leave it out")
    if strings and tokenizer is None:
        raise UsageError("stop strings need the teacher's tokenizer: give tokenizer=")
    return strings


def check_room(max_new_tokens: int, positions: int) -> None:
    """Raise UsageError for an empty answer, CapacityError for one that fills the context without any prompt."""
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if max_new_tokens >= positions:
        raise CapacityError(
            f"{max_new_tokens} new tokens leave no room for a prompt: the teacher's context holds {positions} "
            "positions; lower --max-new-tokens"
        )


def check_prompts(
    teacher: Teacher, prompts: Sequence[Sequence[int]], max_new_tokens: int, label: Label = prompt_label
) -> None:
    """Raise UsageError on an empty prompt or answer or an unknown token, CapacityError when prompt and answer together
    exceed the teacher's context. `label` names a prompt by its number.
    """
    check_room(max_new_tokens, teacher.max_positions)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UsageError(f"{label(number)} is empty: give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < teacher.vocab_size:
            raise UsageError(f"{label(number)} has a token id outside of 0 to {teacher.vocab_size - 1}")
        if len(prompt) + max_new_tokens > teacher.max_positions:
            raise CapacityError(
                f"{label(number)} has {len(prompt)} tokens and {max_new_tokens} new ones are asked for, the "
                f"teacher's context holds {teacher.max_positions}; shorten the prompt, ask for fewer, or skip it"
            )


def check_fits(needed: int, batch: int, positions: int, device: torch.device) -> None:
    """Raise CapacityError when the K/V cache of `batch` sequences of `positions` does not fit the device."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise CapacityError(
            f"the K/V cache of {batch} sequences of {positions} positions takes {readable_bytes(needed)}, {device} has "
            f"{readable_bytes(free)} free: decode fewer at once, or ask for fewer new tokens"
        )
