"""The plots of a comparison: losses and cosines of the arms, distances between minima, and the loss around them."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.statistics import import_scipy
from ..plots.style import MARKERS, draw_matrix, new_plot, save_plot, series_style, shorten, tidy
from .records import Minima, RunRecord, in_order, metric_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_comparison"]

Spread = np.ndarray  # (4, N): steps, and at each the mean over the runs of an arm with the ends of its 95 % interval
_END = "end of run"
_PLACES = (*MARKERS[:3], "*")  # markers of three minimizers and the end of the run
_MARK: dict[str, Any] = {"color": "white", "markeredgecolor": "black", "markersize": 9, "linestyle": ""}


def plot_comparison(records: Sequence[RunRecord], folder: str | os.PathLike[str], *, baseline: str) -> list[Path]:
    """
    Draw all plots that the records have data for, and return their paths.

    Curves and marks are means over the seeds of an arm, bands and bars their 95 % t-intervals. The mean is not finite
    at a step if any run of the arm is not: a mean over the other runs would hide the divergence.

    Raises:
        ValueError: there is no record of the baseline.

    Example:
        >>> from tempfile import mkdtemp
        >>> from hf_nexus.compare.plots import plot_comparison
        >>> from hf_nexus.compare.records import LossPoint, RunRecord
        >>> def run(arm, gain):
        ...     losses = [(step, 4 / step, 5 / step - gain) for step in (1, 2)]
        ...     return RunRecord(arm, 1, curve=[LossPoint(s, s, {}, {"a": a}, {}, a, a, b) for s, a, b in losses])
        >>> records = [run("adamw", 0), run("nexus", 0.1)]
        >>> [path.name for path in plot_comparison(records, mkdtemp(), baseline="adamw")]
        ['ood_against_train.png', 'losses.png']
    """
    names = list(dict.fromkeys(record.arm for record in records))
    if baseline not in names:
        raise ValueError(f"No record of the baseline {baseline!r}; the records are of {names}.")
    names.sort(key=lambda name: name != baseline)
    arms = [_Arm(name, [run for run in records if run.arm == name], index) for index, name in enumerate(names)]
    plots = {
        "ood_against_train.png": _ood_against_train(arms),
        "losses.png": _losses(arms),
        "cosines.png": _cosines(arms),
        "minima_distance.png": _distances({arm.name: arm.minima for arm in arms if arm.minima}),
        "landscape.png": _landscapes({arm.name: arm.minima[0] for arm in arms if arm.minima and arm.minima[0].plane}),
        "distance_against_ood.png": _distance_against_ood(arms),
    }
    return [save_plot(figure, Path(folder, name)) for name, figure in plots.items() if figure is not None]


# ---- Arms, and means over their runs ----


@dataclass(frozen=True, eq=False)
class _Arm:
    name: str
    runs: list[RunRecord]
    index: int  # 0 for the baseline

    @property
    def style(self) -> dict[str, Any]:
        return series_style(self.index)

    @property
    def minima(self) -> list[Minima]:
        return [run.minima for run in self.runs if run.minima and run.minima.pairwise]

    def spread(self, metric: str, baseline: "_Arm | None" = None) -> Spread:
        """A loss, or its difference to the baseline at the same seed."""
        curves = self._curves(metric)
        if baseline is not None:
            theirs = baseline._curves(metric)
            curves = {
                seed: {step: loss - theirs[seed][step] for step, loss in curve.items() if step in theirs[seed]}
                for seed, curve in curves.items()
                if seed in theirs
            }
        return _spread(curves.values())

    def _curves(self, metric: str) -> dict[int, dict[int, float]]:
        found = {run.seed: {point.step: point.metrics() for point in run.curve} for run in self.runs}
        return {seed: {step: m[metric] for step, m in curve.items() if metric in m} for seed, curve in found.items()}

    def draw(self, axes: "Axes", spread: Spread, *, band: bool = True, markers: int = 8) -> None:
        """Draw the mean as a curve, and its interval as a band. The arms' markers are at different steps."""
        steps, mean, low, high = spread
        every = max(1, len(steps) // markers)
        axes.plot(steps, mean, linewidth=1.4, markersize=4.5, markevery=(self.index % every, every), **self.style)
        if band:
            axes.fill_between(steps, low, high, color=self.style["color"], alpha=0.13, linewidth=0)


def _spread(runs: Iterable[Mapping[int, float]]) -> Spread:
    """Mean and 95 % interval at each step; NaN where a run has no finite value. One run has no interval."""
    runs = list(runs)
    steps = sorted({step for run in runs for step in run})
    if not steps:
        return np.empty((4, 0))  # `size` is 0
    values = np.array([[run.get(step, math.nan) for step in steps] for run in runs])
    values[~np.isfinite(values)] = math.nan
    mean, half = values.mean(0), 0.0
    if len(runs) > 1:
        half = import_scipy().stats.t.ppf(0.975, len(runs) - 1) * values.std(0, ddof=1) / math.sqrt(len(runs))
    return np.stack([steps, mean, mean - half, mean + half])


def _half(spread: Spread) -> float:
    """Half of the interval at the end; 0 for a single run."""
    return np.nan_to_num(spread[3, -1] - spread[1, -1])


def _smoothed(spread: Spread, window: int) -> Spread:
    """Mean over the finite ones of `window` neighbouring points; a point that is not finite stays as it is."""
    finite = np.isfinite(spread[1])
    if not finite.any():
        return spread
    near = slice(window // 2, window // 2 + len(finite))  # of a convolution, the points centred on one of the curve
    count, *rows = (np.convolve(row, np.ones(window))[near] for row in (finite, *np.where(finite, spread[1:], 0.0)))
    return np.stack([spread[0], *(np.where(finite, row / np.maximum(count, 1), math.nan) for row in rows)])


def _add_legend(figure: "Figure", labels: Mapping[str, Mapping[str, Any]]) -> None:
    """A legend of labels and their line styles below the panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **{"markersize": 6, "linewidth": 1.5} | dict(style)) for style in labels.values()]
    # The space in front: matplotlib omits labels that start with an underscore from legends.
    columns = max(1, int(figure.get_figwidth() / (0.92 + 0.064 * max(map(len, labels)))))
    place: dict[str, Any] = {
        "loc": "outside lower center",
        "ncols": columns,
        "frameon": False,
        "fontsize": 9,
        "handlelength": 4,
    }
    figure.legend(handles, [f" {label}" for label in labels], **place)


def _add_arms(figure: "Figure", arms: Iterable[_Arm]) -> None:
    labels = {}
    for arm in arms:
        diverged = sum(run.diverged for run in arm.runs)
        seeds = _seeds(arm.runs) + f", {diverged} diverged" * bool(diverged)
        labels[f"{shorten(arm.name, 28)} ({seeds})"] = arm.style
    _add_legend(figure, labels)


def _on_scale(axes: "Axes", differences: Mapping[_Arm, float], loss: float, *, to_baseline: bool = True) -> list[_Arm]:
    """
    Arms with a finite difference to a reference that would not hide the others; those are named in the plot, with
    their difference if the reference is the baseline.

    An arm is off the scale beyond both 2 % of the reference's `loss` and five times the median distance.
    """
    sizes = sorted(abs(value) for value in differences.values() if math.isfinite(value))
    limit = max(5 * sizes[(len(sizes) - 1) // 2], 0.02 * abs(loss)) if sizes else 0.0
    hidden = {arm: f" ({difference:+.2g})" for arm, difference in differences.items() if abs(difference) > limit}
    if hidden:
        names = ", ".join(shorten(arm.name, 20) + found * to_baseline for arm, found in hidden.items())
        text = "off scale" + ", with the difference to the baseline" * to_baseline + f": {names}"
        axes.text(0.01, 0.01, text, transform=axes.transAxes, fontsize=7.5)
    return [arm for arm, difference in differences.items() if abs(difference) <= limit]


def _seeds(runs: Sequence[Any]) -> str:
    return f"{len(runs)} seed{'s' * (len(runs) > 1)}"


def _bands(arms: Sequence[_Arm]) -> bool:
    """Whether the bands of so many arms can be told apart."""
    return len(arms) <= 4


# ---- Losses and cosines ----


def _ood_against_train(arms: Sequence[_Arm]) -> "Figure | None":
    """The last part of training, on the scale of the ends of the arms."""
    paths: dict[_Arm, tuple[Spread, Spread]] = {}  # training and OOD losses of an arm during training
    for arm in arms:
        train, ood = arm.spread("train_loss"), arm.spread("ood_loss")
        if ood.size:
            paths[arm] = (train[:, np.isin(train[0], ood[0])], ood)
    ends = {arm: ood[1, -1] for arm, (_, ood) in paths.items() if math.isfinite(ood[1, -1])}
    if not ends:
        return None
    figure = new_plot(8.5, 5.6)
    axes = figure.subplots()
    tidy(axes, "marks: mean at the end with its 95 % interval over seeds; thin lines: single seeds")
    axes.set(xlabel="training loss", ylabel="OOD loss")
    for arm, (x, y) in paths.items():
        axes.plot(x[1], y[1], linewidth=1.5, **arm.style | {"marker": ""}, zorder=3)
        mark = arm.style | {"markersize": 8, "markeredgecolor": "white", "linewidth": 0.9, "capsize": 3}
        axes.errorbar(x[1, -1], y[1, -1], xerr=_half(x), yerr=_half(y), **mark, zorder=4)
        for run in arm.runs if len(arm.runs) > 1 else []:
            points = [(p.train_loss, math.nan if p.ood_loss is None else p.ood_loss) for p in run.curve]
            axes.plot(*zip(*points, strict=True), color=arm.style["color"], linewidth=0.5, alpha=0.6, zorder=2)
    start = next(iter(ends.values()))
    differences = {arm: end - start for arm, end in ends.items()}
    shown = _on_scale(axes, differences, start, to_baseline=arms[0] in ends)
    for axis, name in enumerate(("xlim", "ylim")):
        spreads = [paths[arm][axis] for arm in shown]
        low, high = min(found[2, -1] for found in spreads), max(found[3, -1] for found in spreads)
        room = max(high - low, np.nan_to_num(np.ptp(spreads[0][1, -2:]))) or 0.01 * abs(low)
        axes.set(**{name: (low - 0.35 * room, high + 0.7 * room)})
    figure.suptitle("OOD loss against training loss, nats per token; lower is better", fontsize=10.5)
    _add_arms(figure, paths)
    return figure


def _losses(arms: Sequence[_Arm]) -> "Figure | None":
    """Two panels for each metric on the curve: its values, and their differences to the baseline."""
    points = [point.metrics() for arm in arms for run in arm.runs for point in run.curve]
    if not any(math.isfinite(loss) for point in points for loss in point.values()):
        return None
    metrics = in_order(metric for point in points for metric in point if metric != "train_loss")
    rows = math.ceil(len(metrics) / 2)
    figure = new_plot(13.0, 1.0 + 1.95 * rows)
    panels = figure.subplots(rows, 4, sharex=True, squeeze=False, width_ratios=[1, 1.7] * 2).reshape(-1, 2)
    for index, ((left, right), metric) in enumerate(zip(panels, metrics, strict=False)):
        x = "outer step" * (index >= len(metrics) - 2)
        tidy(left, shorten(metric_label(metric), 30), x, fontsize=8, fontweight="bold")
        tidy(right, x=x, fontsize=8)
        for axes in (left, right):
            axes.tick_params(labelbottom=bool(x))
        for arm in arms:
            arm.draw(left, arm.spread(metric), band=False, markers=5)
        right.axhline(0.0, color="black", linewidth=1.2)
        _draw_differences(right, arms, metric)
    for axes in panels[len(metrics) :].flat:
        axes.set_axis_off()
    figure.suptitle(
        "Held-out losses, nats per token, lower is better. Left: mean over seeds. Right: difference to "
        f"{shorten(arms[0].name, 20)} at the same seed, below 0 is better:\n"
        f"mean{' and 95 % interval' * _bands(arms)} over seeds; on its right, mean and 95 % interval at the end.",
        fontsize=10,
    )
    _add_arms(figure, arms)
    return figure


def _draw_differences(axes: "Axes", arms: Sequence[_Arm], metric: str) -> None:
    """Curves of the other arms around the zero line, scaled to the last three quarters of training."""
    baseline, *others = arms
    spreads = {arm: found for arm in others if (found := arm.spread(metric, baseline)).size}
    if not spreads:
        return
    shown = _on_scale(axes, {arm: found[1, -1] for arm, found in spreads.items()}, baseline.spread(metric)[1, -1])
    first, last = (end(end(found[0]) for found in spreads.values()) for end in (min, max))
    late = [np.abs(spreads[arm][1:, spreads[arm][0] >= first + (last - first) / 4]) for arm in shown]
    for place, (arm, found) in enumerate(spreads.items(), start=1):
        arm.draw(axes, found, band=_bands(arms), markers=5)
        mark = arm.style | {"markersize": 4.5, "capsize": 2, "linewidth": 1.2, "linestyle": "-"}
        axes.errorbar(last + place * (last - first or 1) * 0.03, found[1, -1], yerr=_half(found), **mark)
    limit = 1.15 * max((part[np.isfinite(part)].max(initial=0.0) for part in late), default=0.0) or 1.0
    axes.set_ylim(-limit, limit)


def _cosines(arms: Sequence[_Arm]) -> "Figure | None":
    """Gradient cosines between sources, and path cosines of the outer steps."""
    gradients, paths = {}, {}
    for arm in arms:
        of_runs = ({step: [c for _, _, c in pairs] for step, pairs in run.cosines} for run in arm.runs)
        gradients[arm] = _spread({step: float(np.mean(c)) for step, c in run.items() if c} for run in of_runs)
        logged = ([row for row in run.path if "path_cosine" in row] for run in arm.runs)
        paths[arm] = _spread({int(row["step"]): row["path_cosine"] for row in rows} for rows in logged)
    window = max(1, max(found.shape[1] // 20 for found in paths.values()))
    window += 1 - window % 2  # odd, for a window that is centred
    panels = {
        "gradient cosine between sources, mean over pairs; 1: their gradients agree": gradients,
        "path cosine" + f", moving mean of {window} logged values" * (window > 1): {
            arm: _smoothed(found, window) for arm, found in paths.items()
        },
    }
    panels = {k: curves for k, curves in panels.items() if any(np.isfinite(c[1]).any() for c in curves.values())}
    if not panels:
        return None
    figure = new_plot(1.5 + 4.7 * len(panels), 4.4)
    from matplotlib.ticker import MaxNLocator

    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        tidy(axes, title, "outer step")
        axes.axhline(0.0, color="0.6", linewidth=0.8)
        for arm, spread in curves.items():
            if spread.size:
                arm.draw(axes, spread, band=_bands(arms))
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
    title = "Cosines during training: mean" + " and 95 % interval" * _bands(arms) + " over seeds"
    figure.suptitle(title, fontsize=10.5)
    _add_arms(figure, [arm for arm in arms if any(curves[arm].size for curves in panels.values())])
    return figure


# ---- Minima ----


def _distances(arms: Mapping[str, Sequence[Minima]]) -> "Figure | None":
    """For each arm the matrix of relative distances of the minimizers to one another and to the end of the run."""
    if not arms:
        return None
    names = [*dict.fromkeys(name for runs in arms.values() for run in runs for name in run.to_start), _END]
    matrices = {arm: _mean_distances(runs, names) for arm, runs in arms.items()}
    values = np.concatenate([rows[np.isfinite(rows)] for rows in matrices.values()])
    limits = (values.min(), values.max()) if values.size else (0.0, 1.0)
    columns = min(3, len(arms))
    lines = math.ceil(len(arms) / columns)
    side = max(2.4, 0.36 * len(names))
    figure = new_plot(1.6 + (side + 0.95) * columns, 1.0 + (side + 1.1) * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(arms) :]:
        axes.set_axis_off()
    for axes, (arm, rows) in zip(panels.flat, matrices.items(), strict=False):
        image = draw_matrix(axes, names, rows.tolist(), cmap="cividis", limits=limits, number=".1f")
        for line in (axes.axhline, axes.axvline):
            line(len(names) - 1.5, color="white", linewidth=3)
        mean = 100 * sum(run.relative_distance for run in arms[arm]) / len(arms[arm])
        title = f"{shorten(arm, 28)}\nmean of pairs {mean:.2f} %, {_seeds(arms[arm])}"
        axes.set_title(title, fontsize=9.5, loc="left")
    bar = figure.colorbar(image, ax=panels, shrink=0.6, aspect=30)
    bar.set_label("L2 distance in % of the parameter norm", fontsize=9)
    title = "Distances between the minimizers of the sources, mean over seeds; closer is what Nexus aims at"
    figure.suptitle(title, fontsize=10.5)
    return figure


def _mean_distances(runs: Sequence[Minima], names: Sequence[str]) -> np.ndarray:
    """Relative distances in %, each the mean over the runs that have the pair; NaN without such a run."""
    total, count = np.zeros((2, len(names), len(names)))
    for run in runs:
        for a, b, value in [*run.pairwise, *((a, _END, value) for a, value in run.to_start.items())]:
            for place in ((names.index(a), names.index(b)), (names.index(b), names.index(a))):
                total[place] += 100 * value / run.parameter_norm
                count[place] += 1
    return np.divide(total, count, out=np.full_like(total, math.nan), where=count > 0)


def _landscapes(arms: Mapping[str, Minima]) -> "Figure | None":
    """For each arm the loss on the plane through three minimizers, and below it the loss on the segments between."""
    if not arms:
        return None
    planes = {arm: minima.plane for arm, minima in arms.items() if minima.plane is not None}
    columns = min(3, len(arms))
    lines = math.ceil(len(arms) / columns)
    figure = new_plot(1.2 + 4.0 * columns, 0.8 + 5.8 * lines)
    panels = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=[1.5, 1] * lines)
    above, below = list(panels[::2].flat), list(panels[1::2].flat)
    for axes in (*above[len(arms) :], *below[len(arms) :]):
        axes.set_axis_off()
    levels = _levels(planes.values())
    for top, bottom, (arm, plane) in zip(above, below, planes.items(), strict=False):
        image = _draw_plane(top, shorten(arm, 36), plane, levels)
        _draw_segments(bottom, arms[arm], plane["sources"])
    limits = [axes.get_ylim() for axes in below[: len(arms)]]
    for axes in below:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    bar = figure.colorbar(image, ax=panels[:, -1], shrink=0.5, aspect=40, format="%.2f")
    bar.set_label("mean held-out loss of the three sources (nats per token)", fontsize=9)
    title = "Loss on the plane and on the segments between three minimizers, first seed; lower and flatter is better"
    figure.suptitle(title, fontsize=11)
    marks = zip([*plane["sources"], _END], _PLACES, strict=True)
    _add_legend(figure, {shorten(name, 16): {"marker": mark, **_MARK} for name, mark in marks})
    return figure


def _levels(planes: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Contour levels of the lower losses: the corners of the planes are high, and would hide the minima."""
    losses = np.concatenate([np.ravel(np.array(plane["loss"], dtype=float)) for plane in planes])
    losses = losses[np.isfinite(losses)]
    low, high = (losses.min(), np.quantile(losses, 0.9)) if losses.size else (0.0, 1.0)
    return np.linspace(low, high if low < high else low + 1, 13)


def _draw_plane(axes: "Axes", title: str, plane: Mapping[str, Any], levels: np.ndarray) -> Any:
    loss, limit = np.ma.masked_invalid(np.array(plane["loss"], dtype=float)), 1.6 * levels[-1] - 0.6 * levels[0]
    image = axes.contourf(plane["x"], plane["y"], loss, levels, cmap="Blues", extend="both", vmax=limit)
    if loss.count() and loss.min() < levels[-1] and loss.max() > levels[0]:
        contours = axes.contour(plane["x"], plane["y"], loss, levels[::2], colors="black", linewidths=0.6)
        axes.clabel(contours, fontsize=7, fmt="%.2f")
    for (x, y), marker in zip(plane["points"], _PLACES, strict=True):
        axes.plot([x], [y], marker=marker, **_MARK | {"markersize": 13 if marker == "*" else 8}, zorder=5)
    tidy(axes, title, "L2 distance", "L2 distance", fontsize=8.5, fontweight="bold")
    axes.grid(False)
    axes.set_aspect("equal")
    return image


def _draw_segments(axes: "Axes", minima: Minima, sources: Sequence[str]) -> None:
    """Draw the segments between the minimizers of the plane."""
    barriers = {(a, b): value for a, b, value in minima.barriers}
    drawn = [row for row in minima.segments if {*row[:2]} <= {*sources}]
    for index, (a, b, losses) in enumerate(drawn):
        label = f" {shorten(a, 12)} – {shorten(b, 12)}: barrier {barriers.get((a, b), math.nan):.3g}"  # noqa: RUF001
        style = series_style(index + 1)
        axes.plot(minima.positions, losses, label=label, linewidth=1.5, markersize=4, markevery=(index, 3), **style)
        axes.plot([0, 1], [losses[0], losses[-1]], color=style["color"], linewidth=0.6)
    title = "loss on segments; a barrier is the height above the thin line"
    tidy(axes, title, "position between the first and the second minimizer", "loss", fontsize=8.5)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), handlelength=4)


