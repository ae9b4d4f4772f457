"""The plots of a training run: its losses and path cosines over the steps, and the gradient cosines of its sources."""

import itertools
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .style import COLORS, MARKERS, draw_matrix, new_plot, save_plot, shorten, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

__all__ = ["COSINES_PLOT", "TRAINING_PLOT", "plot_run"]

TRAINING_PLOT, COSINES_PLOT = "training.png", "gradient_cosines.png"

_Points = dict[int, float]  # step -> value; NaN leaves a gap
_Curve = tuple[str, _Points, dict[str, Any]]  # name, points, style
_SHORT, _LONG = (0, (1, 1)), (0, (4, 2))  # dashes
# Cool colors for training sources and warm ones for OOD sources, distinct under color blindness.
_TRAINED_COLORS = ("#0072B2", "#009E73", "#56B4E9", "#332288", "#117733", "#44AA99")
_OOD_COLORS = ("#D55E00", "#E69F00", "#CC79A7", "#882255", "#AA4499", "#999933")


def plot_run(
    log_history: Sequence[Mapping[str, Any]], sources: Sequence[str], folder: str | Path, per_token: bool = True
) -> list[Path]:
    """
    Draw each plot that the log has data for: `training.png` and `gradient_cosines.png`. Returns their paths. Without
    matplotlib, a warning says how to install it. The axis of losses says whether they are in nats per token.

    `training.png` shows the held-out losses: training sources solid, OOD sources dashed, means thick. If no evaluation
    set has the name of a source, all are solid. The training loss, of Nexus a path loss, is dotted. A log without an
    evaluation shows the training losses of the sources. The lower panel shows `path_cosine`, and `inner_lr` if it
    changes.
    `gradient_cosines.png` shows the cosines of `gradient_cosine_steps` as curves, and the last ones as a matrix.

    Example:
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.plots.run import plot_run
        >>> log = [{"step": step, "eval_text_loss": 3 / step} for step in (1, 2, 3)]
        >>> [path.name for path in plot_run(log, ["text"], mkdtemp())]
        ['training.png']
    """
    try:
        plots = {
            TRAINING_PLOT: _training(log_history, sources, per_token),
            COSINES_PLOT: _cosines(log_history, sources),
        }
    except ImportError as error:
        logger.warning(f"The plots of the run are left out. {error}")
        return []
    return [save_plot(figure, Path(folder, name)) for name, figure in plots.items() if figure is not None]


def _series(log: Iterable[Mapping[str, Any]], key: str) -> _Points:
    """Values of a key by step, the last entry of a step. Empty if none is finite."""
    found = {int(entry["step"]): float(entry[key]) for entry in log if key in entry and "step" in entry}
    points = {step: value if math.isfinite(value) else math.nan for step, value in sorted(found.items())}
    return points if any(map(math.isfinite, points.values())) else {}


def _last(points: _Points) -> float:
    return next(value for value in reversed(points.values()) if math.isfinite(value))


# ---- Losses and path cosines ----


def _training(log: Sequence[Mapping[str, Any]], sources: Sequence[str], per_token: bool) -> "Figure | None":
    losses, axis_label = _loss_curves(log, sources)
    axis_label += " (nats per token)" * per_token
    cosine, inner_lr = _series(log, "path_cosine"), _series(log, "inner_lr")
    if len({value for value in inner_lr.values() if math.isfinite(value)}) < 2:
        inner_lr = {}
    if not (losses or cosine or inner_lr):
        return None
    heights = [max(3.2, 0.9 + 0.19 * len(losses))] * bool(losses) + [1.9] * bool(cosine or inner_lr)
    figure = new_plot(8.0, sum(heights) + 0.4)
    from matplotlib.ticker import MaxNLocator

    panels = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    if losses:
        dashed = any(style["linestyle"] == _LONG for _, _, style in losses)
        title = "solid: training sources    dashed: OOD sources    thick: means" if dashed else ""
        tidy(panels[0], title, y=axis_label)
        figure.suptitle(f"{'Held-out' if 'held-out' in axis_label else 'Training'} loss of each source", fontsize=11)
        _draw_losses(panels[0], losses)
    if cosine:
        panels[-1].plot(*_xy(cosine), color="black", linewidth=1.3, marker=".", markersize=4)
        panels[-1].axhline(0.0, color="0.6", linewidth=0.8)
        tidy(panels[-1], y="path cosine")
    if inner_lr:
        axes = panels[-1].twinx() if cosine else panels[-1]
        tidy(axes, y="inner lr (dotted)")
        axes.grid(not cosine)
        axes.spines["right"].set_visible(True)
        axes.plot(*_xy(inner_lr), color=COLORS[1], linewidth=1.3, linestyle=_SHORT)
        axes.yaxis.label.set_color(COLORS[1])
    panels[-1].xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    panels[-1].set_xlabel("outer step", fontsize=10)
    return figure


def _xy(points: _Points) -> tuple[list[int], list[float]]:
    return list(points), list(points.values())


