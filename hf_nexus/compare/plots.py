"""The pictures of a comparison: what its arms did to the losses, the cosines and the minima, against the baseline."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..plots.style import new_plot, place_labels, save_plot, shorten, tidy
from .arms import Arm, Spread, add_legend, bars, differences, draw_curve, limit_of, over_runs, spread_of
from .landscape_plots import distance_against_ood, distance_matrices, landscapes
from .records import LossPoint, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_comparison"]

_Path = tuple[Arm, tuple[list[Spread], list[Spread]]]  # training losses and OOD losses along the training of an arm


def plot_comparison(records: Sequence[RunRecord], folder: str | os.PathLike[str], *, baseline: str) -> list[Path]:
    """
    Draw the pictures that the records have data for.

    In all of them a curve or mark is the mean over an arm's seeds and its band or bar the range. Where a run of an arm
    has no finite value, neither has the mean: averaged over the others alone it would hide the divergence.

    Args:
        records (`Sequence[RunRecord]`):
            The runs; arms may lack seeds.
        folder (`str` or `os.PathLike`):
            Where to write; made if missing.
        baseline (`str`):
            The arm to compare with.

    Returns:
        `list[Path]`: The pictures written, in the order of a report: `ood_against_train.png`, `losses.png`,
        `cosines.png`, `minima_distance.png`, `landscape.png`, `distance_against_ood.png`.

    Raises:
        ValueError: No record is of the arm `baseline`.

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
        raise ValueError(f"`baseline` is {baseline!r}, and the records are of {names}: name one of these arms.")
    names.sort(key=lambda name: name != baseline)
    arms = [Arm(name, [run for run in records if run.arm == name], index) for index, name in enumerate(names)]
    minima = {arm.name: [run.minima for run in arm.runs if run.minima and run.minima.pairwise] for arm in arms}
    minima = {name: found for name, found in minima.items() if found}
    pictures = {
        "ood_against_train.png": _ood_against_train(arms),
        "losses.png": _losses(arms),
        "cosines.png": _cosines(arms),
        "minima_distance.png": distance_matrices(minima),
        "landscape.png": landscapes({name: found[0] for name, found in minima.items()}),
        "distance_against_ood.png": distance_against_ood(arms),
    }
    return [save_plot(figure, Path(folder, name)) for name, figure in pictures.items() if figure is not None]


def _ood_against_train(arms: Sequence[Arm]) -> "Figure | None":
    """The paper's picture, large where training ends, and whole beside it."""
    curves: list[_Path] = []
    for arm in arms:
        train, ood = over_runs(arm.losses(lambda p: p.train_loss)), over_runs(arm.losses(lambda p: p.ood_loss))
        if steps := [step for step in train if step in ood]:
            curves.append((arm, ([train[step] for step in steps], [ood[step] for step in steps])))
    if not any(math.isfinite(mean) for _, (_, y) in curves for mean, _, _ in y):
        return None
    figure = new_plot(10.5, 5.4)
    late, whole = figure.subplots(1, 2, width_ratios=[2.1, 1])
    for axes in (late, whole):
        tidy(axes)
        axes.set_xlabel("training loss", fontsize=10)
        for arm, (x, y) in curves:
            axes.plot([s[0] for s in x], [s[0] for s in y], linewidth=1.5, **arm.style | {"marker": ""}, zorder=3)
            length = {"xerr": bars(x[-1:]), "yerr": bars(y[-1:])} if axes is late else {}
            size = 8 if axes is late else 5
            mark = arm.style | {"markersize": size, "markeredgecolor": "white", "linewidth": 0.9, "capsize": 3}
            axes.errorbar(x[-1][0], y[-1][0], **length, **mark, zorder=4)
    for arm, _ in curves:
        for run in arm.runs if len(arm.runs) > 1 else []:
            points = [(p.train_loss, math.nan if p.ood_loss is None else p.ood_loss) for p in run.curve]
            late.plot(*zip(*points, strict=True), color=arm.style["color"], linewidth=0.5, alpha=0.6, zorder=2)
    late.set_ylabel("OOD loss", fontsize=10)
    late.set_title("where training ends: mean and range over seeds; thin: single seeds", fontsize=9.5, loc="left")
    whole.set_title("all of training, right to left", fontsize=9.5, loc="left")
    figure.suptitle("OOD loss against training loss at restored weights, nats per token", fontsize=10.5)
    _zoom(late, whole, curves)
    add_legend(figure, [arm for arm, _ in curves])
    ends = [(x[-1][0], y[-1][0], shorten(arm.name, 20)) for arm, (x, y) in curves]
    (left, right), (bottom, top) = late.get_xlim(), late.get_ylim()
    inside = [end for end in ends if left < end[0] < right and bottom < end[1] < top]
    away = [f"{name}: {y:.2f} at {x:.2f}" for x, y, name in ends if math.isfinite(y) and (x, y, name) not in inside]
    if away:
        late.text(0.01, 0.99, "beyond: " + "; ".join(away), transform=late.transAxes, va="top", fontsize=8)
    place_labels(late, [end[:2] for end in inside], [end[2] for end in inside])
    return figure


