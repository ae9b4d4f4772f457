"""What lies between the minimizers of the sources: their distances, and the loss on the way."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..plots.style import MARKERS, draw_matrix, new_plot, place_labels, series_style, shorten, tidy
from .arms import Arm, bars, limit_of, spread_of
from .records import Minima

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["distance_against_ood", "distance_matrices", "landscapes"]

_START = "end of run"


def distance_matrices(arms: Mapping[str, Sequence[Minima]]) -> "Figure | None":
    """
    For each arm the distances of the minimizers to one another and to the end of the run, in % of the parameter norm.

    Args:
        arms (`Mapping[str, Sequence[Minima]]`):
            The minima of each arm's runs, over which the mean is taken.

    Returns:
        `Figure`, *optional*: `None` without arms.
    """
    if not arms:
        return None
    names = list(dict.fromkeys(name for runs in arms.values() for run in runs for name in run.to_start))
    matrices = {arm: _mean_matrix(runs, names) for arm, runs in arms.items()}
    shown = [value for rows in matrices.values() for row in rows for value in row if math.isfinite(value)]
    limits = (min(shown), max(shown)) if shown else (0.0, 1.0)
    columns = min(3, len(arms))
    lines = math.ceil(len(arms) / columns)
    side = max(2.4, 0.36 * (len(names) + 1))
    figure = new_plot(1.6 + (side + 0.95) * columns, 1.0 + (side + 1.1) * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[len(arms) :]:
        axes.set_axis_off()
    for axes, (arm, rows) in zip(panels.flat, matrices.items(), strict=False):
        runs = arms[arm]
        image = draw_matrix(axes, [*names, _START], rows, cmap="cividis", limits=limits, number=".1f")
        for line in (axes.axhline, axes.axvline):
            line(len(names) - 0.5, color="white", linewidth=3)
        mean = 100 * sum(run.relative_distance for run in runs) / len(runs)
        seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
        axes.set_title(f"{shorten(arm, 28)}\nmean of pairs {mean:.2f} %, {seeds}", fontsize=9.5, loc="left")
    bar = figure.colorbar(image, ax=panels, shrink=0.6, aspect=30)
    bar.set_label("L2 distance in % of the parameter norm", fontsize=9)
    figure.suptitle("Distances between the minimizers of the sources (mean over seeds)", fontsize=10.5)
    return figure


def _mean_matrix(runs: Sequence[Minima], names: Sequence[str]) -> list[list[float]]:
    """Relative distances in %, the mean over those runs that have the pair; NaN if none has."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for a, b, value in [*run.pairwise, *((a, _START, value) for a, value in run.to_start.items())]:
            for pair in ((a, b), (b, a)):
                found.setdefault(pair, []).append(100 * value / run.parameter_norm)
    mean = {pair: sum(values) / len(values) for pair, values in found.items()}
    every = [*names, _START]
    return [[math.nan if a == b else mean.get((a, b), math.nan) for b in every] for a in every]


