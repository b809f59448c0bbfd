"""Local training: the losses of the DeepSpeed trainer, the weights of the best validation, the time limit."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from firp_cli.config import TrainingConfig
from firp_cli.errors import NumericsError, StoreError, UsageError
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.folder import build_predictor, load_predictor
from firp_cli.training.local_trainer import train_local
from helpers.models import tiny_teacher
from helpers.training import FIRP, MEDUSA, recipe, rows, run, store

SPEED = {"kind": "speed", "loops": 4, "exits": [1, 2]}


def trained(section: dict[str, Any], settings: TrainingConfig, **options: Any) -> tuple[Predictor, list[dict]]:
    config = recipe(section).predictor
    assert config is not None
    predictor = build_predictor(config, tiny_teacher("llama"))
    return predictor, train_local(predictor, tiny_teacher("llama"), store(), settings, **options)


@pytest.mark.parametrize("section", [FIRP, MEDUSA, SPEED], ids=lambda section: section["kind"])
def test_local_training_equals_deepspeed(section: dict[str, Any], tmp_path: Path) -> None:
    wanted = recipe(section, gradient_accumulation=2, max_grad_norm=0.05, init="identity")
    run(tmp_path, wanted)
    predictor, history = trained(section, wanted.training)
    expected = rows(tmp_path)
    assert [(row["split"], row["step"]) for row in history] == [(row["split"], row["step"]) for row in expected]
    for got, row in zip(history, expected, strict=True):
        for name in set(row) & set(got) - {"split"}:
            assert got[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6), (row["step"], name)
    saved = load_predictor(tmp_path, tiny_teacher("llama")).state_dict()
    for name, value in predictor.state_dict().items():
        torch.testing.assert_close(value, saved[name], rtol=1e-4, atol=1e-6)


def test_local_ridge_start_needs_no_process_group(tmp_path: Path) -> None:
    wanted = recipe(max_steps=3)
    run(tmp_path, wanted)
    _, history = trained(FIRP, wanted.training)
    found = [row["loss"] for row in history if row["split"] == "train"]
    assert found == pytest.approx([row["loss"] for row in rows(tmp_path) if row["split"] == "train"], rel=1e-5)


def test_local_time_limit_completes_schedule() -> None:
    settings = recipe(epochs=100_000, validate_every=None).training
    began = time.perf_counter()
    predictor, history = trained(FIRP, settings, seconds=1.5)
    assert time.perf_counter() - began < 10
    steps = [row for row in history if row["split"] == "train"]
    held_out = [row for row in history if row["split"] == "validation"]
    assert 0 < len(steps) < 100_000 and 2 <= len(held_out) <= 12
    assert steps[-1]["learning_rate"] < 0.2 * settings.learning_rate
    assert held_out[-1]["expected_accepted_length"] > 1 and not predictor.training
    assert not any(parameter.requires_grad for parameter in predictor.parameters())


def test_local_training_refuses_unsupported_settings() -> None:
    with pytest.raises(UsageError, match=r"training\.precision=fp32"):
        trained(FIRP, recipe(precision="bf16").training)
    predictor = build_predictor(recipe().predictor, tiny_teacher("llama"))  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="no conversation"):
        train_local(predictor, tiny_teacher("llama"), [], recipe().training)
    broken = [SimpleNamespace(**vars(item)) for item in store()]
    for item in broken:
        item.hidden = {layer: torch.full_like(states, torch.nan) for layer, states in item.hidden.items()}
    with pytest.raises(NumericsError, match="optimizer step 1"):
        train_local(predictor, tiny_teacher("llama"), broken, recipe(init="identity").training)
