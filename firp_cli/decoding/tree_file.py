"""Tuned trees in tree.json, by machine, teacher, temperature, batch size and context. `firp tune` writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from firp_cli.decoding.tree_spec import TreeSpec, read_tree_file, tree_of
from firp_cli.errors import UsageError
from firp_cli.results import as_json
from firp_cli.tune_results import TREES_SCHEMA, TunedTree

KEY = ("machine", "teacher", "batch_size", "temperature")  # equal in entries that replace one another
NEAR = 1.5  # largest factor between the contexts of such entries


@dataclass(frozen=True)
class TunedTrees:
    """Default tree, and the tuned ones. `steps`: the predictor's."""

    default: TreeSpec
    steps: int
    entries: tuple[TunedTree, ...] = ()

    def fitting(self, machine: dict[str, Any], teacher: str, temperature: float) -> TunedTrees:
        """Keep the entries of this machine and teacher (its fingerprint), of the nearest temperature. Greedy trees are
        never used for sampling, nor sampling trees for greedy decoding.
        """
        fitting = [
            entry
            for entry in self.entries
            if (entry.machine, entry.teacher) == (machine, teacher) and (entry.temperature > 0) == (temperature > 0)
        ]
        nearest = min(
            (entry.temperature for entry in fitting), key=lambda known: abs(known - temperature), default=None
        )
        return replace(self, entries=tuple(entry for entry in fitting if entry.temperature == nearest))

    def entry(self, batch: int, context: int) -> TunedTree | None:
        """Return the entry with the nearest context among those with the nearest batch size, by factors; None without
        entries. Of two equally near ones it takes the larger.
        """

        def distance(entry: TunedTree) -> tuple[float, int, float, int]:
            return _factor(entry.batch_size, batch), -entry.batch_size, _factor(entry.context, context), -entry.context

        return min(self.entries, key=distance, default=None)

    def at(self, batch: int, context: int) -> TreeSpec:
        """Return the tree for a batch size and a context: its entry's, without entries the default."""
        entry = self.entry(batch, context)
        return self.default if entry is None else spec_of(entry, self.steps)


def _factor(first: int, second: int) -> float:
    """Return the logarithm of the factor between two counts, rounded so that 1 and 4 are equally far from 2."""
    return round(abs(math.log(max(1, first)) - math.log(max(1, second))), 9)


def spec_of(entry: TunedTree, steps: int) -> TreeSpec:
    """Return the tree of an entry for a predictor of `steps`. Raises UsageError."""
    if entry.paths is None or entry.tree.startswith(("dynamic", "chain/")):  # the text contains everything
        return tree_of("entry", {"tree": entry.tree}, steps)
    name = entry.tree.partition("@")[0].partition("/")[0]
    if name == f"static:{len(entry.paths) + 1}":
        name = ""  # the text form of a tree without a name
    fields = {"paths": entry.paths, "name": name, "steps": entry.steps, "budget": entry.budget}
    return tree_of("entry", fields, steps)


def described(spec: TreeSpec) -> dict[str, Any]:
    """Return the fields of a TunedTree that define its tree."""
    paths = [list(path) for path in spec.paths] if spec.kind == "static" else None
    return {"tree": str(spec), "paths": paths, "steps": spec.steps, "budget": spec.budget, "nodes": spec.nodes}


def read_trees(path: Path, steps: int) -> TunedTrees:
    """Read a tree.json, with entries or without, for a predictor of `steps`. Raises UsageError."""
    value = read_tree_file(path)
    default = tree_of(str(path), value, steps)
    entries = _entries(path, value)
    for number, entry in enumerate(entries):
        try:
            spec_of(entry, steps)
        except UsageError as error:
            raise UsageError(f"{path}: entry {number}: {error}") from None
    return TunedTrees(default, steps, tuple(entries))


def _entries(path: Path, value: dict[str, Any]) -> list[TunedTree]:
    """Return the entries of a tree.json. Raises UsageError if they are damaged or of another version."""
    schema, entries = value.get("schema", TREES_SCHEMA), value.get("entries", [])
    if not isinstance(entries, list):
        raise UsageError(f"{path}: in schema {TREES_SCHEMA} `entries` is a list: `firp tune` writes a new one")
    if schema != TREES_SCHEMA:
        raise UsageError(
            f"{path} has schema {schema!r}, this firp reads {TREES_SCHEMA!r}: `firp tune` writes a new one"
        )
    known = []
    for number, item in enumerate(entries):
        try:
            entry = TunedTree.from_json(item)
            numbers = (entry.batch_size, entry.context, entry.temperature, entry.predicted.step_milliseconds)
            if not isinstance(entry.tree, str) or not all(isinstance(number, int | float) for number in numbers):
                raise TypeError("a field has another type")
        except (TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{path}: entry {number} is damaged ({error}): `firp tune` writes a new one") from None
        known.append(entry)
    return known


def update_trees(path: Path, entries: Sequence[TunedTree]) -> dict[str, Any]:
    """Return the value of a tree.json with these entries. They replace entries of the same machine, teacher, batch
    size, temperature and nearly the same context; the default and all other entries stay. Raises UsageError where the
    file is damaged.
    """
    value = read_tree_file(path) if path.is_file() else {}
    kept = [entry for entry in _entries(path, value) if not any(_replaces(new, entry) for new in entries)]
    default = {name: item for name, item in value.items() if name not in ("schema", "entries")}
    return {"schema": TREES_SCHEMA, **default, "entries": [as_json(entry) for entry in (*kept, *entries)]}


def _replaces(new: TunedTree, old: TunedTree) -> bool:
    same = all(getattr(new, name) == getattr(old, name) for name in KEY)
    return same and _factor(new.context, old.context) <= math.log(NEAR)
