"""Shard files: written with their checksum in one go, and read once from end to end without safetensors' memory map.

The format is safetensors': eight bytes with the length of a JSON header, the header, the tensors' bytes. Tensors lie in
descending order of their type, then by name: a file has the very bytes that `safetensors.torch.save_file` would write.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from firp_cli.errors import CapacityError
from firp_cli.files import write_atomically

# In the order of the format: tensors of a later type come first in a file.
DTYPES = {
    "BOOL": torch.bool,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}
PIECE = 1 << 22  # bytes read or copied at once
MAX_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Entry:
    """One tensor of a shard: its bytes are `start`..`end`-1 of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def save_hashed(tensors: dict[str, Tensor], path: Path) -> str:
    """Write contiguous CPU tensors as one synced safetensors file; returns the sha256 of its bytes.

    A second thread hashes while this one writes and syncs: a checksum of what was meant to be written, which takes no
    second pass over the file and hardly any time.
    """
    parts = _serialised(tensors)
    digest = hashlib.sha256()

    def hash_parts() -> None:
        for part in parts:
            digest.update(part)

    hashing = threading.Thread(target=hash_parts, name="sha256")
    hashing.start()
    try:
        with path.open("wb", buffering=0) as stream:
            for part in parts:
                _write(stream, part)
            os.fsync(stream.fileno())
    finally:
        hashing.join()
    return digest.hexdigest()


def _serialised(tensors: dict[str, Tensor]) -> list[memoryview]:
    """The header and the bytes of each tensor, in the order of the file."""
    order = sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name))
    header, place = {}, 0
    for name in order:
        tensor = tensors[name]
        assert tensor.is_contiguous() and tensor.device.type == "cpu", name
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.nbytes],
        }
        place += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *(_bytes(tensors[name]) for name in order)]


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write(stream: FileIO, part: memoryview) -> None:
    """All of `part`: a single call writes 2 GB at most, and less than asked for when a disk runs full."""
    while len(part):
        part = part[stream.write(part) :]


def copy_hashed(source: Path, target: Path, sha256: str) -> None:
    """Copy a file, whole or not at all. Raises ValueError, and leaves no copy, when its sha256 is another."""

    def copy(temporary: Path) -> None:
        digest = hashlib.sha256()
        with source.open("rb") as reading, temporary.open("wb") as writing:
            while piece := reading.read(PIECE):
                digest.update(piece)
                writing.write(piece)
        if digest.hexdigest() != sha256:
            raise ValueError(f"the checksum of {source} differs")

    write_atomically(target, copy)


def read_header(stream: BinaryIO) -> tuple[dict[str, Entry], bytes]:
    """A file's tensors in the order of their bytes, and the bytes read. Raises ValueError that says what is wrong."""
    size = os.fstat(stream.fileno()).st_size
    prefix = stream.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER, size):
        raise ValueError("it is no safetensors file")
    text = stream.read(length)
    place = first = 8 + length
    try:
        listed = {name: value for name, value in json.loads(text).items() if name != "__metadata__"}
        entries = {
            name: Entry(DTYPES[value["dtype"]], tuple(value["shape"]), *(first + at for at in value["data_offsets"]))
            for name, value in sorted(listed.items(), key=lambda item: item[1]["data_offsets"])
        }
        sizes = {name: torch.Size(entry.shape).numel() * entry.dtype.itemsize for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("its header cannot be read") from None
    for name, entry in entries.items():
        if (entry.start, entry.end) != (place, place + sizes[name]):
            raise ValueError(f"the bytes of {name} lie elsewhere than its shape says")
        place = entry.end
    if place != size:
        raise ValueError(f"its tensors end at byte {place} of {size}")
    return entries, prefix + text


def read_rows(stream: BinaryIO, entry: Entry) -> Iterator[Tensor]:
    """The tensor that comes next in `stream`, in blocks of whole rows of some megabytes (n, ...).

    A block's memory is used again for the next one. Raises ValueError where the file ends too early.
    """
    rows = entry.shape[0] if entry.shape else 1
    row_bytes = max(1, (entry.end - entry.start) // max(1, rows))
    at_once = max(1, PIECE // row_bytes)
    buffer = bytearray(min(rows, at_once) * row_bytes)
    view = memoryview(buffer)
    for first in range(0, rows, at_once):
        count = min(at_once, rows - first)
        part = view[: count * row_bytes]
        filled = 0
        while filled < len(part):
            got = stream.readinto(part[filled:])  # type: ignore[attr-defined]
            if not got:
                raise ValueError("it ends too early")
            filled += got
        yield torch.frombuffer(part, dtype=entry.dtype).view(count, *entry.shape[1:])


def free_bytes(folder: Path) -> int:
    """Free space of the disk that `folder` is, or will be, on."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place


def check_room(needed: dict[Path, int]) -> None:
    """Raises CapacityError when folders that are to be filled with so many bytes do not fit their disks."""
    disks: dict[int, int] = {}
    for folder, count in needed.items():
        device = _existing(folder).stat().st_dev
        disks[device] = disks.get(device, 0) + count
        if disks[device] > (free := free_bytes(folder)):
            raise CapacityError(
                f"{disks[device] / 1e9:.1f} GB are needed and {folder} has {free / 1e9:.1f} GB free\n"
                "make room, give another output, or convert to fewer layers or to int8"
            )
