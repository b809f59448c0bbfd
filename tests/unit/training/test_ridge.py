"""Ridge start against direct least squares, and against the identity."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from firp_cli.config import FirpConfig, HiddenTransferConfig, SpeedConfig, TrainingConfig
from firp_cli.errors import NumericsError
from firp_cli.predictors.anchors import choose_anchors, collate
from firp_cli.predictors.folder import build_predictor
from firp_cli.teacher.teacher import Teacher
from firp_cli.training.objective import objective
from firp_cli.training.ridge import RidgeSums, ridge_start, states_at
from helpers.models import HIDDEN, looped_teacher, random_prompts, sequence_batch, tiny_teacher

TEACHER = tiny_teacher("llama")


def counting(count: int) -> list[list[int]]:
    """Return texts that can be predicted: each repeats a cycle of 24 tokens."""
    return [[3 + 4 * ((7 * number + place) % 24) for place in range(16 + number % 13)] for number in range(count)]


def conversations(
    texts: list[list[int]], teacher: Teacher = TEACHER, layers: tuple[int, ...] = (1, 2, 3)
) -> list[SimpleNamespace]:
    store = []
    for number, tokens in enumerate(texts):
        batch = sequence_batch(teacher, [tokens], [4 + number % 5], list(layers))
        hidden = {layer: states[0] for layer, states in batch.hidden.items()}
        store.append(
            SimpleNamespace(
                input_ids=batch.input_ids[0], loss_mask=batch.loss_mask[0], final=batch.final[0], hidden=hidden
            )
        )
    return store


@pytest.mark.parametrize("bias", [False, True])
def test_ridge_solves_least_squares(bias: bool):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=generator, dtype=torch.float64) + 2
    y = x @ torch.randn(8, 8, generator=generator, dtype=torch.float64) + 3
    y += 0.1 * torch.randn(300, 8, generator=generator, dtype=torch.float64)
    sums = RidgeSums.empty(8, torch.device("cpu"))
    for start in range(0, 300, 70):
        sums.add(x[start : start + 70], y[start : start + 70])
    weight, constant = sums.solve(1e-12, bias)
    rows = torch.cat([x, torch.ones(300, 1, dtype=torch.float64)], dim=1) if bias else x
    direct = torch.linalg.lstsq(rows, y).solution
    torch.testing.assert_close(weight, direct[:8].T, rtol=1e-6, atol=1e-6)
    if bias:
        torch.testing.assert_close(constant, direct[8], rtol=1e-6, atol=1e-5)
    else:
        assert constant is None


def test_ridge_lambda_is_relative_to_mean_diagonal():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 50, 6, generator=generator, dtype=torch.float64)
    sums = RidgeSums.empty(6, torch.device("cpu"))
    sums.add(1000 * x, y)
    gram = 1e6 * x.T @ x
    damped = gram + 0.5 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(sums.solve(0.5, False)[0], 1000 * y.T @ x @ torch.linalg.inv(damped))


def test_ridge_fits_pairs_of_all_anchors():
    store = conversations(random_prompts(40, low=16, high=30))
    predictor = build_predictor(FirpConfig(kind="firp", layer=2, steps=3), TEACHER)
    predictor.initialise("ridge", TEACHER)
    counts = ridge_start(predictor, TEACHER, store, list(range(30)), 1e-6, batch_size=7)
    for step in (1, 2, 3):
        x, y = [], []
        for item in store[:30]:
            length, mask = len(item.input_ids), item.loss_mask
            for n in range(length - step - 1):
                if mask[n + 1 : n + step + 2].all():
                    x.append(item.hidden[2][n].double())
                    y.append(item.hidden[2][n + step].double())
        assert counts[step - 1] == len(x)
        rows, wanted = torch.stack(x), torch.stack(y)
        gram = rows.T @ rows
        direct = wanted.T @ rows @ torch.linalg.inv(gram + 1e-6 * gram.diagonal().mean() * torch.eye(HIDDEN))
        torch.testing.assert_close(predictor.maps[step - 1].weight.double(), direct, rtol=1e-4, atol=1e-5)


def test_ridge_beats_identity_on_held_out_conversations():
    store, settings = conversations(counting(80)), TrainingConfig()
    held = collate(store[60:])
    anchors = choose_anchors(held, 3)
    losses = {}
    for init in ("identity", "ridge"):
        predictor = build_predictor(HiddenTransferConfig(kind="hidden_transfer", layers=[1, 2, 3], bias=True), TEACHER)
        predictor.initialise(init, TEACHER)
        if init == "ridge":
            ridge_start(predictor, TEACHER, store, list(range(60)), 1e-2, batch_size=8)
        with torch.no_grad():
            losses[init] = objective(predictor, TEACHER, held, anchors, settings)[0].item()
    assert losses["ridge"] < 0.8 * losses["identity"], losses


@pytest.mark.parametrize("bias", [False, True])
def test_ridge_exits_target_state_before_final_norm(bias: bool):
    """The target has the length of the exit's own state, which the norm does not change."""
    teacher = looped_teacher(2, 3)
    store = conversations(random_prompts(30, seed=2, low=16, high=30), teacher, (2, 4))
    predictor = build_predictor(SpeedConfig(kind="speed", bias=bias), teacher).requires_grad_(False)
    predictor.initialise("ridge", teacher)
    counts = ridge_start(predictor, teacher, store, list(range(25)), 1e-10, batch_size=4)
    gain = teacher.model.model.norm.weight.double().numpy()
    places = [(item, int(n) - 1) for item in store[:25] for n in item.loss_mask.nonzero()[:, 0]]
    unnormed = np.stack([item.final[n].double().numpy() / gain for item, n in places])
    assert counts == [len(places)] * 2
    for linear, layer in zip(predictor.maps, (2, 4), strict=True):
        rows = np.stack([item.hidden[layer][n].double().numpy() for item, n in places])
        wanted = unnormed * np.sqrt((rows**2).mean(axis=1, keepdims=True))
        if bias:
            rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        direct = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        np.testing.assert_allclose(linear.weight.double().numpy(), direct[:HIDDEN].T, rtol=1e-3, atol=1e-4)
        if bias:
            np.testing.assert_allclose(linear.bias.double().numpy(), direct[HIDDEN], rtol=1e-3, atol=1e-4)