def _loss_curves(log: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> tuple[list[_Curve], str]:
    """The curves of the upper panel, and the label of its axis."""
    keys = dict.fromkeys(match[1] for entry in log for key in entry if (match := re.fullmatch(r"eval_(.+)_loss", key)))
    # Other metrics may end in "loss", too, as the auxiliary loss of experts does.
    timed = {match[1] for entry in log for key in entry if (match := re.fullmatch(r"eval_(?:(.+)_)?runtime", key))}
    evaluated = [name for name in keys if name != "ood" and (not timed or name in timed)]
    ood = [name for name in evaluated if sources and name not in sources]
    if len(ood) == len(evaluated):  # no set has the name of a source: the macro loss covers all of them
        ood = []
    rows = [(name, f"eval_{name}_loss", name in ood) for name in sorted(evaluated, key=lambda name: name in ood)]
    means = [("mean" if evaluated else "held out", "eval_loss", False), ("OOD mean", "eval_ood_loss", True)]
    axis_label = "held-out loss"
    has_path = any({"path_cosine", "pseudo_gradient_norm"} & entry.keys() for entry in log)
    path = "path loss" if has_path else "loss"
    if not any(_series(log, key) for _, key, _ in rows + means):
        rows = [(name, f"loss/{name}", False) for name in sources]
        means = [("mean", "loss", False)]
        axis_label = f"{path} in training"
    curves = []
    colors = {False: itertools.cycle(_TRAINED_COLORS), True: itertools.cycle(_OOD_COLORS)}
    for index, (name, key, dashed) in enumerate(rows + means):
        style: dict[str, Any] = {"linestyle": _LONG if dashed else "-", "markerfacecolor": "white" if dashed else None}
        if index >= len(rows):  # means are thick and lie below the sources, which stay visible on top
            style |= {"color": "0.6" if dashed else "black", "linewidth": 3.2, "zorder": 2}
        else:
            style |= {"color": next(colors[dashed]), "marker": MARKERS[index % len(MARKERS)]}
            style |= {"linewidth": 1.3, "markersize": 5.5, "zorder": 3}
        if points := _series(log, key):
            curves.append((name, points, style))
    if "held-out" in axis_label and (points := _series(log, "loss")):
        name = "training (path loss)" if has_path else "training"
        curves.append((name, points, {"linestyle": _SHORT, "color": "0.3", "linewidth": 1.6}))
    return curves, axis_label


def _draw_losses(axes: "Axes", curves: list[_Curve]) -> None:
    """Draw the curves, and to the right of the panel a legend with their last values."""

    def order(curve: _Curve) -> tuple[bool, bool, float]:  # training before OOD, mean first, then by last value
        _, points, style = curve
        return style["linestyle"] == _LONG, "marker" in style, -_last(points)

    for index, (name, points, style) in enumerate(sorted(curves, key=order)):
        last = _last(points)
        # About ten markers per curve, shifted: those of close curves must not coincide.
        every = max(1, len(points) // 10)
        # A single value has no line, so even a mean needs a marker there.
        single = sum(map(math.isfinite, points.values())) == 1
        style = ({"marker": "*", "markersize": 9} if single else {"markevery": (index % every, every)}) | style
        value = f"{last:.3f}" if abs(last) < 1000 else f"{last:.3g}"
        axes.plot(*_xy(points), label=f"{value}  {shorten(name, 28)}", **style)
    place: dict[str, Any] = {
        "loc": "upper left",
        "bbox_to_anchor": (1.01, 1.03),
        "alignment": "left",
        "handlelength": 3.8,
    }
    axes.legend(title="last loss", fontsize=8.5, title_fontsize=8.5, frameon=False, **place)


# ---- Gradient cosines ----


def _cosines(log: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> "Figure | None":
    pairs: dict[tuple[str, str], _Points] = {}  # the finite cosines of each pair that has any
    with_cosines = [entry for entry in log if any(key.startswith("cosine/") for key in entry)]  # few of a long log
    keys = {key for entry in with_cosines for key in entry}
    for a, b in itertools.combinations(sources, 2):
        key = next((key for key in (f"cosine/{a}/{b}", f"cosine/{b}/{a}") if key in keys), None)
        if key is not None and (points := _series(with_cosines, key)):
            pairs[a, b] = {step: value for step, value in points.items() if math.isfinite(value)}
    if not pairs:
        return None
    figure = new_plot(8.0, 3.6)
    from matplotlib.ticker import MaxNLocator

    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    for points in pairs.values():
        left.plot(*_xy(points), color="0.65", linewidth=1.0, marker=".", markersize=4)
    steps = sorted({step for points in pairs.values() for step in points})
    at = [[points[step] for points in pairs.values() if step in points] for step in steps]
    left.plot(steps, [sum(found) / len(found) for found in at], color="black", linewidth=2.4, marker="o", markersize=4)
    left.axhline(0.0, color="0.6", linewidth=0.8)
    tidy(left, "grey: each pair    black: their mean", "outer step", "gradient cosine")
    left.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    last = {pair: _last(points) for pair, points in pairs.items()}
    last |= {(b, a): value for (a, b), value in last.items()}
    names = [name for name in sources if any(name in pair for pair in pairs)]
    rows = [[last.get((a, b), math.nan) for b in names] for a in names]
    largest = max(0.1, *map(abs, last.values()))
    draw_matrix(right, names, rows, cmap="PuOr_r", limits=(-largest, largest))
    right.set_title(f"after step {steps[-1]}", fontsize=9, loc="left")
    figure.suptitle("Gradient cosines between sources, at restored weights", fontsize=11)
    return figure
