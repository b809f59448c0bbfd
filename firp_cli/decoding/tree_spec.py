"""Specifications of draft trees: the text form, tree.json files, and the limits of steps and pseudo rows.

A parent precedes its children; node 0 is the root, the last emitted token. A child is named by its position among its
parent's candidates, 0 for the most probable one.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from firp_cli.errors import UsageError
from firp_cli.files import read_json
from firp_cli.predictors.base import Predictor

DEFAULT_NODES = 8
MAX_NODES = 1024
KINDS = ("dynamic", "static", "chain", "none")  # first words of specifications
NEEDED = "it needs `tree` (a spec), `paths`, or `entries`"


@dataclass(frozen=True)
class TreeSpec:
    """Specification of the tree that each decoding step builds.

    `static`: `paths` lists nodes as candidate positions from the root, e.g. (0,), (1,), (0, 0); closed under prefixes.
    `dynamic`: the `nodes - 1` prefixes of highest joint draft probability, chosen anew each step.
    `none`: no draft, autoregressive decoding.
    `budget`: number of nodes with pseudo rows, those where the accepted path most likely ends; None: all nodes.
    `steps`: draft steps that are run; None: all steps of the predictor.
    """

    kind: str
    nodes: int
    paths: tuple[tuple[int, ...], ...] = ()
    name: str = ""
    budget: int | None = None
    steps: int | None = None

    def __str__(self) -> str:
        if self.kind == "none":
            return "none"
        shape = self.name or f"{self.kind}:{self.nodes}"
        if self.steps is not None:
            shape = f"{'chain' if shape == _chain(self.steps) else shape}/{self.steps}"
        return f"{shape}@{self.budget}" if self.limited else shape

    @property
    def limited(self) -> bool:
        """True if some nodes have no pseudo rows."""
        return self.budget is not None and self.budget < self.nodes

    def depth(self, steps: int) -> int:
        """Return the length of the longest path below the root."""
        if self.kind == "dynamic":
            return min(self.steps or steps, steps)
        return max(map(len, self.paths), default=0)

    def drafting(self, steps: int) -> int:
        """Return how many of a predictor's `steps` must run. If every node has pseudo rows, no draft uses the
        steps after the deepest path.
        """
        if self.kind == "none":
            return 0
        run = min(self.steps or steps, steps)
        if self.limited:
            return run
        return min(run, self.depth(run) if self.kind == "static" else self.nodes - 1)

    def breadth(self, vocabulary: int) -> int:
        """Return the most candidates that a node needs."""
        if self.kind == "static":
            return max((position for path in self.paths for position in path), default=0) + 1
        return max(1, min(self.nodes - 1, vocabulary))


def parse_tree(spec: str, steps: int) -> TreeSpec:
    """Parse `dynamic:N`, `chain`, `static:4x2x1` (children per node by depth), a tree.json file, or `none`.

    `/K` after it runs only K of the predictor's `steps` (a chain is then K deep), `@B` after that gives pseudo rows to
    only B nodes. Raises UsageError.
    """
    path = Path(spec)
    if path.is_file():
        return tree_of(str(path), read_tree_file(path), steps)
    shape, at, budget = spec.rpartition("@")
    if at:
        if not _count(budget) or "@" in shape:
            raise UsageError(f"tree {spec!r}: give the number of nodes with pseudo rows after @, at least 1")
        return _with_limits(parse_tree(shape, steps), spec, budget=_count(budget))
    shape, slash, run = spec.rpartition("/")
    if slash and (shape.partition(":")[0] in KINDS or Path(shape).is_file()):
        if not 1 <= _count(run) <= steps:
            raise UsageError(f"tree {spec!r}: give the number of draft steps after /, 1 to {steps}")
        return _with_limits(parse_tree(_chain(int(run)) if shape == "chain" else shape, steps), spec, steps=int(run))
    if spec == "none":
        return TreeSpec("none", 1)
    kind, _, rest = spec.partition(":")
    if kind == "dynamic" and 2 <= _count(rest) <= MAX_NODES:
        return TreeSpec("dynamic", int(rest))
    widths = [1] * steps if spec == "chain" else [_count(width) for width in rest.split("x")]
    if all(widths) and (spec == "chain" or kind == "static"):
        _check_size(spec, sum(itertools.accumulate(widths, operator.mul)))
        levels = [range(width) for width in widths]
        paths = [path for depth in range(1, len(levels) + 1) for path in itertools.product(*levels[:depth])]
        return static_tree(paths, steps, spec)
    raise UsageError(
        f"no tree {spec!r}: give dynamic:N (2 <= N <= {MAX_NODES}), chain, static:4x2x1 (each may end in /K: K draft "
        "steps, and @B: pseudo rows for B nodes), none, or a tree.json file"
    )


def _with_limits(tree: TreeSpec, text: str, **limits: int | None) -> TreeSpec:
    """Return the tree with the limits that `text` gives it. Raises UsageError."""
    if tree.kind == "none":
        raise UsageError(f"tree {text!r}: none has no draft to limit")
    limited = replace(tree, **limits)  # type: ignore[arg-type]
    if limited.kind == "static" and limited.steps is not None and limited.steps < limited.depth(0):
        raise UsageError(f"tree {text!r} is {limited.depth(0)} deep, it needs at least as many draft steps")
    return limited


def _chain(depth: int) -> str:
    """Return the text form of a chain of any depth; `chain` is one of all the predictor's steps."""
    return "static:" + "x".join("1" * depth)


