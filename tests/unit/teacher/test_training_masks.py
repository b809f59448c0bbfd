"""Attention without written-out masks against the dense reference: real rows, pseudo states, windows, pieces."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from firp_cli.predictors.anchors import choose_anchors
from firp_cli.teacher import training_masks as sequence_attention
from firp_cli.teacher.attention import attend
from firp_cli.teacher.check import standard_attention
from firp_cli.teacher.masks import AttentionMask, causal_allowed, pseudo_positions
from firp_cli.teacher.teacher import Teacher
from firp_cli.teacher.training_masks import AnchoredMask, CausalMask, CausalRows, DenseAnchoredMask
from helpers.models import make_predictor, random_prompts, sequence_batch, tiny_teacher

WINDOWS = [None, 1, 5, 100]


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("piece", [4, 7, 512])
def test_causal_rows_attend_as_under_the_dense_mask(window: int | None, piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sequence_attention, "WINDOW_ROWS", piece)
    batch, count = 2, 23
    queries, keys, values = rows(0, batch, 4, count, 8), rows(1, batch, 2, count, 8), rows(2, batch, 2, count, 8)
    positions = torch.arange(count).expand(batch, count)
    dense = AttentionMask(causal_allowed(torch.full((batch,), count), count), torch.float32, positions, positions)
    expected = attend(queries, keys, values, dense.additive(window), 0.3)
    torch.testing.assert_close(attend(queries, keys, values, CausalRows(window), 0.3), expected)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("budget", [1 << 24, 1000, 1])
def test_pseudo_states_attend_as_under_the_dense_mask(window: int | None, budget: int, monkeypatch: pytest.MonkeyPatch):
    """With the steps present that there are at a layer, whole or in pieces, and the way back."""
    monkeypatch.setattr(sequence_attention, "MASK_BUDGET", budget)
    lengths, anchors, count, steps = torch.tensor([11, 8]), torch.tensor([[0, 4, 9], [2, 3, 7]]), 11, 3
    positions = torch.arange(count).expand(2, count)
    everyone = torch.cat([positions, pseudo_positions(positions, anchors, steps)], dim=1)
    dense = DenseAnchoredMask(causal_allowed(lengths, count), everyone, anchors, steps, torch.float32)
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


class HeldMask(CausalMask):
    """A causal mask whose first layer waits until it is told to go on."""

    def __init__(self) -> None:
        self.inside, self.go = Event(), Event()

    def additive(self, window: int | None) -> CausalRows:
        held = self

        class Held(CausalRows):
            def attend(self, *arguments: Any) -> Tensor:
                held.inside.set()
                assert held.go.wait(30)
                return super().attend(*arguments)

        return Held(window)


def test_threads_within_the_librarys_layers_do_not_take_each_others_attention_away(teacher: Teacher):
    """The one that came first leaves first; the other's further layers, and later ones, still find the right one."""
    config, positions = teacher.model.config, torch.arange(9)[None]
    own, ids = config._attn_implementation, torch.arange(3, 12)[None]
    expected = teacher.run(teacher.embed(ids), positions, CausalMask())
    first, second = HeldMask(), HeldMask()
    with ThreadPoolExecutor(2) as pool:
        results = []
        for mask in (first, second):
            results.append(pool.submit(teacher.run, teacher.embed(ids), positions, mask))
            assert mask.inside.wait(30)
        for mask, result in zip((first, second), results, strict=True):
            mask.go.set()
            torch.testing.assert_close(result.result(), expected)
    assert config._attn_implementation == own


@pytest.mark.parametrize("section", [{"kind": "firp", "layer": 1}, {"kind": "hidden_transfer", "layers": [1, 2, 3]}])
def test_the_training_forward_and_its_gradients_are_those_of_dense_masks(stacked_teacher: Teacher, section: dict):
    results = []
    sequences = random_prompts(3, seed=5, low=14, high=30)
    for standard in (True, False):
        teacher = Teacher(stacked_teacher.model, name=stacked_teacher.name, standard_attention=standard)
        teacher.stack = stacked_teacher.stack
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


def test_layers_with_attention_of_their_own_keep_written_masks(monkeypatch: pytest.MonkeyPatch):
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
