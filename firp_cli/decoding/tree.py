"""Draft trees: their specification, and building one from a draft on the device.

Shapes: B sequences, N nodes (root included), k depth, s candidates per node. Nodes stand in order of depth, so a parent
always precedes its children; node 0 is the root, the last emitted token.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firp_cli.decoding.dynamic import Tree, build_best
from firp_cli.errors import UsageError
from firp_cli.predictors.base import Draft, Predictor

DEFAULT_NODES = 8
MAX_NODES = 1024
KINDS = ("dynamic", "static", "chain", "none")  # what specifications begin with
NEEDED = "it needs `tree` (a spec), `paths`, or `entries`"


@dataclass(frozen=True)
class TreeSpec:
    """What tree to build each step.

    `static`: `paths` lists nodes as candidate ranks from the root, e.g. (0,), (1,), (0, 0); closed under prefixes.
    `dynamic`: the `nodes - 1` prefixes of highest joint draft probability, chosen anew each step.
    `none`: no draft, plain decoding.
    `budget`: nodes that get pseudo rows, those where the accepted path most likely ends; None: all of them.
    `steps`: draft steps that are run; None: all that the predictor has.
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
        shape, run = self.name or f"{self.kind}:{self.nodes}", "" if self.steps is None else f"/{self.steps}"
        if run and self.name == _widths([1] * self.depth(0)) and self.depth(0) == self.steps:
            shape = "chain"
        return shape + run + (f"@{self.budget}" if self.limited else "")

    @property
    def limited(self) -> bool:
        """True where some nodes have no pseudo rows."""
        return self.budget is not None and self.budget < self.nodes

    def depth(self, steps: int) -> int:
        """Longest path below the root."""
        if self.kind == "dynamic":
            return min(self.steps or steps, steps)
        return max(map(len, self.paths), default=0)

    def drafting(self, steps: int) -> int:
        """How many of a predictor's `steps` need to run. Where every node has pseudo rows, steps that no path of the
        tree reaches would be thrown away.
        """
        if self.kind == "none":
            return 0
        run = min(self.steps or steps, steps)
        if self.limited:
            return run
        return min(run, self.depth(run) if self.kind == "static" else self.nodes - 1)

    def breadth(self, vocabulary: int) -> int:
        """Candidates that a node may need."""
        if self.kind == "static":
            return max((rank for path in self.paths for rank in path), default=0) + 1
        return max(1, min(self.nodes - 1, vocabulary))


def parse_tree(spec: str, steps: int) -> TreeSpec:
    """`dynamic:N`, `chain`, `static:4x2x1` (children per node by depth) or a tree.json file, each with `/K` behind it
    where only K of the predictor's `steps` shall run (a chain is then K deep), and `@B` where only B nodes shall have
    pseudo rows; or `none`. Raises UsageError.
    """
    if Path(spec).is_file():
        return _from_file(Path(spec), steps)
    if spec == "none":
        return TreeSpec("none", 1)
    shape, at, budget = spec.rpartition("@")
    if at:
        if not _is_number(budget) or int(budget) < 1 or "@" in shape:
            raise UsageError(f"tree {spec!r}: behind @ stands the number of nodes with pseudo rows, at least 1")
        return _with(parse_tree(shape, steps), spec, budget=int(budget))
    shape, slash, run = spec.rpartition("/")
    if slash and (shape.partition(":")[0] in KINDS or Path(shape).is_file()):
        if not _is_number(run) or not 1 <= int(run) <= steps:
            raise UsageError(f"tree {spec!r}: behind / stands the number of draft steps, 1 to {steps}")
        inner = parse_tree(_widths([1] * int(run)) if shape == "chain" else shape, steps)
        return _with(inner, spec, steps=int(run))
    if spec == "chain":
        return static_tree([(0,) * depth for depth in range(1, steps + 1)], steps, "chain")
    kind, _, rest = spec.partition(":")
    if kind == "dynamic" and _is_number(rest) and 2 <= int(rest) <= MAX_NODES:
        return TreeSpec("dynamic", int(rest))
    if kind == "static" and rest:
        widths = rest.split("x")
        if all(_is_number(width) and int(width) > 0 for width in widths):
            levels = [range(int(width)) for width in widths]
            paths = [path for depth in range(1, len(levels) + 1) for path in itertools.product(*levels[:depth])]
            return static_tree(paths, steps, spec)
    raise UsageError(
        f"no tree {spec!r}: give dynamic:N (2 <= N <= {MAX_NODES}), chain, static:4x2x1 (each may end in /K: K draft "
        "steps, and @B: pseudo rows for B nodes), none, or a tree.json file"
    )


