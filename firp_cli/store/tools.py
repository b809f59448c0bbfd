"""Conversion, splitting and merging of stores. One shard at a time is in memory.

StoreWriter writes the results like collected stores: an interrupted run leaves an unfinished store, which the same
call with `resume` completes to the same bytes. No conversation is copied from a shard whose checksum is wrong.
"""

from __future__ import annotations

import hashlib
import shlex
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firp_cli.assets import nearest
from firp_cli.config import DataConfig
from firp_cli.errors import FingerprintError, StoreError, UsageError
from firp_cli.files import write_json
from firp_cli.provenance import fingerprint
from firp_cli.results import Progress, no_progress
from firp_cli.store.reader import (
    FLOATS,
    MANIFEST,
    SCALED,
    Store,
    bytes_per_token,
    decode_states,
    encode_states,
    read_manifest,
    shard_fault,
    state_names,
)
from firp_cli.store.shard_file import check_disk_space, copy_hashed
from firp_cli.store.writer import ShardPlan, StoreWriter, check_target


def convert_store(
    source: Path,
    output: Path,
    *,
    dtype: str | None = None,
    layers: Sequence[int] | None = None,
    resume: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write the conversations in another dtype, with fewer layers, or both. Returns a summary of JSON values.

    Raises UsageError (an unknown dtype, nothing to change), StoreError (a missing layer, damage),
    NumericsError when a state does not fit the dtype, CapacityError.
    """
    if dtype is not None and dtype not in (*FLOATS, *SCALED):
        raise UsageError(f"unknown dtype {dtype!r}{nearest(dtype, (*FLOATS, *SCALED))}")
    store = Store.open(source, layers=layers)
    dtype = dtype or store.manifest["dtype"]
    if dtype == store.manifest["dtype"] and list(store.layers) == store.manifest["layers"]:
        raise UsageError(
            f"{source} already is a {dtype} store of layers {list(store.layers)}; give --dtype or --layers"
        )
    joined = _JoinedStores([store])
    made = {"made_by": "store convert", "sources": [_origin(store)]}
    everything = range(len(store))
    with _begin(joined, {output: everything}, dtype, [made], resume) as writers:
        return _fill(writers[0], joined, everything, dtype, store.manifest["counts"], progress)


def split_store(
    source: Path,
    outputs: Sequence[Path],
    parts: Sequence[float],
    *,
    seed: int = 0,
    resume: bool = False,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """Distribute the conversations over several stores, each to exactly one. Returns a summary of each store.

    Args:
        parts: the share of each output (they sum to 1) or its number of conversations (they sum to all).
        seed: of the assignment; within a part the order is that of `source`.

    Raises UsageError (parts), StoreError, CapacityError.
    """
    if len({output.absolute() for output in outputs}) < len(outputs):
        raise UsageError("every part needs a different --output")
    if len(parts) != len(outputs):
        raise UsageError(f"{len(parts)} parts and {len(outputs)} outputs: give one --output for each part")
    store = Store.open(source)
    assigned = assign_parts(len(store), parts, seed)
    joined, dtype = _JoinedStores([store]), store.manifest["dtype"]
    made = [
        {"made_by": "store split", "sources": [_origin(store)], "parts": list(parts), "part": part, "seed": seed}
        for part in range(len(parts))
    ]
    total, done = sum(joined.lengths), 0
    summaries = []
    with _begin(joined, dict(zip(outputs, assigned, strict=True)), dtype, made, resume) as writers:
        for writer, indices in zip(writers, assigned, strict=True):
            bar = _shifted(progress, done, total)
            summaries.append(_fill(writer, joined, indices, dtype, joined.counts(indices), bar))
            done += sum(joined.lengths[index] for index in indices)
    return summaries


def assign_parts(count: int, parts: Sequence[float], seed: int) -> list[list[int]]:
    """Return the numbers 0..count-1 in disjoint ascending lists of the sizes in `parts`, by a hash of (seed, number).

    Raises UsageError when the parts do not add up to the whole, or when one is empty.
    """
    if all(part == int(part) for part in parts):
        sizes = [int(part) for part in parts]
        if sum(sizes) != count:
            raise UsageError(f"the parts have {sum(sizes)} conversations, the store {count}; give shares, as 0.9,0.1")
    elif abs(sum(parts) - 1) > 1e-6:
        raise UsageError(f"the parts sum to {sum(parts):g}: give shares that sum to 1, or numbers of conversations")
    else:
        ends = [round(share * count) for share in accumulate(parts)]
        sizes = [end - start for start, end in pairwise([0, *ends])]
    if min(sizes) < 1:
        raise UsageError(f"parts of {', '.join(map(str, sizes))} of {count} conversations: one of them is empty")
    ranked = sorted(range(count), key=lambda index: hashlib.sha256(f"split:{seed}:{index}".encode()).digest())
    return [sorted(ranked[start:end]) for start, end in pairwise([0, *accumulate(sizes)])]


def merge_stores(
    output: Path,
    sources: Sequence[Path],
    *,
    layers: Sequence[int] | None = None,
    resume: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write one store of all conversations, in the order of the sources. Returns a summary of JSON values.

    Shards are copied byte for byte; with `layers`, which all sources need, they are rewritten without other layers.

    Raises FingerprintError when teachers, tokenizers or templates differ, StoreError when dtypes or layers do,
    UsageError when a source is named twice, CapacityError.
    """
    if len({source.resolve() for source in sources}) < len(sources) or len(sources) < 2:
        raise UsageError("give two or more different stores to merge")
    stores = [Store.open(source, layers=layers) for source in sources]
    _check_alike(stores)
    joined, dtype = _JoinedStores(stores), stores[0].manifest["dtype"]
    made = {"made_by": "store merge", "sources": [_origin(store) for store in stores]}
    everything = range(len(joined.lengths))
    unchanged = all(list(store.layers) == store.manifest["layers"] for store in stores)
    with _begin(joined, {output: everything}, dtype, [made], resume) as (writer,):
        if unchanged:
            return _copy_shards(writer, stores, joined.all_counts(), progress)
        return _fill(writer, joined, everything, dtype, joined.all_counts(), progress)


def _check_alike(stores: Sequence[Store]) -> None:
    """Raise FingerprintError or StoreError if the sources cannot be merged."""
    first = stores[0]
    for store in stores[1:]:
        mine, theirs = first.manifest["fingerprints"], store.manifest["fingerprints"]
        different = [
            f"another {name} ({first.folder}: {mine[name]}, {store.folder}: {theirs.get(name)})"
            for name in mine
            if mine[name] != theirs.get(name)
        ]
        if different:
            raise FingerprintError(
                f"{store.folder} was made with {' and '.join(different)}; only stores of one teacher can be merged"
            )
        if (dtype := first.manifest["dtype"]) != store.manifest["dtype"]:
            raise StoreError(
                f"{first.folder} has {dtype} states, {store.folder} {store.manifest['dtype']}; "
                f"convert them to one dtype first: firp store convert {shlex.quote(str(store.folder))} --dtype {dtype} "
                f"--output {shlex.quote(f'{store.folder}-{dtype}')}"
            )
        if first.layers != store.layers:
            common = sorted(set(first.layers) & set(store.layers))
            raise StoreError(
                f"{first.folder} has layers {list(first.layers)}, {store.folder} {list(store.layers)}; "
                f"keep those that both have: --layers {','.join(map(str, common)) or 'none'}"
            )


class _JoinedStores:
    """Conversations of several stores as one list, as they are stored."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = stores
        self.lengths = [length for store in stores for length in store.lengths]
        self._starts = [0, *accumulate(map(len, stores))]
        self._verified: set[tuple[int, int]] = set()

    def stored(self, index: int) -> dict[str, Tensor]:
        """Return the rows of conversation `index`. Raises StoreError when its shard is damaged."""
        number = bisect_right(self._starts, index) - 1
        store, place = self.stores[number], index - self._starts[number]
        shard = store.shard_of(place)
        if (number, shard) not in self._verified:
            store.check_shard(shard)
            self._verified.add((number, shard))
        return store.stored(place)

    def shard(self, indices: Sequence[int], dtype: str) -> dict[str, Tensor]:
        """Return the tensors of a shard of these conversations, with states in `dtype`."""
        rows = [self.stored(index) for index in indices]
        tensors = {name: torch.cat([row[name] for row in rows]) for name in ("input_ids", "loss_mask")}
        lengths = [self.lengths[index] for index in indices]
        tensors["sequence_offsets"] = torch.tensor([0, *lengths]).cumsum(0)
        for name in state_names(self.stores[0].layers):
            scaled = f"{name}.scale" in rows[0]
            stored = torch.cat([row[name] for row in rows])
            scale = torch.cat([row[f"{name}.scale"] for row in rows]) if scaled else None
            if dtype == self.stores[0].manifest["dtype"]:
                tensors |= {name: stored} | ({f"{name}.scale": scale} if scale is not None else {})
            else:
                tensors |= {
                    name + suffix: part for suffix, part in encode_states(decode_states(stored, scale), dtype).items()
                }
        return tensors

    def counts(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return the counts of a manifest for some of the conversations; reads their masks."""
        answers = sum(int(self.stored(index)["loss_mask"].sum()) for index in indices)
        tokens = sum(self.lengths[index] for index in indices)
        return {"conversations": len(indices), "tokens": tokens, "response_tokens": answers}

    def all_counts(self) -> dict[str, Any]:
        """Return the sums of the stores' counts."""
        total: Counter[str] = Counter()
        skipped: Counter[str] = Counter()
        answers: Counter[str] = Counter()
        failures: list[str] = []
        for store in self.stores:
            counts = dict(store.manifest["counts"])
            skipped.update(counts.pop("skipped", {}))
            account = dict(counts.pop("answers", {}))
            failures += filter(None, [account.pop("failure", None)])
            answers.update(account)
            total.update(counts)
        found = {**total, "skipped": dict(sorted(skipped.items()))}
        return found | ({"answers": {**answers, "failure": next(iter(failures), None)}} if answers else {})


def _origin(store: Store) -> dict[str, Any]:
    """Return the record of this store in the settings of a store made from it."""
    kept = ("dtype", "layers", "settings", "counts", "recipe")
    sums = [shard["sha256"] for shard in store.manifest["shards"]]
    return {"folder": str(store.folder), "shards": fingerprint(sums), **{key: store.manifest[key] for key in kept}}


@contextmanager
def _begin(
    joined: _JoinedStores, outputs: dict[Path, Sequence[int]], dtype: str, made: Sequence[dict[str, Any]], resume: bool
) -> Iterator[list[StoreWriter]]:
    """Open the outputs' writers, after a check that all outputs may be written and fit their disks.

    Outputs that a killed run did not begin are begun; those that it finished are checked.
    """
    first = joined.stores[0].manifest
    layers = list(joined.stores[0].layers)
    row = bytes_per_token(first["hidden_size"], len(layers), dtype)
    needed = {}
    for output, indices in outputs.items():
        check_target(output, resume)
        present = sum(path.stat().st_size for path in output.glob("shard-*")) if output.is_dir() else 0
        needed[output] = max(0, row * sum(joined.lengths[index] for index in indices) - present)
    check_disk_space(needed)
    settings = [store.manifest["settings"] for store in joined.stores]
    names = dict.fromkeys(str(each.get("dataset")) for each in settings)
    shard_tokens = max(each.get("shard_tokens", DataConfig().shard_tokens) for each in settings)
    recipes = [store.manifest["recipe"] for store in joined.stores]
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                StoreWriter(
                    output,
                    teacher=first["teacher"],
                    fingerprints=first["fingerprints"],
                    layers=layers,
                    dtype=dtype,
                    settings={"dataset": "+".join(names), "shard_tokens": shard_tokens, **how},
                    recipe=recipes[0] if all(recipe == recipes[0] for recipe in recipes) else None,
                    resume=resume,
                )
            )
            for output, how in zip(outputs, made, strict=True)
        ]


