"""Trees that `firp tune` found, by machine, teacher, temperature, batch size and context: the entries of tree.json."""

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

KEY = ("machine", "teacher", "batch_size", "temperature")  # what entries have in common that replace one another
NEAR = 1.5  # factor between the contexts of such entries


@dataclass(frozen=True)
class TunedTrees:
    """A default tree, and those that were found better. `steps`: the predictor's."""

    default: TreeSpec
    steps: int
    entries: tuple[TunedTree, ...] = ()

    def fitting(self, machine: dict[str, Any], teacher: str, temperature: float) -> TunedTrees:
        """Only the entries of this machine and teacher (its fingerprint), of the nearest temperature. Greedy trees are
        never used for sampling, nor the other way round.
        """
        own = [
            entry
            for entry in self.entries
            if (entry.machine, entry.teacher) == (machine, teacher) and (entry.temperature > 0) == (temperature > 0)
        ]
        nearest = min((entry.temperature for entry in own), key=lambda one: abs(one - temperature), default=None)
        return replace(self, entries=tuple(entry for entry in own if entry.temperature == nearest))

    def entry(self, batch: int, context: int) -> TunedTree | None:
        """Of the entries whose batch size is nearest, by factors, the one whose context is; None without entries. Of
        two as near the larger one.
        """

        def distance(entry: TunedTree) -> tuple[float, int, float, int]:
            sizes = (_factor(entry.batch_size, batch), -entry.batch_size)
            return (*sizes, _factor(entry.context, context), -entry.context)

        return min(self.entries, key=distance, default=None)

    def at(self, batch: int, context: int) -> TreeSpec:
        """The tree for a batch size and a context: its entry's, without entries the default."""
        entry = self.entry(batch, context)
        return self.default if entry is None else spec_of(entry, self.steps)


def _factor(one: int, other: int) -> float:
    """How far apart two counts are, by factors; rounded, so that 1 and 4 are as far from 2."""
    return round(abs(math.log(max(1, one)) - math.log(max(1, other))), 9)


def spec_of(entry: TunedTree, steps: int) -> TreeSpec:
    """The tree of an entry for a predictor of `steps`. Raises UsageError."""
    if entry.paths is None or entry.tree.startswith("dynamic"):
        return tree_of("entry", {"tree": entry.tree}, steps)
    name = entry.tree.partition("@")[0].partition("/")[0]
    if name == f"static:{len(entry.paths) + 1}":
        name = ""  # what a tree without a name is called
    if name == "chain" and entry.steps is not None:
        name = "static:" + "x".join("1" * len(entry.paths))  # as parse_tree names one that is cut
    fields = {"paths": entry.paths, "name": name, "steps": entry.steps, "budget": entry.budget}
    return tree_of("entry", fields, steps)


def described(spec: TreeSpec) -> dict[str, Any]:
    """The fields of a TunedTree that say which tree it is."""
    paths = [list(path) for path in spec.paths] if spec.kind == "static" else None
    return {"tree": str(spec), "paths": paths, "steps": spec.steps, "budget": spec.budget, "nodes": spec.nodes}


def read_trees(path: Path, steps: int) -> TunedTrees:
    """A tree.json, with entries or without, for a predictor of `steps`. Raises UsageError."""
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
    """Raises UsageError on entries that another version wrote, or that are damaged."""
    schema, entries = value.get("schema", TREES_SCHEMA), value.get("entries", [])
    if schema != TREES_SCHEMA or not isinstance(entries, list):
        raise UsageError(
            f"{path} has schema {schema!r}, this firp reads {TREES_SCHEMA!r}: `firp tune` writes a new one"
        )
    found = []
    for number, item in enumerate(entries):
        try:
            entry = TunedTree.from_json(item)
            numbers = (entry.batch_size, entry.context, entry.temperature, entry.predicted.step_milliseconds)
            if not isinstance(entry.tree, str) or not all(isinstance(one, int | float) for one in numbers):
                raise TypeError("a field has another type")
        except (TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"{path}: entry {number} is damaged ({error}): `firp tune` writes a new one") from None
        found.append(entry)
    return found


def update_trees(path: Path, entries: Sequence[TunedTree]) -> dict[str, Any]:
    """The value of a tree.json with these entries: its default and its other entries stay, those of the same machine,
    teacher, batch size and temperature, and of nearly the same context, go. Raises UsageError where the file is
    damaged.
    """
    value = read_tree_file(path) if path.is_file() else {}
    kept = [entry for entry in _entries(path, value) if not any(_replaces(new, entry) for new in entries)]
    default = {name: item for name, item in value.items() if name not in ("schema", "entries")}
    return {"schema": TREES_SCHEMA, **default, "entries": [as_json(entry) for entry in (*kept, *entries)]}


def _replaces(new: TunedTree, old: TunedTree) -> bool:
    same = all(getattr(new, name) == getattr(old, name) for name in KEY)
    return same and _factor(new.context, old.context) <= math.log(NEAR)
