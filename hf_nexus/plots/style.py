"""Shared parts of the plots: figures without pyplot, colors and markers, axes, matrices."""

import math
import os
from collections.abc import Sequence
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
    """
    Empty figure of `width` by `height` inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:  # pyplot would choose a GUI backend and keep the figure in memory
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install matplotlib scipy") from error
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


def tidy(axes: "Axes", title: str = "", x: str = "", y: str = "", *, fontsize: float = 9, **title_style: Any) -> None:
    """Draw a faint grid, hide the frame where there are no ticks, and write the title and the names of the axes."""
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=fontsize)
    axes.set_xlabel(x, fontsize=fontsize + 1)
    axes.set_ylabel(y, fontsize=fontsize + 1)
    axes.set_title(title, fontsize=fontsize, loc="left", **title_style)


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
    Draw a square matrix with its numbers in the cells; NaN is written as a dash, and not at all on the diagonal.
    `limits` are the values at the ends of the color map. Returns the image, for a color bar.
    """
    import numpy as np

    image = axes.imshow(rows, cmap=cmap, vmin=limits[0], vmax=limits[1])
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            text = "–" * (i != j) if math.isnan(value) else f"{value:{number}}"  # noqa: RUF001
            red, green, blue, _ = (1.0,) * 4 if math.isnan(value) else image.to_rgba(np.asarray(value))
            color = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.45 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=fontsize, color=color)
    labels = [shorten(name, 14) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.set_yticks(range(len(names)), labels, fontsize=8.5)
    return image
