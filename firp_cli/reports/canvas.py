"""Canvas, style and legend of all figures, and their pictures: PNG for files, SVG for pages. The colours are Okabe and
Ito's, which colour-blind readers can distinguish.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#1d2430", "#5b6573", "#e3e3e3"
PAPER = "#fffffe"  # ground of a label; a white of its own, which pages replace and a text in white keeps
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", INK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "text.parse_math": False,  # a dollar in a name is no formula
    "svg.fonttype": "none",
    "svg.hashsalt": "firp",  # equal figures give equal files
}
DOTS_PER_INCH, MOST_COLOURS = 160, 128
LEGEND_MARK, LEGEND_LETTER = 0.56, 0.061  # inches


@dataclass(frozen=True)
class Picture:
    """Figure as the bytes of a PNG file, and as the text of an SVG file with the colours of this file."""

    png: bytes
    svg: str


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure, sizes in inches, that needs no display and does not change pyplot's global state."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def legend(figure: Figure, most: int) -> None:
    """Draw the legend above the figure, in as many columns as fit, at most `most`."""
    labels = [label for axes in figure.axes for label in axes.get_legend_handles_labels()[1]]
    widths = sorted((LEGEND_MARK + LEGEND_LETTER * len(label) for label in labels), reverse=True)
    columns = next((count for count in range(most, 1, -1) if sum(widths[:count]) <= figure.get_figwidth()), 1)
    figure.legend(loc="outside upper left", ncols=min(columns, len(labels)))


def picture(figure: Figure) -> Picture:
    """Return the figure as PNG on white, and as SVG without a background."""
    drawn = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
        figure.set_layout_engine("none")  # it has been laid out
        return Picture(png(figure), drawn.getvalue())


def png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file of few colours, a third of the size of one with all."""
    from PIL import Image  # which matplotlib needs

    drawn, stream = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH)
    palette = Image.open(drawn).convert("RGB").quantize(MOST_COLOURS, dither=Image.Dither.NONE)
    palette.save(stream, "png", optimize=True)
    return stream.getvalue()
