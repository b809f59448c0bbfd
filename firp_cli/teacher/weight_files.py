"""A teacher's weights: their safetensors files, their fingerprint, and the part that a process keeps."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from firp_cli.errors import TeacherError

SAMPLES = 257  # values of each parameter that a fingerprint samples
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def sample_places(count: int) -> Tensor:
    """Return the flat places (n,) that a fingerprint samples in a parameter of `count` values: long, ascending."""
    return torch.linspace(0, count - 1, min(count, SAMPLES), dtype=torch.float64).long()


def weights_fingerprint(
    shapes: Iterable[tuple[str, Sequence[int]]], sample: Callable[[str, Tensor], Tensor], extra: str = ""
) -> str:
    """Return 16 hex digits over parameter names, shapes and sampled values, in the order of the names.

    Values are rounded to bfloat16: a teacher in float32 and in bfloat16 is the same teacher, and a predictor trained
    with one drafts for the other.

    Args:
        sample: returns a parameter's values at flat places (n,).
        extra: further text that differs between teachers.
    """
    digest = hashlib.sha256()
    for name, shape in sorted((name, tuple(shape)) for name, shape in shapes):
        digest.update(f"{name}{shape}".encode())
        places = sample_places(int(np.prod(shape, dtype=np.int64)))
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
        self.source, self._prefix = source, prefix
        self._files: dict[str, Path] = {}
        self._mapped: dict[Path, tuple[dict[str, Any], Tensor]] = {}
        index = _find(source, INDEX, revision)
        if index is not None:
            names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            paths = {file: self._shard(file, revision, index) for file in sorted(set(names.values()))}
            self._files = {name: paths[file] for name, file in names.items()}
            return
        single = _find(source, SINGLE, revision)
        if single is None:
            raise TeacherError(
                f"{source} has no safetensors weights (pickled .bin files are not read in part)\n"
                "save it again with transformers: model.save_pretrained(FOLDER)"
            )
        self._files = {name: single for name in self._map(single)[0] if name != "__metadata__"}

    def _shard(self, file: str, revision: str | None, index: Path) -> Path:
        path = _find(self.source, file, revision)
        if path is None:
            raise TeacherError(f"{self.source}: {file} is missing, which {index.name} lists; fetch it again")
        return path

    def key(self, name: str) -> str | None:
        """Return a parameter's name in the files; None where they do not have it."""
        prefix = f"{self._prefix}."
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in self._files:
                return candidate
        return None

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._entry(key)["shape"])

    def dtype(self, key: str) -> torch.dtype:
        """Return a tensor's dtype. Raises TeacherError for a dtype that no teacher has."""
        name = self._entry(key)["dtype"]
        if name not in DTYPES:
            raise TeacherError(f"{self._files[key]}: {key} has dtype {name}, which is not read in part")
        return DTYPES[name]

    def read(self, key: str) -> Tensor:
        """Return a whole tensor, on the CPU, in the file's dtype."""
        path = self._files[key]
        try:
            with safe_open(path, framework="pt") as stream:
                return stream.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error

    def sample(self, key: str, places: Tensor) -> Tensor:
        """Return values at flat places (n,); the file is mapped, and only the pages with these values are read."""
        header, data = self._map(self._files[key])
        first, end = header[key]["data_offsets"]
        return data[first:end].view(self.dtype(key))[places]

    def _entry(self, key: str) -> dict[str, Any]:
        return self._map(self._files[key])[0][key]

    def _map(self, path: Path) -> tuple[dict[str, Any], Tensor]:
        """Return a file's header, and the bytes after it."""
        if path not in self._mapped:
            try:
                with path.open("rb") as stream:
                    (length,) = struct.unpack("<Q", stream.read(8))
                    header = json.loads(stream.read(length))
                total = path.stat().st_size
                data = torch.from_file(str(path), shared=False, size=total, dtype=torch.uint8)[8 + length :]
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
                if len(data) != max(ends, default=0):
                    raise ValueError(f"{len(data):,} bytes of {max(ends, default=0):,}")
            except (OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
                raise _damaged(path, error) from error
            self._mapped[path] = (header, data)
        return self._mapped[path]


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
        record = {
            "kind": self.kind,
            "layers": self.layers,
            "of": self.of,
            "bytes": self.held,
            "saved_bytes": self.saved,
        }
        return record | ({"ranks": self.ranks} if self.ranks > 1 else {}) | ({"note": self.note} if self.note else {})
