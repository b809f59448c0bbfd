"""Checks before a run is resumed: recipe, store and ranks must be those that it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from firp_cli.config import Recipe
from firp_cli.errors import FirpError, RecipeError, UsageError, first_line
from firp_cli.files import read_json
from firp_cli.machine import world_size
from firp_cli.recipe import dump_recipe, load_recipe, validate_recipe
from firp_cli.training.checkpoint import read_state

FREE_TO_CHANGE = {  # training fields that do not change the losses, to float error
    "log_every",
    "save_every",
    "gate_prompts",
    "keep_last",
    "keep_best",
    "patience",
    "min_improvement",
    "readers",
    "wandb",
    "zero_stage",
}
TEACHER_FREE_TO_CHANGE = {"sharding", "device_map"}  # the place of the teacher's weights does not change the losses


def data_identity(conversations: int, store: dict[str, Any]) -> dict[str, Any]:
    """Return what tells one store from another; `store`: its own description, as in training.json."""
    counted = {"conversations": conversations, "tokens": store.get("counts", {}).get("tokens")}
    read = {"dtype": store.get("dtype"), "data_fingerprint": store.get("settings", {}).get("data_fingerprint")}
    return {name: value for name, value in (counted | read).items() if value is not None}


def check_resumable(checkpoint: Path, recipe: Recipe, data: dict[str, Any]) -> int:
    """Refuse to resume with another recipe or store, or with ranks that cannot share the run's optimizer steps evenly.

    Returns the micro-batches of an optimizer step over all ranks, which any number of ranks keeps. Raises RecipeError,
    UsageError, FirpError.
    """
    saved = read_state(checkpoint)
    _check_recipe(checkpoint.parent.parent, saved["recipe"], recipe.model_dump())
    _check_data(saved["data"], data)
    per_step = int(saved["micro_batches_per_step"])
    if per_step % world_size():
        allowed = ", ".join(str(count) for count in range(1, per_step + 1) if per_step % count == 0)
        raise UsageError(
            f"an optimizer step of this run has {per_step} micro-batches, which {world_size()} ranks cannot share "
            f"evenly; resume with --gpus {allowed}"
        )
    return per_step


def check_restart(output: Path, recipe: Recipe, data: dict[str, Any]) -> None:
    """Refuse to train again over a predictor without checkpoints, unless it took no step and would be the same.

    Raises RecipeError, UsageError, FirpError.
    """
    if (output / "config.json").is_file() and check_finished(output, recipe, data):
        raise UsageError(
            f"{output} contains a trained predictor without checkpoints, so there is nothing to continue from: give "
            "another --output, or remove the folder to train it again"
        )


def check_finished(output: Path, recipe: Recipe, data: dict[str, Any]) -> int:
    """Compare recipe and store with those of the trained predictor in `output`; return its optimizer steps.

    Raises RecipeError and UsageError where they differ, FirpError where its records are damaged.
    """
    path = output / "training.json"
    try:
        record = read_json(path)
        known = data_identity(sum(record["conversations"].values()), record["store"])
        steps = int(record["steps"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FirpError(
            f"{path} cannot be read ({first_line(error)}): what {output} was trained on is unknown; give another "
            "--output, or remove that folder first"
        ) from error
    published = validate_recipe(yaml.safe_load(dump_recipe(recipe, published=True)))  # as the run's own was written
    _check_recipe(output, load_recipe(output / "recipe.yaml").model_dump(), published.model_dump())
    _check_data(known, data)
    return steps


def _check_recipe(output: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise RecipeError where a field differs that changes the losses."""
    for section in ("teacher", "predictor", "training"):
        free = TEACHER_FREE_TO_CHANGE if section == "teacher" else FREE_TO_CHANGE
        for key in sorted(set(now[section]) | set(then[section])):
            before, after = then[section].get(key), now[section].get(key)
            if before != after and key not in free:
                raise RecipeError(
                    f"{output} was trained with {section}.{key}={before}, now it is {after}; "
                    f"--resume needs the same recipe; else give another --output"
                )


def _check_data(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UsageError where the store is another one; `data_identity` of both."""
    counts = tuple(f"{data['conversations']} conversations" for data in (then, now))
    for name in ("conversations", "tokens", "dtype", "data_fingerprint"):
        if name in then and name in now and then[name] != now[name]:
            before, after = counts if name == "conversations" else (f"{name} {then[name]}", str(now[name]))
            raise UsageError(
                f"the store had {before} when this run began, now it has {after.removesuffix(' conversations')}; "
                "--resume needs the same store; else give another --output"
            )
