"""How close the sources are to each other: cosines between their gradients at one point."""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["gradient_cosines"]

Loss = Callable[[], Tensor]
Batches = Loss | Iterable[tuple[Loss, float]]

# Elements that are worked on at a time in float64, which bounds the memory of inner products and sketches.
BLOCK = 2**20


def gradient_cosines(
    losses: Mapping[str, Batches], params: Sequence[Tensor], *, projection: int | None = None, seed: int = 0
) -> dict[tuple[str, str], float]:
    """
    Cosine between the loss gradients of each pair of sources, all taken at the present parameters. `.grad` is left
    alone.

    For S sources, the exact cosines cost S (S + 1) / 2 passes over their batches, and hold two gradients at a time, or
    three where a source has several batches. With a `projection` it is S passes, one gradient, and S vectors of
    `projection` numbers: each gradient is reduced to a count sketch (Charikar, Chen, Farach-Colton 2002), in which
    each element is added, with a random sign, to a random one of the numbers. Inner products of sketches equal those
    of the gradients in expectation (Weinberger et al. 2009, "Feature hashing for large scale multitask learning", with
    the variance). The error of a cosine c has a standard deviation of about `(1 - c**2) / projection**0.5`, or less
    where few parameters carry the gradients: at most 0.03 for 1024 numbers.

    Args:
        losses (`Mapping[str, Callable[[], Tensor] | Iterable[tuple[Callable[[], Tensor], float]]]`):
            For each source, a function that computes its loss (0-d) on a fixed batch; or for several batches, pairs of
            such a function and the weight of the batch in the source's mean, which is the number of its target tokens.
            The pairs are asked for one by one, and in each pass anew: an iterable may make its batches as it goes.
        params (`Sequence[Tensor]`):
            The parameters to differentiate by.
        projection (`int`, *optional*):
            Numbers that are kept of a gradient. By default the cosines are exact.
        seed (`int`, *optional*, defaults to 0):
            Of the projection. The same on the same kind of device gives the same signs and places.

    Returns:
        `dict[tuple[str, str], float]`: the cosine of each pair, in the order of `losses`; NaN where a gradient is
        zero. A projected cosine can lie outside -1..1 by rounding only.

    Raises:
        ValueError: an iterable that can be read only once, a weight below 0 or not finite, or a projection below 1.

    Example:
        >>> import torch
        >>> from hf_nexus.evaluation import gradient_cosines
        >>> x = torch.ones(2, requires_grad=True)
        >>> gradient_cosines({"a": lambda: x.sum(), "b": [(lambda: -x.sum(), 3.0), (lambda: x.sum(), 1.0)]}, [x])
        {('a', 'b'): -1.0}
    """
    if projection is not None and projection < 1:
        raise ValueError(f"projection={projection} is not allowed; it must be at least 1, or None for exact cosines.")
    names = list(losses)
    for name in names:
        batches = losses[name]
        if not callable(batches) and iter(batches) is batches:
            raise ValueError(f"The batches of source {name!r} can be read only once. Pass a list, not an iterator.")
    products = _exact(losses, params) if projection is None else _projected(losses, params, projection, seed)
    return {(a, b): _cosine(products, a, b) for a, b in itertools.combinations(names, 2)}


# Inner products of gradients by pairs of sources, a source with itself among them.
_Products = dict[tuple[str, str], float]


def _cosine(products: _Products, a: str, b: str) -> float:
    squares = products[a, a] * products[b, b]
    return products[a, b] / squares**0.5 if squares else float("nan")


def _exact(losses: Mapping[str, Batches], params: Sequence[Tensor]) -> _Products:
    names = list(losses)
    products: _Products = {}
    for i, a in enumerate(names[:-1]):
        first = _mean_gradient(a, losses[a], params)
        products[a, a] = dot(first, first)
        for b in names[i + 1 :]:
            second = _mean_gradient(b, losses[b], params)
            products[a, b] = dot(first, second)
            products[b, b] = dot(second, second)
            del second
        del first
    return products


def _projected(losses: Mapping[str, Batches], params: Sequence[Tensor], size: int, seed: int) -> _Products:
    sketches = {}
    for name, batches in losses.items():
        sketch = torch.zeros(size, dtype=torch.float64, device=params[0].device)
        for gradient, weight in _gradients(name, batches, params):
            # A sketch is linear in the gradient, so that the mean needs no gradient of its own.
            sketch += weight * count_sketch(gradient, size, seed)
            del gradient
        sketches[name] = sketch
    pairs = itertools.combinations_with_replacement(sketches, 2)
    return {(a, b): float(torch.dot(sketches[a], sketches[b])) for a, b in pairs}


def _mean_gradient(name: str, batches: Batches, params: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of the weighted mean, up to the sum of the weights: a cosine does not know the difference."""
    total: list[Tensor] | None = None
    for gradient, weight in _gradients(name, batches, params):
        if callable(batches):
            return gradient
        if total is None:
            total = [g * weight for g in gradient]  # not in place: autograd may hand out one tensor twice
        else:
            torch._foreach_add_(total, gradient, alpha=weight)
        del gradient
    return [torch.zeros_like(p) for p in params] if total is None else total


def _gradients(name: str, batches: Batches, params: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], float]]:
    """The gradient on each batch, and its weight. This generator keeps none while the next one is computed."""
    for loss, weight in [(batches, 1.0)] if callable(batches) else batches:
        if not 0 <= weight < math.inf:
            raise ValueError(f"A batch of source {name!r} has weight {weight}; it must be finite and not below 0.")
        if weight:  # the mean over no tokens is NaN, and zero times NaN as well
            grads = torch.autograd.grad(loss(), params, allow_unused=True)
            yield [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)], float(weight)
            del grads


@torch.no_grad()
def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The inner product of two vectors that are given in parts, summed in float64."""
    products = [
        torch.dot(x.double(), y.double())
        for whole_x, whole_y in zip(a, b, strict=True)
        for x, y in zip(whole_x.reshape(-1).split(BLOCK), whole_y.reshape(-1).split(BLOCK), strict=True)
    ]
    return float(torch.stack(products).sum())


@torch.no_grad()
def count_sketch(tensors: Sequence[Tensor], size: int, seed: int) -> Tensor:
    """
    A vector reduced to `size` float64 numbers. The places depend on the seed and the position alone: all vectors of
    one shape are sketched alike, and no table of places is kept.
    """
    device = tensors[0].device
    bins = torch.zeros(2 * size, dtype=torch.float64, device=device)  # a place and a sign are one of 2 * size bins
    generator = torch.Generator(device)
    for i, tensor in enumerate(tensors):
        for j, block in enumerate(tensor.reshape(-1).split(BLOCK)):
            key = hashlib.blake2b(repr((seed, i, j)).encode(), digest_size=7).digest()
            generator.manual_seed(int.from_bytes(key, "big"))
            places = torch.randint(2 * size, (block.numel(),), generator=generator, device=device)
            bins.index_add_(0, places, block.double())
    return bins[:size] - bins[size:]