def _zoom(late: "Axes", whole: "Axes", curves: Sequence[_Path]) -> None:
    """Frame the ends of training, and the way there as far again; an arm that is off the scale is left out."""
    from matplotlib.patches import Rectangle

    frame = []
    for axis in (0, 1):
        finite = [found for _, path in curves if (found := [s for s in path[axis] if math.isfinite(s[0])])]
        start = finite[0][-1][0]
        far = limit_of([found[-1][0] - start for found in finite[1:]], start)
        ends = [found[-1] for found in finite if abs(found[-1][0] - start) <= far]
        low, high = min(end[1] for end in ends), max(end[2] for end in ends)
        step = abs(finite[0][-2][0] - start) if len(finite[0]) > 1 else 0.0
        room = max(high - low, step) or 0.01 * abs(start)
        frame.append((low - 0.35 * room, high + 0.7 * room))
    (left, right), (bottom, top) = frame
    late.set(xlim=(left, right), ylim=(bottom, top))
    whole.add_patch(Rectangle((left, bottom), right - left, top - bottom, fill=False, edgecolor="0.3", linewidth=0.8))


def _losses(arms: Sequence[Arm]) -> "Figure | None":
    """For each source its losses, and beside them what the eye cannot see there: their differences."""
    points = [point for arm in arms for run in arm.runs for point in run.curve]
    values: dict[str, Callable[[LossPoint], float | None]] = {"mean over sources": lambda p: p.validation_loss}
    if any(p.ood_loss is not None for p in points):
        values["OOD mean"] = lambda p: p.ood_loss
    for name in dict.fromkeys(name for p in points for name in p.validation):
        values[name] = lambda p, name=name: p.validation.get(name)  # type: ignore[misc]
    for name in dict.fromkeys(name for p in points for name in p.ood):
        values[f"OOD: {name}"] = lambda p, name=name: p.ood.get(name)  # type: ignore[misc]
    found = [value(point) for point in points for value in values.values()]
    if not any(loss is not None and math.isfinite(loss) for loss in found):
        return None
    rows = math.ceil(len(values) / 2)
    figure = new_plot(13.0, 1.0 + 1.95 * rows)
    panels = figure.subplots(rows, 4, sharex=True, squeeze=False, width_ratios=[1, 1.7] * 2).reshape(-1, 2)
    for (left, right), (name, value) in zip(panels, values.items(), strict=False):
        for axes in (left, right):
            tidy(axes, 8)
        left.set_title(shorten(name, 26), fontsize=9.5, loc="left", fontweight="bold")
        for arm in arms:
            draw_curve(left, arm, over_runs(arm.losses(value)), band=False, markers=5)
        right.axhline(0.0, color="black", linewidth=1.2)
        _draw_differences(right, arms, value)
    for left, right in panels[len(values) :]:
        left.set_axis_off()
        right.set_axis_off()
    for left, right in panels[max(0, len(values) - 2) : len(values)]:
        for axes in (left, right):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("outer step", fontsize=9)
    figure.suptitle(
        "Held-out losses, nats per token. Left: means over seeds. Right: difference to the baseline under the "
        "same seed (below 0 is better):\n"
        f"mean over seeds, {'the range as band and, ' * _few(arms)}behind the end, mean and range at the end.",
        fontsize=10,
    )
    add_legend(figure, arms)
    return figure


