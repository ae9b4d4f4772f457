"""Plot of the gradient cosines between the sources of a run."""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .style import draw_matrix, new_plot, save_plot, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_cosines"]

_Pairs = dict[tuple[str, str], dict[int, float]]  # pair of sources -> step -> cosine


def plot_cosines(
    log_history: Sequence[Mapping[str, Any]], sources: Sequence[str], path: str | os.PathLike[str]
) -> Path | None:
    """
    Draw the gradient cosines of a log as curves, and the last ones as a matrix.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`), sources (`Sequence[str]`), path (`str` or `os.PathLike`):
            As in [`plot_training`]. With `gradient_cosine_steps`, the log has the keys `cosine/<source>-<source>`.

    Returns:
        `Path`, *optional*: `path`; `None` if the log has no finite cosine. Then no file is written.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.plots.cosines import plot_cosines
        >>> log = [{"step": s, "cosine/code-text": 0.1 * s} for s in (1, 2, 3)]
        >>> plot_cosines(log, ["code", "text"], Path(mkdtemp(), "cosines.png")).name
        'cosines.png'
    """
    pairs = _pairs(log_history, sources)
    if not pairs:
        return None
    figure = new_plot(8.0, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    _draw_curves(left, pairs)
    _draw_last(right, pairs, [name for name in sources if any(name in pair for pair in pairs)])
    figure.suptitle("gradient cosines between sources, at restored weights", fontsize=10)
    return save_plot(figure, path)


def _pairs(log: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> _Pairs:
    """The finite cosines of each pair that has any."""
    found: _Pairs = {}
    for first, second in combinations(sources, 2):
        for key in (f"cosine/{first}-{second}", f"cosine/{second}-{first}"):
            points = {int(entry["step"]): float(entry[key]) for entry in log if key in entry and "step" in entry}
            if points := {step: value for step, value in sorted(points.items()) if math.isfinite(value)}:
                found[first, second] = points
    return found


def _draw_curves(axes: "Axes", pairs: _Pairs) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = sorted({step for points in pairs.values() for step in points})
    for points in pairs.values():
        axes.plot(list(points), list(points.values()), color="0.65", linewidth=1.0, marker=".", markersize=4)
    at = {step: [points[step] for points in pairs.values() if step in points] for step in steps}
    means = [sum(values) / len(values) for values in at.values()]
    axes.plot(steps, means, color="black", linewidth=2.4, marker="o", markersize=4)
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    tidy(axes)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_xlabel("outer step", fontsize=10)
    axes.set_ylabel("gradient cosine", fontsize=10)
    axes.set_title("grey: each pair    black: their mean", fontsize=9, loc="left")


def _draw_last(axes: "Axes", pairs: _Pairs, names: Sequence[str]) -> None:
    """Draw the last cosine of each pair as a matrix."""
    last = {pair: points[max(points)] for pair, points in pairs.items()}
    last |= {(second, first): value for (first, second), value in last.items()}
    rows = [[1.0 if a == b else last.get((a, b), math.nan) for b in names] for a in names]
    draw_matrix(axes, names, rows, cmap="PuOr_r", limits=(-1, 1))
    axes.set_title(f"after step {max(map(max, pairs.values()))}", fontsize=9, loc="left")
