"""What the pictures share: figures without pyplot, styles that keep apart in grey, matrices and labels."""

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
    "new_figure",
    "place_labels",
    "save_figure",
    "series_style",
    "shorten",
    "tidy",
]

# The Okabe-Ito colours keep apart under colour blindness; markers and dashes keep the curves apart in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 3)))


def new_figure(width: float, height: float) -> "Figure":
    """
    An empty figure of `width` by `height` inches.

    Example:
        >>> from hf_nexus.plots.style import new_figure
        >>> new_figure(4, 3).get_size_inches().tolist()
        [4.0, 3.0]
    """
    # The object-oriented API with its own canvas: pyplot would choose a GUI backend and keep the figure alive.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """
    Write `figure` to `path`, whatever its suffix as PNG. Missing folders are made.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.plots.style import new_figure, save_figure
        >>> save_figure(new_figure(4, 3), Path(mkdtemp(), "empty.png")).name
        'empty.png'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=figure.dpi)
    return path


def tidy(axes: "Axes", fontsize: float = 9) -> None:
    """A faint grid, and no frame where there are no ticks."""
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=fontsize)


def series_style(index: int) -> dict[str, Any]:
    """
    Colour, marker and dashes of the `index`-th of several curves; the first, to which one compares, is black.

    Example:
        >>> from hf_nexus.plots.style import series_style
        >>> series_style(0)["color"], series_style(1)["marker"]
        ('black', 's')
    """
    color = "black" if index == 0 else COLORS[(index - 1) % len(COLORS)]
    return {"color": color, "marker": MARKERS[index % len(MARKERS)], "linestyle": _DASHES[index % len(_DASHES)]}


def shorten(name: str, limit: int) -> str:
    r"""
    `name` in at most `limit` characters, cut in the middle, with what matplotlib would read as a formula escaped.

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
    Draw a matrix with its numbers written in.

    Args:
        axes (`Axes`):
            Where to.
        names (`Sequence[str]`):
            Of rows and columns.
        rows (`Sequence[Sequence[float]]`):
            The values; NaN is written as a dash.
        cmap (`str`), limits (`tuple[float, float]`):
            Colour map, and the values at its ends.
        number (`str`, *optional*, defaults to `".2f"`), fontsize (`float`, *optional*, defaults to 8.0):
            Format and size of the numbers.

    Returns:
        `AxesImage`: for a colour bar.

    Example:
        >>> from hf_nexus.plots.style import draw_matrix, new_figure
        >>> image = draw_matrix(new_figure(3, 3).subplots(), "ab", [[0, 1], [1, 0]], cmap="Blues", limits=(0, 1))
        >>> image.get_array().shape
        (2, 2)
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
    Write each label beside its point, where it hides as little as possible of markers, lines and other labels.

    To be called when all else is drawn: the layout of the figure is fixed by it.

    Example:
        >>> from hf_nexus.plots.style import new_figure, place_labels
        >>> axes = new_figure(3, 3).subplots()
        >>> place_labels(axes, [(0.5, 0.5), (0.51, 0.5)], ["one", "other"])
        >>> [label.get_text() for label in axes.texts]
        ['one', 'other']
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
    lines = [line.get_transform().transform(np.asarray(line.get_xydata(), dtype=float)) for line in axes.lines]
    pieces = [(a, b) for line in lines for a, b in pairwise(line) if np.isfinite([a, b]).all()]
    paths = [np.linspace(a, b, int(min(300, 2 + math.dist(a, b) / 4))) for a, b in pieces]
    drawn = np.concatenate([np.repeat(marks, 8, axis=0), *paths])
    directions = [(1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1)]
    frame = axes.get_window_extent()
    taken: list[tuple[Any, Any]] = []
    for point, mark, label in zip(points, marks, labels, strict=True):
        style: dict[str, Any] = {"fontsize": 8.5, "zorder": 6, "xytext": (0, 0), "textcoords": "offset points"} | text
        lead = {"arrowstyle": "-", "color": "0.35", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        written = axes.annotate(label, point, arrowprops=lead, **style)
        size = Text.get_window_extent(written)  # without the line that leads to the point
        best: tuple[float, Any, Any, bool] = (math.inf, None, None, False)
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
                    best = (cost, (low, high), (corner - mark) / pixel, reach > 15)
        taken.append(best[1])
        written.set_position(tuple(best[2]))
        written.set(ha="left", va="bottom")
        assert written.arrow_patch is not None
        written.arrow_patch.set_visible(best[3])
