"""The plots of a comparison: losses and cosines of the arms, distances between minima, and the loss around them."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plots.style import MARKERS, draw_matrix, new_plot, place_labels, save_plot, series_style, shorten, tidy
from .records import Minima, RunRecord, in_order, metric_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_comparison"]

_Spread = tuple[float, float, float]  # mean, lowest and highest over the runs of an arm
_END = "end of run"


def plot_comparison(records: Sequence[RunRecord], folder: str | os.PathLike[str], *, baseline: str) -> list[Path]:
    """
    Draw all plots that the records have data for.

    Curves and marks are means over the seeds of an arm, bands and bars the range. The mean is not finite at a step if
    any run of the arm is not: a mean over the other runs would hide the divergence.

    Args:
        records (`Sequence[RunRecord]`):
            Records of the runs; arms may lack seeds.
        folder (`str` or `os.PathLike`):
            Where to write. Missing folders are created.
        baseline (`str`):
            The arm to compare with.

    Returns:
        `list[Path]`: those of `ood_against_train.png`, `losses.png`, `cosines.png`, `minima_distance.png`,
        `landscape.png`, `distance_against_ood.png` that were drawn, in this order.

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
    minima = {arm.name: [run.minima for run in arm.runs if run.minima and run.minima.pairwise] for arm in arms}
    minima = {name: found for name, found in minima.items() if found}
    plots = {
        "ood_against_train.png": _ood_against_train(arms),
        "losses.png": _losses(arms),
        "cosines.png": _cosines(arms),
        "minima_distance.png": _distances(minima),
        "landscape.png": _landscapes({name: found[0] for name, found in minima.items() if found[0].plane}),
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
    def label(self) -> str:
        diverged = sum(run.diverged for run in self.runs)
        # The space in front: matplotlib omits labels that start with an underscore from legends.
        return f" {shorten(self.name, 28)} ({_seeds(self.runs)}{f', {diverged} diverged' * bool(diverged)})"

    def curves(self, metric: str) -> dict[int, dict[int, float]]:
        """A loss by seed and step."""
        found = {run.seed: {point.step: point.metrics() for point in run.curve} for run in self.runs}
        return {seed: {step: m[metric] for step, m in curve.items() if metric in m} for seed, curve in found.items()}

    def mean(self, metric: str) -> dict[int, _Spread]:
        return _over_runs(self.curves(metric).values())

    def mean_difference(self, baseline: "_Arm", metric: str) -> dict[int, _Spread]:
        """Difference to the baseline at the same seed; empty without a common seed."""
        theirs = baseline.curves(metric)
        return _over_runs(
            {step: value - theirs[seed][step] for step, value in curve.items() if step in theirs[seed]}
            for seed, curve in self.curves(metric).items()
            if seed in theirs
        )

    def draw(self, axes: "Axes", points: Mapping[int, _Spread], *, band: bool = True, markers: int = 8) -> None:
        """Draw the mean as a curve, and the range as a band. The arms' markers are at different steps."""
        steps, means = list(points), [mean for mean, _, _ in points.values()]
        every = max(1, len(steps) // markers)
        axes.plot(steps, means, linewidth=1.4, markersize=4.5, markevery=(self.index % every, every), **self.style)
        if band:
            low, high = [[spread[index] for spread in points.values()] for index in (1, 2)]
            axes.fill_between(steps, low, high, color=self.style["color"], alpha=0.13, linewidth=0)


def _seeds(runs: Sequence[Any]) -> str:
    return f"{len(runs)} seed{'s' * (len(runs) > 1)}"


def _over_runs(runs: Iterable[Mapping[int, float]]) -> dict[int, _Spread]:
    """Mean and range at each step; NaN where a run has no finite value."""
    runs = list(runs)
    steps = sorted({step for run in runs for step in run})
    return {step: _spread([run.get(step, math.nan) for run in runs]) for step in steps}


def _spread(values: Sequence[float]) -> _Spread:
    if not values or not all(map(math.isfinite, values)):
        return math.nan, math.nan, math.nan
    return sum(values) / len(values), min(values), max(values)


def _bars(spread: _Spread) -> list[list[float]]:
    """Lengths of the error bars below and above a mean, which rounding can move out of the range."""
    mean, low, high = spread
    return [[length if math.isnan(length) else max(length, 0.0)] for length in (mean - low, high - mean)]


def _smoothed(points: Mapping[int, _Spread], window: int) -> dict[int, _Spread]:
    """Mean over the finite ones of `window` neighbouring points; a point that is not finite stays as it is."""
    steps, half, found = list(points), window // 2, dict(points)
    for index, step in enumerate(steps):
        near = [points[other] for other in steps[max(0, index - half) : index + half + 1]]
        near = [spread for spread in near if math.isfinite(spread[0])]
        if math.isfinite(points[step][0]):
            mean, low, high = (sum(column) / len(near) for column in zip(*near, strict=True))
            found[step] = (mean, low, high)
    return found


def _limit(differences: Iterable[float], loss: float) -> float:
    """
    Distance from the baseline that a plot shows: that of the farthest arm, except for arms off the scale.

    An arm is off the scale, and would hide the others, beyond both 2 % of the baseline's `loss` and five times the
    median distance.
    """
    sizes = sorted(abs(value) for value in differences if math.isfinite(value))
    return min(sizes[-1], max(5 * sizes[(len(sizes) - 1) // 2], 0.02 * abs(loss))) if sizes else 0.0


def _add_legend(figure: "Figure", arms: Sequence[_Arm]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], markersize=6, linewidth=1.5, **arm.style) for arm in arms]
    labels = [arm.label for arm in arms]
    columns = max(1, int(figure.get_figwidth() / (0.85 + 0.064 * max(map(len, labels)))))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, handlelength=4
    )


def _label(axes: "Axes", points: Mapping[_Arm, tuple[float, float]]) -> None:
    """Write the name of each arm at its point, and in a corner those of arms outside of the axes."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    inside = {arm: (x, y) for arm, (x, y) in points.items() if left <= x <= right and bottom <= y <= top}
    outside = [(arm, x, y) for arm, (x, y) in points.items() if arm not in inside and math.isfinite(y)]
    if outside:
        names = [f"{shorten(arm.name, 20)} ({x:.3g}, {y:.3g})" for arm, x, y in outside]
        axes.text(0.01, 0.01, "off scale: " + ", ".join(names), transform=axes.transAxes, fontsize=8)
    place_labels(axes, list(inside.values()), [shorten(arm.name, 24) for arm in inside])


def _bands(arms: Sequence[_Arm]) -> bool:
    """Whether the bands of so many arms can be told apart."""
    return len(arms) <= 4


# ---- Losses and cosines ----

_Path = tuple[_Arm, tuple[list[_Spread], list[_Spread]]]  # training and OOD losses of an arm during training


def _ood_against_train(arms: Sequence[_Arm]) -> "Figure | None":
    """The end of training in a large panel, and all of training in a small one."""
    paths: list[_Path] = []
    for arm in arms:
        train, ood = arm.mean("train_loss"), arm.mean("ood_loss")
        if steps := [step for step in train if step in ood]:
            paths.append((arm, ([train[step] for step in steps], [ood[step] for step in steps])))
    if not any(math.isfinite(mean) for _, (_, y) in paths for mean, _, _ in y):
        return None
    figure = new_plot(10.5, 5.4)
    late, whole = figure.subplots(1, 2, width_ratios=[2.1, 1])
    for axes in (late, whole):
        tidy(axes)
        axes.set_xlabel("training loss", fontsize=10)
        for arm, (x, y) in paths:
            axes.plot([s[0] for s in x], [s[0] for s in y], linewidth=1.5, **arm.style | {"marker": ""}, zorder=3)
            length = {"xerr": _bars(x[-1]), "yerr": _bars(y[-1])} if axes is late else {}
            size = 8 if axes is late else 5
            mark = arm.style | {"markersize": size, "markeredgecolor": "white", "linewidth": 0.9, "capsize": 3}
            axes.errorbar(x[-1][0], y[-1][0], **length, **mark, zorder=4)
    for arm, _ in paths:
        for run in arm.runs if len(arm.runs) > 1 else []:
            points = [(p.train_loss, math.nan if p.ood_loss is None else p.ood_loss) for p in run.curve]
            late.plot(*zip(*points, strict=True), color=arm.style["color"], linewidth=0.5, alpha=0.6, zorder=2)
    late.set_ylabel("OOD loss", fontsize=10)
    late.set_title("end of training: mean and range over seeds (thin: single seeds)", fontsize=9.5, loc="left")
    whole.set_title("all of training, from right to left", fontsize=9.5, loc="left")
    figure.suptitle("OOD loss against training loss at restored weights, nats per token", fontsize=10.5)
    _zoom(late, whole, paths)
    _add_legend(figure, [arm for arm, _ in paths])
    _label(late, {arm: (x[-1][0], y[-1][0]) for arm, (x, y) in paths})
    return figure


def _zoom(late: "Axes", whole: "Axes", paths: Sequence[_Path]) -> None:
    """Limit `late` to the ends of training, without arms off the scale, and mark this area in `whole`."""
    from matplotlib.patches import Rectangle

    frame = []
    for axis in (0, 1):
        finite = [found for _, path in paths if (found := [s for s in path[axis] if math.isfinite(s[0])])]
        start = finite[0][-1][0]
        far = _limit([found[-1][0] - start for found in finite[1:]], start)
        ends = [found[-1] for found in finite if abs(found[-1][0] - start) <= far]
        low, high = min(end[1] for end in ends), max(end[2] for end in ends)
        step = abs(finite[0][-2][0] - start) if len(finite[0]) > 1 else 0.0
        room = max(high - low, step) or 0.01 * abs(start)
        frame.append((low - 0.35 * room, high + 0.7 * room))
    (left, right), (bottom, top) = frame
    late.set(xlim=(left, right), ylim=(bottom, top))
    whole.add_patch(Rectangle((left, bottom), right - left, top - bottom, fill=False, edgecolor="0.3", linewidth=0.8))


def _losses(arms: Sequence[_Arm]) -> "Figure | None":
    """Two panels for each source: its held-out loss, and its differences to the baseline."""
    points = [point.metrics() for arm in arms for run in arm.runs for point in run.curve]
    if not any(math.isfinite(loss) for point in points for loss in point.values()):
        return None
    metrics = in_order(metric for point in points for metric in point if metric != "train_loss")
    rows = math.ceil(len(metrics) / 2)
    figure = new_plot(13.0, 1.0 + 1.95 * rows)
    panels = figure.subplots(rows, 4, sharex=True, squeeze=False, width_ratios=[1, 1.7] * 2).reshape(-1, 2)
    for (left, right), metric in zip(panels, metrics, strict=False):
        tidy(left, 8)
        tidy(right, 8)
        left.set_title(shorten(metric_label(metric), 30), fontsize=9.5, loc="left", fontweight="bold")
        for arm in arms:
            arm.draw(left, arm.mean(metric), band=False, markers=5)
        right.axhline(0.0, color="black", linewidth=1.2)
        _draw_differences(right, arms, metric)
    for axes in panels[len(metrics) :].flat:
        axes.set_axis_off()
    for axes in panels[max(0, len(metrics) - 2) : len(metrics)].flat:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("outer step", fontsize=9)
    figure.suptitle(
        "Held-out losses, nats per token. Left: mean over seeds. Right: difference to the baseline at the same seed "
        "(negative is better),\n"
        f"mean over seeds{' with the range as a band' * _bands(arms)}; on the right, mean and range at the end.",
        fontsize=10,
    )
    _add_legend(figure, arms)
    return figure


def _draw_differences(axes: "Axes", arms: Sequence[_Arm], metric: str) -> None:
    """Curves of the other arms around the zero line, scaled to the last three quarters of training."""
    baseline, *others = arms
    found = {arm.name: arm.mean_difference(baseline, metric) for arm in others}
    steps = sorted({step for points in found.values() for step in points})
    if not steps:
        return
    peaks, outside, final = [], [], next(reversed(baseline.mean(metric).values()))[0]
    for points in found.values():
        late = [s for step, s in points.items() if step >= steps[0] + (steps[-1] - steps[0]) / 4]
        peaks.append(max((abs(x) for s in late for x in s if math.isfinite(x)), default=math.nan))
    limit = 1.15 * _limit(peaks, final if math.isfinite(final) else 0.0) or 1.0
    stride = (steps[-1] - steps[0] or 1) * 0.03
    for place, arm in enumerate(others, start=1):
        if not found[arm.name]:
            continue
        arm.draw(axes, found[arm.name], band=_bands(arms), markers=5)
        end = list(found[arm.name].values())[-1]
        if abs(end[0]) > limit:
            outside.append(f"{shorten(arm.name, 18)} ends at {end[0]:+.2g}")
        mark = arm.style | {"markersize": 4.5, "capsize": 2, "linewidth": 1.2, "linestyle": "-"}
        axes.errorbar(steps[-1] + place * stride, end[0], yerr=_bars(end), **mark)
    axes.set_ylim(-limit, limit)
    axes.text(0.99, 0.98, "\n".join(outside), transform=axes.transAxes, ha="right", va="top", fontsize=7.5)


def _cosines(arms: Sequence[_Arm]) -> "Figure | None":
    """Gradient cosines between sources, and path cosines of the outer steps."""
    gradients, paths, window = {}, {}, 1
    for arm in arms:
        of_pairs = [{step: [value for _, _, value in pairs] for step, pairs in run.cosines} for run in arm.runs]
        gradients[arm.name] = _over_runs({s: _spread(pairs)[0] for s, pairs in run.items()} for run in of_pairs)
        logged = [[row for row in run.path if "path_cosine" in row] for run in arm.runs]
        paths[arm.name] = _over_runs({int(row["step"]): row["path_cosine"] for row in rows} for rows in logged)
        window = max(window, len(paths[arm.name]) // 20)
    window += 1 - window % 2  # odd, for a window that is centred
    paths = {name: _smoothed(points, window) for name, points in paths.items()}
    path = "path cosine" + f", moving mean of {window} logged values" * (window > 1)
    panels = {"gradient cosine between sources, mean over pairs": gradients, path: paths}
    panels = {
        title: curves
        for title, curves in panels.items()
        if any(math.isfinite(mean) for points in curves.values() for mean, _, _ in points.values())
    }
    if not panels:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = new_plot(1.5 + 4.7 * len(panels), 4.4)
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        tidy(axes)
        axes.axhline(0.0, color="0.6", linewidth=0.8)
        for arm in arms:
            if curves[arm.name]:
                arm.draw(axes, curves[arm.name], band=_bands(arms))
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
        axes.set_xlabel("outer step", fontsize=10)
        axes.set_title(title, fontsize=9.5, loc="left")
    figure.suptitle("mean over seeds" + ", with the range as a band" * _bands(arms), fontsize=9.5)
    _add_legend(figure, [arm for arm in arms if any(curves[arm.name] for curves in panels.values())])
    return figure


# ---- Minima ----


def _distances(arms: Mapping[str, Sequence[Minima]]) -> "Figure | None":
    """For each arm the matrix of relative distances of the minimizers to one another and to the end of the run."""
    if not arms:
        return None
    names = [*dict.fromkeys(name for runs in arms.values() for run in runs for name in run.to_start), _END]
    matrices = {arm: _mean_distances(runs, names) for arm, runs in arms.items()}
    values = [value for rows in matrices.values() for row in rows for value in row if math.isfinite(value)]
    limits = (min(values), max(values)) if values else (0.0, 1.0)
    columns = min(3, len(arms))
    lines = math.ceil(len(arms) / columns)
    side = max(2.4, 0.36 * len(names))
    figure = new_plot(1.6 + (side + 0.95) * columns, 1.0 + (side + 1.1) * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(arms) :]:
        axes.set_axis_off()
    for axes, (arm, rows) in zip(panels.flat, matrices.items(), strict=False):
        image = draw_matrix(axes, names, rows, cmap="cividis", limits=limits, number=".1f")
        axes.axhline(len(names) - 1.5, color="white", linewidth=3)
        axes.axvline(len(names) - 1.5, color="white", linewidth=3)
        mean = 100 * sum(run.relative_distance for run in arms[arm]) / len(arms[arm])
        axes.set_title(
            f"{shorten(arm, 28)}\nmean of pairs {mean:.2f} %, {_seeds(arms[arm])}", fontsize=9.5, loc="left"
        )
    bar = figure.colorbar(image, ax=panels, shrink=0.6, aspect=30)
    bar.set_label("L2 distance in % of the parameter norm", fontsize=9)
    figure.suptitle("Distances between the minimizers of the sources, mean over seeds", fontsize=10.5)
    return figure


def _mean_distances(runs: Sequence[Minima], names: Sequence[str]) -> list[list[float]]:
    """Relative distances in %, each the mean over the runs that have the pair; NaN without such a run."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for a, b, value in [*run.pairwise, *((a, _END, value) for a, value in run.to_start.items())]:
            for pair in ((a, b), (b, a)):
                found.setdefault(pair, []).append(100 * value / run.parameter_norm)
    mean = {pair: sum(values) / len(values) for pair, values in found.items()}
    return [[math.nan if a == b else mean.get((a, b), math.nan) for b in names] for a in names]


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
    levels = _levels(list(planes.values()))
    for axes, (arm, plane) in zip(above, planes.items(), strict=False):
        axes.set_title(shorten(arm, 36), fontsize=10.5, loc="left", fontweight="bold")
        image = _draw_plane(axes, plane, levels)
    losses = [
        loss
        for axes, minima in zip(below, arms.values(), strict=False)
        for loss in _draw_segments(axes, minima)
        if math.isfinite(loss)
    ]
    if losses:
        room = 0.05 * (max(losses) - min(losses)) or 0.01
        for axes in below:
            axes.set_ylim(min(losses) - room, max(losses) + room)
    for axes in (*above[len(arms) :], *below[len(arms) :]):
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=panels[:, -1], shrink=0.5, aspect=40, format="%.2f")
    bar.set_label("mean held-out loss of the three sources (nats per token)", fontsize=9)
    figure.suptitle("Loss on the plane and on the segments between three minimizers (first seed)", fontsize=11)
    for axes, plane in zip(above, planes.values(), strict=False):
        names = [shorten(name, 16) for name in plane["sources"]] + [_END]
        place_labels(axes, plane["points"], names, bbox={"boxstyle": "round,pad=0.15", "fc": "white", "lw": 0})
    return figure


def _levels(planes: Sequence[Mapping[str, Any]]) -> list[float]:
    """Contour levels from the lowest loss to a little above the minimizers; the corners of the planes are higher."""
    low, high = math.inf, -math.inf
    for plane in planes:
        low = min([low, *(loss for row in plane["loss"] for loss in row if math.isfinite(loss))])
        for x, y in plane["points"]:
            column = min(range(len(plane["x"])), key=lambda i: abs(plane["x"][i] - x))
            row = min(range(len(plane["y"])), key=lambda i: abs(plane["y"][i] - y))
            if math.isfinite(plane["loss"][row][column]):
                high = max(high, plane["loss"][row][column])
    if not low < high:
        low, high = (low, low + 1) if math.isfinite(low) else (0.0, 1.0)
    return [low + 1.4 * (high - low) * step / 12 for step in range(13)]


def _draw_plane(axes: "Axes", plane: Mapping[str, Any], levels: Sequence[float]) -> Any:
    import numpy as np

    loss = np.ma.masked_invalid(np.asarray(plane["loss"], dtype=float))
    image = axes.contourf(
        plane["x"], plane["y"], loss, levels, cmap="Blues", extend="both", vmax=1.6 * levels[-1] - 0.6 * levels[0]
    )
    if loss.count() and loss.min() < levels[-1] and loss.max() > levels[0]:
        contours = axes.contour(plane["x"], plane["y"], loss, levels[::2], colors="black", linewidths=0.6)
        axes.clabel(contours, fontsize=7, fmt="%.2f")
    *minimizers, end = plane["points"]
    for (x, y), marker in [*zip(minimizers, MARKERS, strict=False), (end, "*")]:
        size = 13 if marker == "*" else 8
        axes.plot([x], [y], marker, color="white", markeredgecolor="black", markersize=size, zorder=5)
    axes.set_aspect("equal")
    axes.tick_params(labelsize=8.5)
    axes.set_xlabel("L2 distance", fontsize=9)
    axes.set_ylabel("L2 distance", fontsize=9)
    return image


def _draw_segments(axes: "Axes", minima: Minima) -> list[float]:
    """Draw the segments between the minimizers of the plane; return their losses."""
    assert minima.plane is not None
    tidy(axes, 8.5)
    barriers = {(a, b): value for a, b, value in minima.barriers}
    drawn = [row for row in minima.segments if {*row[:2]} <= {*minima.plane["sources"]}]
    for index, (a, b, losses) in enumerate(drawn):
        label = f" {shorten(a, 12)} – {shorten(b, 12)}: barrier {barriers.get((a, b), math.nan):.3g}"  # noqa: RUF001
        style = series_style(index + 1)
        axes.plot(minima.positions, losses, label=label, linewidth=1.5, markersize=4, markevery=(index, 3), **style)
        axes.plot([0, 1], [losses[0], losses[-1]], color=style["color"], linewidth=0.6)
    title = "loss on segments; a barrier is the height above the thin line"
    if len(barriers) > len(drawn):
        (a, b), value = max(barriers.items(), key=lambda item: item[1] if math.isfinite(item[1]) else -math.inf)
        title += f"\nhighest of all {len(barriers)}: {value:.3g} ({shorten(a, 12)} – {shorten(b, 12)})"  # noqa: RUF001
    axes.set_title(title, fontsize=8.5, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), handlelength=4)
    axes.set_xlabel("position between the first and the second minimizer", fontsize=9)
    axes.set_ylabel("loss", fontsize=9)
    return [loss for *_, losses in drawn for loss in losses]


