"""Canvas, style, legend and PNG bytes of all figures. The colours are Okabe and Ito's, which colour-blind readers can
distinguish.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
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
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
DOTS_PER_INCH, MOST_COLOURS = 160, 128
LEGEND_MARK, LEGEND_LETTER = 0.56, 0.061  # inches


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


def png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file of few colours, a third of the size of one with all."""
    from PIL import Image  # which matplotlib needs

    drawn, stream = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DOTS_PER_INCH)
    palette = Image.open(drawn).convert("RGB").quantize(MOST_COLOURS, dither=Image.Dither.NONE)
    palette.save(stream, "png", optimize=True)
    return stream.getvalue()
