"""Hidden-state store: a folder of safetensors shards with a manifest, read memory-mapped.

`manifest.json` records the teacher, tokenizer, template, layers, dtype and settings, and names every shard with its
size and sha256. A shard contains whole conversations, concatenated: `input_ids` (T,), `loss_mask` (T,),
`sequence_offsets` (n+1,), `hidden.<layer>` (T, d) for each cached layer, `hidden.final` (T, d: the normed final state),
and for int8 and float8 `<name>.scale` (T, 1) in bfloat16 (float32 in older stores). `writer.py` writes it.
"""

from __future__ import annotations

import json
import shlex
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from firp_cli.errors import FingerprintError, StoreError
from firp_cli.files import file_sha256
from firp_cli.provenance import differences

SCHEMA = "firp.store/1"
MANIFEST = "manifest.json"
FINAL = "hidden.final"
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCALED = {"int8": (torch.int8, 127.0), "float8": (torch.float8_e4m3fn, 448.0)}  # type, largest value
TOKEN_BYTES = 4 + 1  # an int32 id and a bool of the mask
BLOCK = 1 << 19  # numbers that are scaled at once, in the CPU's cache: passes over main memory take five times as long
SCALE = torch.bfloat16  # dtype of a row's scale: four bytes would be a large part of a short row


@dataclass
class StoredSequence:
    """One conversation: input_ids (T,) long, loss_mask (T,) bool, final (T, d), hidden layer -> (T, d).

    The mask, and states that are stored unscaled, are views of the shard's memory map: do not write to them.
    """

    input_ids: Tensor
    loss_mask: Tensor
    final: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)


def state_names(layers: Sequence[int]) -> dict[str, int | None]:
    """Return the tensor names of the cached states, with their layer; None for the normed final state."""
    return {**{f"hidden.{layer}": layer for layer in layers}, FINAL: None}


