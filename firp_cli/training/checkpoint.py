"""Files of a training run: resumable checkpoints, the best weights, and at the end the predictor folder.

    output/checkpoints/step-N/        state.json, and one safetensors file per parameter: weights and AdamW's moments
    output/checkpoints/latest         name of the newest one
    output/checkpoints/best-N.safetensors   weights of the best validations so far
    output/predictor.safetensors, config.json, recipe.yaml, training.json   the trained predictor

Everything is written under another name and renamed when whole. A checkpoint contains whole float32 tensors and no
pickle: any number of ranks and any ZeRO stage can resume from it, with the number of ranks that wrote it bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from firp_cli.config import PredictorSection, Recipe
from firp_cli.distributed.launch import barrier
from firp_cli.errors import FirpError, UsageError, first_line
from firp_cli.files import file_sha256, lock_folder, write_atomically, write_json
from firp_cli.machine import is_main, rank, world_size
from firp_cli.predictors.base import Predictor
from firp_cli.predictors.folder import read_weights, write_predictor
from firp_cli.recipe import dump_recipe
from firp_cli.store.reader import MANIFEST
from firp_cli.training.loop import RunProgress
from firp_cli.training.optimizer_state import (
    States,
    adam_steps,
    learning,
    restore_schedule,
    restore_states,
    schedule_state,
    whole_states,
)
from firp_cli.training.random_state import random_state, restore_random_state, seed_rank

FOLDER = "checkpoints"
FIRST_STAGE = "coupling"  # folder of the first stage of a run, a run of its own
START_FILE = "start.safetensors"  # all weights at its start: those that do not learn are in no checkpoint
STATE_FILE = "state.json"
# config.json is last: a folder that contains it is complete
EXPORTED = ("predictor.safetensors", "recipe.yaml", "training.json", "config.json")


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Lock a run's folder while it is written, on rank 0. Raises UsageError where another process has the lock."""
    if not is_main():
        yield
        return
    folder = output / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(folder)
    except BlockingIOError as error:
        raise UsageError(
            f"another `firp train` is writing {output}: {error.strerror}; wait for it, or give another --output"
        ) from None
    except OSError as error:
        raise FirpError(f"cannot lock {output}: {error}; give an --output that can be written") from error
    with lock:
        yield


def guard_output(output: Path, resume: bool) -> None:
    """Refuse to train over a finished or interrupted run. Raises UsageError."""
    if (output / MANIFEST).is_file():
        raise UsageError(f"{output} is a hidden-state store: give another --output for the run")
    if not resume and (found := content(output)):
        raise UsageError(
            f"{output} contains {found}: add --resume to continue it, or give another --output for a new run\n"
            f"(to start over in the same place remove the folder first)"
        )


def content(output: Path) -> str | None:
    """Return what a folder contains of a run; None where it contains nothing of one."""
    if latest_checkpoint(output) is not None or (output / FIRST_STAGE).exists():
        return "the checkpoints of a run"
    return "a trained predictor" if (output / "config.json").is_file() else None


def latest_checkpoint(output: Path) -> Path | None:
    """Return the folder of the newest whole checkpoint, or None."""
    whole = _checkpoints(output)
    return whole[-1] if whole else None


