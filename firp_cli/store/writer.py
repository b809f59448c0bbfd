"""Writing of a store: shards are whole or absent, and a killed run can be resumed.

The conversations of a shard follow from their lengths alone, and nothing is computed across shards: a shard has the
same bytes whether it was written in one run, after a resume, or rebuilt alone, and by any number of ranks.

Every rank writes its shards: the file, then beside it a sidecar `shard-00003.json` with its manifest entry. Rank 0
enters sidecars in the manifest and removes them. A file without an entry is written again, so a killed rank loses only
its unfinished shard; the next run enters the sidecars of a killed one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor

from firp_cli.errors import FingerprintError, NumericsError, StoreError
from firp_cli.files import LOCK, FolderLock, lock_folder, write_atomically, write_json
from firp_cli.provenance import differences, environment
from firp_cli.store.reader import MANIFEST, SCALED, SCHEMA, read_manifest, shard_fault, state_names
from firp_cli.store.shard_file import save_hashed

PROVENANCE = "provenance.json"
SHARD_FILES = re.compile(r"shard-\d{5,}\.(safetensors|json)")
TEMPORARY = ".*.tmp"
LEAST_SHARDS = 32  # minimum number of shards of a large corpus, for ranks to share
LEAST_TOKENS = 8192  # minimum tokens of a shard: short batches need more padding
FOLD_SECONDS = 5.0  # minimum time between two writings of the manifest


@dataclass(frozen=True)
class ShardPlan:
    """Shard `number`, of conversations first .. next-1."""

    number: int
    first: int
    next: int

    @property
    def file(self) -> str:
        """Name of the shard file."""
        return f"shard-{self.number:05d}.safetensors"

    @property
    def sidecar(self) -> str:
        """Name of the file with the shard's manifest entry."""
        return self.sidecar_of(self.file)

    @staticmethod
    def sidecar_of(file: str) -> str:
        """Return the name of the file with the manifest entry of shard `file`."""
        return file.removesuffix(".safetensors") + ".json"


