"""Points in parameter space: their distances, and losses on segments and on a plane between minima."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors import as_float64
from .cosines import BLOCK, dot

__all__ = ["minima_landscape"]

# All parameters of a model in one order, on any device.
Point = Sequence[Tensor]
# A point as a weighted sum of others.
Place = Sequence[tuple[float, Point]]

# A flatter triangle counts as a line: float32 does not determine its plane.
_FLAT = 1e-6
# Of the extent of all points of a plane along each axis.
_MARGIN = 0.25


def distance(a: Point, b: Point) -> float:
    """L2 distance, summed in float64. 8 MB at a time are moved between devices."""
    return math.sqrt(inner(a, b, a, b))


@torch.no_grad()
def inner(a: Point, b: Point, c: Point, d: Point) -> float:
    """Inner product of `a - b` with `c - d`, in float64. No difference is held in memory."""
    total = 0.0
    for tensors in zip(a, b, c, d, strict=True):
        for w, x, y, z in zip(*(tensor.reshape(-1).split(BLOCK) for tensor in tensors), strict=True):
            w, x, y, z = (as_float64(block.to(tensors[0].device)) for block in (w, x, y, z))
            total += float(torch.dot(w - x, y - z))
    return total


def barrier_height(positions: Sequence[float], losses: Sequence[float]) -> float:
    """
    How far the losses at positions from 0 to 1 rise above the straight line between those at the ends; at least 0, and
    NaN if one of them is.
    """
    rises = [v - (losses[0] * (1 - t) + losses[-1] * t) for t, v in zip(positions, losses, strict=True)]
    return math.nan if any(map(math.isnan, losses)) else max(0.0, *rises)


@torch.no_grad()
def minima_landscape(
    params: Mapping[str, Tensor],
    minimizers: Mapping[str, Mapping[str, Tensor]],
    losses: Mapping[str, Callable[[], float | Tensor]],
    *,
    positions: int = 11,
    resolution: int | None = None,
) -> dict[str, Any]:
    """
    Distances, losses and barriers between the minimizers of several sources, as plain data.

    `params` are the trainable parameters of a model, where the searches for the minimizers began. `losses` compute the
    held-out loss of each source at the current parameters. These are moved in place and always restored bit for bit
    from the one copy that is held. For S sources, losses are computed `S (S - 1) positions + 2 S` times, and
    `3 * resolution ** 2` times more for a plane, which needs a `resolution` and three sources.

    Returns `start_loss`, `end_loss` and `to_start` (distance) of each source, `parameter_norm` (of the start),
    `pairwise` (`(source, source, distance)`), `positions`, `segments` (`(source, source, mean losses of the two)`),
    `barriers` (`(source, source, height)`), and `plane`, that of the first three sources or `None`.

    Example:
        >>> import torch
        >>> from hf_nexus.evaluation.landscape import minima_landscape
        >>> x = torch.zeros(1)
        >>> minima = {"a": {"x": torch.tensor([-1.0])}, "b": {"x": torch.tensor([1.0])}}
        >>> losses = {name: lambda m=m: (x - m["x"]).square().sum() for name, m in minima.items()}
        >>> found = minima_landscape({"x": x}, minima, losses)
        >>> found["pairwise"], found["start_loss"], found["end_loss"]
        ([('a', 'b', 2.0)], {'a': 1.0, 'b': 1.0}, {'a': 0.0, 'b': 0.0})
    """
    start = [p.clone() for p in params.values()]
    ends = {name: [point[key] for key in params] for name, point in minimizers.items()}
    pairs = list(itertools.combinations(ends, 2))
    along = [i / (positions - 1) for i in range(positions)]

    def loss_at(place: Place, *sources: str) -> float:
        """Mean loss of some sources."""
        _move(params.values(), place)
        return sum(float(losses[name]()) for name in sources) / len(sources)

    try:
        start_loss = {name: loss_at([(1.0, start)], name) for name in ends}
        end_loss = {name: loss_at([(1.0, end)], name) for name, end in ends.items()}
        segments = [(a, b, [loss_at([(1 - t, ends[a]), (t, ends[b])], a, b) for t in along]) for a, b in pairs]
        corners = dict(itertools.islice(ends.items(), 3))
        plane = _plane(start, corners, loss_at, resolution) if resolution and len(corners) == 3 else None
    finally:
        torch._foreach_copy_(list(params.values()), start)
    return {
        "start_loss": start_loss,
        "end_loss": end_loss,
        "parameter_norm": math.sqrt(dot(start, start)),
        "to_start": {name: distance(end, start) for name, end in ends.items()},
        "pairwise": [(a, b, distance(ends[a], ends[b])) for a, b in pairs],
        "positions": along,
        "segments": segments,
        "barriers": [(a, b, barrier_height(along, values)) for a, b, values in segments],
        "plane": plane,
    }


def _move(params: Iterable[Tensor], place: Place) -> None:
    """Set parameters to a place. If its only factor that is not 0 is 1, they equal that point bit for bit."""
    (factor, first), *more = [(c, point) for c, point in place if c]
    for i, p in enumerate(params):
        p.copy_(first[i]).mul_(factor)
        for c, point in more:
            p.add_(point[i].to(p), alpha=c)


def _plane(
    start: Point, corners: Mapping[str, Point], loss_at: Callable[..., float], resolution: int
) -> dict[str, Any] | None:
    """
    Mean losses of three sources on the plane through their minimizers, on `resolution ** 2` grid points; `None` if the
    minimizers lie on a line. `x` and `y` are the coordinates of the grid in units of L2 distance, `points` those of
    the minimizers and of the start. `loss` has a row for each of `y` and a column for each of `x`.

    The first minimizer is the origin, the x axis points to the second, and the y axis is the orthogonal part of the
    third (Gram-Schmidt). The start is projected onto the plane.
    """
    a, b, c = corners.values()
    ab2, ac2 = inner(b, a, b, a), inner(c, a, c, a)
    length = math.sqrt(ab2)
    along = inner(b, a, c, a) / length if length else 0.0
    height = math.sqrt(max(0.0, ac2 - along**2))
    if not min(length, height) > _FLAT * max(length, math.sqrt(ac2)):  # NaN as well
        return None
    x = inner(start, a, b, a) / length
    y = (inner(start, a, c, a) - x * along) / height
    points = [(0.0, 0.0), (length, 0.0), (along, height), (x, y)]
    xs, ys = (_axis(values, resolution) for values in zip(*points, strict=True))

    def at(x: float, y: float) -> float:
        third = y / height
        second = (x - third * along) / length
        return loss_at([(1 - second - third, a), (second, b), (third, c)], *corners)

    loss = [[at(x, y) for x in xs] for y in ys]
    return {"sources": list(corners), "x": xs, "y": ys, "points": points, "loss": loss}


def _axis(values: Sequence[float], resolution: int) -> list[float]:
    low, high = min(values), max(values)
    first, step = low - _MARGIN * (high - low), (1 + 2 * _MARGIN) * (high - low) / (resolution - 1)
    return [first + step * i for i in range(resolution)]
