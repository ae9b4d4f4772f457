"""Vectors of parameters: how long they are, how far apart, and a model moved between them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .closeness import BLOCK

__all__ = ["Point", "distance", "inner", "moving", "norm"]

# A vector of parameters, by name or in order: such as `dict(model.named_parameters())`. On any device.
Point = Mapping[str, Tensor] | Sequence[Tensor]


def norm(point: Point) -> float:
    """
    L2 norm of a vector of parameters, summed in float64; tied ones (entries that share memory) count once.

    Example:
        >>> import torch
        >>> from hf_nexus.evaluation.points import norm
        >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        5.0
    """
    (tensors,) = _matched([point])
    return math.sqrt(sum(float(block.square().sum()) for t in tensors for block in _blocks(t)))


def distance(a: Point, b: Point, *, relative_to: Point | None = None) -> float:
    """
    L2 distance between two vectors of parameters, summed in float64; tied ones (entries that share memory, and whose
    partners are the same as well) count once.

    Args:
        a (`Mapping[str, Tensor]` or `Sequence[Tensor]`), b (as `a`):
            By the same names, or in the same order. They may be on different devices; 8 MB at a time are moved.
        relative_to (as `a`, *optional*):
            Divide by the norm of this point.

    Raises:
        ValueError: names or shapes that differ, or a norm of 0.

    Example:
        >>> import torch
        >>> from hf_nexus.evaluation.points import distance
        >>> start, end = {"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([3.0, 5.0])}
        >>> distance(start, end), distance(start, end, relative_to=start)
        (5.0, 5.0)
    """
    one, two = _matched([a, b])
    value = math.sqrt(inner(one, two, one, two))
    if relative_to is None:
        return value
    scale = norm(relative_to)
    if not scale:
        raise ValueError("relative_to has norm 0; distances cannot be relative to it. Leave it out.")
    return value / scale


@torch.no_grad()
def inner(a: Sequence[Tensor], b: Sequence[Tensor], c: Sequence[Tensor], d: Sequence[Tensor]) -> float:
    """The inner product of `a - b` with `c - d`, in float64, without holding any of the differences."""
    total = 0.0
    for parts in zip(a, b, c, d, strict=True):
        for w, x, y, z in zip(*(part.reshape(-1).split(BLOCK) for part in parts), strict=True):
            w, x, y, z = (block.to(parts[0].device, torch.float64) for block in (w, x, y, z))
            total += float(torch.dot(w - x, y - z))
    return total


@contextmanager
def moving(
    params: Point, points: Sequence[Point]
) -> Iterator[tuple[Callable[[Sequence[float]], None], list[list[Tensor]]]]:
    """
    Move parameters in place between points, without gradients. However the context ends, they are put back bit for bit
    from the one copy that it holds.

    Args:
        params (`Mapping[str, Tensor]` or `Sequence[Tensor]`):
            What is moved.
        points (`Sequence` of what `params` is):
            On any device. `params` may be among them, and means where they were.

    Returns:
        `move` and the points, as lists of tensors that moving does not change. `move([c0, c1, ...])` sets the
        parameters to `c0 * point 0 + c1 * point 1 + ...`; bit for bit to the point whose factor is 1 if the other
        factors are 0. At least one is not.

    Example:
        >>> import torch
        >>> from hf_nexus.evaluation.points import moving
        >>> x = torch.tensor([1.0])
        >>> with moving([x], [[x], [torch.tensor([5.0])]]) as (move, _):
        ...     move([0.5, 0.5])
        ...     print(x)
        tensor([3.])
        >>> x
        tensor([1.])
    """
    live, *given = _matched([params, *points])
    with torch.no_grad():
        saved = [p.clone() for p in live]
        fixed = [
            [s if t.data_ptr() == p.data_ptr() else t for p, s, t in zip(live, saved, point, strict=True)]
            for point in given
        ]

        def move(factors: Sequence[float]) -> None:
            (share, first), *more = [(c, point) for c, point in zip(factors, fixed, strict=False) if c]
            for i, p in enumerate(live):
                p.copy_(first[i]).mul_(share)
                for c, point in more:
                    p.add_(point[i].to(p), alpha=c)

        try:
            yield move, fixed
        finally:
            for p, s in zip(live, saved, strict=True):
                p.copy_(s)


def _matched(points: Sequence[Point]) -> list[list[Tensor]]:
    """The points as lists in one order, without what repeats another entry in all of them (tied parameters)."""
    names = next((list(point) for point in points if isinstance(point, Mapping)), [])
    lists: list[list[Tensor]] = []
    for point in points:
        if isinstance(point, Mapping) and (odd := sorted(set(point) ^ set(names))):
            raise ValueError(f"The points do not have the same parameters: {odd[0]!r} is not in all of them.")
        lists.append([t.detach() for t in ([point[n] for n in names] if isinstance(point, Mapping) else point)])
        shapes, wanted = ([tuple(t.shape) for t in tensors] for tensors in (lists[-1], lists[0]))
        if shapes != wanted:
            i = next((i for i, (x, y) in enumerate(zip(shapes, wanted, strict=False)) if x != y), None)
            which = f"there are {len(shapes)} and {len(wanted)} tensors"
            if i is not None:
                which = f"{names[i] if names else f'tensor {i}'} has shape {shapes[i]} and {wanted[i]}"
            raise ValueError(f"The points do not have the same parameters: {which}.")
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


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    return (block.double() for block in tensor.reshape(-1).split(BLOCK))
