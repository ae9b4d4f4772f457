"""Losses between minima: along segments and on a plane."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .parameter_space import Point, distance, inner, moving, norm

__all__ = ["minima_landscape"]

# Computes a loss at the current parameters.
Measure = Callable[[], float | Tensor]

_POSITIONS = tuple(i / 10 for i in range(11))

# A flatter triangle counts as a line: float32 does not determine its plane.
_FLAT = 1e-6


def segment_losses(params: Point, a: Point, b: Point, positions: Sequence[float], loss: Measure) -> list[float]:
    """
    Losses at `a + t (b - a)` for each position t. At 0 and 1 the parameters equal `a` and `b` bit for bit.

    The parameters are moved in place and always restored bit for bit. One copy of them is held.
    """
    with moving(params, [a, b]) as (move, _):

        def at(t: float) -> float:
            move([1 - t, t])
            return float(loss())

        return [at(t) for t in positions]


def barrier_height(positions: Sequence[float], losses: Sequence[float]) -> float:
    """
    How far the losses along a segment rise above the straight line between those at its ends; at least 0, and NaN if
    one of them is. The positions ascend from one end to the other.
    """
    first, last = (positions[0], positions[-1]) if positions else (0.0, 0.0)
    if len(positions) != len(losses) or not all(a < b for a, b in itertools.pairwise(positions)) or first == last:
        raise ValueError(
            f"A barrier needs as many losses as positions, and at least two positions in ascending order. Given were "
            f"{len(losses)} losses at {list(positions)}."
        )
    fractions = [(t - first) / (last - first) for t in positions]
    rises = [v - (losses[0] * (1 - s) + losses[-1] * s) for s, v in zip(fractions, losses, strict=True)]
    return math.nan if any(map(math.isnan, losses)) else max(0.0, *rises)


def plane_losses(
    params: Point,
    corners: Sequence[Point],
    loss: Measure,
    *,
    others: Sequence[Point] = (),
    resolution: int = 11,
    margin: float = 0.25,
) -> dict[str, Any] | None:
    """
    Losses on the plane through three points, on `resolution ** 2` grid points; `None` if the points lie on a line.
    `x` and `y` are the coordinates of the grid in units of L2 distance, `points` those of the corners, then of the
    others. `loss` has a row for each of `y` and a column for each of `x`.

    The first corner is the origin, the x axis points to the second, and the y axis is the orthogonal part of the third
    (Gram-Schmidt). Other points are projected onto the plane. `margin` is a fraction of the extent of all points along
    each axis. The parameters are moved in place and always restored bit for bit. One copy of them is held.
    """
    if len(corners) != 3 or resolution < 2:
        raise ValueError(
            f"A plane needs 3 corners and a resolution of at least 2, not {len(corners)} and {resolution}."
        )
    with moving(params, [*corners, *others]) as (move, points):
        a, b, c, *rest = points
        ab2, ac2 = inner(b, a, b, a), inner(c, a, c, a)
        length = math.sqrt(ab2)
        along = inner(b, a, c, a) / length if length else 0.0
        height = math.sqrt(max(0.0, ac2 - along**2))
        if not min(length, height) > _FLAT * max(length, math.sqrt(ac2)):  # NaN as well
            return None
        places = [(0.0, 0.0), (length, 0.0), (along, height)]
        for point in rest:
            x = inner(point, a, b, a) / length
            places.append((x, (inner(point, a, c, a) - x * along) / height))
        xs, ys = (_axis([place[i] for place in places], resolution, margin) for i in (0, 1))

        def at(x: float, y: float) -> float:
            third = y / height
            second = (x - third * along) / length
            move([1 - second - third, second, third])
            return float(loss())

        return {"x": xs, "y": ys, "points": places, "loss": [[at(x, y) for x in xs] for y in ys]}


def minima_landscape(
    params: Point,
    start: Point,
    minimizers: Mapping[str, Point],
    losses: Mapping[str, Measure],
    *,
    positions: Sequence[float] = _POSITIONS,
    plane: Sequence[str] = (),
    resolution: int = 11,
) -> dict[str, Any]:
    """
    Distances, losses and barriers between the minimizers of several sources, as plain data.

    The parameters are moved in place and always restored bit for bit. One copy of them is held. For S sources and P
    positions, losses are computed S (S - 1) P + 2 S times, and `3 * resolution ** 2` times more for a plane.

    Args:
        params (`Mapping[str, Tensor]` or `Sequence[Tensor]`):
            Parameters that the losses depend on, such as `dict(model.named_parameters())`.
        start (like `params`), minimizers (`Mapping[str, Point]`):
            Point where the searches for the minimizers began, which may be `params`, and where each one ended.
        losses (`Mapping[str, Callable[[], float | Tensor]]`):
            For each of these sources, a function that computes its held-out loss at the current parameters.
        positions (`Sequence[float]`, *optional*, defaults to 0, 0.1, ..., 1):
            Positions along the segment between two minimizers, from 0 to 1.
        plane (`Sequence[str]`, *optional*), resolution (`int`, *optional*, defaults to 11):
            Three sources whose minimizers span a plane, and grid points along each of its axes.

    Returns:
        `dict[str, Any]`: `start_loss`, `end_loss` and `to_start` (distance) of each source, `parameter_norm` (of the
        start), `pairwise` (`(source, source, distance)`), `positions`, `segments` (`(source, source, mean losses of
        the two)`), `barriers` (`(source, source, height)`), and `plane`: its `sources`, `x`, `y`, `points` and
        `loss`, or `None`.

    Raises:
        ValueError: a source without a minimizer or a loss, different names or shapes, or a plane of other than three
            sources.

    Example:
        >>> import torch
        >>> from hf_nexus.evaluation.landscape import minima_landscape
        >>> x = torch.zeros(1)
        >>> minima = {"a": [torch.tensor([-1.0])], "b": [torch.tensor([1.0])]}
        >>> losses = {name: lambda m=m: (x - m[0]).square().sum() for name, m in minima.items()}
        >>> found = minima_landscape([x], [torch.tensor([0.0])], minima, losses)
        >>> found["pairwise"], found["start_loss"], found["end_loss"]
        ([('a', 'b', 2.0)], {'a': 1.0, 'b': 1.0}, {'a': 0.0, 'b': 0.0})
    """
    for name in (*minimizers, *plane):
        if name not in losses or name not in minimizers:
            raise ValueError(f"Source {name!r} needs a minimizer and a loss; there are {list(minimizers)} with both.")
    if plane and len(set(plane)) != 3:
        raise ValueError(f"plane={list(plane)} is not allowed; a plane goes through the minimizers of three sources.")
    pairs = list(itertools.combinations(minimizers, 2))

    def mean_of(names: Sequence[str]) -> Callable[[], float]:
        return lambda: sum(float(losses[name]()) for name in names) / len(names)

    with moving(params, [start, *minimizers.values()]) as (move, (origin, *ends)):
        start_loss, end_loss = {}, {}
        for i, name in enumerate(minimizers):
            move([1.0])
            start_loss[name] = float(losses[name]())
            move([0.0] * (i + 1) + [1.0])
            end_loss[name] = float(losses[name]())
        at = dict(zip(minimizers, ends, strict=True))
        pairwise = [(a, b, distance(at[a], at[b])) for a, b in pairs]
        to_start = {name: distance(end, origin) for name, end in at.items()}
        parameter_norm = norm(origin)
    segments = [
        (a, b, segment_losses(params, minimizers[a], minimizers[b], positions, mean_of((a, b)))) for a, b in pairs
    ]
    corners = [minimizers[name] for name in plane]
    grid = plane_losses(params, corners, mean_of(plane), others=[start], resolution=resolution) if plane else None
    return {
        "start_loss": start_loss,
        "end_loss": end_loss,
        "parameter_norm": parameter_norm,
        "to_start": to_start,
        "pairwise": pairwise,
        "positions": list(positions),
        "segments": segments,
        "barriers": [(a, b, barrier_height(positions, values)) for a, b, values in segments],
        "plane": {"sources": list(plane), **grid} if grid else None,
    }


def _axis(values: Sequence[float], resolution: int, margin: float) -> list[float]:
    low, high = min(values), max(values)
    first, step = low - margin * (high - low), (1 + 2 * margin) * (high - low) / (resolution - 1)
    return [first + step * i for i in range(resolution)]
