"""Metrics of a run: metrics.jsonl, TensorBoard, Weights & Biases on request, and a listener."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firp_cli.config import Recipe
from firp_cli.errors import FirpError, UsageError
from firp_cli.files import write_atomically, write_json
from firp_cli.results import as_json

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_FILE = "wandb.json"  # the run's id at Weights & Biases, for a resumed run


def _ignore(*_: Any) -> None:
    pass


def _never(_: int) -> bool:
    return False


@dataclass
class Listener:
    """Callbacks of a run. All are called on every rank.

    Attributes:
        ridge: (done, total) conversations of the ridge start.
        step: (done, total, row) after each optimizer step; `total` is expected where training.max_minutes ends the run.
        validation: (row) after each validation.
        note: (text) on events such as a resume.
        stop: called with the number of steps done; True saves a checkpoint and ends the run as Ctrl-C does.
    """

    ridge: Callable[[int, int | None], None] = _ignore
    step: Callable[[int, int, dict[str, Any]], None] = _ignore
    validation: Callable[[dict[str, Any]], None] = _ignore
    note: Callable[[str], None] = _ignore
    stop: Callable[[int], bool] = _never


def check_trackers(recipe: Recipe) -> None:
    """Raise UsageError if the recipe names a tracker that is not installed."""
    if recipe.training.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise UsageError(
            "training.wandb needs Weights & Biases, which is not installed: pip install 'firp[wandb]', or remove the "
            "setting (TensorBoard and metrics.jsonl are always written)"
        )


class MetricsLog:
    """Writer of a JSON line per optimizer step and per validation (`split`), and of the trackers' scalars.

    A resumed run first drops the lines after its checkpoint: the file is that of an uninterrupted run.
    """

    def __init__(self, output: Path, recipe: Recipe, resumed_at: int | None = None, validated_at: int = -1) -> None:
        self._path = output / METRICS_FILE
        self._log_every = recipe.training.log_every
        with self._writing():
            output.mkdir(parents=True, exist_ok=True)
            resuming = resumed_at is not None and self._path.is_file()
            kept = _lines_until(self._path, resumed_at or 0, validated_at) if resuming else ""
            write_atomically(self._path, lambda temporary: temporary.write_text(kept, encoding="utf-8"))
            self._stream = self._path.open("a", encoding="utf-8")
            self._trackers: list[Any] = [_TensorBoard(output, resumed_at)]
            if recipe.training.wandb is not None:
                self._trackers.append(_Wandb(output, recipe))

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; training rows reach the trackers every `training.log_every` steps. Raises FirpError."""
        with self._writing():
            self._stream.write(json.dumps(as_json(row), allow_nan=False) + "\n")
            self._stream.flush()
            if row["split"] != "train" or row["step"] % self._log_every == 0:
                scalars = dict(_scalars(row))
                for tracker in self._trackers:
                    tracker.write(scalars, row["step"])

    def close(self) -> None:
        """Finish all files. Raises FirpError."""
        with self._writing():
            self._stream.close()
            for tracker in self._trackers:
                tracker.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FirpError(
                f"{self._path} cannot be written ({error}): make room, then --resume continues from the last "
                "checkpoint, if there is one"
            ) from error


class _TensorBoard:
    """Event files under output/tensorboard; a resumed run hides the events after its checkpoint."""

    def __init__(self, output: Path, resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if resumed_at is None else resumed_at + 1
        self._board = SummaryWriter(str(output / TENSORBOARD_FOLDER), purge_step=purge)

    def write(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class _Wandb:
    """Run in the project `training.wandb`, the same one after a resume. Mode and key are configured in wandb.

    Raises UsageError where wandb refuses to start.
    """

    def __init__(self, output: Path, recipe: Recipe) -> None:
        wandb = importlib.import_module("wandb")
        path = output / WANDB_FILE
        identifier = json.loads(path.read_text(encoding="utf-8"))["id"] if path.is_file() else None
        try:
            self._run = wandb.init(
                project=recipe.training.wandb,
                name=output.name,
                dir=str(output),
                id=identifier,
                resume="allow" if identifier else None,
                config=recipe.model_dump(),
            )
        except wandb.errors.Error as error:
            raise UsageError(
                f"Weights & Biases does not start: {error}\n"
                "log in with `wandb login`, keep the metrics here with WANDB_MODE=offline, or remove training.wandb"
            ) from error
        write_json(path, {"project": recipe.training.wandb, "id": self._run.id})

    def write(self, scalars: dict[str, float], step: int) -> None:
        # no `step=`: wandb refuses steps below the last one that a killed run has sent
        self._run.log({**scalars, "optimizer_step": step})

    def close(self) -> None:
        self._run.finish()


def _scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a row by tracker name: `train/loss`, `validation/top1/step_2`."""
    for name, value in row.items():
        if isinstance(value, list):
            yield from ((f"{row['split']}/{name}/step_{number}", item) for number, item in enumerate(value, start=1))
        elif isinstance(value, (int, float)) and name != "step":
            yield f"{row['split']}/{name}", value


def _lines_until(path: Path, step: int, validated: int) -> str:
    """Return the lines of rows up to an optimizer step and up to a validation, without a last line cut by a kill."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= (step if row["split"] == "train" else validated):
            kept.append(line + "\n")
    return "".join(kept)
