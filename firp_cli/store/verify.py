"""Description and verification of a store. Unfinished and damaged stores are described too."""

from __future__ import annotations

import hashlib
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from firp_cli.results import Progress, no_progress
from firp_cli.store.reader import (
    FLOATS,
    MANIFEST,
    SCALE,
    SCALED,
    read_manifest,
    shard_fault,
    source_command,
    state_names,
)
from firp_cli.store.shard_file import TensorEntry, read_header, read_rows

THREADS = 4  # shards read at once: hashing occupies a core each, a disk serves a few readers
NAMED = 4  # conversations with the same fault that are named; the others are counted
SHARES = {"shortest": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "longest": 1.0}


@dataclass(frozen=True)
class StoreFault:
    """Fault of a file of a store, and its remedy."""

    file: str
    fault: str
    remedy: str


def describe_store(folder: Path) -> dict[str, Any]:
    """Return contents, size, origin and conversation lengths of a store as JSON values. Reads only the shards' offsets.

    `missing` names shards that are absent, not yet written, or visibly damaged; lengths are those of the others.
    Raises StoreError when there is no store.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    shards = manifest["shards"]
    lengths: list[int] = []
    missing = _unwritten(manifest)
    for shard in shards:
        fault = shard_fault(folder, shard, checksum=False)
        try:
            lengths += [] if fault else _lengths(folder / shard["file"])
        except (OSError, SafetensorError) as error:
            fault = str(error)
        missing += [f"{shard['file']}: {fault}"] if fault else []
    tokens, size = sum(shard["tokens"] for shard in shards), sum(shard["bytes"] for shard in shards)
    return {
        "store": str(folder),
        "complete": manifest["complete"] and not missing,
        "missing": missing,
        **{key: manifest[key] for key in ("teacher", "fingerprints", "layers", "dtype", "hidden_size")},
        "conversations": sum(shard["sequences"] for shard in shards),
        "tokens": tokens,
        "response_tokens": manifest["counts"].get("response_tokens"),
        "counts": manifest["counts"],
        "bytes": size,
        "bytes_per_token": size / tokens if tokens else None,
        "shards": len(shards),
        "shards_planned": manifest["shards_planned"],
        "lengths": _distribution(lengths),
        "made_by": source_command(manifest),
        "settings": manifest["settings"],
        "recipe": manifest["recipe"],
    }


def _unwritten(manifest: dict[str, Any]) -> list[str]:
    if manifest["complete"]:
        return []
    planned, written = manifest["shards_planned"], len(manifest["shards"])
    return [f"{planned - written if planned else 'all'} of {planned or '?'} shards are not written yet"]


def _lengths(path: Path) -> list[int]:
    with safe_open(path, framework="pt") as handle:
        return [end - start for start, end in pairwise(handle.get_tensor("sequence_offsets").tolist())]


def _distribution(lengths: Sequence[int]) -> dict[str, Any]:
    """Return quantiles of the lengths in tokens, and a histogram: upper end (a power of two) -> conversations."""
    if not lengths:
        return {}
    ordered = sorted(lengths)
    quantiles: dict[str, Any] = {name: ordered[round(share * (len(ordered) - 1))] for name, share in SHARES.items()}
    histogram: dict[str, int] = {}
    for length in ordered:
        end = str(1 << (length - 1).bit_length()) if length else "0"
        histogram[end] = histogram.get(end, 0) + 1
    return quantiles | {"mean": sum(ordered) / len(ordered), "histogram": histogram}


def verify_store(folder: Path, progress: Progress = no_progress) -> list[StoreFault]:
    """Return every fault of a store, by file: sizes, checksums, layout, offsets, NaN and infinities, empty loss masks.

    Each shard is read once, in blocks, several shards at a time. `progress` counts bytes. Raises StoreError when there
    is no store.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    shards = manifest["shards"]
    total, done, guard = sum(shard["bytes"] for shard in shards), 0, threading.Lock()

    def on_bytes(count: int) -> None:
        nonlocal done
        with guard:
            done += count
            progress(done, total)

    pool = ThreadPoolExecutor(max(1, min(THREADS, os.cpu_count() or 1, len(shards))), thread_name_prefix="verify")
    try:
        faults = pool.map(lambda shard: _ShardCheck(folder, manifest, shard, on_bytes).faults(), shards)
        return [*_manifest_faults(manifest), *chain.from_iterable(faults)]
    finally:
        pool.shutdown(cancel_futures=True)


def _manifest_faults(manifest: dict[str, Any]) -> Iterator[StoreFault]:
    again = f"run the same `{source_command(manifest)}` with --resume"
    if not manifest["complete"]:
        yield StoreFault(MANIFEST, "the store is unfinished: " + "; ".join(_unwritten(manifest)), again)
        return
    place = 0
    for shard in manifest["shards"]:
        if shard["first"] != place or shard["next"] - shard["first"] != shard["sequences"]:
            yield StoreFault(MANIFEST, f"{shard['file']} does not begin where the shard before it ends", again)
        place = shard["next"]
    for name, key in (("conversations", "sequences"), ("tokens", "tokens")):
        counted, present = manifest["counts"].get(name), sum(shard[key] for shard in manifest["shards"])
        if counted not in (None, present):
            yield StoreFault(MANIFEST, f"it counts {counted} {name}, its shards contain {present}", again)


