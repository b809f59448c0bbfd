"""Small training runs."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from firp_cli.config import Recipe
from firp_cli.recipe import validate_recipe
from firp_cli.training.trainer import Outcome, train
from helpers.models import sequence_batch, tiny_teacher

TIMED = ("tokens_per_second", "step_seconds", "data_wait", "memory_bytes")

FIRP = {"kind": "firp", "layer": 2, "steps": 3}
MEDUSA = {"kind": "medusa", "steps": 2}


@lru_cache
def store(count: int = 26) -> tuple[SimpleNamespace, ...]:
    """Return conversations that repeat a cycle of tokens, with the teacher's states."""
    teacher = tiny_teacher("llama")
    items = []
    for number in range(count):
        tokens = [3 + 4 * ((7 * number + place) % 24) for place in range(14 + number % 9)]
        batch = sequence_batch(teacher, [tokens], [3 + number % 4], [1, 2, 3])
        hidden = {layer: states[0] for layer, states in batch.hidden.items()}
        items.append(
            SimpleNamespace(
                input_ids=batch.input_ids[0], loss_mask=batch.loss_mask[0], final=batch.final[0], hidden=hidden
            )
        )
    return tuple(items)


def recipe(predictor: dict[str, Any] = FIRP, **training: Any) -> Recipe:
    settings = {
        "init": "ridge" if predictor["kind"] == "firp" else "identity",
        "micro_batch_size": 3,
        "anchors_per_sequence": 6,
        "learning_rate": 5e-3,
        "validation_fraction": 0.2,
        "epochs": 2,
        "validate_every": 4,
        "save_every": 3,
    }
    return validate_recipe({"predictor": predictor, "training": settings | training})


def run(output: Path, wanted: Recipe, **options: Any) -> Outcome:
    return train(wanted, tiny_teacher("llama"), store(), output, **options)


def rows(output: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without the fields that measure time."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in rows(output) if row["split"] == "train"]