def _fill(
    writer: StoreWriter,
    joined: _JoinedStores,
    indices: Sequence[int],
    dtype: str,
    counts: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Write the missing shards, one after the other."""
    lengths = [joined.lengths[index] for index in indices]
    pending = writer.plan(lengths, counts)
    total = sum(lengths)
    done = total - sum(sum(lengths[plan.first : plan.next]) for plan in pending)
    for plan in pending:
        writer.write(plan, joined.shard(indices[plan.first : plan.next], dtype))
        done += sum(lengths[plan.first : plan.next])
        progress(done, total)
    writer.fold()
    return _summary(writer, len(pending))


def _copy_shards(
    writer: StoreWriter, stores: Sequence[Store], counts: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Copy every missing shard, then enter all under their new numbers."""
    places = [(store, number) for store in stores for number in range(len(store.manifest["shards"]))]
    manifest = writer.manifest
    manifest |= {"shards_planned": len(places), "counts": counts, "complete": False, "shards": []}
    write_json(writer.folder / MANIFEST, manifest)
    total = sum(shard["bytes"] for store in stores for shard in store.manifest["shards"])
    entries: list[dict[str, Any]] = []
    done = first = copied = 0
    for new, (store, number) in enumerate(places):
        shard = store.manifest["shards"][number]
        plan = ShardPlan(new, first, first + shard["sequences"])
        entries.append({**shard, "file": plan.file, "first": plan.first, "next": plan.next})
        if shard_fault(writer.folder, entries[-1], checksum=True):
            _copy(store, number, writer.folder / plan.file)
            copied += 1
        first, done = plan.next, done + shard["bytes"]
        progress(done, total)
    manifest |= {"shards": entries, "complete": True}
    write_json(writer.folder / MANIFEST, manifest)
    return _summary(writer, copied)


def _copy(store: Store, number: int, target: Path) -> None:
    """Copy one shard; a damaged one is refused."""
    shard = store.manifest["shards"][number]
    source = store.folder / shard["file"]
    try:
        copy_hashed(source, target, shard["sha256"])
    except ValueError as error:
        store.check_shard(number)
        raise StoreError(f"{source} changed while it was read; do not write to it during a merge") from error
    except OSError as error:
        raise StoreError(
            f"cannot copy {source} to {target}: {error}\n"
            "what was finished is kept; make room and run again with --resume"
        ) from error


def _summary(writer: StoreWriter, written: int) -> dict[str, Any]:
    manifest = read_manifest(writer.folder)
    return {
        "store": str(writer.folder),
        **{key: manifest[key] for key in ("layers", "dtype")},
        **manifest["counts"],
        "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "shards": len(manifest["shards"]),
        "shards_written": written,
    }


def _shifted(progress: Progress, before: int, total: int) -> Progress:
    """Return the progress callback of one part of the whole."""
    return lambda done, _: progress(before + done, total)
