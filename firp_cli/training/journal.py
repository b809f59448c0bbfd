"""Where a run's figures go: metrics.jsonl, TensorBoard, and whoever listens (the terminal)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firp_cli.provenance import write_atomically
from firp_cli.records import plain

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


def _ignore(*_: Any) -> None:
    pass


def _never(_: int) -> bool:
    return False


@dataclass
class Listener:
    """What a run tells while it lasts. All are called on every rank.

    Attributes:
        ridge: (done, total) conversations of the ridge start.
        step: (done, total, row) after each optimizer step.
        validation: (row) after each validation.
        note: (text) once in a while.
        stop: asked with the number of steps done; True saves a checkpoint and ends the run as Ctrl-C does.
    """

    ridge: Callable[[int, int | None], None] = _ignore
    step: Callable[[int, int, dict[str, Any]], None] = _ignore
    validation: Callable[[dict[str, Any]], None] = _ignore
    note: Callable[[str], None] = _ignore
    stop: Callable[[int], bool] = _never


class Journal:
    """Writes one JSON line per optimizer step and per validation (`split` says which), and TensorBoard scalars.

    A resumed run drops the lines behind its checkpoint first, so the file reads as if the run had never stopped.
    """

    def __init__(self, output: Path, log_every: int, resumed_at: int | None = None, validated_at: int = -1) -> None:
        from torch.utils.tensorboard import SummaryWriter

        output.mkdir(parents=True, exist_ok=True)
        path = output / METRICS_FILE
        kept = "" if resumed_at is None or not path.is_file() else _lines_until(path, resumed_at, validated_at)
        write_atomically(path, lambda temporary: temporary.write_text(kept, encoding="utf-8"))
        self._stream = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(output / TENSORBOARD_FOLDER), purge_step=None if resumed_at is None else resumed_at + 1
        )
        self._log_every = log_every

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; training rows reach TensorBoard every `training.log_every` steps."""
        self._stream.write(json.dumps(plain(row), allow_nan=False) + "\n")
        self._stream.flush()
        if row["split"] != "train" or row["step"] % self._log_every == 0:
            for name, value in row.items():
                self._scalar(f"{row['split']}/{name}", value, row["step"])
            self._board.flush()

    def _scalar(self, name: str, value: Any, step: int) -> None:
        if isinstance(value, list):
            for number, item in enumerate(value, start=1):
                self._board.add_scalar(f"{name}/step_{number}", item, step)
        elif isinstance(value, (int, float)) and not name.endswith("/step"):
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._stream.close()
        self._board.close()


def _lines_until(path: Path, step: int, validated: int) -> str:
    """The whole lines of rows up to an optimizer step and up to a validation; a last line cut by a kill is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= (step if row["split"] == "train" else validated):
            kept.append(line + "\n")
    return "".join(kept)