def _with(spec: TreeSpec, text: str, **changes: int) -> TreeSpec:
    """The tree under a limit that stands behind it in `text`."""
    changed = replace(spec, **changes)  # type: ignore[arg-type]
    if spec.kind == "none":
        raise UsageError(f"tree {text!r}: none has no draft to limit")
    _check_steps(changed, text)
    return changed


def _check_steps(spec: TreeSpec, text: str) -> None:
    if spec.kind == "static" and spec.steps is not None and spec.steps < spec.depth(0):
        raise UsageError(f"tree {text!r} is {spec.depth(0)} deep, it needs at least as many draft steps")


def _widths(widths: Sequence[int]) -> str:
    return "static:" + "x".join(map(str, widths))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def default_tree(folder: Path | None, predictor: Predictor) -> TreeSpec:
    """The default of the predictor folder's tree.json if it has one, else `dynamic:8`."""
    if folder is not None and (folder / "tree.json").is_file():
        return _from_file(folder / "tree.json", predictor.steps)
    return TreeSpec("dynamic", DEFAULT_NODES)


def _from_file(path: Path, steps: int) -> TreeSpec:
    return tree_of(path, read_tree_file(path), steps)


def read_tree_file(path: Path) -> dict[str, Any]:
    """What a tree.json holds. Raises UsageError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not a tree file ({error}): {NEEDED}") from None
    if not isinstance(value, dict) or not {"tree", "paths", "entries"} & set(value):
        raise UsageError(f"{path} is not a tree file: {NEEDED}")
    return value


def tree_of(path: Path | str, value: dict[str, Any], steps: int) -> TreeSpec:
    """The tree that a tree.json's value, or one of its entries, stands for: of `paths`, with `name`, `steps` and
    `budget` if they are there, else of the specification `tree`, else `dynamic:8`. Raises UsageError.
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
        paths = [tuple(int(rank) for rank in item) for item in value["paths"]]
        limits = {name: None if value.get(name) is None else int(value[name]) for name in ("steps", "budget")}
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: `paths` are lists of ranks, `steps` and `budget` numbers ({error})") from None
    if any(limit is not None and limit < 1 for limit in limits.values()) or (limits["steps"] or 1) > steps:
        raise UsageError(f"{path}: `steps` is 1 to {steps}, `budget` at least 1, got {limits}")
    tree = replace(static_tree(paths, steps, str(value.get("name") or "")), **limits)  # type: ignore[arg-type]
    _check_steps(tree, str(path))
    return tree


def static_tree(paths: Sequence[tuple[int, ...]], steps: int, name: str = "") -> TreeSpec:
    """The tree of these nodes, ranks from the root. Raises UsageError where a parent lacks, or it is too deep."""
    ordered = tuple(sorted(set(paths), key=lambda path: (len(path), path)))
    known = {(), *ordered}
    for path in ordered:
        if len(path) > steps:
            raise UsageError(f"tree {name or list(path)} is {len(path)} deep, the predictor drafts {steps} steps")
        if not path or min(path) < 0 or path[:-1] not in known:
            raise UsageError(f"tree path {list(path)} lacks its parent or has a negative rank")
    if not ordered:
        raise UsageError("a tree without paths drafts nothing: `none` says so")
    if len(ordered) + 1 > MAX_NODES:
        raise UsageError(f"tree {name} has {len(ordered) + 1} nodes, at most {MAX_NODES} are allowed")
    return TreeSpec("static", len(ordered) + 1, ordered, name)


def root_tree(root: Tensor) -> Tree:
    """The tree of plain decoding: one node per sequence. `root`: (B,) tokens."""
    zeros, itself = _root_shape(root.shape[0], root.device)
    return Tree(root[:, None], zeros, zeros, itself, zeros[:, None])


