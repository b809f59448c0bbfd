"""Choice of tokens from logits: greedy, or by temperature and top-p. Where logits are NaN or infinite there is none:
the choice is then `NO_TOKEN`, which the host finds among the tokens that it reads.

Shapes: B sequences, N nodes, V vocabulary size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from firp_cli.config import check_sampling
from firp_cli.teacher.attention import choose_backend

NO_TOKEN = -1
CANDIDATES = 1024  # most probable tokens of a row, which on a CPU are tried before the row is sorted


class Sampler:
    """Chooses the teacher's token at every node: argmax at temperature 0, else a draw after temperature and top-p.

    Top-p keeps a token if the tokens that are more probable have less than `top_p` together, so tokens of equal
    probability stay together. Apart from these and from rounding that is the rule of transformers' `generate`.

    Args:
        kernel: find the largest logits, and what top-p keeps, by Triton kernels; None: on CUDA devices with Triton.

    Raises UsageError.
    """

    def __init__(
        self, temperature: float, top_p: float, seed: int, device: torch.device, kernel: bool | None = None
    ) -> None:
        check_sampling(temperature, top_p, seed)
        self.greedy = temperature == 0.0
        self._temperature, self._top_p = temperature, top_p
        self._find_thresholds, self._find_largest = top_p_thresholds, largest
        if choose_backend("auto", device) == "triton" if kernel is None else kernel:
            from firp_cli.decoding import triton_sampling

            self._find_thresholds = triton_sampling.top_p_thresholds
            self._find_largest = _largest_by_parts
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose tokens (B, N) from float32 logits (B, N, V); NO_TOKEN in rows with NaN or positive infinity."""
        if self.greedy:
            return self._find_largest(logits)
        probabilities = (logits.flatten(0, 1) / self._temperature).softmax(-1)
        if self._top_p < 1.0:
            removed = probabilities < self._find_thresholds(probabilities, self._top_p)
            probabilities.masked_fill_(removed, 0.0)
        # The first of independent exponential clocks with these rates is a draw; `multinomial` would wait for the host.
        # The rates need not add up to 1. A clock of 0 would give NaN for a rate of 0, and `argmax` prefers NaN.
        clocks = torch.empty_like(probabilities).exponential_(generator=self.generator)
        clocks.clamp_(min=torch.finfo(clocks.dtype).tiny)
        # the softmax of NaN or infinity is NaN
        return self._find_largest((probabilities / clocks).view(logits.shape))


def largest(logits: Tensor) -> Tensor:
    """Return the places (...) of the largest logits (..., V), or NO_TOKEN where these are NaN or infinite."""
    most, tokens = logits.max(-1)  # `argmax` uses one core for few rows on a CPU
    return torch.where(most.abs() < torch.inf, tokens, NO_TOKEN)


def _largest_by_parts(logits: Tensor) -> Tensor:
    """Return what `largest` does; torch's kernel reads a row in one block, and here many blocks share it."""
    from firp_cli.predictors.triton_candidates import most_probable

    if len(logits) > 1 and not logits.is_contiguous():  # the kernel would need a copy
        return largest(logits)
    return most_probable(logits, 1, mark=True)[0][..., 0]


def top_p_thresholds(probabilities: Tensor, top_p: float) -> Tensor:
    """Return the smallest probability (B * N, 1) that top-p keeps in each row of (B * N, V)."""
    if probabilities.device.type != "cpu" or probabilities.shape[1] <= CANDIDATES:
        return _thresholds_of_sorted(probabilities.sort(-1, descending=True).values, top_p)[0]
    thresholds, found = _thresholds_of_sorted(probabilities.topk(CANDIDATES).values, top_p)
    if not found.all():
        rest = probabilities[~found].sort(-1, descending=True).values
        thresholds[~found] = _thresholds_of_sorted(rest, top_p)[0]
    return thresholds


def _thresholds_of_sorted(candidates: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return thresholds (B * N, 1) from the most probable tokens of each row, most probable first, and the rows (B * N)
    in which these tokens have at least `top_p` together.
    """
    before = candidates.cumsum(-1) < top_p  # the next candidate is kept
    last = before.sum(-1, keepdim=True).clamp(max=candidates.shape[1] - 1)
    return candidates.gather(-1, last), ~before[:, -1]
