"""What decoding would take, from how many tokens each step emitted and what a step costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def replay(emitted: Sequence[Sequence[int]], batch: int, step: Callable[[int], float], halving: bool = False) -> float:
    """Time of decoding the sequences in batches of `batch`, in their order.

    Args:
        emitted: by sequence, tokens of each step. step: time of a step of so many live sequences.
        halving: finished sequences leave once half of the batch has (with CUDA graphs), not at once.
    """
    total = 0.0
    for start in range(0, len(emitted), batch):
        lengths = sorted(len(steps) for steps in emitted[start : start + batch])
        held = len(lengths)
        for number in range(lengths[-1]):
            live = sum(1 for length in lengths if length > number)
            if not halving or 2 * live <= held:
                held = live
            total += step(held)
    return total


def replay_speedup(
    emitted: Sequence[Sequence[int]],
    batch: int,
    step: Callable[[int], float],
    plain: Callable[[int], float],
    halving: bool = False,
) -> float:
    """Speedup over plain decoding of the same tokens, where a plain step of so many sequences takes `plain`."""
    ones = [[1] * sum(steps) for steps in emitted]
    return replay(ones, batch, plain, halving) / replay(emitted, batch, step, halving)
