"""Writing a store: shards that are whole or absent, in an order that a killed run can take up again.

Which conversations a shard holds follows from their lengths alone, and nothing is computed across shards: a shard has
the same bytes whether it was written in one run, after a resume, or rebuilt alone.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from firp_cli.data.store import MANIFEST, SCALED, SCHEMA, read_manifest, shard_fault, state_names
from firp_cli.data.store_file import save_hashed
from firp_cli.errors import FingerprintError, NumericsError, StoreError
from firp_cli.provenance import environment, write_atomically, write_json

LOCK = ".lock"


@dataclass(frozen=True)
class ShardPlan:
    """Shard `number` holds conversations first .. next-1."""

    number: int
    first: int
    next: int

    @property
    def file(self) -> str:
        return f"shard-{self.number:05d}.safetensors"


def plan_shards(lengths: Sequence[int], shard_tokens: int) -> list[ShardPlan]:
    """Whole conversations in order, at most `shard_tokens` tokens to a shard unless one alone is longer."""
    plans: list[ShardPlan] = []
    first, tokens = 0, 0
    for index, length in enumerate(lengths):
        if index > first and tokens + length > shard_tokens:
            plans.append(ShardPlan(len(plans), first, index))
            first, tokens = index, 0
        tokens += length
    if first < len(lengths):
        plans.append(ShardPlan(len(plans), first, len(lengths)))
    return plans


def check_target(folder: Path, resume: bool) -> None:
    """Refuse a folder that cannot be written, before any work is done. Raises StoreError with the remedy."""
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        if not resume:
            state = "a complete store" if manifest["complete"] else "an unfinished store"
            raise StoreError(
                f"{folder} already holds {state} of {manifest['settings']['dataset']}; "
                "give --resume to finish or repair it, another --output, or delete it"
            )
        return
    strangers = [path.name for path in folder.glob("*") if path.name != LOCK] if folder.is_dir() else []
    if strangers or (folder.exists() and not folder.is_dir()):
        raise StoreError(f"{folder} is not empty and holds no store; give another --output")


class StoreWriter:
    """Fills one store; holds its lock from construction to `close`. `write` may be called from another thread."""

    def __init__(
        self,
        folder: Path,
        *,
        teacher: dict[str, Any],
        fingerprints: dict[str, str],
        layers: Sequence[int],
        dtype: str,
        settings: dict[str, Any],
        recipe: dict[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        """Begin a store, or with `resume` take up the one in `folder`.

        Args:
            teacher: its description. fingerprints: `teacher`, `tokenizer`, `chat template`.
            layers, dtype, settings: all that decides what the store's bytes are.
        Raises StoreError or FingerprintError when `folder` holds a store made otherwise, or another process writes it.
        """
        check_target(folder, resume)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(folder)
        self._guard = threading.Lock()
        self._plans: list[ShardPlan] = []
        self._names = state_names(layers)
        fresh = {
            "schema": SCHEMA,
            "complete": False,
            "teacher": teacher,
            "fingerprints": fingerprints,
            "layers": list(layers),
            "dtype": dtype,
            "hidden_size": teacher["hidden_size"],
            "settings": settings,
            "counts": {},
            "shards_planned": None,
            "shards": [],
            "recipe": recipe,
        }
        try:
            if (folder / MANIFEST).is_file():
                self.manifest = read_manifest(folder)
                _compare(folder, self.manifest, fresh)
            else:
                self.manifest = fresh
                write_json(folder / "provenance.json", environment())
                write_json(folder / MANIFEST, self.manifest)
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
        except BaseException:
            self.close()
            raise

    def plan(self, lengths: Sequence[int], counts: dict[str, Any]) -> list[ShardPlan]:
        """Fix the shards and return those to be written: all but the ones that are already there and undamaged."""
        self._plans = plan_shards(lengths, self.manifest["settings"]["shard_tokens"])
        expected = {plan.file: plan for plan in self._plans}
        whole = [
            shard
            for shard in self.manifest["shards"]
            if (plan := expected.get(shard["file"]))
            and (plan.first, plan.next) == (shard["first"], shard["next"])
            and shard_fault(self.folder, shard, checksum=True) is None
        ]
        there = {shard["file"] for shard in whole}
        pending = [plan for plan in self._plans if plan.file not in there]
        changed = {"shards": whole, "shards_planned": len(self._plans), "counts": counts, "complete": not pending}
        if any(self.manifest[key] != value for key, value in changed.items()):
            self.manifest |= changed
            write_json(self.folder / MANIFEST, self.manifest)
        return pending

    def write(self, plan: ShardPlan, tensors: dict[str, Tensor]) -> None:
        """Write one shard and enter it in the manifest.

        Raises NumericsError naming the conversation when a state is NaN or infinite, StoreError when the disk refuses.
        """
        self._check_finite(plan, tensors)
        path = self.folder / plan.file
        try:
            digests: list[str] = []
            write_atomically(path, lambda temporary: digests.append(save_hashed(tensors, temporary)))
            entry = {
                "file": plan.file,
                "first": plan.first,
                "next": plan.next,
                "sequences": plan.next - plan.first,
                "tokens": tensors["input_ids"].shape[0],
                "bytes": path.stat().st_size,
                "sha256": digests[0],
            }
            with self._guard:
                others = [shard for shard in self.manifest["shards"] if shard["file"] != plan.file]
                self.manifest["shards"] = sorted([*others, entry], key=lambda shard: shard["first"])
                self.manifest["complete"] = len(self.manifest["shards"]) == len(self._plans)
                write_json(self.folder / MANIFEST, self.manifest)
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"cannot write {path}: {error}\nwhat was finished is kept; make room and run again with --resume"
            ) from error

    def close(self) -> None:
        """Let go of the lock."""
        self._lock.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_finite(self, plan: ShardPlan, tensors: dict[str, Tensor]) -> None:
        """A sum is finite when every entry is; only where it is not is the culprit looked for."""
        suffix = ".scale" if self.manifest["dtype"] in SCALED else ""
        for name in self._names:
            states = tensors[name + suffix]
            if torch.isfinite(states.sum(dtype=torch.float32)):
                continue
            bad = (~torch.isfinite(states)).any(dim=-1).nonzero()
            if not len(bad):
                continue
            row = int(bad[0, 0])
            place = int(torch.searchsorted(tensors["sequence_offsets"].long(), row, right=True)) - 1
            start = int(tensors["sequence_offsets"][place])
            where = f"{name}, token {row - start} of conversation {plan.first + place} ({plan.file})"
            raise NumericsError(
                f"NaN or infinity in {where}; the shard was not written\n"
                "load the teacher in another dtype (teacher.dtype), or store in one of wider range (data.store_dtype)"
            )


def _take_lock(folder: Path) -> TextIO:
    stream = (folder / LOCK).open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise StoreError(f"another `firp collect` is writing {folder}; wait for it, or give another --output") from None
    return stream


def _compare(folder: Path, found: dict[str, Any], fresh: dict[str, Any]) -> None:
    """Refuse to go on with a store made otherwise."""
    marks = [
        f"{name} (store: {found['fingerprints'].get(name)}, now: {value})"
        for name, value in fresh["fingerprints"].items()
        if found["fingerprints"].get(name) != value
    ]
    if marks:
        raise FingerprintError(
            f"{folder} was made with another {' and another '.join(marks)}; give another --output, or delete it"
        )
    mine = {"layers": fresh["layers"], "dtype": fresh["dtype"], **fresh["settings"]}
    theirs = {"layers": found["layers"], "dtype": found["dtype"], **found["settings"]}
    different = [
        f"{name} (store: {theirs.get(name)}, now: {mine.get(name)})"
        for name in [*mine, *(theirs.keys() - mine.keys())]
        if theirs.get(name) != mine.get(name)
    ]
    if different:
        raise StoreError(
            f"--resume needs the settings that {folder} was made with; different: {', '.join(different)}\n"
            "give them as they were, another --output, or delete the store"
        )
