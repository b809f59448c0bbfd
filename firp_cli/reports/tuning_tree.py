"""Figure of a tuned tree, drawn from the root downwards with a tidy layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from firp_cli.reports.canvas import Picture, canvas, picture
from firp_cli.tune_results import TunedTree

if TYPE_CHECKING:
    from matplotlib.patches import PathPatch

Node = tuple[int, ...]  # positions among the candidates from the root; the root is ()
Contour = list[tuple[float, float]]  # by depth, the leftmost and rightmost x

NODE_WIDTH, LEVEL_HEIGHT = 0.52, 0.88  # inches between neighbours and between levels
LEAST_WIDTH, MOST_WIDTH = 5.2, 15.0
BEND = 0.36  # of the way down, where an edge turns to its child
CIRCLE = 0.84  # of the distance between neighbours
INSIDE = 7.6  # font size in a circle of full size
DARK = 0.7  # probability from which on the text is white


def tree_layout(paths: Iterable[Sequence[int]]) -> dict[Node, tuple[float, float]]:
    """Return the coordinates of all nodes, the root included: x from 0 up, y = -depth.

    Nodes of a level are at least 1 apart, in order of position; parents are centred above their children; subtrees are
    as close as that allows, so that no edges cross (Reingold and Tilford 1981).
    """
    nodes = {tuple(path[:depth]) for path in paths for depth in range(len(path) + 1)} | {()}
    children: dict[Node, list[Node]] = {node: [] for node in nodes}
    for node in sorted(nodes - {()}):
        children[node[:-1]].append(node)
    places, contour = _packed((), children)
    start = min(left for left, _ in contour)
    return {node: (x - start, -float(len(node))) for node, x in places.items()}


def _packed(node: Node, children: dict[Node, list[Node]]) -> tuple[dict[Node, float], Contour]:
    """Return the x of a subtree's nodes, with its root at 0, and its extent on each level."""
    if not children[node]:
        return {node: 0.0}, [(0.0, 0.0)]
    places: dict[Node, float] = {}
    contour: Contour = []
    for child in children[node]:
        below, reach = _packed(child, children)
        gaps = [right + 1.0 - left for (_, right), (left, _) in zip(contour, reach, strict=False)]
        shift = max(gaps, default=0.0)
        places |= {name: x + shift for name, x in below.items()}
        moved = [(left + shift, right + shift) for left, right in reach]
        both = [(a[0], b[1]) for a, b in zip(contour, moved, strict=False)]
        contour = both + contour[len(both) :] + moved[len(both) :]
    middle = (places[children[node][0]] + places[children[node][-1]]) / 2
    places = {name: x - middle for name, x in places.items()} | {node: 0.0}
    return places, [(0.0, 0.0), *((left - middle, right - middle) for left, right in contour)]


def ordinal(position: int) -> str:
    """Return `1st` for position 0, the most probable candidate."""
    place = position + 1
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"


def drawable(entries: Iterable[TunedTree]) -> TunedTree | None:
    """Return the first entry that is a tree with a known shape."""
    return next((entry for entry in entries if entry.tree != "none" and any(entry.paths or ())), None)


def _probabilities(entry: TunedTree) -> dict[Node, float]:
    """Return the probability that each node is accepted; empty if unknown."""
    nodes: list[Node] = [(), *(tuple(path) for path in entry.paths or () if path)]
    known = entry.probabilities or []
    return dict(zip(nodes, known, strict=True)) if len(known) == len(nodes) else {}


def _title(entry: TunedTree, nodes: int, depth: int) -> str:
    drafts = "1 draft" if depth == 1 else f"{depth} drafts"
    typical = " (dynamic: typical shape)" if entry.tree.startswith("dynamic") else ""
    return f"{entry.tree} at batch size {entry.batch_size}: {nodes} nodes, {drafts} deep{typical}"


def _label(node: Node, probability: float | None) -> str:
    name = ordinal(node[-1]) if node else "root"
    if probability is None or not node:
        return name
    return f"{name}\n{f'{probability:.{2 if probability >= 0.01 else 3}f}' if probability >= 0.0005 else '<.001'}"


def _edge(above: tuple[float, float], below: tuple[float, float], width: float) -> PathPatch:
    """Return a curve that leaves the parent and reaches its child vertically, so that it crosses no neighbour."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    bend = above[1] - BEND * (above[1] - below[1])
    points = [above, (above[0], bend), (below[0], bend), below]
    line = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    return PathPatch(line, fill=False, edgecolor="#8a97a6", linewidth=width, zorder=1)


def tree_figure(entry: TunedTree) -> Picture:
    """Draw circles joined by edges, with order and acceptance probability inside; probable nodes are darker."""
    from matplotlib import colormaps

    places, probabilities = tree_layout(entry.paths or []), _probabilities(entry)
    span = max(x for x, _ in places.values())
    depth = max(map(len, places))
    width = min(MOST_WIDTH, max(LEAST_WIDTH, NODE_WIDTH * (span + 1) + 0.2))
    scale = min(1.0, (width - 0.2) / (NODE_WIDTH * (span + 1)))
    reach = (width - 0.2) / (NODE_WIDTH * scale)  # width in node distances
    with canvas(width, LEVEL_HEIGHT * (depth + 1) + 0.35) as figure:
        axes = figure.subplots()
        shades = colormaps["Blues"]
        for node, (x, y) in places.items():
            probability = probabilities.get(node, 0.25)
            if node:
                axes.add_patch(_edge(places[node[:-1]], (x, y), 0.7 + 5.0 * probability))
            fill = shades(0.75 * probability)
            diameter = 72 * NODE_WIDTH * CIRCLE * scale
            axes.scatter([x], [y], s=diameter**2, color=[fill], edgecolors="#3c4a5a", linewidths=0.8, zorder=2)
            ink = "white" if probability > DARK else "black"
            text = _label(node, probabilities.get(node))
            axes.text(x, y, text, ha="center", va="center", size=INSIDE * scale, color=ink, linespacing=1.05, zorder=3)
        axes.set_xlim(span / 2 - reach / 2, span / 2 + reach / 2)
        axes.set_ylim(-depth - 0.5, 0.5)
        axes.set_axis_off()
        figure.suptitle(_title(entry, len(places), depth), x=0.01, ha="left", size=10, weight="bold")
        if probabilities:
            figure.supxlabel(
                "In a circle: the candidate's order, and the probability that the node is accepted.", size=8.5
            )
        return picture(figure)
