"""A tuned tree drawn from the root downwards: tidy layout, and the figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from firp_cli.reports.canvas import canvas, png
from firp_cli.tune_results import TunedTree

if TYPE_CHECKING:
    from matplotlib.patches import PathPatch

Node = tuple[int, ...]  # ranks from the root; the root is ()
Contour = list[tuple[float, float]]  # by depth, the leftmost and rightmost place

NODE_WIDTH, LEVEL_HEIGHT = 0.52, 0.88  # inches between neighbours and between levels
LEAST_WIDTH, MOST_WIDTH = 5.2, 15.0
BEND = 0.36  # how far down an edge turns to its child
CIRCLE = 0.84  # of the distance between neighbours
INSIDE = 7.6  # points of the text in a circle of full size
DARK = 0.7  # chance from which on the text is white


def tree_layout(paths: Iterable[Sequence[int]]) -> dict[Node, tuple[float, float]]:
    """Places of all nodes, the root included: x from 0 up, y = -depth.

    Nodes of one level are at least 1 apart, in order of rank; parents stand over the middle of their children; subtrees
    stand as close as that allows, so that no edges cross. (Reingold and Tilford 1981.)
    """
    nodes = {tuple(path[:depth]) for path in paths for depth in range(len(path) + 1)} | {()}
    children: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in sorted(nodes - {()}):
        children[node[:-1]].append(node)
    places, contour = _packed((), children)
    start = min(left for left, _ in contour)
    return {node: (x - start, -float(len(node))) for node, x in places.items()}


def _packed(node: Node, children: dict[Node, list[Node]]) -> tuple[dict[Node, float], Contour]:
    """Places of a subtree with its own root at 0, and how far it reaches on each level."""
    if not children[node]:
        return {node: 0.0}, [(0.0, 0.0)]
    places: dict[Node, float] = {}
    contour: Contour = []
    for child in children[node]:
        own, reach = _packed(child, children)
        gaps = [right + 1.0 - left for (_, right), (left, _) in zip(contour, reach, strict=False)]
        shift = max(gaps, default=0.0)
        places |= {name: x + shift for name, x in own.items()}
        moved = [(left + shift, right + shift) for left, right in reach]
        both = [(a[0], b[1]) for a, b in zip(contour, moved, strict=False)]
        contour = both + contour[len(both) :] + moved[len(both) :]
    middle = (places[children[node][0]] + places[children[node][-1]]) / 2
    places = {name: x - middle for name, x in places.items()} | {node: 0.0}
    return places, [(0.0, 0.0), *((left - middle, right - middle) for left, right in contour)]


def ordinal(rank: int) -> str:
    """`1st` for rank 0, the most probable candidate."""
    place = rank + 1
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"


def drawable(entries: Iterable[TunedTree]) -> TunedTree | None:
    """The first entry that is a tree whose shape is known."""
    return next((entry for entry in entries if entry.tree != "none" and any(entry.paths or ())), None)


def _chances(entry: TunedTree) -> dict[Node, float]:
    """How likely each node is accepted; empty where that is not known."""
    nodes: list[Node] = [(), *(tuple(path) for path in entry.paths or () if path)]
    known = entry.probabilities or []
    return dict(zip(nodes, known, strict=True)) if len(known) == len(nodes) else {}


def _title(entry: TunedTree, nodes: int, depth: int) -> str:
    drafts = "1 draft" if depth == 1 else f"{depth} drafts"
    typical = " (dynamic: typical shape)" if entry.tree.startswith("dynamic") else ""
    return f"{entry.tree} at batch size {entry.batch_size}: {nodes} nodes, {drafts} deep{typical}"


def _label(node: Node, chance: float | None) -> str:
    name = ordinal(node[-1]) if node else "root"
    if chance is None or not node:
        return name
    return f"{name}\n{f'{chance:.{2 if chance >= 0.01 else 3}f}' if chance >= 0.0005 else '<.001'}"


def _edge(above: tuple[float, float], below: tuple[float, float], width: float) -> PathPatch:
    """A curve that leaves the parent and reaches its child upright, so that it passes behind no neighbour."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    bend = above[1] - BEND * (above[1] - below[1])
    points = [above, (above[0], bend), (below[0], bend), below]
    line = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    return PathPatch(line, fill=False, edgecolor="#8a97a6", linewidth=width, zorder=1)


def tree_figure(entry: TunedTree) -> bytes:
    """Circles joined by edges: rank and chance of acceptance inside; the more likely, the darker and the wider."""
    from matplotlib import colormaps

    places, chances = tree_layout(entry.paths or []), _chances(entry)
    span = max(x for x, _ in places.values())
    depth = max(map(len, places))
    width = min(MOST_WIDTH, max(LEAST_WIDTH, NODE_WIDTH * (span + 1) + 0.2))
    scale = min(1.0, (width - 0.2) / (NODE_WIDTH * (span + 1)))
    reach = (width - 0.2) / (NODE_WIDTH * scale)  # node distances that the figure has room for
    with canvas(width, LEVEL_HEIGHT * (depth + 1) + 0.35) as figure:
        axes = figure.subplots()
        shades = colormaps["Blues"]
        for node, (x, y) in places.items():
            chance = chances.get(node, 0.25)
            if node:
                axes.add_patch(_edge(places[node[:-1]], (x, y), 0.7 + 5.0 * chance))
            fill = shades(0.75 * chance)
            diameter = 72 * NODE_WIDTH * CIRCLE * scale
            axes.scatter([x], [y], s=diameter**2, color=[fill], edgecolors="#3c4a5a", linewidths=0.8, zorder=2)
            ink = "white" if chance > DARK else "#1d2430"
            text = _label(node, chances.get(node))
            axes.text(x, y, text, ha="center", va="center", size=INSIDE * scale, color=ink, linespacing=1.05, zorder=3)
        axes.set_xlim(span / 2 - reach / 2, span / 2 + reach / 2)
        axes.set_ylim(-depth - 0.5, 0.5)
        axes.set_axis_off()
        figure.suptitle(_title(entry, len(places), depth), x=0.01, ha="left", size=10, weight="bold")
        if chances:
            figure.supxlabel("In a circle: the candidate's rank, and how likely the node is accepted.", size=8.5)
        return png(figure)