def landscapes(arms: Mapping[str, Minima]) -> "Figure | None":
    """
    For each arm the loss on the plane through three minimizers, and along the segments between them.

    Args:
        arms (`Mapping[str, Minima]`):
            The minima of one run of each arm; those without a plane are left out.

    Returns:
        `Figure`, *optional*: `None` if no arm has a plane.
    """
    arms = {arm: minima for arm, minima in arms.items() if minima.plane}
    if not arms:
        return None
    columns = min(3, len(arms))
    lines = math.ceil(len(arms) / columns)
    figure = new_plot(1.2 + 4.0 * columns, 0.8 + 5.8 * lines)
    panels = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=[1.5, 1] * lines)
    levels = _levels([minima.plane for minima in arms.values() if minima.plane])
    planes = []
    for index, (arm, minima) in enumerate(arms.items()):
        above, below = panels[index // columns * 2 :, index % columns][:2]
        above.set_title(shorten(arm, 36), fontsize=10.5, loc="left", fontweight="bold")
        image = _draw_plane(above, minima, levels)
        planes.append((above, minima))
        _draw_segments(below, minima)
    losses = [loss for minima in arms.values() for *_, row in _segments(minima) for loss in row if math.isfinite(loss)]
    if losses:
        room = 0.05 * (max(losses) - min(losses)) or 0.01
        for axes in panels[1::2].flat:
            axes.set_ylim(min(losses) - room, max(losses) + room)
    for index in range(len(arms), lines * columns):
        for axes in panels[index // columns * 2 :, index % columns][:2]:
            axes.set_axis_off()
    bar = figure.colorbar(image, ax=panels[:, -1], shrink=0.5, aspect=40, format="%.2f")
    bar.set_label("mean held-out loss of the three sources (nats per token)", fontsize=9)
    figure.suptitle("The slice through three minimizers, and the way between them (first seed)", fontsize=11)
    for axes, minima in planes:
        assert minima.plane is not None
        names = [shorten(name, 16) for name in minima.plane["sources"]] + [_START]
        place_labels(axes, minima.plane["points"], names, bbox={"boxstyle": "round,pad=0.15", "fc": "white", "lw": 0})
    return figure


def _levels(planes: Sequence[Mapping[str, Any]]) -> list[float]:
    """Contour levels for all arms, close where the minimizers lie; the far corners of the grids are above them."""
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


def _draw_plane(axes: "Axes", minima: Minima, levels: Sequence[float]) -> Any:
    import numpy as np

    plane = minima.plane
    assert plane is not None
    loss = np.ma.masked_invalid(np.asarray(plane["loss"], dtype=float))
    image = axes.contourf(
        plane["x"], plane["y"], loss, levels, cmap="Blues", extend="both", vmax=1.6 * levels[-1] - 0.6 * levels[0]
    )
    if loss.count() and loss.min() < levels[-1] and loss.max() > levels[0]:
        lines = axes.contour(plane["x"], plane["y"], loss, levels[::2], colors="black", linewidths=0.6)
        axes.clabel(lines, fontsize=7, fmt="%.2f")
    for index, (x, y) in enumerate(plane["points"]):
        marker, size = ("*", 13) if index == len(plane["points"]) - 1 else (MARKERS[index], 8)
        axes.plot([x], [y], marker, color="white", markeredgecolor="black", markersize=size, zorder=5)
    axes.set_aspect("equal")
    axes.tick_params(labelsize=8.5)
    axes.set_xlabel("L2 distance", fontsize=9)
    axes.set_ylabel("L2 distance", fontsize=9)
    return image


def _segments(minima: Minima) -> list[tuple[str, str, list[float]]]:
    """Those between the minimizers of the plane."""
    assert minima.plane is not None
    return [row for row in minima.segments if set(row[:2]) <= set(minima.plane["sources"])]


def _draw_segments(axes: "Axes", minima: Minima) -> None:
    """The loss between the three minimizers of the plane; of the other pairs the highest barrier is named."""
    tidy(axes, 8.5)
    barriers = {(a, b): value for a, b, value in minima.barriers}
    drawn = _segments(minima)
    for index, (a, b, losses) in enumerate(drawn):
        label = f" {shorten(a, 12)} – {shorten(b, 12)}: barrier {barriers.get((a, b), math.nan):.3g}"  # noqa: RUF001
        style = series_style(index + 1)
        axes.plot(minima.positions, losses, label=label, linewidth=1.5, markersize=4, markevery=(index, 3), **style)
        axes.plot([0, 1], [losses[0], losses[-1]], color=style["color"], linewidth=0.6)
    title = "loss along segments; barrier above the thin line"
    if len(barriers) > len(drawn):
        (a, b), value = max(barriers.items(), key=lambda item: item[1] if math.isfinite(item[1]) else -math.inf)
        title += f"\nhighest of all {len(barriers)}: {value:.3g} ({shorten(a, 12)} – {shorten(b, 12)})"  # noqa: RUF001
    axes.set_title(title, fontsize=8.5, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2), handlelength=4)
    axes.set_xlabel("position from the first minimizer to the second", fontsize=9)
    axes.set_ylabel("loss", fontsize=9)


def distance_against_ood(arms: Sequence[Arm]) -> "Figure | None":
    """
    Do arms whose minima lie closer generalize better? One mark for each arm, and small ones for its runs.

    Args:
        arms (`Sequence[Arm]`):
            The baseline first. Runs count that have minima, a finite OOD loss, and a baseline of the same seed.

    Returns:
        `Figure`, *optional*: `None` if no run counts.
    """
    baseline = {run.seed: run.end.ood_loss for run in arms[0].runs if run.curve and run.end.ood_loss is not None}
    found: list[tuple[Arm, list[float], list[float]]] = []
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
    ends = []
    for arm, x, y in found:
        mark: dict[str, Any] = {"color": arm.style["color"], "marker": arm.style["marker"], "linestyle": ""}
        if len(x) > 1:
            axes.plot(x, y, markersize=4, alpha=0.55, zorder=2, **mark)
        xs, ys = spread_of(x), spread_of(y)
        large: dict[str, Any] = {"markersize": 9, "markeredgecolor": "white", "elinewidth": 0.8, "zorder": 4}
        axes.errorbar(xs[0], ys[0], xerr=bars([xs]), yerr=bars([ys]), **mark, **large)
        ends.append((xs[0], ys[0], shorten(arm.name, 28)))
    axes.set_xlabel("mean distance between minimizers, % of the parameter norm", fontsize=10)
    axes.set_ylabel(f"OOD gain over {shorten(arms[0].name, 20)}\n(nats per token, same seed)", fontsize=10)
    axes.set_title("large: mean of an arm, with the range; small: its runs; up is better", fontsize=9.5, loc="left")
    axes.margins(0.12)
    limit = limit_of([y for _, y, _ in ends[1:]], min(abs(loss) for loss in baseline.values()))
    inside = [end for end in ends if abs(end[1]) <= limit]
    if len(inside) < len(ends):
        values = [value for _, _, y in found for value in y if abs(value) <= 1.5 * limit]
        room = 0.15 * (max(values) - min(values)) or limit
        axes.set_ylim(min(values) - room, max(values) + room)
        away = [f"{name}: {y:+.2g} at {x:.3g} %" for x, y, name in ends if abs(y) > limit]
        axes.text(0.01, 0.01, "beyond: " + "; ".join(away), transform=axes.transAxes, fontsize=8)
    place_labels(axes, [end[:2] for end in inside], [end[2] for end in inside])
    return figure
