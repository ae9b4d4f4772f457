"""Shared parts of the plots: figures without pyplot, colors and markers, matrices, labels."""

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "MARKERS",
    "draw_matrix",
    "new_plot",
    "place_labels",
    "save_plot",
    "series_style",
    "shorten",
    "tidy",
]

# Okabe-Ito colors are distinct under color blindness; markers and dashes are distinct in grayscale.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 3)))


def new_plot(width: float, height: float) -> "Figure":
    """Empty figure of `width` by `height` inches."""
    # pyplot would choose a GUI backend and keep the figure in memory.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_plot(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, with any suffix of `path`. Missing folders are created."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # a link is replaced and not followed
    figure.savefig(path, format="png", dpi=figure.dpi)
    return path


def tidy(axes: "Axes", fontsize: float = 9) -> None:
    """Draw a faint grid, and hide the frame where there are no ticks."""
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=fontsize)


def series_style(index: int) -> dict[str, Any]:
    """Color, marker and dashes of the `index`-th of several curves. Index 0, the baseline, is black."""
    color = "black" if index == 0 else COLORS[(index - 1) % len(COLORS)]
    return {"color": color, "marker": MARKERS[index % len(MARKERS)], "linestyle": _DASHES[index % len(_DASHES)]}


def shorten(name: str, limit: int) -> str:
    r"""
    `name` in at most `limit` characters, cut in the middle. `$` is escaped: matplotlib reads it as mathematics.

    Example:
        >>> from hf_nexus.plots.style import shorten
        >>> shorten("a_rather_long_name", 10), shorten("US$", 10)
        ('a_rat…name', 'US\\$')
    """
    tail = (limit - 1) * 4 // 9
    return (name if len(name) <= limit else f"{name[: limit - 1 - tail]}…{name[-tail:]}").replace("$", r"\$")


def draw_matrix(
    axes: "Axes",
    names: Sequence[str],
    rows: Sequence[Sequence[float]],
    *,
    cmap: str,
    limits: tuple[float, float],
    number: str = ".2f",
    fontsize: float = 8.0,
) -> Any:
    """
    Draw a square matrix with its numbers in the cells; NaN is written as a dash. `limits` are the values at the ends
    of the color map. Returns the image, for a color bar.
    """
    import numpy as np

    image = axes.imshow(rows, cmap=cmap, vmin=limits[0], vmax=limits[1])
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            text = "–" if math.isnan(value) else f"{value:{number}}"  # noqa: RUF001
            red, green, blue, _ = (1.0,) * 4 if math.isnan(value) else image.to_rgba(np.asarray(value))
            color = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.45 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=fontsize, color=color)
    labels = [shorten(name, 14) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.set_yticks(range(len(names)), labels, fontsize=8.5)
    return image


def place_labels(axes: "Axes", points: Sequence[tuple[float, float]], labels: Sequence[str], **text: Any) -> None:
    """
    Write each label next to its point, where it covers the fewest markers, lines and other labels.

    Call this last: it fixes the layout of the figure.
    """
    import numpy as np
    from matplotlib.text import Text

    figure = axes.figure.figure
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    figure.set_layout_engine("none")
    axes.apply_aspect()
    pixel = figure.dpi / 72
    marks = axes.transData.transform(np.asarray(points, dtype=float).reshape(-1, 2))
    drawn = np.concatenate([np.repeat(marks, 8, axis=0), *_line_pixels(axes)])
    taken: list[tuple[Any, Any]] = []
    for point, mark, label in zip(points, marks, labels, strict=True):
        style: dict[str, Any] = {"fontsize": 8.5, "zorder": 6, "xytext": (0, 0), "textcoords": "offset points"} | text
        lead = {"arrowstyle": "-", "color": "0.35", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        written = axes.annotate(label, point, arrowprops=lead, **style)
        size = Text.get_window_extent(written)  # without the line that leads to the point
        corner, reach = _best_corner(axes.get_window_extent(), mark, size, drawn, taken, pixel)
        taken.append((corner - 2, corner + np.asarray((size.width + 2, size.height + 2))))
        written.set_position(tuple((corner - mark) / pixel))
        written.set(ha="left", va="bottom")
        assert written.arrow_patch is not None
        written.arrow_patch.set_visible(reach > 15)


def _line_pixels(axes: "Axes") -> list[Any]:
    """Pixels along each piece of each line, (N, 2), at most 4 pixels apart up to 300 of them."""
    import numpy as np

    lines = [line.get_transform().transform(np.asarray(line.get_xydata(), dtype=float)) for line in axes.lines]
    pieces = [(a, b) for line in lines for a, b in pairwise(line) if np.isfinite([a, b]).all()]
    return [np.linspace(a, b, int(min(300, 2 + math.dist(a, b) / 4))) for a, b in pieces]


def _best_corner(
    frame: Any, mark: Any, size: Any, drawn: Any, taken: Sequence[tuple[Any, Any]], pixel: float
) -> tuple[Any, int]:
    """Lower left corner of a label of `size` that covers least, in pixels, and its distance from `mark` in points."""
    import numpy as np

    directions = [(1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1)]
    best: tuple[float, Any, int] = (math.inf, None, 0)
    for reach in (7, 15, 26, 40, 56):
        for right, up in directions:
            step = reach * pixel / math.hypot(right, up)
            shift = (step * right - size.width * (1 - right) / 2, step * up - size.height * (1 - up) / 2)
            corner = mark + np.asarray(shift)
            low, high = corner - 2, corner + np.asarray((size.width + 2, size.height + 2))
            hidden = float(np.all((drawn > low) & (drawn < high), axis=1).sum())
            hidden += 200 * sum(bool(np.all((a < high) & (b > low))) for a, b in taken)
            outside = low[0] < frame.x0 or low[1] < frame.y0 or high[0] > frame.x1 or high[1] > frame.y1
            cost = hidden + 300 * outside + reach / 5
            if cost < best[0]:
                best = (cost, corner, reach)
    return best[1:]