def _count(text: str) -> int:
    """Return a number's value, 0 for other text."""
    return int(text) if text.isascii() and text.isdigit() else 0


def default_tree(folder: Path | None, predictor: Predictor) -> TreeSpec:
    """Return the default of the predictor folder's tree.json if it has one, else `dynamic:8`."""
    if folder is not None and os.path.lexists(path := folder / "tree.json"):
        return tree_of(str(path), read_tree_file(path), predictor.steps)
    return TreeSpec("dynamic", DEFAULT_NODES)


def read_tree_file(path: Path) -> dict[str, Any]:
    """Return the contents of a tree.json. Raises UsageError."""
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a tree file ({error}): {NEEDED}") from None
    if not isinstance(value, dict) or not {"tree", "paths", "entries"} & set(value):
        raise UsageError(f"{path} is not a tree file: {NEEDED}")
    return value


def tree_of(path: str, value: dict[str, Any], steps: int) -> TreeSpec:
    """Return the tree of a tree.json's value, or of one of its entries: `paths`, with `name`, `steps` and `budget` if
    present, else the specification `tree`, else `dynamic:8`. Raises UsageError.
    """
    spec = value.get("tree", f"dynamic:{DEFAULT_NODES}")
    if not isinstance(spec, str) or Path(spec).is_file():
        raise UsageError(f"{path}: `tree` must be a spec such as dynamic:8, not {spec!r}")
    if value.get("paths") is None:
        try:
            return parse_tree(spec, steps)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    try:
        paths = [tuple(int(position) for position in item) for item in value["paths"]]
        limits = {name: None if value.get(name) is None else int(value[name]) for name in ("steps", "budget")}
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(
            f"{path}: `paths` must be lists of candidate positions, `steps` and `budget` numbers ({error})"
        ) from None
    if any(limit is not None and limit < 1 for limit in limits.values()) or (limits["steps"] or 1) > steps:
        raise UsageError(f"{path}: `steps` must be 1 to {steps} and `budget` at least 1, got {limits}")
    try:
        return _with_limits(static_tree(paths, steps, str(value.get("name") or "")), path, **limits)
    except UsageError as error:
        raise error if str(error).startswith(f"tree {path!r}") else UsageError(f"{path}: {error}") from None


def _check_size(name: str, drafted: int) -> None:
    if drafted + 1 > MAX_NODES:
        raise UsageError(f"tree {name} has {drafted + 1} nodes, at most {MAX_NODES} are allowed")


def static_tree(paths: Sequence[tuple[int, ...]], steps: int, name: str = "") -> TreeSpec:
    """Return the tree of these candidate positions from the root. Raises UsageError where a parent is missing or the
    tree is too deep or too large.
    """
    ordered = tuple(sorted(set(paths), key=lambda path: (len(path), path)))
    known = {(), *ordered}
    for path in ordered:
        if len(path) > steps:
            raise UsageError(f"tree {name or list(path)} is {len(path)} deep, the predictor drafts {steps} steps")
        if not path or min(path) < 0 or path[:-1] not in known:
            raise UsageError(f"tree path {list(path)} lacks its parent or has a negative position")
    if not ordered:
        raise UsageError("a tree without paths drafts nothing: use `none`")
    _check_size(name, len(ordered))
    return TreeSpec("static", len(ordered) + 1, ordered, name)
