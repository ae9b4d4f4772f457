"""Gradient cosines against values that are known exactly, their memory, and the error of projections."""

import gc
import math

import pytest
import torch

from hf_nexus.evaluation import cosines
from hf_nexus.evaluation.cosines import count_sketch, gradient_cosines


def cosine(a, b):
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


def linear(vector, x):
    """A loss whose gradient is `vector`."""
    return lambda: (vector * x).sum()


def test_cosines_of_known_gradients_over_several_parameters():
    x, y = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)
    g = {name: (torch.randn(2, 3), torch.randn(4)) for name in "abc"}
    losses = {name: lambda v=v: (v[0] * x).sum() + (v[1] * y).sum() for name, v in g.items()}
    flat = {name: torch.cat([v.reshape(-1) for v in vs]) for name, vs in g.items()}
    found = gradient_cosines(losses, [x, y])
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    for (a, b), value in found.items():
        assert value == pytest.approx(float(torch.cosine_similarity(flat[a], flat[b], dim=0)), abs=1e-6)


def test_cosines_of_quadratics_are_those_of_the_minima():
    x = torch.randn(7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    minima = {name: torch.randn(7, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc", 1)}
    losses = {name: lambda m=m: 3 * (x - m).square().sum() for name, m in minima.items()}
    for (a, b), value in gradient_cosines(losses, [x]).items():
        assert value == pytest.approx(cosine(x.detach() - minima[a], x.detach() - minima[b]), abs=1e-6)


@pytest.mark.parametrize("projection", [None, 10**6], ids=["exact", "projected"])
def test_unused_parameters_are_zero_and_zero_has_no_cosine(projection):
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    losses = {"x": x.sum, "y": y.sum, "none": lambda: (x * 0).sum()}
    found = gradient_cosines(losses, [x, y], projection=projection)
    assert found["x", "y"] == 0.0
    assert math.isnan(found["x", "none"])
    assert x.grad is None


@pytest.mark.parametrize("projection", [None, 10**6], ids=["exact", "projected"])
def test_several_batches_have_the_gradient_of_their_mean(projection):
    x, y = torch.zeros(5, requires_grad=True), torch.zeros(2, requires_grad=True)
    x.grad = torch.full((5,), 7.0)
    g = [torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def forbidden():
        raise AssertionError("a batch without tokens has no loss")

    losses = {
        "many": [(linear(g[0], x), 3), (forbidden, 0), (linear(g[1], x), 1.0), (lambda: y.sum() * 0 + x.sum(), 2.0)],
        "one": linear(g[2], x),
        "single": [(linear(g[3], x), 0.1)],
    }
    means = {"many": (3 * g[0] + g[1] + 2) / 6, "one": g[2], "single": g[3]}
    found = gradient_cosines(losses, [x, y], projection=projection)
    for (a, b), value in found.items():
        assert value == pytest.approx(cosine(means[a], means[b]), abs=1e-6)
    assert x.grad.tolist() == [7.0] * 5 and y.grad is None
    assert found == gradient_cosines(losses, [x, y], projection=projection)


@pytest.mark.parametrize(
    ("batches", "projection", "passes", "held"),
    [(1, None, 10, 1), (3, None, 30, 2), (1, 8, 4, 0), (3, 8, 12, 0)],
    ids=["one batch", "several batches", "one batch projected", "several batches projected"],
)
def test_few_gradients_are_alive_while_the_next_is_computed(batches, projection, passes, held):
    """For 4 sources, exact cosines take 4 + 3 + 2 gradients and projected ones 4."""
    x = torch.ones(1013, requires_grad=True)
    alive = []

    def loss():
        gc.collect()
        alive.append(sum(type(o) is torch.Tensor and o.shape == x.shape for o in gc.get_objects()))
        return x.sum()

    source = loss if batches == 1 else [(loss, 1.0)] * batches
    gc.freeze()  # looks only at new objects
    try:
        gradient_cosines(dict.fromkeys("abcd", source), [x], projection=projection)
    finally:
        gc.unfreeze()
    assert len(alive) == (passes if projection else passes - batches)
    assert max(alive) == held


# ---- Projection ----


def projected(a, b, size, seeds):
    x = torch.zeros_like(a, requires_grad=True)
    losses = {"a": linear(a, x), "b": linear(b, x)}
    return torch.tensor([gradient_cosines(losses, [x], projection=size, seed=s)["a", "b"] for s in range(seeds)])


@pytest.mark.parametrize("wanted", [0.0, 0.7])
def test_the_error_falls_with_the_root_of_the_projection(wanted):
    generator = torch.Generator().manual_seed(3)
    a, b = torch.linalg.qr(torch.randn(4000, 2, generator=generator))[0].T
    b = wanted * a + (1 - wanted**2) ** 0.5 * b
    errors = {size: (projected(a, b, size, 300) - wanted).square().mean().sqrt() for size in (16, 64, 256)}
    for size, error in errors.items():  # of 300 values: the standard error of the estimate is 4 %
        assert float(error) * size**0.5 == pytest.approx(1 - wanted**2, rel=0.2)


def test_inner_products_of_sketches_are_exact_in_expectation():
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    a[0], b[0] = 9.0, -7.0  # one element that carries most of it
    products = torch.stack([count_sketch([a], 8, s) @ count_sketch([b], 8, s) for s in range(3000)])
    assert float((products.mean() - a @ b).abs()) < 4 * float(products.std()) / 3000**0.5
    assert float(products.std()) > 1  # far from exact one by one


def test_every_block_of_every_parameter_has_other_places(monkeypatch):
    monkeypatch.setattr(cosines, "BLOCK", 64)
    v = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert count_sketch([torch.cat([v, -v])], 512, 0).abs().sum() > 1
    assert count_sketch([v, -v], 512, 0).abs().sum() > 1
    assert torch.equal(count_sketch([v, v], 512, 0), count_sketch([v.view(8, 8), v], 512, 0))
    assert not torch.equal(count_sketch([v], 512, 0), count_sketch([v], 512, 1))


def test_sketches_leave_the_global_random_state_alone():
    state = torch.get_rng_state()
    count_sketch([torch.ones(10)], 4, 0)
    assert torch.equal(torch.get_rng_state(), state)
