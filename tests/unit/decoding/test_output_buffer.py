"""Output of steps: the host reads them one step late on a CUDA device, without loss or repetition."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

from firp_cli.decoding.engine import Engine
from firp_cli.decoding.output_buffer import OutputBuffer, Rows
from firp_cli.decoding.tree_spec import parse_tree
from firp_cli.results import Generation
from firp_cli.teacher.teacher import Teacher
from helpers.graphs import LateBuffer
from helpers.models import embedded_predictor, embedded_prompts, embedded_teacher, generate_reference
from helpers.pairwise import covered

CPU = torch.device("cpu")


def write(output: OutputBuffer, number: int, batch: int = 2, width: int = 3) -> Rows:
    """Write one step's rows, with different counts and tokens for every sequence; return the rows to be read."""
    rows = [[number % 3, *(100 * number + 10 * place + token for token in range(width))] for place in range(batch)]
    output.write(torch.tensor([row[0] for row in rows]), torch.tensor([row[1:] for row in rows]))
    return rows


def test_output_is_read_at_once_on_a_cpu() -> None:
    output = OutputBuffer(2, 3, CPU)
    for number in range(5):
        written = write(output, number)
        assert output.launched(number) == [(number, written)]
        assert output.unread == 0 and output.drain() == []


@pytest.mark.usefixtures("late")
def test_late_output_is_read_after_the_next_launch() -> None:
    """Each step once, in order, with the tag that it was launched with, though its row is overwritten by then."""
    output = LateBuffer(2, 3, CPU)
    written, read = [], []
    for number in range(7):
        written.append((f"step {number}", write(output, number)))
        ready = output.launched(f"step {number}")
        assert (len(ready), output.unread) == ((0, 1) if number == 0 else (1, 1))
        read += ready
    assert read == written[:-1]
    assert output.drain() == written[-1:]
    assert output.unread == 0 and output.drain() == []
    again = write(output, 50)
    assert output.launched("again") == [] and output.drain() == [("again", again)]


@pytest.mark.parametrize("buffer", [OutputBuffer, LateBuffer])
@pytest.mark.usefixtures("late")
def test_smaller_steps_leave_the_rest_of_the_rows(buffer: type[OutputBuffer]) -> None:
    """Autoregressive steps emit one token, and sequences leave: a count gives the number of a row's tokens."""
    output = buffer(3, 4, CPU)
    write(output, 1, batch=3, width=4)
    read = output.launched(None)
    write(output, 2, batch=2, width=1)
    read += output.launched(None)
    read += output.drain()
    assert read[0][1][2] == [1, 120, 121, 122, 123]
    assert [row[:2] for row in read[1][1][:2]] == [[2, 200], [2, 210]]


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


@pytest.mark.parametrize(("kind", "batch", "tokens"), covered([None, "firp"], [1, 4], [40, 5, 2]))
def test_reading_late_changes_no_token(
    kind: str | None, batch: int, tokens: int, request: pytest.FixtureRequest
) -> None:
    """Sequences end by EOS in the middle of a step or by their limit, in different steps. The device decodes past their
    ends until the host has read them.
    """
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
    for late in (False, True):
        if late:
            request.getfixturevalue("late")
        seen: list[list[int]] = [[] for _ in prompts]
        got = Engine(teacher, predictor, tree).generate(
            prompts, tokens, on_tokens=lambda number, new, _, seen=seen: seen[number].extend(new)
        )
        assert [item.token_ids for item in got] == seen == expected
        outcomes.append([outcome(item) for item in got])
    assert outcomes[0] == outcomes[1]
    assert {item.finish_reason for item in got} >= ({"eos", "length"} if tokens == 40 and batch == 4 else {"eos"})
    if predictor and tokens == 40:
        whole = Engine(embedded_teacher(), predictor, tree).generate(prompts, tokens + 5)
        ends = [
            (item.accepted_lengths[-1], uncut.accepted_lengths[item.steps - 1])
            for item, uncut in zip(got, whole, strict=True)
        ]
        assert any(cut < uncut for cut, uncut in ends), "it ended in the middle of a step"