class _ShardCheck:
    """One pass over one shard. `damage`: faults since it was written; `content`: faults that it was written with."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], shard: dict[str, Any], on_bytes: Callable[[int], None]
    ) -> None:
        self.path, self.manifest, self.shard = folder / shard["file"], manifest, shard
        self.on_bytes = on_bytes
        self.damage: list[str] = []
        self.content: list[str] = []
        self.offsets: list[int] = []
        self.infinite: dict[str, list[int]] = {}  # rows with NaN or infinities, by tensor

    def faults(self) -> list[StoreFault]:
        """Return all faults of this shard."""
        size = shard_fault(self.path.parent, self.shard, checksum=False)
        if size:
            self.damage.append(size)
        else:
            try:
                with self.path.open("rb", buffering=0) as stream:
                    self._read(stream)
            except (OSError, ValueError) as error:
                self.damage.append(str(error))
        again = f"run the same `{source_command(self.manifest)}` with --resume"
        rebuild = f"{again}: it rebuilds just that shard"
        content = rebuild if self.damage else f"delete the file and {again}"
        found = [(text, rebuild) for text in self.damage] + [(text, content) for text in self.content]
        return [StoreFault(self.shard["file"], text, remedy) for text, remedy in found]

    def _read(self, stream: BinaryIO) -> None:
        digest = hashlib.sha256()
        try:
            entries, head = read_header(stream)
        except ValueError as error:
            self.damage.append(str(error))
            return
        digest.update(head)
        self._check_layout(entries)
        states = {name for state in state_names(self.manifest["layers"]) for name in (state, f"{state}.scale")}
        for name, entry in entries.items():
            kept, row = [], 0
            for block in read_rows(stream, entry):
                digest.update(memoryview(block.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
                self.on_bytes(block.nbytes)
                if name in states:
                    self._check_finite(name, block, row)
                elif name in ("sequence_offsets", "loss_mask"):
                    kept.append(block.clone())
                row += len(block)
            if name == "sequence_offsets":
                self._check_offsets(torch.cat(kept).tolist() if kept else [])
            elif name == "loss_mask" and kept:
                self._check_mask(torch.cat(kept))
        for name, rows in self.infinite.items():
            self.content.append(f"NaN or infinity in {name}, {self._places(rows)}")
        if digest.hexdigest() != self.shard["sha256"]:
            self.damage.insert(0, "its checksum differs")

    def _check_layout(self, entries: dict[str, TensorEntry]) -> None:
        """Compare names, types and shapes with the manifest."""
        tokens, size, dtype = self.shard["tokens"], self.manifest["hidden_size"], self.manifest["dtype"]
        expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
            "input_ids": ((torch.int32, torch.int64), (tokens,)),
            "loss_mask": ((torch.bool,), (tokens,)),
            "sequence_offsets": ((torch.int64,), (self.shard["sequences"] + 1,)),
        }
        for name in state_names(self.manifest["layers"]):
            expected[name] = ((SCALED[dtype][0] if dtype in SCALED else FLOATS[dtype],), (tokens, size))
            if dtype in SCALED:
                expected[f"{name}.scale"] = ((SCALE, torch.float32), (tokens, 1))
        for name in sorted(expected.keys() | entries.keys()):
            if name not in entries or name not in expected:
                self.content.append(f"{name} is {'missing' if name in expected else 'not expected'}")
                continue
            entry, (dtypes, shape) = entries[name], expected[name]
            if entry.dtype not in dtypes or entry.shape != shape:
                kind = str(dtypes[0]).removeprefix("torch.")
                found = str(entry.dtype).removeprefix("torch.")
                self.content.append(f"{name} is {found} {list(entry.shape)} instead of {kind} {list(shape)}")

    def _check_offsets(self, offsets: list[int]) -> None:
        rising = all(start < end for start, end in pairwise(offsets))
        if not rising or not offsets or offsets[0] != 0 or offsets[-1] != self.shard["tokens"]:
            self.content.append(f"sequence_offsets do not rise from 0 to {self.shard['tokens']}")
        else:
            self.offsets = offsets

    def _check_finite(self, name: str, block: Tensor, first: int) -> None:
        """Find rows with NaN or infinities; blocks whose smallest and largest entry are finite have none."""
        if block.dtype == torch.int8:
            return
        if block.dtype == torch.float8_e4m3fn:
            bad = (block.view(torch.uint8) & 0x7F) == 0x7F  # its only NaN; it has no infinity
        elif all(bool(torch.isfinite(bound)) for bound in torch.aminmax(block)):
            return
        else:
            bad = ~torch.isfinite(block)
        rows = bad.reshape(len(bad), -1).any(dim=-1).nonzero().flatten()
        if len(rows):
            self.infinite.setdefault(name, []).extend((rows + first).tolist())

    def _places(self, rows: Sequence[int]) -> str:
        """Return the location of the first of some ascending rows, and how many more conversations have such rows."""
        if not self.offsets:
            return f"row {rows[0]}"
        places = dict.fromkeys(bisect_right(self.offsets, row) - 1 for row in rows)
        first = next(iter(places))
        more = f" and in {len(places) - 1} more" if len(places) > 1 else ""
        return f"token {rows[0] - self.offsets[first]} of conversation {self.shard['first'] + first}{more}"

    def _check_mask(self, mask: Tensor) -> None:
        empty = [
            self.shard["first"] + index
            for index, (start, end) in enumerate(pairwise(self.offsets))
            if not mask[start:end].any()
        ]
        if empty:
            more = f" and {len(empty) - NAMED} more" if len(empty) > NAMED else ""
            named = ", ".join(map(str, empty[:NAMED])) + more
            self.content.append(f"the loss mask of conversation {named} is all zero: nothing to learn from")
