"""What a run leaves on disk: resumable checkpoints, the best weights, and at the end the predictor folder.

    output/checkpoints/step-N/        state.json, and one safetensors file per parameter: weights and AdamW's moments
    output/checkpoints/latest         name of the newest one
    output/checkpoints/best-N.safetensors   weights of the best validations so far
    output/predictor.safetensors, config.json, recipe.yaml, training.json   the trained predictor

Everything is written under another name and renamed when whole. A checkpoint holds whole float32 tensors and no
pickle: any number of ranks and any ZeRO stage can take it up, and at the number that wrote it, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from firp_cli.config import PredictorSection, Recipe
from firp_cli.distributed.launch import barrier
from firp_cli.errors import FirpError, RecipeError, UsageError
from firp_cli.files import file_sha256, lock_folder, write_atomically, write_json
from firp_cli.machine import is_main, rank, world_size
from firp_cli.predictors.folder import write_predictor
from firp_cli.recipe import dump_recipe
from firp_cli.training.optimizer_state import Whole, adam_steps, learning_rates, restore_states, whole_states
from firp_cli.training.random_state import random_state, restore_random_state, seed_rank

FOLDER = "checkpoints"
STATE_FILE = "state.json"
FREE_TO_CHANGE = {  # training fields that leave the losses as they are, to float error
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
TEACHER_FREE = {"sharding", "device_map"}  # where the teacher's weights lie decides no loss
EXPORTED = (
    "predictor.safetensors",
    "recipe.yaml",
    "training.json",
    "config.json",
)  # config.json last: it makes it whole


@dataclass
class RunState:
    """How far a run is. `seconds`, `waited` and `tokens` count training steps only, `waited` is per rank. `spent`:
    seconds by the clock of rank 0, in a run with `training.max_minutes`.

    `first`, `best` and `last` are rows of validations: the start values', the best so far, the latest. `kept` are the
    steps whose weights are kept, the best first; `stale` counts the validations since the last one that was better.
    """

    step: int = 0
    first: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    kept: list[tuple[float, int]] = field(default_factory=list)
    stale: int = 0
    seconds: float = 0.0
    spent: float = 0.0
    waited: float = 0.0
    tokens: int = 0


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold a run's folder while it is written; rank 0 does. Raises UsageError where another process holds it."""
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


def save_checkpoint(
    engine: Any, output: Path, state: RunState, recipe: Recipe, conversations: int, per_step: int
) -> None:
    """Write a resumable checkpoint; every rank calls it. Raises FirpError when it cannot be written.

    Args:
        per_step: micro-batches of an optimizer step, over all ranks.
    """
    folder = output / FOLDER
    tag, partial = f"step-{state.step}", folder / f"saving-step-{state.step}"
    states: list[Any] = [random_state()]
    if world_size() > 1:
        states = [None] * world_size()
        torch.distributed.all_gather_object(states, random_state())
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
                "state": asdict(state),
                "recipe": recipe.model_dump(),
                "conversations": conversations,
                "world_size": world_size(),
                "micro_batches_per_step": per_step,
                "adam_steps": adam_steps(engine),
                "schedule": {key: engine.lr_scheduler.state_dict()[key] for key in ("last_epoch", "_last_lr")},
                "parameters": sums,
                "random_states": states,
            }
            write_json(partial / STATE_FILE, saved)
            _publish(folder, partial.name, tag)
            _prune(output, recipe.training.keep_last)
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise FirpError(
            f"the checkpoint of step {state.step} cannot be written ({error}); the one before it is whole: "
            "make room, then --resume goes on from there"
        ) from error
    barrier()


def _publish(folder: Path, partial: str, tag: str) -> None:
    """Sync every file, then rename: until then the folder is no checkpoint."""
    for path in (folder / partial).iterdir():
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
    if (folder / tag).exists():  # damaged, or it would have been taken up
        _discard(folder / tag)
    (folder / partial).rename(folder / tag)
    write_atomically(folder / "latest", lambda temporary: temporary.write_text(tag, encoding="utf-8"))


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint: first what makes it one, so that a kill leaves none that lacks files."""
    (checkpoint / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _prune(output: Path, keep_last: int) -> None:
    """Keep the last checkpoints and the best weights that they refer to."""
    whole = _checkpoints(output)
    for path in whole[:-keep_last]:
        _discard(path)
    wanted = {step for path in whole[-keep_last:] for _, step in _read_state(path)["state"]["kept"]}
    for path in (output / FOLDER).glob("best-*.safetensors"):
        if int(path.stem.removeprefix("best-")) not in wanted:
            path.unlink()


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises FirpError when it is damaged."""
    try:
        saved = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if "parameters" not in saved:
            raise KeyError("written by another version of firp")
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(checkpoint, str(error)) from error
    return saved


