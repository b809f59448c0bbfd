"""Attention without written-out masks against the dense reference: real rows, pseudo states, windows, chunks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from firp_cli.predictors.anchors import choose_anchors
from firp_cli.teacher import training_masks
from firp_cli.teacher.attention import attend
from firp_cli.teacher.check import standard_attention
from firp_cli.teacher.masks import AttentionMask, causal_allowed, pseudo_positions
from firp_cli.teacher.teacher import Teacher
from firp_cli.teacher.training_masks import AnchoredMask, CausalMask, CausalRows, DenseAnchoredMask
from helpers.models import FAMILIES, make_predictor, random_prompts, sequence_batch, tiny_teacher
from helpers.pairwise import pairwise

WINDOWS = [None, 1, 5, 100]


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("piece", [4, 7, 512])
def test_causal_rows_equal_dense_mask(window: int | None, piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training_masks, "WINDOW_ROWS", piece)
    batch, count = 2, 23
    queries, keys, values = rows(0, batch, 4, count, 8), rows(1, batch, 2, count, 8), rows(2, batch, 2, count, 8)
    positions = torch.arange(count).expand(batch, count)
    dense = AttentionMask(causal_allowed(torch.full((batch,), count), count), torch.float32, positions, positions)
    expected = attend(queries, keys, values, dense.additive(window), 0.3)
    torch.testing.assert_close(attend(queries, keys, values, CausalRows(window), 0.3), expected)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("budget", [1 << 24, 1000, 1])
def test_anchor_rows_equal_dense_mask(window: int | None, budget: int, monkeypatch: pytest.MonkeyPatch):
    """Compare forward and backward pass for the steps present at a layer, whole and in chunks."""
    monkeypatch.setattr(training_masks, "MASK_BUDGET", budget)
    lengths, anchors, count, steps = torch.tensor([11, 8]), torch.tensor([[0, 4, 9], [2, 3, 7]]), 11, 3
    positions = torch.arange(count).expand(2, count)
    all_positions = torch.cat([positions, pseudo_positions(positions, anchors, steps)], dim=1)
    dense = DenseAnchoredMask(causal_allowed(lengths, count), all_positions, anchors, steps, torch.float32)
    lean = AnchoredMask(anchors, count, steps)
    for present in (1, 3, 2):
        pseudo = present * anchors.shape[1]
        results = []
        for mask in (dense, lean):
            queries = rows(3, 2, 4, pseudo, 8).requires_grad_()
            keys, values = (rows(seed, 2, 2, count + pseudo, 8).requires_grad_() for seed in (4, 5))
            output = attend(queries, keys, values, mask.pseudo(window, present), None)
            output.square().sum().backward()
            results.append((output.detach(), queries.grad, keys.grad, values.grad))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("earlier", [True, False])
def test_pseudo_masks_equal_an_element_wise_rule(window: int | None, earlier: bool):
    lengths, anchors, count, steps = torch.tensor([11, 8]), torch.tensor([[0, 4, 9], [2, 3, 7]]), 11, 3
    positions = torch.arange(count).expand(2, count)
    all_positions = torch.cat([positions, pseudo_positions(positions, anchors, steps)], dim=1)
    allowed = causal_allowed(lengths, count)
    dense = DenseAnchoredMask(allowed, all_positions, anchors, steps, torch.float32, earlier)
    expected = torch.zeros(2, 9, count + 9, dtype=torch.bool)
    for batch in range(2):
        for row in range(9):
            step, anchor = row // 3, row % 3
            place = anchors[batch, anchor].item()
            for column in range(count + 9):
                if column < count:
                    seen, back = column <= place, place + step + 1 - column
                else:
                    other, grown = divmod(column - count, 3)
                    seen = grown == anchor and (other <= step if earlier else other == step)
                    back = step - other
                expected[batch, row, column] = seen and (window is None or back < window)
    lean = AnchoredMask(anchors, count, steps, earlier).pseudo(window, steps)
    assert torch.equal(lean.mask(0, 9, 9, torch.float32)[:, 0] == 0, expected)
    assert torch.equal(dense.pseudo(window, steps)[:, 0] == 0, expected)


class WaitingMask(CausalMask):
    """Causal mask whose layers wait for the event `go`."""

    def __init__(self) -> None:
        self.inside, self.go = Event(), Event()

    def additive(self, window: int | None) -> CausalRows:
        mask = self

        class WaitingRows(CausalRows):
            def attend(self, *arguments: Any) -> Tensor:
                mask.inside.set()
                assert mask.go.wait(30)
                return super().attend(*arguments)

        return WaitingRows(window)


def test_library_attention_survives_concurrent_threads(teacher: Teacher):
    """The first thread ends first; the second one's later layers, and later calls, still find the right attention."""
    config, positions = teacher.model.config, torch.arange(9)[None]
    implementation, ids = config._attn_implementation, torch.arange(3, 12)[None]
    expected = teacher.run(teacher.embed(ids), positions, CausalMask())
    first, second = WaitingMask(), WaitingMask()
    with ThreadPoolExecutor(2) as pool:
        results = []
        for mask in (first, second):
            results.append(pool.submit(teacher.run, teacher.embed(ids), positions, mask))
            assert mask.inside.wait(30)
        for mask, result in zip((first, second), results, strict=True):
            mask.go.set()
            torch.testing.assert_close(result.result(), expected)
    assert config._attn_implementation == implementation


SECTIONS = [{"kind": "firp", "layer": 1}, {"kind": "hidden_transfer", "layers": [1, 2, 3]}]


@pytest.mark.parametrize(("family", "any_stack", "section"), pairwise(list(FAMILIES), ["lean", "library"], SECTIONS))
def test_training_gradients_equal_dense_masks(family: str, any_stack: str, section: dict):
    tiny = tiny_teacher(family, any_stack == "lean")
    results = []
    sequences = random_prompts(3, seed=5, low=14, high=30)
    for standard in (True, False):
        teacher = Teacher(tiny.model, name=tiny.name)
        teacher.standard_attention = standard
        teacher.stack = tiny.stack
        predictor = make_predictor(teacher, **section).requires_grad_(True)
        batch = sequence_batch(teacher, sequences, [3, 5, 8], list(predictor.required_layers))
        anchors = choose_anchors(batch, predictor.steps, 6, [1, 2, 3])
        states = predictor.draft_states(teacher, batch, anchors.index)[anchors.valid]
        # the norm makes the sum of squares the same whatever the states are: its gradient would be rounding alone
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
        (states * weights).sum().backward()
        results.append([states.detach(), *(parameter.grad for parameter in predictor.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_nonstandard_attention_keeps_dense_masks(monkeypatch: pytest.MonkeyPatch):
    """Scores that are capped, as Gemma's, are not standard attention; a Llama's are."""
    teacher = tiny_teacher("llama")
    assert teacher.standard_attention and isinstance(teacher.causal_mask(9).additive(None), CausalRows)
    layer = teacher.layer
    monkeypatch.setattr(
        teacher, "layer", lambda *given: layer(*given) * (0.9 if isinstance(given[4], CausalRows) else 1.0)
    )
    assert not standard_attention(teacher)
    mask = Teacher(teacher.model).causal_mask(9).additive(None)
    assert isinstance(mask, Tensor) and mask.shape == (1, 1, 9, 9)
