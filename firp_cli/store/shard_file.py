"""Shard files: written together with their checksum, and read once from start to end without a memory map.

The format is that of safetensors: eight bytes with the length of a JSON header, the header, the tensors' bytes. Tensors
are in descending order of their type, then by name: the bytes are those that `safetensors.torch.save_file` writes.
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
from firp_cli.machine import readable_bytes

# In the order of the format: tensors of a later type are earlier in a file.
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
BLOCK_BYTES = 1 << 22  # bytes read or copied at once
MAX_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class TensorEntry:
    """Header entry of one tensor of a shard: its bytes are `start`..`end`-1 of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def save_hashed(tensors: dict[str, Tensor], path: Path) -> str:
    """Write contiguous CPU tensors as one synced safetensors file; returns the sha256 of its bytes.

    A second thread hashes while this one writes and syncs: the checksum is that of the intended bytes, needs no second
    pass over the file, and takes hardly any time.
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
    """Return the header and the bytes of each tensor, in the order of the file."""
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
    """Write all of `part`: a single call writes at most 2 GB, and less than requested on a full disk."""
    while len(part):
        part = part[stream.write(part) :]


def copy_hashed(source: Path, target: Path, sha256: str) -> None:
    """Copy a file. Raises ValueError, and leaves no copy, when its sha256 differs."""

    def copy(temporary: Path) -> None:
        digest = hashlib.sha256()
        with source.open("rb") as reading, temporary.open("wb") as writing:
            while block := reading.read(BLOCK_BYTES):
                digest.update(block)
                writing.write(block)
        if digest.hexdigest() != sha256:
            raise ValueError(f"the checksum of {source} differs")

    write_atomically(target, copy)


def read_header(stream: BinaryIO) -> tuple[dict[str, TensorEntry], bytes]:
    """Return a file's tensors in the order of their bytes, and the bytes read. Raises ValueError naming the fault."""
    size = os.fstat(stream.fileno()).st_size
    prefix = stream.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER, size):
        raise ValueError("it is not a safetensors file")
    text = stream.read(length)
    place = first = 8 + length
    try:
        listed = {name: value for name, value in json.loads(text).items() if name != "__metadata__"}
        entries = {
            name: TensorEntry(
                DTYPES[value["dtype"]], tuple(value["shape"]), *(first + at for at in value["data_offsets"])
            )
            for name, value in sorted(listed.items(), key=lambda item: item[1]["data_offsets"])
        }
        sizes = {name: torch.Size(entry.shape).numel() * entry.dtype.itemsize for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("its header cannot be read") from None
    for name, entry in entries.items():
        if (entry.start, entry.end) != (place, place + sizes[name]):
            raise ValueError(f"the bytes of {name} do not match its shape")
        place = entry.end
    if place != size:
        raise ValueError(f"its tensors end at byte {place} of {size}")
    return entries, prefix + text


def read_rows(stream: BinaryIO, entry: TensorEntry) -> Iterator[Tensor]:
    """Yield the next tensor of `stream` in blocks of whole rows (n, ...) of some megabytes.

    A block's memory is reused for the next one. Raises ValueError where the file ends too early.
    """
    rows = entry.shape[0] if entry.shape else 1
    row_bytes = max(1, (entry.end - entry.start) // max(1, rows))
    block_rows = max(1, BLOCK_BYTES // row_bytes)
    buffer = bytearray(min(rows, block_rows) * row_bytes)
    view = memoryview(buffer)
    for first in range(0, rows, block_rows):
        count = min(block_rows, rows - first)
        part = view[: count * row_bytes]
        filled = 0
        while filled < len(part):
            got = stream.readinto(part[filled:])  # type: ignore[attr-defined]
            if not got:
                raise ValueError("it ends too early")
            filled += got
        yield torch.frombuffer(part, dtype=entry.dtype).view(count, *entry.shape[1:])


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that `folder` is, or will be, on."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    """Return the folder or its nearest parent that exists."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place


def check_disk_space(needed: dict[Path, int]) -> None:
    """Raise CapacityError when folders that get so many bytes do not fit their disks."""
    disks: dict[int, int] = {}
    for folder, count in needed.items():
        device = _existing(folder).stat().st_dev
        disks[device] = disks.get(device, 0) + count
        if disks[device] > (free := free_bytes(folder)):
            raise CapacityError(
                f"{readable_bytes(disks[device])} are needed and {folder} has {readable_bytes(free)} free\n"
                "make room, give another output, or convert to fewer layers or to int8"
            )
