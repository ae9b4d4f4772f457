"""Plot of a training run: losses of the sources above, path cosine and inner learning rate below."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .style import COLORS, MARKERS, new_plot, save_plot, shorten, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_training"]


@dataclass(frozen=True)
class _Curve:
    name: str
    points: dict[int, float]  # step -> value; NaN leaves a gap
    style: dict[str, Any]

    @property
    def last(self) -> float:
        """The last finite value. Every curve has one."""
        return next(value for value in reversed(self.points.values()) if math.isfinite(value))


def plot_training(
    log_history: Sequence[Mapping[str, Any]], sources: Sequence[str], path: str | os.PathLike[str]
) -> Path | None:
    """
    Draw the curves of a training run.

    The upper panel shows the held-out losses: training sources solid, OOD sources dashed, means thick. If no
    evaluation set has the name of a source, all are solid. A log without an evaluation shows its training losses
    instead, labeled as path losses. The lower panel shows `path_cosine`, and `inner_lr` if it changes.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            `trainer.state.log_history`: one mapping per logging step or evaluation, with `step` among its keys.
            Non-finite values leave gaps.
        sources (`Sequence[str]`):
            Names of the training sources.
        path (`str` or `os.PathLike`):
            PNG file to write. Missing folders are created.

    Returns:
        `Path`, *optional*: `path`; `None` if the log has nothing to draw. Then no file is written.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.plots.training import plot_training
        >>> log = [{"step": s, "eval_code_loss": 5 / s, "path_cosine": 0.1} for s in (1, 2, 3)]
        >>> plot_training(log, ["code"], Path(mkdtemp(), "training.png")).name
        'training.png'
    """
    losses, axis_label = _loss_curves(log_history, sources)
    cosine, inner_lr = _series(log_history, "path_cosine"), _series(log_history, "inner_lr")
    if len({value for value in inner_lr.values() if math.isfinite(value)}) < 2:
        inner_lr = {}
    if not (losses or cosine or inner_lr):
        return None
    from matplotlib.ticker import MaxNLocator

    heights = [max(3.2, 0.9 + 0.19 * len(losses))] * bool(losses) + [1.9] * bool(cosine or inner_lr)
    figure = new_plot(8.0, sum(heights) + 0.4)
    panels = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for panel in panels:
        tidy(panel)
    panels[-1].xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    panels[-1].set_xlabel("outer step", fontsize=10)
    if losses:
        _draw_losses(panels[0], losses, axis_label)
    if cosine or inner_lr:
        _draw_path(panels[-1], cosine, inner_lr)
    return save_plot(figure, path)


def _series(log: Iterable[Mapping[str, Any]], key: str) -> dict[int, float]:
    """Values of a key by step, the last entry of a step. Empty if none is finite."""
    found = {int(entry["step"]): float(entry[key]) for entry in log if key in entry and "step" in entry}
    points = {step: value if math.isfinite(value) else math.nan for step, value in sorted(found.items())}
    return points if any(map(math.isfinite, points.values())) else {}


def _loss_curves(log: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> tuple[list[_Curve], str]:
    """The curves of the upper panel, and the label of its axis."""
    keys = dict.fromkeys(match[1] for entry in log for key in entry if (match := re.fullmatch(r"eval_(.+)_loss", key)))
    evaluated = [name for name in keys if name != "ood"]
    ood = [name for name in evaluated if sources and name not in sources]
    if len(ood) == len(evaluated):  # no set has the name of a source: the macro loss covers all of them
        ood = []
    rows = [(name, f"eval_{name}_loss", name in ood) for name in sorted(evaluated, key=lambda name: name in ood)]
    means = [("mean" if evaluated else "held out", "eval_loss", False), ("OOD mean", "eval_ood_loss", True)]
    axis_label = "held-out loss (nats per token)"
    if not any(_series(log, key) for _, key, _ in rows + means):
        rows = [(name, f"loss/{name}", False) for name in sources]
        means = [("mean", "loss", False)]
        axis_label = "path loss in training (nats per token)"
    curves = []
    for index, (name, key, dashed) in enumerate(rows + means):
        if points := _series(log, key):
            curves.append(_Curve(name, points, _style(index, dashed, mean=index >= len(rows))))
    return curves, axis_label


def _style(index: int, dashed: bool, mean: bool) -> dict[str, Any]:
    """Line style of a curve. Means are thick and lie below the sources, which stay visible on top."""
    common: dict[str, Any] = {
        "linestyle": (0, (4, 2)) if dashed else "-",
        "markerfacecolor": "white" if dashed else None,
    }
    if mean:
        return common | {"color": "0.6" if dashed else "black", "linewidth": 3.2, "zorder": 2}
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    return common | {"color": color, "linewidth": 1.3, "marker": marker, "markersize": 5.5, "zorder": 3}


def _draw_losses(axes: "Axes", curves: list[_Curve], axis_label: str) -> None:
    """Draw the curves, and to the right of the panel a legend with their last values."""

    def order(curve: _Curve) -> tuple[bool, bool, float]:  # training before OOD, mean first, then by last value
        return curve.style["linestyle"] != "-", "marker" in curve.style, -curve.last

    for index, curve in enumerate(sorted(curves, key=order)):
        value = f"{curve.last:.3f}" if abs(curve.last) < 1000 else f"{curve.last:.3g}"
        # About ten markers per curve, shifted: those of close curves must not coincide.
        every = max(1, len(curve.points) // 10)
        # A single value has no line, so even a mean needs a marker there.
        single = sum(map(math.isfinite, curve.points.values())) == 1
        style: dict[str, Any] = ({"marker": "*", "markersize": 9} if single else {}) | curve.style
        axes.plot(
            list(curve.points),
            list(curve.points.values()),
            label=f"{value}  {shorten(curve.name, 28)}",
            markevery=None if single else (index % every, every),
            **style,
        )
    axes.set_ylabel(axis_label, fontsize=10)
    if any(curve.style["linestyle"] != "-" for curve in curves):
        axes.set_title("solid: training sources    dashed: OOD sources    thick: means", fontsize=9, loc="left")
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.03),
        frameon=False,
        fontsize=8.5,
        handlelength=3.8,
        title="last loss",
        title_fontsize=8.5,
        alignment="left",
    )


def _draw_path(axes: "Axes", cosine: dict[int, float], inner_lr: dict[int, float]) -> None:
    """Draw the path cosine and the inner learning rate, on two axes if there are both."""
    if cosine:
        axes.plot(list(cosine), list(cosine.values()), color="black", linewidth=1.3, marker=".", markersize=4)
        axes.axhline(0.0, color="0.6", linewidth=0.8)
        axes.set_ylabel("path cosine", fontsize=10)
    if inner_lr:
        twin = axes.twinx() if cosine else axes
        twin.plot(list(inner_lr), list(inner_lr.values()), color="#D55E00", linewidth=1.3, linestyle=(0, (1, 1)))
        twin.set_ylabel("inner lr (dotted)", fontsize=10, color="#D55E00")
        twin.tick_params(labelsize=9)
        twin.spines["top"].set_visible(False)