def _distance_against_ood(arms: Sequence[_Arm]) -> "Figure | None":
    """Minima distance against OOD gain over the baseline: large marks for arms, small marks for runs."""
    baseline = {run.seed: run.metrics().get("ood_loss", math.nan) for run in arms[0].runs if run.curve}
    points: dict[_Arm, list[tuple[float, float]]] = {}
    for arm in arms:
        for run in arm.runs if baseline else []:
            end = run.metrics() if run.curve and run.minima else {}
            x, loss = end.get("minima_distance", math.nan), end.get("ood_loss", math.nan)
            y = baseline.get(run.seed, math.nan) - loss
            if math.isfinite(x) and math.isfinite(y):
                points.setdefault(arm, []).append((100 * x, y))
    if not points:
        return None
    figure = new_plot(8.5, 5.2)
    axes = figure.subplots()
    tidy(axes, "large: mean of an arm with its 95 % interval over seeds; small: single runs")
    axes.set(
        xlabel="mean distance between minimizers, % of the parameter norm",
        ylabel=f"OOD gain over {shorten(arms[0].name, 20)} at the same seed\n(nats per token)",
    )
    axes.axhline(0.0, color="0.5", linewidth=0.9)
    means = {arm: -float(np.mean([y for _, y in found])) for arm, found in points.items()}
    for arm in _on_scale(axes, means, min(abs(loss) for loss in baseline.values() if math.isfinite(loss))):
        mark: dict[str, Any] = arm.style | {"linestyle": ""}
        if len(points[arm]) > 1:
            axes.plot(*zip(*points[arm], strict=True), markersize=4, alpha=0.55, zorder=2, **mark)
        xs, ys = (_spread({0: value} for value in values) for values in zip(*points[arm], strict=True))
        large: dict[str, Any] = {"markersize": 9, "markeredgecolor": "white", "elinewidth": 0.8, "zorder": 4}
        axes.errorbar(xs[1], ys[1], xerr=_half(xs), yerr=_half(ys), **mark, **large)
    axes.margins(0.12)
    figure.suptitle("Minima distance and OOD gain: to the left is closer, higher is better", fontsize=10.5)
    _add_arms(figure, points)
    return figure
