"""Cosines between the gradients of sources, all at the same parameters."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..tensors import as_float64, float64_device

__all__ = ["dot", "gradient_cosines"]

Loss = Callable[[], Tensor]
Batches = Loss | Iterable[tuple[Loss, float]]
# Inner products of gradients by pair of sources, each source with itself included.
_Products = dict[tuple[str, str], float]

# Elements processed at a time in float64, which bounds the memory of inner products and sketches.
BLOCK = 2**20


def gradient_cosines(
    losses: Mapping[str, Batches], params: Sequence[Tensor], *, projection: int | None = None, seed: int = 0
) -> dict[tuple[str, str], float]:
    """
    Cosine between the loss gradients of each pair of sources at the current parameters. `.grad` is not touched.

    For S sources, exact cosines take S (S + 1) / 2 - 1 passes over the batches and hold two gradients at a time, or
    three if a source has several batches. With a `projection` they take S passes and hold one gradient and S vectors
    of `projection` numbers. Each gradient is then reduced to a count sketch (Charikar, Chen, Farach-Colton 2002): each
    element is added, with a random sign, to a random number of the sketch. Inner products of sketches equal those of
    the gradients in expectation (Weinberger et al. 2009, "Feature hashing for large scale multitask learning"). The
    error of a cosine c has a standard deviation of about `(1 - c**2) / projection**0.5` at most: 0.03 for 1024
    numbers. The same seed on the same kind of device gives the same projection.

    Each source has a function that computes its loss (0-d) on a fixed batch. For several batches, it has pairs of such
    a function and the number of target tokens of the batch, its weight in the mean of the source. Each pass iterates
    over the pairs again, so an iterable may create its batches as it goes. The cosine is NaN if a gradient is zero.

    Example:
        >>> import torch
        >>> from hf_nexus.evaluation.cosines import gradient_cosines
        >>> x = torch.ones(2, requires_grad=True)
        >>> gradient_cosines({"a": lambda: x.sum(), "b": [(lambda: -x.sum(), 3.0), (lambda: x.sum(), 1.0)]}, [x])
        {('a', 'b'): -1.0}
    """
    products = _exact(losses, params) if projection is None else _projected(losses, params, projection, seed)
    return {(a, b): _cosine(products, a, b) for a, b in itertools.combinations(losses, 2)}


def _cosine(products: _Products, a: str, b: str) -> float:
    squares = products[a, a] * products[b, b]
    return products[a, b] / squares**0.5 if squares else float("nan")


def _exact(losses: Mapping[str, Batches], params: Sequence[Tensor]) -> _Products:
    names = list(losses)
    products: _Products = {}
    for i, a in enumerate(names[:-1]):
        first = _mean_gradient(losses[a], params)
        products[a, a] = dot(first, first)
        for b in names[i + 1 :]:
            second = _mean_gradient(losses[b], params)
            products[a, b] = dot(first, second)
            products[b, b] = dot(second, second)
            del second
        del first
    return products


def _projected(losses: Mapping[str, Batches], params: Sequence[Tensor], size: int, seed: int) -> _Products:
    sketches = {}
    for name, batches in losses.items():
        sketch = torch.zeros(size, dtype=torch.float64, device=float64_device(params[0]))
        for gradient, weight in _gradients(batches, params):
            sketch += weight * count_sketch(gradient, size, seed)  # linear, so no mean gradient is needed
            del gradient
        sketches[name] = sketch
    pairs = itertools.combinations_with_replacement(sketches, 2)
    return {(a, b): float(torch.dot(sketches[a], sketches[b])) for a, b in pairs}


def _mean_gradient(batches: Batches, params: Sequence[Tensor]) -> list[Tensor]:
    """Weighted sum of the gradients. It has the direction of the mean, which is all a cosine depends on."""
    total: list[Tensor] | None = None
    for gradient, weight in _gradients(batches, params):
        if callable(batches):
            return gradient
        if total is None:
            total = [g * weight for g in gradient]  # not in place: autograd may return one tensor twice
        else:
            torch._foreach_add_(total, gradient, alpha=weight)
        del gradient
    return [torch.zeros_like(p) for p in params] if total is None else total


def _gradients(batches: Batches, params: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], float]]:
    """Gradient and weight of each batch. The generator holds no gradient while the next one is computed."""
    for loss, weight in [(batches, 1.0)] if callable(batches) else batches:
        if weight:  # the mean loss over no tokens is NaN, and so is zero times NaN
            grads = torch.autograd.grad(loss(), params, allow_unused=True)
            yield [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)], float(weight)
            del grads


@torch.no_grad()
def dot(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """Inner product of two points in parameter space, summed in float64."""
    products = [
        torch.dot(as_float64(x), as_float64(y))
        for whole_x, whole_y in zip(a, b, strict=True)
        for x, y in zip(whole_x.reshape(-1).split(BLOCK), whole_y.reshape(-1).split(BLOCK), strict=True)
    ]
    return float(torch.stack(products).sum())


@torch.no_grad()
def count_sketch(tensors: Sequence[Tensor], size: int, seed: int) -> Tensor:
    """
    Count sketch of a vector, (size,) in float64. The projection depends only on the seed and the positions: vectors
    of one shape are projected alike, and no table is kept.
    """
    device = float64_device(tensors[0])
    bins = torch.zeros(2 * size, dtype=torch.float64, device=device)  # a number and a sign are one of 2 * size bins
    generator = torch.Generator(device)
    for i, tensor in enumerate(tensors):
        for j, block in enumerate(tensor.reshape(-1).split(BLOCK)):
            key = hashlib.blake2b(repr((seed, i, j)).encode(), digest_size=7).digest()
            generator.manual_seed(int.from_bytes(key, "big"))
            places = torch.randint(2 * size, (block.numel(),), generator=generator, device=device)
            bins.index_add_(0, places, as_float64(block))
    return bins[:size] - bins[size:]