@cache  # graphs hold their addresses
def _root_shape(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(batch, 1, dtype=torch.long, device=device)
    return zeros, torch.ones(batch, 1, 1, dtype=torch.bool, device=device)


def build(spec: TreeSpec, predictor: Predictor, draft: Draft, root: Tensor) -> Tree:
    """The tree of one step: root tokens (B,) and below them candidates that `predictor.child_candidates` scores."""
    if spec.kind == "none":
        return root_tree(root)
    if spec.kind == "static":
        return _build_static(spec, predictor, draft, root)
    run = spec.depth(draft.tokens.shape[1])
    return build_best(spec.nodes, predictor, Draft(draft.tokens[:, :run], draft.log_probs[:, :run]), root)


@cache  # graphs hold their addresses
def _static_shape(spec: TreeSpec, device: torch.device) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """parents (N,), depth (N,), ancestors (N, N), paths (N, P), and per depth the (parent node, rank) of its nodes."""
    index = {path: number for number, path in enumerate(((), *spec.paths))}
    parents = [index[path[:-1]] for path in index]
    ancestors = torch.zeros(spec.nodes, spec.nodes, dtype=torch.bool)
    ways = []
    for path, number in index.items():
        way = [index[path[:depth]] for depth in range(len(path) + 1)]
        ancestors[number, way] = True
        ways.append(way + way[-1:] * (spec.depth(0) + 1 - len(way)))
    levels = []
    for depth in range(1, spec.depth(0) + 1):
        paths = [path for path in spec.paths if len(path) == depth]
        nodes = torch.tensor([index[path[:-1]] for path in paths], device=device)
        levels.append((nodes, torch.tensor([path[-1] for path in paths], device=device)))
    depths = torch.tensor([len(path) for path in index])
    shape = (torch.tensor(parents), depths, ancestors, torch.tensor(ways))
    return [part.to(device) for part in shape], levels


@cache  # graphs hold their addresses
def _static_places(spec: TreeSpec, breadth: int, device: torch.device) -> Tensor:
    """(N - 1,) where the tokens of the nodes below the root stand among the k * s candidates of a draft."""
    return torch.tensor([(len(path) - 1) * breadth + path[-1] for path in spec.paths], device=device)


def _build_static(spec: TreeSpec, predictor: Predictor, draft: Draft, root: Tensor) -> Tree:
    shape, levels = _static_shape(spec, root.device)
    batch = root.shape[0]
    parents, depth, ancestors, paths = (part.expand(batch, *part.shape) for part in shape)
    if not predictor.conditional and not spec.limited:  # every node's token stands at a place of its own
        places = _static_places(spec, draft.tokens.shape[2], root.device)
        tokens = torch.cat([root[:, None], draft.tokens.flatten(1).index_select(1, places)], dim=1)
        return Tree(tokens, parents, depth, ancestors, paths)
    tokens, scores = root[:, None], draft.log_probs.new_zeros(batch, 1)
    for number, (nodes, ranks) in enumerate(levels, start=1):
        candidates, log_probs = predictor.child_candidates(draft, number, tokens[:, nodes])
        picks = ranks[None, :, None].expand(batch, -1, 1)
        if spec.limited:
            scores = torch.cat([scores, scores[:, nodes] + log_probs.gather(2, picks)[:, :, 0]], dim=1)
        tokens = torch.cat([tokens, candidates.gather(2, picks)[:, :, 0]], dim=1)
    return Tree(tokens, parents, depth, ancestors, paths, scores if spec.limited else None)


def anchor_nodes(tree: Tree, count: int) -> Tensor:
    """(B, count) the nodes that get pseudo rows: the root, and those where the accepted path most likely ends.

    A path ends at a node if it comes there and to none of its children, by the draft's own probabilities.
    """
    assert tree.scores is not None
    coming = tree.scores.exp()
    going_on = torch.zeros_like(coming).scatter_add_(1, tree.parents[:, 1:], coming[:, 1:])
    ending = coming - going_on
    ending[:, 0] = torch.inf  # every node needs an ancestor with pseudo rows
    return ending.topk(count, dim=1).indices


def nearest_anchor(tree: Tree, anchors: Tensor, path: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The deepest of `anchors` (B, A) on a path (B, P) of `count` (B,) nodes below the root: its place among them (B,),
    and its distance from the path's end in tokens (B,).
    """
    on_path = (anchors[:, :, None] == path[:, None]).any(-1)  # behind its end a path repeats its last node
    depth, place = torch.where(on_path, tree.depth.gather(1, anchors), -1).max(dim=1)
    return place, count - depth