def test_ridge_exits_beat_identity():
    teacher, settings = looped_teacher(2, 3), TrainingConfig()
    store = conversations(counting(80), teacher, (2, 4))
    held = collate(store[60:])
    averages = {}
    for init in ("identity", "ridge"):
        predictor = build_predictor(SpeedConfig(kind="speed"), teacher)
        predictor.initialise(init, teacher)
        if init == "ridge":
            ridge_start(predictor, teacher, store, list(range(60)), 1e-2, batch_size=8)
        anchors = choose_anchors(held, predictor.offsets)
        with torch.no_grad():
            averages[init] = objective(predictor, teacher, held, anchors, settings)[1].averages(predictor.pipeline)
    for early, fitted in zip(averages["identity"]["top1"], averages["ridge"]["top1"], strict=True):
        assert fitted > early + 0.1, averages
    assert averages["ridge"]["expected_accepted_length"] > averages["identity"]["expected_accepted_length"] + 0.1


def test_states_above_first_layer_are_computed():
    batch = sequence_batch(TEACHER, random_prompts(3, seed=5, low=8, high=20), [2, 3, 4], [1, 2, 3])
    inside = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    states = states_at(TEACHER, batch, [1, 3])
    assert list(states) == [1, 3]
    torch.testing.assert_close(states[3][inside], batch.hidden[3][inside], rtol=1e-5, atol=1e-5)


def test_ridge_refuses_nan_states_by_conversation():
    store = conversations(counting(6))
    store[4].hidden[2][7] = float("nan")
    predictor = build_predictor(FirpConfig(kind="firp", layer=2, steps=2), TEACHER)
    with pytest.raises(NumericsError, match=r"layer 2, conversations \[4, 5\]"):
        ridge_start(predictor, TEACHER, store, list(range(6)), 1e-2, batch_size=2)
    sums = RidgeSums.empty(4, torch.device("cpu"))
    with pytest.raises(NumericsError, match="nonzero variance"):
        sums.solve(1e-2, bias=False)