def check_resumable(checkpoint: Path, recipe: Recipe, conversations: int) -> int:
    """Refuse to go on with another recipe or store, or with ranks that cannot share out the run's optimizer steps.

    Returns the micro-batches of an optimizer step, over all ranks: however many ranks there are now, they take the same
    ones. Raises RecipeError, UsageError, FirpError.
    """
    saved = _read_state(checkpoint)
    now, then = recipe.model_dump(), saved["recipe"]
    for section in ("teacher", "predictor", "training"):
        free = TEACHER_FREE if section == "teacher" else FREE_TO_CHANGE
        for key in sorted(set(now[section]) | set(then[section])):
            before, after = then[section].get(key), now[section].get(key)
            if before != after and key not in free:
                raise RecipeError(
                    f"{checkpoint.parent.parent} was trained with {section}.{key}={before}, now it is {after}; "
                    f"--resume goes on exactly: give the same recipe, or another --output"
                )
    if saved["conversations"] != conversations:
        raise UsageError(
            f"the store had {saved['conversations']} conversations when this run began, now it has {conversations}; "
            "--resume needs the same store"
        )
    per_step = int(saved["micro_batches_per_step"])
    if per_step % world_size():
        allowed = ", ".join(str(count) for count in range(1, per_step + 1) if per_step % count == 0)
        raise UsageError(
            f"an optimizer step of this run has {per_step} micro-batches, which {world_size()} ranks cannot share out "
            f"evenly; resume with --gpus {allowed}"
        )
    return per_step


def load_weights(checkpoint: Path, predictor: torch.nn.Module) -> None:
    """Put a checkpoint's weights into a predictor that no engine has taken yet. Raises FirpError when damaged."""
    read = _reader(checkpoint)
    with torch.no_grad():
        for name, parameter in predictor.named_parameters():
            parameter.copy_(read(name)["weight"])


def load_checkpoint(engine: Any, checkpoint: Path, recipe: Recipe) -> RunState:
    """Restore weights, optimizer, schedule and random states; every rank calls it. Raises FirpError when damaged."""
    saved = _read_state(checkpoint)
    restore_states(engine, _reader(checkpoint), saved["adam_steps"])
    engine.lr_scheduler.load_state_dict(engine.lr_scheduler.state_dict() | saved["schedule"])
    for group, rate in zip(learning_rates(engine), saved["schedule"]["_last_lr"], strict=True):
        group["lr"] = rate
    state = RunState(**saved["state"])
    state.kept = [(length, step) for length, step in state.kept]
    engine.global_steps = state.step
    engine.micro_steps = state.step * engine.gradient_accumulation_steps()
    engine.global_samples = state.step * engine.train_batch_size()
    if saved["world_size"] == world_size():
        restore_random_state(saved["random_states"][rank()])
    else:
        seed_rank(recipe.training.seed, state.step, rank())
    return state


def _reader(checkpoint: Path) -> Callable[[str], Whole]:
    """Reads a parameter's states once its file's checksum is right."""
    sums = _read_state(checkpoint)["parameters"]

    def read(name: str) -> Whole:
        path = checkpoint / f"{name}.safetensors"
        try:
            if file_sha256(path) != sums[name]:
                raise _unreadable(checkpoint, f"the checksum of {path.name} differs")
            return load_file(path)
        except (OSError, SafetensorError, KeyError) as error:
            raise _unreadable(checkpoint, f"{path.name}: {error}") from error

    return read


def _unreadable(checkpoint: Path, reason: str) -> FirpError:
    return FirpError(f"checkpoint {checkpoint} cannot be read ({reason}); remove it to resume from the one before")


def save_best(output: Path, step: int, weights: dict[str, Tensor]) -> None:
    """Keep the weights of the best validation so far; older ones go when no checkpoint refers to them any more."""
    path = output / FOLDER / f"best-{step}.safetensors"
    with _writing(f"the best weights of step {step}"):
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
    """Write the predictor folder: it has no config.json, and so is none, until all of it is in place.

    Raises FirpError when it cannot be written; the checkpoints stay.
    """
    temporary = output / f".export-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _writing("the predictor"):
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


@contextlib.contextmanager
def _writing(what: str) -> Iterator[None]:
    """What fails to be written beside checkpoints is made again from the last of them."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FirpError(f"{what} cannot be written ({error}); make room, then --resume goes on") from error
