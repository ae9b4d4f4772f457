"""One picture of a training run: losses per source above, path cosine and inner learning rate below."""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .style import COLORS, MARKERS, new_figure, save_figure, shorten, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_run"]


@dataclass(frozen=True)
class _Curve:
    name: str
    points: dict[int, float]  # step -> value; NaN leaves a gap
    style: dict[str, Any]


def plot_run(
    log_history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], sources: Sequence[str] | None = None
) -> Path:
    """Draws the curves of one run into a PNG.

    The upper panel holds the held-out losses: solid for the training sources, dashed for the OOD sources, thick for
    the means. If no set is named after a training source, all are solid. Without any evaluation the logged training
    losses are drawn instead, and the axis says that they are path losses. The lower panel holds `path_cosine` and, if
    it changes, `inner_lr`; it is left out when the log has neither.

    Args:
        log_history (`Sequence[Mapping[str, Any]]`):
            What `trainer.state.log_history` holds: one mapping per logging or evaluation, with `step` among its keys.
            Non-finite values leave gaps.
        path (`str` or `os.PathLike`):
            File to write, whatever its suffix as PNG. Missing folders are made.
        sources (`Sequence[str]`, *optional*):
            Names of the training sources; by default those of which the log has `loss/<source>` or `tokens/<source>`.

    Returns:
        `Path`: `path`.

    Raises:
        ValueError: If the log holds no finite loss, path cosine or changing inner learning rate.

    Example:
        ```python
        >>> from hf_nexus.plots.training import plot_run
        >>> log = [{"step": s, "eval_code_loss": 5 / s, "tokens/code": s, "path_cosine": 0.1} for s in (1, 2, 3)]
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> plot_run(log, Path(mkdtemp(), "training.png")).name
        'training.png'

        ```
    """
    losses, axis_label = _loss_curves(log_history, sources)
    cosine, inner_lr = _series(log_history, "path_cosine"), _series(log_history, "inner_lr")
    if len({value for value in inner_lr.values() if math.isfinite(value)}) < 2:
        inner_lr = {}
    if not (losses or cosine or inner_lr):
        raise ValueError(
            f"`log_history` has {len(log_history)} entries and none holds a finite loss, `path_cosine` or changing "
            "`inner_lr` beside its `step`: pass `trainer.state.log_history` after at least one logging step or "
            "evaluation (lower `logging_steps` or `eval_steps` if the run was too short to log)."
        )
    from matplotlib.ticker import MaxNLocator

    heights = [max(3.2, 0.9 + 0.19 * len(losses))] * bool(losses) + [1.9] * bool(cosine or inner_lr)
    figure = new_figure(8.0, sum(heights) + 0.4)
    panels = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    for panel in panels:
        tidy(panel)
    panels[-1].xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    panels[-1].set_xlabel("outer step", fontsize=10)
    if losses:
        _draw_losses(panels[0], losses, axis_label)
    if cosine or inner_lr:
        _draw_path(panels[-1], cosine, inner_lr)
    return save_figure(figure, path)


def _series(log: Iterable[Mapping[str, Any]], key: str) -> dict[int, float]:
    """`{step: value}` of one key, the last entry of a step winning; empty if no value is finite."""
    found = {int(entry["step"]): float(entry[key]) for entry in log if key in entry and "step" in entry}
    points = {step: value if math.isfinite(value) else math.nan for step, value in sorted(found.items())}
    return points if any(map(math.isfinite, points.values())) else {}


def _names(log: Iterable[Mapping[str, Any]], pattern: str) -> list[str]:
    """What the group of `pattern` matched among the log's keys, in the order of appearance."""
    found = (match[1] for entry in log for key in entry if (match := re.fullmatch(pattern, key)))
    return list(dict.fromkeys(found))


def _loss_curves(log: Sequence[Mapping[str, Any]], names: Sequence[str] | None) -> tuple[list[_Curve], str]:
    """The curves of the upper panel, and what its axis is called."""
    sources = _names(log, r"(?:loss|tokens)/(.+)") if names is None else list(names)
    evaluated = [name for name in _names(log, r"eval_(.+)_loss") if name != "ood"]
    ood = [name for name in evaluated if sources and name not in sources]
    if len(ood) == len(evaluated):  # no set is named after a source: the macro covers all of them
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
    """Line style of one curve. The means lie under the sources, whose thin lines stay visible on the thick ones."""
    common: dict[str, Any] = {
        "linestyle": (0, (4, 2)) if dashed else "-",
        "markerfacecolor": "white" if dashed else None,
    }
    if mean:
        return common | {"color": "0.6" if dashed else "black", "linewidth": 3.2, "zorder": 2}
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    return common | {"color": color, "linewidth": 1.3, "marker": marker, "markersize": 5.5, "zorder": 3}


def _draw_losses(axes: "Axes", curves: list[_Curve], axis_label: str) -> None:
    """Draws the curves and, outside of the panel, a legend with the last finite value of each."""

    def key(curve: _Curve) -> tuple[bool, bool, float]:  # training before OOD, mean first, then as the curves end
        return curve.style["linestyle"] != "-", "marker" in curve.style, -_last(curve)

    for index, curve in enumerate(sorted(curves, key=key)):
        value = f"{_last(curve):.3f}" if abs(_last(curve)) < 1000 else f"{_last(curve):.3g}"
        label = f"{value}  {shorten(curve.name, 28)}"
        # About ten markers a curve, shifted so that those of close curves do not coincide. A lone value has no line,
        # so there even a mean needs a marker.
        every = max(1, len(curve.points) // 10)
        lone = sum(map(math.isfinite, curve.points.values())) == 1
        style: dict[str, Any] = ({"marker": "*", "markersize": 9} if lone else {}) | curve.style
        shown = None if lone else (index % every, every)
        axes.plot(list(curve.points), list(curve.points.values()), label=label, markevery=shown, **style)
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


def _last(curve: _Curve) -> float:
    """The last finite value; `_series` lets no curve without one through."""
    return next(value for value in reversed(curve.points.values()) if math.isfinite(value))


def _draw_path(axes: "Axes", cosine: dict[int, float], inner_lr: dict[int, float]) -> None:
    """Draws the path cosine and, on an axis of its own if both are there, the inner learning rate."""
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