def shard_size(tokens: int, shard_tokens: int) -> int:
    """Return the tokens per shard of a corpus of `tokens`: `shard_tokens`, or fewer to share a small corpus evenly."""
    return min(shard_tokens, max(LEAST_TOKENS, tokens // LEAST_SHARDS))


def plan_shards(lengths: Sequence[int], shard_tokens: int) -> list[ShardPlan]:
    """Cut conversations, in order, into shards of at most `shard_tokens` tokens; a longer conversation gets a shard."""
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


def check_target(folder: Path, resume: bool, locked: bool = False) -> None:
    """Refuse a folder that cannot be written, before any work is done. Raises StoreError with the remedy.

    Args:
        locked: True if this process has the folder's lock already.
    """
    if not locked and (folder / LOCK).is_file():
        _lock(folder).close()
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        if not resume:
            state = "a complete store" if manifest["complete"] else "an unfinished store"
            raise StoreError(
                f"{folder} already holds {state} of {manifest['settings']['dataset']}; "
                "give --resume to finish or repair it, another --output, or delete it"
            )
        return
    known = {LOCK, *(path.name for path in folder.glob(TEMPORARY))}  # of a run that was killed at its start
    unknown = [path.name for path in folder.glob("*") if path.name not in known] if folder.is_dir() else []
    if unknown or (folder.exists() and not folder.is_dir()):
        raise StoreError(f"{folder} is not empty and is not a store; give another --output")


class ShardWriter:
    """Writer of shards and their sidecars into a store that rank 0 leads. `write` may be called from a thread."""

    def __init__(self, folder: Path, layers: Sequence[int], dtype: str) -> None:
        """Join the writers of `folder`. Raises StoreError when another run has the store."""
        self.folder = folder
        self._names, self._dtype = state_names(layers), dtype
        self._lock = _lock(folder, member=True)

    def write(self, plan: ShardPlan, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Write one shard and return its manifest entry.

        Raises NumericsError naming the conversation when a state is NaN or infinite, StoreError on a disk error.
        """
        self._check_finite(plan, tensors)
        path = self.folder / plan.file
        with _disk(path):
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
                "text": text_fingerprint(tensors["input_ids"], tensors["loss_mask"]),
            }
            write_json(self.folder / plan.sidecar, entry)
        return entry

    def close(self) -> None:
        """Release the folder."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_finite(self, plan: ShardPlan, tensors: dict[str, Tensor]) -> None:
        """Raise NumericsError naming the first row with NaN or infinities; finite extremes mean that there is none."""
        suffix = ".scale" if self._dtype in SCALED else ""
        for name in self._names:
            states = tensors[name + suffix]
            if all(bool(torch.isfinite(bound)) for bound in torch.aminmax(states)):
                continue
            bad = (~torch.isfinite(states)).any(dim=-1).nonzero()
            row = int(bad[0, 0])
            place = int(torch.searchsorted(tensors["sequence_offsets"].long(), row, right=True)) - 1
            start = int(tensors["sequence_offsets"][place])
            where = f"{name}, token {row - start} of conversation {plan.first + place} ({plan.file})"
            raise NumericsError(
                f"NaN or infinity in {where}; the shard was not written\n"
                "load the teacher in another dtype (teacher.dtype), or store in one of wider range (data.store_dtype)"
            )


class StoreWriter(ShardWriter):
    """Leader of a store's writers: has its lock and writes its manifest, from construction to `close`."""

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
        """Create a store, or with `resume` continue the one in `folder`.

        Args:
            teacher: its description. fingerprints: `teacher`, `tokenizer`, `chat template`.
            layers, dtype, settings: everything that determines the store's bytes.

        Raises StoreError or FingerprintError when `folder` holds a store made otherwise, or another process writes it.
        """
        self.folder = folder
        self._names, self._dtype = state_names(layers), dtype
        check_target(folder, resume)
        with _disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        self._guard = threading.Lock()
        self._plans: dict[str, ShardPlan] = {}
        self._folded = time.monotonic()
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
            check_target(folder, resume, locked=True)  # another process may have written before the lock was taken
            for leftover in folder.glob(TEMPORARY):
                leftover.unlink()
            if (folder / MANIFEST).is_file():
                self.manifest = read_manifest(folder)
                _compare(folder, self.manifest, fresh)
            else:
                self.manifest = fresh
                self._save()
            if not (folder / PROVENANCE).is_file():
                with _disk(folder):
                    write_json(folder / PROVENANCE, environment())
        except BaseException:
            self._lock.close()
            raise

    def share(self) -> None:
        """Let the writers of the other ranks join."""
        with _disk(self.folder):
            self._lock.share()

    def plan(
        self, lengths: Sequence[int], counts: dict[str, Any], text: Callable[[ShardPlan], str] | None = None
    ) -> list[ShardPlan]:
        """Plan the shards and return those to be written: all but those that exist undamaged.

        Args:
            text: returns the fingerprint of a shard's text; a shard of another text is written again.
        """
        claims = self.claims(lengths)
        return self.settle([entry for plan, entry in claims if is_whole(self.folder, plan, entry, text)], counts)

    def claims(self, lengths: Sequence[int]) -> list[tuple[ShardPlan, dict[str, Any]]]:
        """Plan the shards; return the entries of manifest and sidecars, for `is_whole` to check."""
        plans = plan_shards(lengths, shard_size(sum(lengths), self.manifest["settings"]["shard_tokens"]))
        self._plans = {plan.file: plan for plan in plans}
        entries = [*self.manifest["shards"], *self._sidecars().values()]
        return [(self._plans[entry["file"]], entry) for entry in entries if entry.get("file") in self._plans]

    def settle(self, whole: Sequence[dict[str, Any]], counts: dict[str, Any]) -> list[ShardPlan]:
        """Enter the whole shards, remove all other shard files, and return the shards to be written, in order."""
        entered = {entry["file"]: entry for entry in whole}
        pending = [plan for file, plan in self._plans.items() if file not in entered]
        shards = sorted(entered.values(), key=lambda entry: entry["first"])
        changed = {"shards": shards, "shards_planned": len(self._plans), "counts": counts, "complete": not pending}
        if any(self.manifest[key] != value for key, value in changed.items()):
            self.manifest |= changed
            self._save()
        # only after the manifest no longer names them
        for path in self.folder.glob("shard-*"):
            if path.name not in self._plans and SHARD_FILES.fullmatch(path.name):
                path.unlink()
        return pending

    def write(self, plan: ShardPlan, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Write one shard as `ShardWriter.write` does, and the manifest every FOLD_SECONDS."""
        entry = super().write(plan, tensors)
        self.fold(FOLD_SECONDS)
        return entry

    def fold(self, seconds: float = 0.0, entries: Sequence[dict[str, Any]] = ()) -> None:
        """Enter finished shards in the manifest: those with sidecars, and `entries`; at most once in `seconds`.

        Raises StoreError on a disk error.
        """
        with self._guard:
            if time.monotonic() - self._folded < seconds:
                return
            self._folded = time.monotonic()
            fresh = {entry["file"]: entry for entry in (*self._sidecars().values(), *entries)}
            known = {shard["file"]: shard for shard in self.manifest["shards"]}
            known |= {file: entry for file, entry in fresh.items() if file in self._plans}
            if list(known.values()) != self.manifest["shards"]:
                self.manifest["shards"] = sorted(known.values(), key=lambda shard: shard["first"])
                self.manifest["complete"] = len(known) == len(self._plans)
                self._save()
            for file in fresh:
                (self.folder / ShardPlan.sidecar_of(file)).unlink(missing_ok=True)

    def entered(self) -> dict[str, int]:
        """Return the tokens of each shard in the manifest, by file."""
        with self._guard:
            return {shard["file"]: shard["tokens"] for shard in self.manifest["shards"]}

    def record(self, run: dict[str, Any]) -> None:
        """Add a run's record to provenance.json: the manifest's bytes do not depend on it."""
        path = self.folder / PROVENANCE
        with _disk(path):
            provenance = json.loads(path.read_text(encoding="utf-8"))
            provenance.setdefault("runs", []).append(run)
            write_json(path, provenance)

    def close(self) -> None:
        """Enter finished shards and release the folder."""
        try:
            if self._plans:
                self.fold()
        finally:
            self._lock.close()

    def _save(self) -> None:
        with _disk(self.folder / MANIFEST):
            write_json(self.folder / MANIFEST, self.manifest)

    def _sidecars(self) -> dict[str, dict[str, Any]]:
        """Return the entries in sidecars, by shard file."""
        entries = {}
        for path in self.folder.glob("shard-*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                entry = json.loads(path.read_text(encoding="utf-8"))
                entries[entry["file"]] = entry
        return entries


def is_whole(
    folder: Path, plan: ShardPlan, entry: dict[str, Any], text: Callable[[ShardPlan], str] | None = None
) -> bool:
    """Return True if the shard of a manifest entry or sidecar exists undamaged and is the one that `plan` describes."""
    return (
        (entry["first"], entry["next"]) == (plan.first, plan.next)
        and (text is None or entry.get("text") == text(plan))
        and shard_fault(folder, entry, checksum=True) is None
    )


def text_fingerprint(input_ids: Tensor, loss_mask: Tensor) -> str:
    """Return 16 hex digits over the bytes of token ids (T,) int32 and mask (T,) bool, as stored."""
    digest = hashlib.sha256(input_ids.numpy().tobytes())
    digest.update(loss_mask.numpy().tobytes())
    return digest.hexdigest()[:16]


def _lock(folder: Path, member: bool = False) -> FolderLock:
    try:
        return lock_folder(folder, member)
    except BlockingIOError as error:
        raise StoreError(
            f"another `firp collect` is writing {folder}: {error.strerror}; wait for it, or give another --output"
        ) from None
    except OSError as error:
        raise StoreError(f"cannot lock {folder}: {error}; give an --output on a file system with locks") from error


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a StoreError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StoreError(
            f"cannot write {path}: {error}\nwhat was finished is kept; make room and run again with --resume"
        ) from error


def _compare(folder: Path, found: dict[str, Any], fresh: dict[str, Any]) -> None:
    """Refuse to resume a store that was made with another teacher or other settings."""
    different = differences(found["fingerprints"], fresh["fingerprints"], "store")
    if different:
        raise FingerprintError(
            f"{folder} was made with another {' and another '.join(different)}; give another --output, or delete it"
        )
    mine = {"layers": fresh["layers"], "dtype": fresh["dtype"], **fresh["settings"]}
    theirs = {"layers": found["layers"], "dtype": found["dtype"], **found["settings"]}
    different = differences(theirs, mine, "store")
    if different:
        raise StoreError(
            f"--resume needs the settings that {folder} was made with; different: {', '.join(different)}\n"
            "give them as they were, another --output, or delete the store"
        )