def _draw_differences(axes: "Axes", arms: Sequence[Arm], value: Callable[[LossPoint], float | None]) -> None:
    """The other arms against the zero line of the baseline, scaled to the later three quarters of training."""
    baseline, *others = arms
    found = {arm.name: differences(arm, baseline, value) for arm in others}
    steps = sorted({step for points in found.values() for step in points})
    if not steps:
        return
    peaks, beyond, loss = [], [], next(reversed(over_runs(baseline.losses(value)).values()))[0]
    for arm in others:
        late = [s for step, s in found[arm.name].items() if step >= steps[0] + (steps[-1] - steps[0]) / 4]
        peaks.append(max((abs(x) for s in late for x in s if math.isfinite(x)), default=math.nan))
    limit = 1.15 * limit_of(peaks, loss if math.isfinite(loss) else 0.0) or 1.0
    stride = (steps[-1] - steps[0] or 1) * 0.03
    for place, arm in enumerate(others, start=1):
        if not found[arm.name]:
            continue
        draw_curve(axes, arm, found[arm.name], band=_few(arms), markers=5)
        end = list(found[arm.name].values())[-1]
        if abs(end[0]) > limit:
            beyond.append(f"{shorten(arm.name, 18)} ends at {end[0]:+.2g}")
        mark = arm.style | {"markersize": 4.5, "capsize": 2, "linewidth": 1.2, "linestyle": "-"}
        axes.errorbar(steps[-1] + place * stride, end[0], yerr=bars([end]), **mark)
    axes.set_ylim(-limit, limit)
    axes.text(0.99, 0.98, "\n".join(beyond), transform=axes.transAxes, ha="right", va="top", fontsize=7.5)


def _few(arms: Sequence[Arm]) -> bool:
    """Whether bands of all can be told apart."""
    return len(arms) <= 4


def _cosines(arms: Sequence[Arm]) -> "Figure | None":
    """How far the sources pull in one direction: their gradients, and the windows along the path."""
    gradients, paths, window = {}, {}, 1
    for arm in arms:
        of_pairs = [{step: [value for _, _, value in pairs] for step, pairs in run.cosines} for run in arm.runs]
        gradients[arm.name] = over_runs([{s: spread_of(pairs)[0] for s, pairs in run.items()} for run in of_pairs])
        logged = [[row for row in run.path if "path_cosine" in row] for run in arm.runs]
        paths[arm.name] = over_runs([{int(row["step"]): row["path_cosine"] for row in rows} for rows in logged])
        window = max(window, len(paths[arm.name]) // 20)
    window += 1 - window % 2  # odd, so that it lies evenly about its middle
    paths = {name: smoothed(points, window) for name, points in paths.items()}
    path = "path cosine" + f", moving mean of {window} logged values" * (window > 1)
    shown = {"gradient cosine between sources, mean of pairs": gradients, path: paths}
    means = {title: [s[0] for points in curves.values() for s in points.values()] for title, curves in shown.items()}
    shown = {title: curves for title, curves in shown.items() if any(map(math.isfinite, means[title]))}
    if not shown:
        return None
    from matplotlib.ticker import MaxNLocator

    figure = new_plot(1.5 + 4.7 * len(shown), 4.4)
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (title, curves) in zip(panels, shown.items(), strict=True):
        tidy(axes)
        axes.axhline(0.0, color="0.6", linewidth=0.8)
        for arm in arms:
            if curves[arm.name]:
                draw_curve(axes, arm, curves[arm.name], band=_few(arms))
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))
        axes.set_xlabel("outer step", fontsize=10)
        axes.set_title(title, fontsize=9.5, loc="left")
    figure.suptitle("mean over seeds" + ", and their range as a band" * _few(arms), fontsize=9.5)
    add_legend(figure, [arm for arm in arms if any(curves[arm.name] for curves in shown.values())])
    return figure


def smoothed(points: Mapping[int, Spread], window: int) -> dict[int, Spread]:
    """The mean of the finite ones of `window` neighbours about each point; a gap stays one."""
    steps, half, found = list(points), window // 2, {}
    for index, step in enumerate(steps):
        near = [points[other] for other in steps[max(0, index - half) : index + half + 1]]
        near = [spread for spread in near if math.isfinite(spread[0])]
        gap = not math.isfinite(points[step][0])
        found[step] = points[step] if gap else tuple(sum(column) / len(near) for column in zip(*near, strict=True))
    return found  # type: ignore[return-value]
