"""Points in parameter space: their norms and distances, and a model moved between them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .cosines import BLOCK

__all__ = ["Point", "distance", "inner", "moving", "norm"]

# All parameters of a model, by name or in order, such as `dict(model.named_parameters())`. On any device.
Point = Mapping[str, Tensor] | Sequence[Tensor]


def norm(point: Point) -> float:
    """L2 norm, summed in float64. Tied parameters count once."""
    (tensors,) = _matched([point])
    blocks = (block.double() for tensor in tensors for block in tensor.reshape(-1).split(BLOCK))
    return math.sqrt(sum(float(block.square().sum()) for block in blocks))


def distance(a: Point, b: Point) -> float:
    """L2 distance, summed in float64. Tied parameters count once. 8 MB at a time are moved between devices."""
    a, b = _matched([a, b])
    return math.sqrt(inner(a, b, a, b))


@torch.no_grad()
def inner(a: Sequence[Tensor], b: Sequence[Tensor], c: Sequence[Tensor], d: Sequence[Tensor]) -> float:
    """Inner product of `a - b` with `c - d`, in float64. No difference is held in memory."""
    total = 0.0
    for tensors in zip(a, b, c, d, strict=True):
        for w, x, y, z in zip(*(tensor.reshape(-1).split(BLOCK) for tensor in tensors), strict=True):
            w, x, y, z = (block.to(tensors[0].device, torch.float64) for block in (w, x, y, z))
            total += float(torch.dot(w - x, y - z))
    return total


@contextmanager
def moving(
    params: Point, points: Sequence[Point]
) -> Iterator[tuple[Callable[[Sequence[float]], None], list[list[Tensor]]]]:
    """
    Move parameters in place between points, without gradients. At the end, also after an exception, they are restored
    bit for bit from the one copy that this context holds. `params` may be among the points.

    Yields `move` and the points, as lists of tensors that `move` does not change. `move([c0, c1, ...])` sets the
    parameters to `c0 * points[0] + c1 * points[1] + ...`; at least one factor is not 0. If the only factor is 1, they
    equal that point bit for bit.
    """
    live, *given = _matched([params, *points])
    with torch.no_grad():
        saved = [p.clone() for p in live]
        fixed = [
            [s if t.data_ptr() == p.data_ptr() else t for p, s, t in zip(live, saved, point, strict=True)]
            for point in given
        ]

        def move(factors: Sequence[float]) -> None:
            (factor, first), *more = [(c, point) for c, point in zip(factors, fixed, strict=False) if c]
            for i, p in enumerate(live):
                p.copy_(first[i]).mul_(factor)
                for c, point in more:
                    p.add_(point[i].to(p), alpha=c)

        try:
            yield move, fixed
        finally:
            for p, s in zip(live, saved, strict=True):
                p.copy_(s)


def _matched(points: Sequence[Point]) -> list[list[Tensor]]:
    """The points as lists in one order. An entry is left out if it repeats another one in all points (tied)."""
    names = next((list(point) for point in points if isinstance(point, Mapping)), [])
    lists: list[list[Tensor]] = []
    for point in points:
        if isinstance(point, Mapping) and (odd := sorted(set(point) ^ set(names))):
            raise ValueError(f"The points do not have the same parameters: {odd[0]!r} is not in all of them.")
        lists.append([t.detach() for t in ([point[n] for n in names] if isinstance(point, Mapping) else point)])
        shapes, expected = ([tuple(t.shape) for t in tensors] for tensors in (lists[-1], lists[0]))
        if shapes != expected:
            i = next((i for i, (x, y) in enumerate(zip(shapes, expected, strict=False)) if x != y), None)
            problem = f"there are {len(shapes)} and {len(expected)} tensors"
            if i is not None:
                problem = f"{names[i] if names else f'tensor {i}'} has shape {shapes[i]} and {expected[i]}"
            raise ValueError(f"The points do not have the same parameters: {problem}.")
    kept: list[int] = []
    owner: dict[tuple, int] = {}
    for j in range(len(lists[0])):
        places = [(number, *_memory(tensors[j])) for number, tensors in enumerate(lists)]
        twins = {owner[place] for place in places if place in owner}
        if not any(all(_same(tensors[i], tensors[j]) for tensors in lists) for i in twins):
            kept.append(j)
            owner.update({place: j for place in places if place not in owner})
    return [[tensors[j] for j in kept] for tensors in lists]


def _memory(t: Tensor) -> tuple:
    return t.device, t.data_ptr(), tuple(t.shape), t.stride()


def _same(x: Tensor, y: Tensor) -> bool:
    return _memory(x) == _memory(y) or torch.equal(x, y)
