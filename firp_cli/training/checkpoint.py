"""What a run leaves on disk: resumable checkpoints, the best weights, and at the end the predictor folder.

    output/checkpoints/step-N/        DeepSpeed's files and state.json; the last two are kept
    output/checkpoints/latest         name of the newest one
    output/checkpoints/best-N.safetensors   weights with the best validation so far
    output/predictor.safetensors, config.json, recipe.yaml, training.json   the trained predictor

Everything is written under another name and renamed when whole.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from firp_cli.distributed.launch import barrier, is_main, world_size
from firp_cli.errors import FirpError, RecipeError, UsageError
from firp_cli.predictors.registry import write_predictor
from firp_cli.provenance import write_atomically, write_json
from firp_cli.recipe import PredictorSection, Recipe, dump_recipe

FOLDER = "checkpoints"
KEPT = 2
STATE_FILE = "state.json"
FREE_TO_CHANGE = {"log_every", "save_every", "gate_prompts"}  # training fields that leave the losses as they are
EXPORTED = (
    "predictor.safetensors",
    "recipe.yaml",
    "training.json",
    "config.json",
)  # config.json last: it makes it whole


@dataclass
class RunState:
    """How far a run is. `seconds`, `waited` and `tokens` count training steps only, `waited` is per rank.

    `first`, `best` and `last` are rows of validations: the start values', the best so far, the latest.
    """

    step: int = 0
    first: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    seconds: float = 0.0
    waited: float = 0.0
    tokens: int = 0


def guard_output(output: Path, resume: bool) -> None:
    """Refuse to train over a finished or interrupted run. Raises UsageError."""
    if resume:
        return
    if latest_checkpoint(output) is not None:
        held = "the checkpoints of a run"
    elif (output / "config.json").is_file():
        held = "a trained predictor"
    else:
        return
    raise UsageError(
        f"{output} holds {held}: add --resume to go on with it, or --output OTHER to start anew beside it\n"
        f"(to start over in the same place remove the folder first)"
    )


def latest_checkpoint(output: Path) -> Path | None:
    """Folder of the newest whole checkpoint, or None."""
    whole = _checkpoints(output)
    return whole[-1] if whole else None


def _checkpoints(output: Path) -> list[Path]:
    found = [path.parent for path in (output / FOLDER).glob(f"step-*/{STATE_FILE}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(engine: Any, output: Path, state: RunState, recipe: Recipe, conversations: int) -> None:
    """Write a resumable checkpoint; every rank calls it. Raises FirpError when it cannot be written."""
    folder = output / FOLDER
    tag, partial = f"step-{state.step}", f"saving-step-{state.step}"
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("saving-*"):
            shutil.rmtree(leftover)
    barrier()
    try:
        engine.save_checkpoint(str(folder), tag=partial, save_latest=False)
        barrier()
        if is_main():
            values = {
                "state": asdict(state),
                "recipe": recipe.model_dump(),
                "conversations": conversations,
                "world_size": world_size(),
            }
            write_json(folder / partial / STATE_FILE, values)
            _publish(folder, partial, tag)
            _prune(output)
    except (OSError, RuntimeError) as error:
        raise FirpError(
            f"the checkpoint of step {state.step} cannot be written ({error}); the one before it is whole: "
            "make room, then --resume goes on from there"
        ) from error
    barrier()


def _publish(folder: Path, partial: str, tag: str) -> None:
    for path in (folder / partial).iterdir():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
    if (folder / tag).exists():
        shutil.rmtree(folder / tag)
    (folder / partial).rename(folder / tag)
    write_atomically(folder / "latest", lambda temporary: temporary.write_text(tag, encoding="utf-8"))


def _prune(output: Path) -> None:
    """Keep the last checkpoints and the best weights that they refer to."""
    whole = _checkpoints(output)
    for path in whole[:-KEPT]:
        shutil.rmtree(path)
    best = [_read_state(path)["state"]["best"] for path in whole[-KEPT:]]
    wanted = {row["step"] for row in best if row}
    for path in (output / FOLDER).glob("best-*.safetensors"):
        if int(path.stem.removeprefix("best-")) not in wanted:
            path.unlink()


def _read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def check_resumable(checkpoint: Path, recipe: Recipe, conversations: int) -> None:
    """Refuse to go on with another recipe, store or number of ranks: losses would differ. Raises RecipeError."""
    saved = _read_state(checkpoint)
    now, then = recipe.model_dump(), saved["recipe"]
    for section in ("teacher", "predictor", "training"):
        for key in sorted(set(now[section]) | set(then[section])):
            before, after = then[section].get(key), now[section].get(key)
            if before != after and key not in FREE_TO_CHANGE:
                raise RecipeError(
                    f"{checkpoint.parent.parent} was trained with {section}.{key}={before}, now it is {after}; "
                    f"--resume goes on exactly: give the same recipe, or another --output"
                )
    if saved["conversations"] != conversations:
        raise UsageError(
            f"the store had {saved['conversations']} conversations when this run began, now it has {conversations}; "
            "--resume needs the same store"
        )
    if saved["world_size"] != world_size():
        raise UsageError(
            f"this run was started with --gpus {saved['world_size']}, now there are {world_size()} ranks; "
            f"resume with --gpus {saved['world_size']}"
        )


def load_checkpoint(engine: Any, checkpoint: Path) -> RunState:
    """Restore weights, optimizer and schedule; every rank calls it. Raises FirpError when it cannot be read."""
    try:
        loaded, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        state = RunState(**_read_state(checkpoint)["state"])
    except Exception as error:  # torch, pickle and DeepSpeed each fail in their own way on a damaged file
        raise _unreadable(checkpoint, str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    if loaded is None or engine.global_steps != state.step:
        raise _unreadable(checkpoint, "DeepSpeed found nothing to load")
    return state


def _unreadable(checkpoint: Path, reason: str) -> FirpError:
    return FirpError(f"checkpoint {checkpoint} cannot be read ({reason}); remove it to resume from the one before")


def save_best(output: Path, step: int, weights: dict[str, Tensor]) -> None:
    """Keep the weights of the best validation so far; older ones go when no checkpoint refers to them any more."""
    path = output / FOLDER / f"best-{step}.safetensors"
    write_atomically(path, lambda temporary: save_file(weights, temporary))


def load_best(output: Path, step: int) -> dict[str, Tensor]:
    """Weights of the best validation. Raises FirpError when the file is gone."""
    path = output / FOLDER / f"best-{step}.safetensors"
    try:
        return load_file(path)
    except Exception as error:
        raise FirpError(
            f"the best weights {path} cannot be read ({error}); train again with another --output"
        ) from None


def export_predictor(
    output: Path,
    weights: dict[str, Tensor],
    config: PredictorSection,
    teacher: dict[str, Any],
    recipe: Recipe,
    training: dict[str, Any],
) -> None:
    """Write the predictor folder: it has no config.json, and so is none, until all of it is in place."""
    temporary = output / f".export-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_predictor(weights, config, temporary, teacher)
        (temporary / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        write_json(temporary / "training.json", training)
        for name in EXPORTED:
            with (temporary / name).open("rb+") as stream:
                os.fsync(stream.fileno())
        for stale in ("config.json", "tree.json"):  # a tree was tuned for the weights that go
            (output / stale).unlink(missing_ok=True)
        for name in EXPORTED:
            (temporary / name).replace(output / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
