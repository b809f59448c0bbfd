"""The pairwise cover of test parameters: every pair, few combinations, no chance."""

from itertools import combinations, product
from math import prod

import pytest

from helpers.pairwise import nightly_rest, pairwise

SHAPES = [(1, 1), (2, 3), (2, 2, 2), (4, 3, 2), (3, 3, 3, 3), (5, 1, 4), (2, 2, 2, 2, 2, 2), (6, 5, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pairwise_covers_every_pair_with_few_combinations(shape: tuple[int, ...]) -> None:
    axes = [[f"{axis}{value}" for value in range(size)] for axis, size in enumerate(shape)]
    cover = pairwise(*axes)
    assert set(cover) <= set(product(*axes)) and len(set(cover)) == len(cover)
    for first, second in combinations(range(len(axes)), 2):
        covered = {(row[first], row[second]) for row in cover}
        assert covered == set(product(axes[first], axes[second]))
    least = prod(sorted(shape)[-2:])
    assert least <= len(cover) <= 2 * least
    assert len(cover) < prod(shape) or len([size for size in shape if size > 1]) <= 2
    assert pairwise(*axes) == cover


def test_pairwise_repeats_equal_values_and_takes_short_shapes() -> None:
    assert pairwise([1, 2, 3]) == [(1,), (2,), (3,)]
    assert pairwise() == [] and pairwise([], [1, 2]) == []
    assert len(pairwise([0, 0], [1, 1])) == 4


def test_nightly_rest_marks_what_is_not_chosen() -> None:
    rows = nightly_rest([(1, "b"), (2, "a")], [1, 2], ["a", "b"])
    assert [row.values for row in rows] == [(1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert [[mark.name for mark in row.marks] for row in rows] == [["nightly"], [], [], ["nightly"]]
