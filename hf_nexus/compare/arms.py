"""The runs of a comparison arm by arm: what is drawn of them, and how they are told apart."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..plots.style import series_style, shorten
from .records import LossPoint, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Arm",
    "Spread",
    "add_legend",
    "bars",
    "differences",
    "draw_curve",
    "limit_of",
    "over_runs",
    "spread_of",
]

Spread = tuple[float, float, float]  # mean, lowest and highest of an arm's runs


@dataclass(frozen=True)
class Arm:
    """The runs of an arm, and its place among the arms, which gives it its style; the baseline's is 0."""

    name: str
    runs: list[RunRecord]
    index: int

    @property
    def style(self) -> dict[str, Any]:
        """Colour, marker and dashes."""
        return series_style(self.index)

    @property
    def label(self) -> str:
        """Name and number of seeds, for a legend."""
        diverged = sum(not run.curve or not math.isfinite(run.end.train_loss) for run in self.runs)
        seeds = f"{len(self.runs)} seed{'s' * (len(self.runs) > 1)}"
        # The blank in front: matplotlib leaves labels that begin with an underscore out of legends.
        return f" {shorten(self.name, 28)} ({seeds}{f', {diverged} diverged' * bool(diverged)})"

    def losses(self, value: Callable[[LossPoint], float | None]) -> list[dict[int, float]]:
        """`value` along the training of each run, `{step: value}`."""
        found = [{point.step: value(point) for point in run.curve} for run in self.runs]
        return [{step: loss for step, loss in points.items() if loss is not None} for points in found]


def over_runs(runs: Sequence[Mapping[int, float]]) -> dict[int, Spread]:
    """Mean and range at each step; NaN where a run has no finite value."""
    steps = sorted({step for run in runs for step in run})
    return {step: spread_of([run.get(step, math.nan) for run in runs]) for step in steps}


def differences(arm: Arm, baseline: Arm, value: Callable[[LossPoint], float | None]) -> dict[int, Spread]:
    """An arm's losses minus those of the baseline under the same seed; empty if they have no seed in common."""
    theirs = dict(zip([run.seed for run in baseline.runs], baseline.losses(value), strict=True))
    ours = zip([run.seed for run in arm.runs], arm.losses(value), strict=True)
    return over_runs(
        [
            {step: loss - theirs[seed][step] for step, loss in points.items() if step in theirs[seed]}
            for seed, points in ours
            if seed in theirs
        ]
    )


def spread_of(values: Sequence[float]) -> Spread:
    """Mean, lowest and highest; NaN where one value is not finite."""
    if not values or not all(map(math.isfinite, values)):
        return math.nan, math.nan, math.nan
    return sum(values) / len(values), min(values), max(values)


def bars(spreads: Sequence[Spread]) -> list[list[float]]:
    """Lengths of error bars below and above the means, which rounding can put beyond equal values."""
    below = [max(mean - low, 0.0) if low == low else math.nan for mean, low, _ in spreads]
    above = [max(high - mean, 0.0) if high == high else math.nan for mean, _, high in spreads]
    return [below, above]


def limit_of(differences: Iterable[float], loss: float) -> float:
    """
    How far from the baseline a picture reaches: as far as the arms do, but for those that are off the scale.

    These, which would hide all others, are beyond both 2 % of the baseline's `loss` and five times the median.
    """
    sizes = sorted(abs(value) for value in differences if math.isfinite(value))
    return min(sizes[-1], max(5 * sizes[(len(sizes) - 1) // 2], 0.02 * abs(loss))) if sizes else 0.0


def add_legend(figure: "Figure", arms: Sequence[Arm]) -> None:
    """Below the panels, in as many columns as fit."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], markersize=6, linewidth=1.5, **arm.style) for arm in arms]
    labels = [arm.label for arm in arms]
    columns = int(figure.get_figwidth() / (0.75 + 0.062 * max(map(len, labels))))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=max(1, columns), frameon=False, fontsize=9, handlelength=4
    )


def draw_curve(axes: "Axes", arm: Arm, points: Mapping[int, Spread], *, band: bool = True, markers: int = 8) -> None:
    """Mean over steps, with the range as a band; the markers of the arms are shifted against one another."""
    steps, means = list(points), [mean for mean, _, _ in points.values()]
    every = max(1, len(steps) // markers)
    axes.plot(steps, means, linewidth=1.4, markersize=4.5, markevery=(arm.index % every, every), **arm.style)
    if band:
        low, high = [[spread[index] for spread in points.values()] for index in (1, 2)]
        axes.fill_between(steps, low, high, color=arm.style["color"], alpha=0.13, linewidth=0)
