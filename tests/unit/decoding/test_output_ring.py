"""Output ring: the host reads steps in groups, some steps late, without loss or repetition."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

from firp_cli.decoding.engine import Engine, EngineOptions
from firp_cli.decoding.output_ring import OutputRing, Rows
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.results import Generation
from firp_cli.teacher.teacher import Teacher
from helpers.graphs import LateRing
from helpers.models import embedded_predictor, embedded_prompts, embedded_teacher, generate_reference
from helpers.pairwise import covered

CPU = torch.device("cpu")


def push(ring: OutputRing, number: int, batch: int = 2, width: int = 3) -> list[list[int]]:
    """Push one step's rows, with different counts and tokens for every sequence; return the rows to be read."""
    rows = [[number % 3, *(100 * number + 10 * place + token for token in range(width))] for place in range(batch)]
    ring.push(torch.tensor([row[0] for row in rows]), torch.tensor([row[1:] for row in rows]))
    return rows


@pytest.mark.parametrize("every", [1, 3, 4])
def test_rows_are_read_in_order_and_once(every: int) -> None:
    """Long enough to wrap round several times."""
    ring = OutputRing(2, 3, every, CPU)
    pushed: Rows = []
    read: Rows = []
    for number in range(4 * every + 2):
        pushed.append(push(ring, number))
        for _, rows in ring.launched("tag"):
            read += rows
        assert ring.unread == len(pushed) - len(read) < every
        assert len(read) % every == 0
    assert read == pushed[: len(read)]
    assert len(read) == 4 * every + 2 - (4 * every + 2) % every


@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_draining_reads_everything_and_starts_over(before: int) -> None:
    ring = OutputRing(2, 3, 4, CPU)
    first = [push(ring, number) for number in range(before + 1)]
    read = [rows for _ in range(before) for _, rows in ring.launched(None)]
    read += [rows for _, rows in ring.launched(None, drain=True)]
    assert [step for rows in read for step in rows] == first
    assert ring.unread == 0
    second: Rows = []
    for number in range(4):
        second.append(push(ring, 50 + number))
        found = ring.launched("second")
        assert found == ([("second", second)] if number == 3 else [])


def test_rows_are_returned_with_their_groups_tag() -> None:
    """A group's tag names the sequences of the batch; rows of fewer sequences are padded."""
    ring = OutputRing(3, 3, 2, CPU)
    found = []
    for number, (batch, tag) in enumerate([(3, "abc"), (3, "abc"), (1, "b"), (1, "b"), (2, "bc"), (2, "bc")]):
        expected = push(ring, number, batch)
        for read, rows in ring.launched(tag):
            found.append(read)
            assert rows[-1][:batch] == expected
            assert all(len(step) == 3 for step in rows)
    assert found == ["abc", "b", "bc"]


def test_short_steps_leave_the_rest_of_a_row() -> None:
    """Autoregressive steps emit one token, tree steps several; a count gives the number of a row's tokens."""
    ring = OutputRing(1, 4, 2, CPU)
    push(ring, 1, batch=1, width=4)
    ring.launched(None)
    push(ring, 2, batch=1, width=1)
    ((_, rows),) = ring.launched(None)
    assert rows[0] == [[1, 100, 101, 102, 103]]
    assert rows[1][0][:2] == [2, 200]


def test_reset_drops_unread_rows() -> None:
    ring = OutputRing(2, 3, 3, CPU)
    for number in range(5):
        push(ring, number)
        ring.launched(None)
    assert ring.unread == 2
    ring.reset()
    assert ring.unread == 0
    expected = [push(ring, 90 + number) for number in range(3)]
    assert [ring.launched(None) for _ in range(3)] == [[], [], [(None, expected)]]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("every", [1, 3, 4])
def test_late_ring_reads_a_group_after_the_next_launch(every: int) -> None:
    ring = LateRing(2, 3, every, CPU)
    pushed, read = [], []
    for number in range(5 * every + 1):
        pushed.append(push(ring, number))
        ready = ring.launched(number // every)
        assert len(ready) == int(number % every == every - 1 and number >= 2 * every - 1)
        for tag, rows in ready:
            assert tag == number // every - 1
            read += rows
        assert ring.unread == len(pushed) - len(read) <= 2 * every
    pushed.append(push(ring, 99))
    for _, rows in ring.launched(5, drain=True):
        read += rows
    assert read == pushed
    assert ring.unread == 0


@pytest.mark.usefixtures("late")
def test_reset_of_a_late_ring_drops_unread_rows() -> None:
    ring = LateRing(1, 3, 2, CPU)
    for number in range(5):
        push(ring, number, batch=1)
        ring.launched("old")
    ring.reset()
    assert ring.unread == 0
    expected = [push(ring, 10 + number, batch=1) for number in range(2)]
    assert [ring.launched("new"), ring.launched("new", drain=False)] == [[], []]
    push(ring, 20, batch=1)
    (first, *rest) = ring.launched("new", drain=True)
    assert first == ("new", expected)
    assert len(rest) == 1


def outcome(item: Generation) -> tuple[Any, ...]:
    return item.token_ids, item.accepted_lengths, item.finish_reason, item.steps


@cache
def reference(number: int, tokens: int) -> list[int]:
    return generate_reference(embedded_teacher().model, embedded_prompts(4)[number], tokens)


def ending_early(expected: list[list[int]], place: int) -> Teacher:
    """Return the embedded teacher with one more EOS: the token at a place of the first text."""
    teacher = copy.copy(embedded_teacher())
    teacher.eos_token_ids = (*teacher.eos_token_ids, expected[0][place])
    return teacher


@pytest.mark.parametrize(
    ("kind", "batch", "tokens", "ring"), covered([None, "firp"], [1, 4], [40, 5, 2], ["at-once", "late"])
)
def test_reading_late_changes_no_token(
    kind: str | None, batch: int, tokens: int, ring: str, request: pytest.FixtureRequest
) -> None:
    """Sequences end by EOS in the middle of a step or by their limit, in different steps. The device decodes past their
    ends until the host has read them.
    """
    if ring == "late":
        request.getfixturevalue("late")
    prompts = embedded_prompts(4)[:batch]
    texts = [reference(number, tokens) for number in range(batch)]
    teacher = ending_early(texts, 17 if tokens > 17 else tokens - 1)
    expected = [
        text[: min([place + 1 for place, token in enumerate(text) if token in teacher.eos_token_ids], default=tokens)]
        for text in texts
    ]
    predictor = embedded_predictor(kind) if kind else None
    tree = parse_tree("dynamic:9@4", predictor.steps) if predictor else None
    outcomes = []
    for every in (1, 3, 16):
        seen: list[list[int]] = [[] for _ in prompts]
        options = EngineOptions(read_every=every)
        got = Engine(teacher, predictor, tree, options=options).generate(
            prompts, tokens, on_tokens=lambda number, new, _, seen=seen: seen[number].extend(new)
        )
        assert [item.token_ids for item in got] == seen == expected
        outcomes.append([outcome(item) for item in got])
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert {item.finish_reason for item in got} >= ({"eos", "length"} if tokens == 40 and batch == 4 else {"eos"})
    if predictor and tokens == 40:
        whole = Engine(embedded_teacher(), predictor, tree).generate(prompts, tokens + 5)
        ends = [
            (item.accepted_lengths[-1], uncut.accepted_lengths[item.steps - 1])
            for item, uncut in zip(got, whole, strict=True)
        ]
        assert any(cut < uncut for cut, uncut in ends), "it ended in the middle of a step"
