"""Outputs compared token for token, and how close the teacher itself was where they part."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from firp_cli.evaluation.rows import BatchRun
from firp_cli.results import Divergence
from firp_cli.teacher.masks import causal_allowed
from firp_cli.teacher.teacher import Teacher


def compare_tokens(
    teacher: Teacher, prompts: Sequence[Sequence[int]], reference: Sequence[BatchRun], other: Sequence[BatchRun]
) -> dict[int, Divergence | None]:
    """Number of a prompt (token ids) to its first divergence from the reference, None where all tokens are equal."""
    found: dict[int, Divergence | None] = {}
    for expected_run, got_run in zip(reference, other, strict=True):
        for number, one, two in zip(expected_run.numbers, expected_run.generations, got_run.generations, strict=True):
            found[number] = first_divergence(teacher, number, prompts[number], one.token_ids, two.token_ids)
    return found


def first_divergence(
    teacher: Teacher, number: int, prompt: Sequence[int], expected: Sequence[int], got: Sequence[int]
) -> Divergence | None:
    """Where `got` leaves `expected`, and how far apart the teacher's logits of the two tokens are there.

    A side that ended earlier has token -1 and no gap (NaN).
    """
    if list(expected) == list(got):
        return None
    pairs = list(zip(expected, got, strict=False))
    position = next((place for place, (one, two) in enumerate(pairs) if one != two), len(pairs))
    if position == len(pairs):
        longer = [expected[position] if len(expected) > position else -1, got[position] if len(got) > position else -1]
        return Divergence(number, position, longer[0], longer[1], float("nan"))
    logits = next_token_logits(teacher, [*prompt, *expected[:position]])
    gap = (logits[expected[position]] - logits[got[position]]).item()
    return Divergence(number, position, expected[position], got[position], gap)


@torch.inference_mode()
def next_token_logits(teacher: Teacher, token_ids: Sequence[int]) -> torch.Tensor:
    """The teacher's float32 logits (V,) behind `token_ids`, from one whole forward."""
    ids = torch.tensor([list(token_ids)], device=teacher.device)
    count = ids.shape[1]
    positions = torch.arange(count, device=teacher.device)[None]
    mask = teacher.sequence_mask(causal_allowed(torch.full((1,), count, device=teacher.device), count), positions)
    hidden = teacher.run(teacher.embed(ids), positions, mask)
    return teacher.head(teacher.norm(hidden[0, -1]))
