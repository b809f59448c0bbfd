"""Test parameters in tiers: a pairwise cover by default, the full product nightly."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return few combinations of the axes' values that contain every pair of values of two axes.

    The cover is greedy and deterministic: each next combination is the first of the full product that contains most of
    the pairs not covered yet. One axis alone gives each of its values once.
    """
    strength = min(2, len(axes))

    def parts(indices: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(indices), strength))

    candidates = [(indices, parts(indices)) for indices in product(*(range(len(axis)) for axis in axes))]
    uncovered = {part for _, covered in candidates for part in covered} - {()}
    cover = []
    while uncovered:
        indices, covered = max(candidates, key=lambda candidate: len(candidate[1] & uncovered))
        uncovered -= covered
        cover.append(tuple(axis[index] for axis, index in zip(axes, indices, strict=True)))
    return cover


def nightly_rest(chosen: Sequence[tuple[Any, ...]], *axes: Sequence[Any]) -> list[Any]:
    """Return the full product of the axes for `parametrize`; combinations that are not `chosen` are marked nightly."""
    rows = list(product(*axes))
    assert all(row in rows for row in chosen)
    return [pytest.param(*row, marks=() if row in chosen else pytest.mark.nightly) for row in rows]


def covered(*axes: Sequence[Any]) -> list[Any]:
    """Return the full product of the axes for `parametrize`; what a pairwise cover does not need is marked nightly."""
    return nightly_rest(pairwise(*axes), *axes)