def _distance_against_ood(arms: Sequence[_Arm]) -> "Figure | None":
    """Minima distance against OOD gain over the baseline: large marks for arms, small marks for runs."""
    baseline = {run.seed: run.end.ood_loss for run in arms[0].runs if run.curve and run.end.ood_loss is not None}
    found: list[tuple[_Arm, list[float], list[float]]] = []
    for arm in arms:
        points = []
        for run in arm.runs:
            loss = run.end.ood_loss if run.curve else None
            if run.minima and run.minima.pairwise and loss is not None and run.seed in baseline:
                points.append((100 * run.minima.relative_distance, baseline[run.seed] - loss))
        if points := [point for point in points if all(map(math.isfinite, point))]:
            found.append((arm, [x for x, _ in points], [y for _, y in points]))
    if not found:
        return None
    figure = new_plot(8.0, 5.0)
    axes = figure.subplots()
    tidy(axes)
    axes.axhline(0.0, color="0.5", linewidth=0.9)
    means = {}
    for arm, x, y in found:
        mark: dict[str, Any] = {"color": arm.style["color"], "marker": arm.style["marker"], "linestyle": ""}
        if len(x) > 1:
            axes.plot(x, y, markersize=4, alpha=0.55, zorder=2, **mark)
        xs, ys = _spread(x), _spread(y)
        large: dict[str, Any] = {"markersize": 9, "markeredgecolor": "white", "elinewidth": 0.8, "zorder": 4}
        axes.errorbar(xs[0], ys[0], xerr=_bars(xs), yerr=_bars(ys), **mark, **large)
        means[arm] = (xs[0], ys[0])
    axes.set_xlabel("mean distance between minimizers, % of the parameter norm", fontsize=10)
    axes.set_ylabel(f"OOD gain over {shorten(arms[0].name, 20)}\n(nats per token, same seed)", fontsize=10)
    axes.set_title("large: mean and range of an arm; small: its runs; higher is better", fontsize=9.5, loc="left")
    axes.margins(0.12)
    limit = _limit([y for _, y in list(means.values())[1:]], min(abs(loss) for loss in baseline.values()))
    if any(abs(y) > limit for _, y in means.values()):
        shown = [(x, y) for _, xs, ys in found for x, y in zip(xs, ys, strict=True) if abs(y) <= 1.5 * limit]
        for axis, values in zip("xy", zip(*shown, strict=True), strict=True):
            room = 0.15 * (max(values) - min(values)) or 0.01 * abs(values[0]) or limit
            axes.set(**{f"{axis}lim": (min(values) - room, max(values) + room)})
    _label(axes, means)
    return figure
