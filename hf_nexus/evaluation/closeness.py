"""How close the sources are to each other: cosines between their gradients at one point."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["gradient_cosines"]


def gradient_cosines(
    losses: Mapping[str, Callable[[], Tensor]], params: Sequence[Tensor]
) -> dict[tuple[str, str], float]:
    """
    Cosine between the loss gradients of each pair of sources, all taken at the present parameters.

    At most two gradients are held at a time: for S sources this costs S (S + 1) / 2 backward passes.

    Args:
        losses (`Mapping[str, Callable[[], Tensor]]`):
            For each source, a function that computes its loss (0-d) on a fixed batch.
        params (`Sequence[Tensor]`):
            The parameters to differentiate by.

    Returns:
        `dict[tuple[str, str], float]`: the cosine of each pair, in the order of `losses`; NaN where a gradient is
        zero.

    Example:
        >>> import torch
        >>> from hf_nexus.evaluation import gradient_cosines
        >>> x = torch.ones(2, requires_grad=True)
        >>> gradient_cosines({"a": lambda: x.sum(), "b": lambda: -x.sum()}, [x])
        {('a', 'b'): -1.0}
    """

    def gradient(source: str) -> list[Tensor]:
        grads = torch.autograd.grad(losses[source](), params, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]

    def dot(a: list[Tensor], b: list[Tensor]) -> float:
        products = [torch.dot(x.reshape(-1).double(), y.reshape(-1).double()) for x, y in zip(a, b, strict=True)]
        return float(torch.stack(products).sum())

    names = list(losses)
    squares: dict[str, float] = {}
    dots: dict[tuple[str, str], float] = {}
    for i, a in enumerate(names[:-1]):
        first = gradient(a)
        squares[a] = dot(first, first)
        for b in names[i + 1 :]:
            second = gradient(b)
            dots[a, b] = dot(first, second)
            squares[b] = dot(second, second)
            del second
    return {
        (a, b): dots[a, b] / (squares[a] * squares[b]) ** 0.5 if squares[a] * squares[b] else float("nan")
        for a, b in itertools.combinations(names, 2)
    }
