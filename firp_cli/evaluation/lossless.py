"""Token-for-token comparison of outputs, and the teacher's logit gap where they diverge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from firp_cli.evaluation.answer_runs import BatchRun
from firp_cli.evaluation.bench_prompts import BenchPrompt
from firp_cli.results import Divergence
from firp_cli.teacher.masks import causal_allowed
from firp_cli.teacher.teacher import Teacher


def compare_tokens(
    teacher: Teacher, prompts: Sequence[BenchPrompt], reference: Sequence[BatchRun], compared: Sequence[BatchRun]
) -> dict[int, Divergence | None]:
    """Return the first divergence from the reference by index of the prompt; None where all tokens are equal.

    The turns of a conversation are compared in order, up to the first one that differs: it is part of the prompts of
    those after it.
    """
    divergences: dict[int, Divergence | None] = {}
    for expected_run, got_run in zip(reference, compared, strict=True):
        earlier: dict[int, list[list[int]]] = {}
        for expected, got in zip(expected_run.first, got_run.first, strict=True):
            assert expected.token_ids is not None and got.token_ids is not None
            number, answers = expected.prompt, earlier.setdefault(expected.prompt, [])
            if divergences.get(number) is None:
                prompt = prompts[number].after(answers)
                mark = first_divergence(teacher, number, prompt, expected.token_ids, got.token_ids)
                divergences[number] = replace(mark, turn=1 + len(answers)) if mark else None
            answers.append(expected.token_ids)
    return divergences


def first_divergence(
    teacher: Teacher,
    number: int,
    prompt: Sequence[int],
    expected: Sequence[int],
    got: Sequence[int],
    logits_after: Callable[[Sequence[int]], torch.Tensor] | None = None,
) -> Divergence | None:
    """Return the first divergence of `got` from `expected`, with the gap of the teacher's logits of the two tokens.

    Args:
        logits_after: returns the teacher's logits (V,) after tokens; None computes them.
    """
    if list(expected) == list(got):
        return None
    pairs = list(zip(expected, got, strict=False))
    position = next((place for place, (one, two) in enumerate(pairs) if one != two), len(pairs))
    if position == len(pairs):
        longer = [expected[position] if len(expected) > position else -1, got[position] if len(got) > position else -1]
        return Divergence(number, position, longer[0], longer[1], float("nan"))
    ids = [*prompt, *expected[:position]]
    logits = next_token_logits(teacher, ids) if logits_after is None else logits_after(ids)
    one, two = (logits[token].item() for token in (expected[position], got[position]))
    unit = unit_in_last_place(max(abs(one), abs(two)), teacher.dtype)
    return Divergence(number, position, expected[position], got[position], one - two, (one - two) / unit)


def unit_in_last_place(value: float, dtype: torch.dtype) -> float:
    """Return the distance between neighbouring numbers of the dtype at this size."""
    info = torch.finfo(dtype)
    return max(info.tiny, 2.0 ** math.floor(math.log2(max(abs(value), info.tiny))) * info.eps)


@torch.inference_mode()
def next_token_logits(teacher: Teacher, token_ids: Sequence[int]) -> torch.Tensor:
    """Return the teacher's float32 logits (V,) after `token_ids`, from one forward over all of them."""
    ids = torch.tensor([list(token_ids)], device=teacher.device)
    count = ids.shape[1]
    positions = torch.arange(count, device=teacher.device)[None]
    mask = teacher.sequence_mask(causal_allowed(torch.full((1,), count, device=teacher.device), count), positions)
    hidden = teacher.run(teacher.embed(ids), positions, mask)
    return teacher.head(teacher.norm(hidden[0, -1]))