def _checkpoints(output: Path) -> list[Path]:
    found = [path.parent for path in (output / FOLDER).glob(f"step-*/{STATE_FILE}")]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(
    engine: Any,
    output: Path,
    progress: RunProgress,
    recipe: Recipe,
    data: dict[str, Any],
    per_step: int,
) -> None:
    """Write a resumable checkpoint; every rank calls it. Raises FirpError when it cannot be written.

    Args:
        data: `data_identity` of the store.
        per_step: micro-batches of an optimizer step, over all ranks.
    """
    folder = output / FOLDER
    tag, partial = f"step-{progress.step}", folder / f"saving-step-{progress.step}"
    random_states: list[Any] = [random_state()]
    if world_size() > 1:
        random_states = [None] * world_size()
        torch.distributed.all_gather_object(random_states, random_state())
    try:
        if is_main():
            for leftover in folder.glob("saving-*"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        sums: dict[str, str] = {}
        for name, values in whole_states(engine):
            if is_main():
                path = partial / f"{name}.safetensors"
                save_file({key: value.to("cpu").contiguous() for key, value in values.items()}, path)
                sums[name] = file_sha256(path)
        if is_main():
            saved = {
                "state": asdict(progress),
                "recipe": recipe.model_dump(),
                "data": data,
                "world_size": world_size(),
                "micro_batches_per_step": per_step,
                "adam_steps": adam_steps(engine),
                "schedule": schedule_state(engine),
                "parameters": sums,
                "random_states": random_states,
            }
            write_json(partial / STATE_FILE, saved)
            _publish(folder, partial.name, tag)
            _prune(output, recipe.training.keep_last)
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
        remedy = "there is none before it: make room, then start again"
        if latest_checkpoint(output) is not None:
            remedy = "the one before it is whole: make room, then --resume continues from there"
        raise FirpError(f"the checkpoint of step {progress.step} cannot be written ({error}); {remedy}") from error
    barrier()


def _publish(folder: Path, partial: str, tag: str) -> None:
    """Sync every file, then rename the folder, which makes it a checkpoint."""
    for path in (folder / partial).iterdir():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
    if (folder / tag).exists():  # damaged, or the run would have resumed from it
        _discard(folder / tag)
    (folder / partial).rename(folder / tag)
    write_atomically(folder / "latest", lambda temporary: temporary.write_text(tag, encoding="utf-8"))


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint, its state file first, so that a kill leaves none that lacks files."""
    (checkpoint / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _prune(output: Path, keep_last: int) -> None:
    """Keep the last checkpoints and the best weights that they refer to."""
    whole = _checkpoints(output)
    for path in whole[:-keep_last]:
        _discard(path)
    kept = {step for path in whole[-keep_last:] for _, step in read_state(path)["state"]["kept"]}
    for path in (output / FOLDER).glob("best-*.safetensors"):
        if int(path.stem.removeprefix("best-")) not in kept:
            path.unlink()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint. Raises FirpError when it is damaged."""
    try:
        saved = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if not {"parameters", "recipe", "micro_batches_per_step"} <= set(saved):
            raise ValueError("written by another version of firp")
        saved.setdefault("data", {"conversations": saved.get("conversations")})  # as earlier versions wrote it
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(checkpoint, first_line(error)) from error
    return saved


def load_weights(checkpoint: Path, predictor: torch.nn.Module) -> None:
    """Load the weights that a checkpoint holds, those that learn, into a predictor before its engine is built.

    Raises FirpError when they are damaged.
    """
    read = _reader(checkpoint)
    with torch.no_grad():
        for name, parameter in learning(predictor):
            parameter.copy_(read(name)["weight"])


def load_checkpoint(engine: Any, checkpoint: Path, recipe: Recipe) -> RunProgress:
    """Restore weights, optimizer, schedule and random states; every rank calls it. Raises FirpError when damaged."""
    saved = read_state(checkpoint)
    restore_states(engine, _reader(checkpoint), saved["adam_steps"])
    progress = RunProgress(**saved["state"])
    progress.kept = [(length, step) for length, step in progress.kept]
    restore_schedule(engine, saved["schedule"], progress.step)
    if saved["world_size"] == world_size():
        restore_random_state(saved["random_states"][rank()])
    else:
        seed_rank(recipe.training.seed, progress.step, rank())
    return progress


def _reader(checkpoint: Path) -> Callable[[str], States]:
    """Return a function that checks the checksum of a parameter's file and reads its states."""
    sums = read_state(checkpoint)["parameters"]

    def read(name: str) -> States:
        path = checkpoint / f"{name}.safetensors"
        try:
            if file_sha256(path) != sums[name]:
                raise _unreadable(checkpoint, f"the checksum of {path.name} differs")
            return load_file(path)
        except (OSError, SafetensorError, KeyError) as error:
            raise _unreadable(checkpoint, f"{path.name}: {error}") from error

    return read


def _unreadable(checkpoint: Path, reason: str) -> FirpError:
    return FirpError(f"checkpoint {checkpoint} cannot be read ({reason}); remove it to resume from the one before it")


def save_start(output: Path, weights: dict[str, Tensor]) -> None:
    """Write the weights at the start of a first stage."""
    with _writing("the start values"):
        write_atomically(output / START_FILE, lambda temporary: save_file(weights, temporary))


def load_whole(predictor: Predictor, path: Path) -> None:
    """Load all weights of a predictor from a file. Raises FirpError when it cannot be read."""
    try:
        read_weights(predictor, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise FirpError(f"{path} cannot be read ({error}); remove its folder to train the first stage again") from None


def save_best(output: Path, step: int, weights: dict[str, Tensor]) -> None:
    """Write the weights of one of the best validations; they are removed once no checkpoint refers to them."""
    path = output / FOLDER / f"best-{step}.safetensors"
    with _writing(f"the best weights of step {step}"):
        write_atomically(path, lambda temporary: save_file(weights, temporary))


def load_best(output: Path, step: int) -> dict[str, Tensor]:
    """Return the weights of the best validation. Raises FirpError when the file is missing or damaged."""
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
    """Write the predictor folder; config.json, which makes it one, comes last.

    Raises FirpError when it cannot be written; the checkpoints stay.
    """
    temporary = output / f".export-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _writing("the predictor"):
            write_predictor(weights, config, temporary, teacher)
            (temporary / "recipe.yaml").write_text(dump_recipe(recipe, published=True), encoding="utf-8")
            write_json(temporary / "training.json", training)
            for name in EXPORTED:
                with (temporary / name).open("rb+") as stream:
                    os.fsync(stream.fileno())
            for stale in ("config.json", "tree.json"):  # the tree was tuned for the old weights
                (output / stale).unlink(missing_ok=True)
            for name in EXPORTED:
                (temporary / name).replace(output / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _writing(what: str) -> Iterator[None]:
    """Turn a failure to write into an error that names --resume: the last checkpoint has all that is needed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FirpError(f"{what} cannot be written ({error}); make room, then continue with --resume") from error