def bytes_per_token(hidden_size: int, layers: int, dtype: str) -> int:
    """Return the bytes of a token in a store of `layers` layers and the final state."""
    each = hidden_size + SCALE.itemsize if dtype in SCALED else hidden_size * FLOATS[dtype].itemsize
    return TOKEN_BYTES + (layers + 1) * each


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return an uninitialised tensor. On a CPU numpy allocates huge pages: small ones cost more than scaling."""
    if torch.device(device).type != "cpu":
        return torch.empty(*shape, dtype=dtype, device=device)
    memory: Tensor = torch.from_numpy(np.empty(prod(shape) * dtype.itemsize, np.uint8))
    return memory.view(dtype).view(*shape)


def encode_states(states: Tensor, dtype: str) -> dict[str, Tensor]:
    """Return states (T, d) as they are stored, by name suffix; int8 and float8 rows are scaled to the dtype's range.

    NaN and infinities remain visible: in the states or, where those are scaled, in the row's scale.
    """
    if dtype in FLOATS:
        return {"": states.to(FLOATS[dtype])}
    kind, largest = SCALED[dtype]
    stored = allocate(states.shape, kind, states.device)
    scales = torch.empty((*states.shape[:-1], 1), dtype=SCALE, device=states.device)
    rows = _rows_per_block(states)
    scratch = torch.empty(states[:rows].shape, device=states.device)
    for source, target, scale in zip(states.split(rows), stored.split(rows), scales.split(rows), strict=True):
        block = scratch[: len(source)].copy_(source)
        scale.copy_(_round_up(block.abs().amax(dim=-1, keepdim=True) / largest))
        block.div_(scale.float())
        target.copy_(block.round_() if kind == torch.int8 else block)
    return {"": stored, ".scale": scales}


def _rows_per_block(states: Tensor) -> int:
    """Return the number of rows (T, d) to process at once: on a CPU as many as fit its cache, elsewhere all."""
    return max(1, BLOCK // states.shape[-1] if states.device.type == "cpu" else len(states))


def _round_up(scale: Tensor) -> Tensor:
    """Return the next bfloat16 at or above each float32 >= 0, at least its smallest normal number.

    Rounding to nearest would put half of the scales below their value and clip the largest entry of such rows.
    """
    scale = scale.clamp_min(torch.finfo(SCALE).tiny)
    above = (scale.view(torch.int32) + 0xFFFF).bitwise_and_(-0x10000).view(torch.float32)
    return torch.where(scale.isfinite(), above, scale).to(SCALE)


def decode_states(stored: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return stored rows (T, d) as floats, in `out` if given: float32 if they were scaled, else unchanged."""
    if scale is None:
        return stored if out is None else out.copy_(stored)
    rows = _rows_per_block(stored)
    values = allocate(stored.shape, torch.float32, stored.device) if out is None else out
    float8 = stored.dtype == torch.float8_e4m3fn
    scratch = torch.empty(stored[:rows].shape if float8 else 0, dtype=torch.int16, device=stored.device)
    for source, target, factor in zip(stored.split(rows), values.split(rows), scale.float().split(rows), strict=True):
        if float8:
            # Its bits, moved to their places in a float16, are its value / 256: faster than torch's conversion.
            bits = scratch[: len(source)].copy_(source.view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(~0x4000)
            target.copy_(bits.view(torch.float16)).mul_(factor * 256)
        else:
            target.copy_(source).mul_(factor)
    return values


class Store(Sequence[StoredSequence]):
    """Complete store, open for reading. `store[i]` reads the rows of conversation i in the chosen layers.

    Only those rows' pages are read from disk. Threads may share a store; another process opens the shards again.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], layers: Sequence[int]) -> None:
        self.folder, self.manifest, self.layers = folder, manifest, tuple(layers)
        self._names = state_names(self.layers)
        self._scaled = manifest["dtype"] in SCALED
        names = (name for state in self._names for name in ((state, f"{state}.scale") if self._scaled else (state,)))
        self._read = ("input_ids", "loss_mask", *names)
        self._starts = [0, *accumulate(shard["sequences"] for shard in manifest["shards"])]
        self._files: dict[int, tuple[dict[str, Tensor], list[int]]] = {}

    @classmethod
    def open(cls, folder: Path | str, layers: Sequence[int] | None = None, verify: bool = False) -> Store:
        """Open a complete store, to read `layers` (None: all). Sizes are checked, checksums with `verify`.

        Raises StoreError: no store, unfinished, a layer that it lacks, a damaged or missing shard.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            planned = manifest["shards_planned"] or "?"
            raise StoreError(
                f"the store {folder} is unfinished ({len(manifest['shards'])} of {planned} shards); "
                f"run the same `{source_command(manifest)}` with --resume"
            )
        absent = [layer for layer in layers or () if layer not in manifest["layers"]]
        if absent:
            raise StoreError(
                f"the store {folder} holds layers {manifest['layers']}, not {absent}; "
                f"collect another with --layers {','.join(map(str, sorted({*manifest['layers'], *absent})))}"
            )
        store = cls(folder, manifest, manifest["layers"] if layers is None else sorted(set(layers)))
        store._check_shards(checksums=verify)
        return store

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> StoredSequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[StoredSequence]: ...
    def __getitem__(self, index: int | slice) -> StoredSequence | list[StoredSequence]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"conversation {index} of {len(self)}")
        rows = self.stored(index % len(self))
        states = {
            layer: decode_states(rows[name], rows[f"{name}.scale"] if self._scaled else None)
            for name, layer in self._names.items()
        }
        final = states.pop(None)
        hidden = {layer: rows for layer, rows in states.items() if layer is not None}
        return StoredSequence(rows["input_ids"].long(), rows["loss_mask"], final, hidden)

    def stored(self, index: int) -> dict[str, Tensor]:
        """Return the rows of conversation `index` (from 0) as stored, by tensor name; nothing is copied."""
        number = self.shard_of(index)
        tensors, offsets = self._shard(number)
        place = index - self._starts[number]
        start, end = offsets[place], offsets[place + 1]
        return {name: tensor[start:end] for name, tensor in tensors.items()}

    def shard_of(self, index: int) -> int:
        """Return the number of the shard of conversation `index`."""
        return bisect_right(self._starts, index) - 1

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of every conversation."""
        lengths: list[int] = []
        for number in range(len(self.manifest["shards"])):
            offsets = self._shard(number)[1]
            lengths += [end - start for start, end in pairwise(offsets)]
        return lengths

    def verify(self) -> None:
        """Compare every shard's sha256 with the manifest's. Raises StoreError naming the damaged or missing ones."""
        self._check_shards(checksums=True)

    def check_shard(self, number: int) -> None:
        """Compare one shard's sha256 with the manifest's. Raises StoreError."""
        shard = self.manifest["shards"][number]
        if fault := shard_fault(self.folder, shard, checksum=True):
            raise self._damaged(f"{shard['file']} ({fault})")

    def check_teacher(self, teacher: str, tokenizer: str, template: str) -> None:
        """Compare fingerprints. Raises FingerprintError naming both values of each that differs."""
        made_with = self.manifest["fingerprints"]
        current = {"teacher": teacher, "tokenizer": tokenizer, "chat template": template}
        if not (different := differences(made_with, current, "store")):
            return
        remedy = "use that teacher, or collect a store for this one"
        if made_with | {"chat template": template} == current:
            source = self.manifest["teacher"].get("chat_template", {}).get("source", "the tokenizer's")
            remedy = (
                f"give teacher.chat_template and template_options as for the store (its template: {source}), or "
                "collect another store"
            )
        raise FingerprintError(
            f"the store {self.folder} was made by {self.manifest['teacher']['name']} with another "
            f"{' and another '.join(different)}\n{remedy}"
        )

    def describe(self) -> dict[str, Any]:
        """Return identity and size of the store, for training.json."""
        kept = ("fingerprints", "layers", "dtype", "settings", "counts")
        return {"folder": str(self.folder), **{key: self.manifest[key] for key in kept}}

    def _check_shards(self, checksums: bool) -> None:
        faults = {
            shard["file"]: fault
            for shard in self.manifest["shards"]
            if (fault := shard_fault(self.folder, shard, checksums))
        }
        if faults:
            listed = ", ".join(f"{file} ({fault})" for file, fault in list(faults.items())[:4])
            more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
            raise self._damaged(listed + more, "that" if len(faults) == 1 else "those")

    def _damaged(self, what: str, rebuilt: str = "that") -> StoreError:
        return StoreError(
            f"the store {self.folder} is damaged: {what}\n"
            f"run the same `{source_command(self.manifest)}` with --resume: it rebuilds just {rebuilt}"
        )

    def _shard(self, number: int) -> tuple[dict[str, Tensor], list[int]]:
        """Return a shard's tensors, memory-mapped, and its sequence offsets. Opened on first use.

        Threads that are first at the same time both open it; either result is valid.
        """
        opened = self._files.get(number)
        if opened is None:
            file = self.manifest["shards"][number]["file"]
            try:
                with safe_open(self.folder / file, framework="pt") as handle:
                    tensors = {name: handle.get_tensor(name) for name in self._read}
                    opened = tensors, handle.get_tensor("sequence_offsets").tolist()
            except (OSError, SafetensorError) as error:
                raise self._damaged(f"{file} ({error})") from error
            self._files[number] = opened
        return opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # memory maps cannot be pickled


def source_command(manifest: dict[str, Any]) -> str:
    """Return the command that made a store; with --resume it repairs the store."""
    return f"firp {manifest['settings'].get('made_by', 'collect')}"


def refuse_file(folder: Path) -> None:
    """Raise StoreError where a store's folder, or a folder that it is in, is a file."""
    file = next((item for item in (folder, *folder.parents) if item.is_file()), None)
    if file is not None:
        raise StoreError(f"{file} is a file: a store is a folder that `firp collect` fills; give another --store")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a store's manifest. Raises StoreError when there is none, or when this version cannot read it."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        place = shlex.quote(str(folder))
        raise StoreError(f"no store in {folder}; make one: firp collect --output {place} (or of your recipe)") from None
    except NotADirectoryError:
        refuse_file(folder)
        raise
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        raise StoreError(f"{path} has schema {schema!r}, this firp reads {SCHEMA!r}; collect the store again")
    return manifest


def shard_fault(folder: Path, shard: dict[str, Any], checksum: bool) -> str | None:
    """Return a shard file's fault: missing, another size or (with `checksum`) another sha256; None if there is none."""
    path = folder / shard["file"]
    if not path.is_file():
        return "missing"
    if path.stat().st_size != shard["bytes"]:
        return f"{path.stat().st_size} bytes instead of {shard['bytes']}"
    if checksum and file_sha256(path) != shard["sha256"]:
        return "its checksum differs"
    return None
