"""A teacher's weights: their safetensors files, their fingerprint, and the part that a process keeps."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from firp_cli.chat_template import note_once
from firp_cli.errors import TeacherError

SAMPLES = 257  # values of each parameter that a fingerprint samples
DTYPES = ("F64", "F32", "F16", "BF16")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def weights_fingerprint(
    parameters: Iterable[tuple[str, Tensor]], sample: Callable[[str, Tensor], Tensor], extra: str = ""
) -> str:
    """Return 16 hex digits over parameter names, shapes and sampled values, in the order of the names.

    Values are rounded to bfloat16: a teacher in float32 and in bfloat16 is the same teacher, and a predictor trained
    with one drafts for the other.

    Args:
        sample: returns a parameter's values at flat places (n,).
        extra: further text that differs between teachers.
    """
    digest = hashlib.sha256()
    for name, shape in sorted((name, tuple(parameter.shape)) for name, parameter in parameters):
        digest.update(f"{name}{shape}".encode())
        count = math.prod(shape)
        places = torch.linspace(0, count - 1, min(count, SAMPLES), dtype=torch.float64).long()
        digest.update(sample(name, places).bfloat16().float().cpu().numpy().tobytes())
    digest.update(extra.encode())
    return digest.hexdigest()[:16]


class WeightFiles:
    """Safetensors files of a checkpoint, read tensor by tensor.

    Args:
        source: folder or hub id. prefix: prefix of a whole model's names before those of its decoder.

    Raises TeacherError where there are no such files, or one is damaged. Pickles are not read.
    """

    def __init__(self, source: str, revision: str | None = None, prefix: str = "") -> None:
        self._source, self._prefix = source, prefix
        self._opened: dict[Path, Any] = {}
        index = _find(source, INDEX, revision)
        if index is not None:
            try:
                names: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                files = sorted(set(names.values()))
            except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
                raise _damaged(index, error) from error
            paths: dict[str, Path] = {}
            for file in files:
                path = _find(source, file, revision)
                if path is None:
                    raise TeacherError(f"{source}: {file} is missing, which {INDEX} lists; fetch it again")
                paths[file] = path
            self._files = {name: paths[file] for name, file in names.items()}
            return
        single = _find(source, SINGLE, revision)
        if single is None:
            raise TeacherError(
                f"{source} has no safetensors weights (pickled .bin files are not read in part)\n"
                "save it again with transformers: model.save_pretrained(FOLDER)"
            )
        self._files = dict.fromkeys(self._open(single).keys(), single)

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise TeacherError unless the files contain a parameter of this shape, in a dtype of teachers."""
        path, key = self._place(name)
        entry = self._open(path).get_slice(key)
        if entry.get_dtype() not in DTYPES:
            raise TeacherError(f"{path}: {key} has dtype {entry.get_dtype()}, which is not read in part")
        if entry.get_shape() != list(shape):
            raise TeacherError(f"{path}: {key} has shape {entry.get_shape()}, the library's has {list(shape)}")

    def read(self, name: str) -> Tensor:
        """Return a parameter's values, on the CPU, in the file's dtype."""
        path, key = self._place(name)
        try:
            with safe_open(path, framework="pt") as stream:
                return stream.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error

    def sample(self, name: str, places: Tensor) -> Tensor:
        """Return values at flat places (n,); the file is mapped, and only the pages with these values are read."""
        path, key = self._place(name)
        values: Tensor = self._open(path).get_tensor(key)
        return values.flatten()[places]

    def unused(self, names: Iterable[str]) -> list[str]:
        """Return the tensors of the files that are none of these parameters."""
        return sorted(set(self._files) - {key for name in names for key in self._keys(name)})

    def _keys(self, name: str) -> tuple[str, str, str]:
        """Return the names that a parameter may have in the files."""
        prefix = f"{self._prefix}."
        return name, name.removeprefix(prefix), prefix + name

    def _place(self, name: str) -> tuple[Path, str]:
        """Return the file of a parameter, and its name there. Raises TeacherError for a missing one."""
        for key in self._keys(name):
            if key in self._files:
                return self._files[key], key
        raise TeacherError(f"{self._source}: its files do not contain {name} as the library does")

    def _open(self, path: Path) -> Any:
        """Return a file, opened on first use."""
        if path not in self._opened:
            try:
                self._opened[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from error
        return self._opened[path]


def check_complete(
    name: str,
    model: nn.Module,
    missing_keys: Iterable[str],
    mismatched_keys: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    unexpected_keys: Iterable[str],
    **_: Any,
) -> None:
    """Check the library's account of a loaded model: a parameter that its files lack has random values.

    Raises TeacherError where a parameter is missing or has another shape; logs a line for weights that are not used.
    """
    missing = set(missing_keys)
    wrong = [f"{key} is missing" for key, _ in model.named_parameters(remove_duplicate=False) if key in missing]
    for key, found, wanted in sorted(mismatched_keys):
        wrong.append(f"{key} has shape {list(found)}, not {list(wanted)}")
    if wrong:
        raise TeacherError(
            f"the weight files of {name} do not fit its config.json: {_first(wrong)}\n"
            "fetch the model again, or correct its config.json"
        )
    note_unused(name, unexpected_keys)


def note_unused(name: str, keys: Iterable[str]) -> None:
    """Log a line for weights in a model's files that the model does not use."""
    if unused := sorted(keys):
        note_once(
            f"the weight files of {name} have weights that the model does not use: {_first(unused)}; if they belong to "
            "it, its config.json is wrong (num_hidden_layers)"
        )


def _first(items: Sequence[str]) -> str:
    """Return the first three items, and the number of the others."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")


def damaged_weights(folder: Path) -> str | None:
    """Return a line on the first safetensors file of a folder that cannot be opened; None where all can."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            return str(_damaged(path, error))
    return None


def _damaged(path: Path, error: Exception) -> TeacherError:
    return TeacherError(f"{path} cannot be read ({error}); fetch it again")


def _find(source: str, file: str, revision: str | None) -> Path | None:
    """Return a file of a checkpoint: from its folder, the hub's cache or the hub; None where it has none."""
    from transformers.utils import cached_file

    if Path(source).is_dir():
        return Path(source) / file if (Path(source) / file).is_file() else None
    path = cached_file(source, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)


@dataclass(frozen=True)
class LoadedWeights:
    """Part of a teacher's weights in this process.

    Attributes:
        kind: whole, upper (the layers from one on), zero3 (a part of every matrix) or device_map.
        layers: layers that this process runs, of the teacher's `of`.
        held: bytes of weights in this process. saved: further bytes that the whole teacher would take.
        note: the reason why no smaller part was loaded, or the devices; may be empty.
        ranks: processes that hold the teacher together.
    """

    kind: str
    layers: int
    of: int
    held: int
    saved: int = 0
    note: str = ""
    ranks: int = 1

    def describe(self) -> dict[str, Any]:
        """Return a record for manifests and training.json."""
        record: dict[str, Any] = {"kind": self.kind, "layers": self.layers, "of": self.of}
        record |= {"bytes": self.held, "saved_bytes": self.saved}
        return record | ({"ranks": self.ranks} if self.ranks > 1 else {}) | ({"note": self.note} if self.note else {})
