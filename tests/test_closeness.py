import pytest
import torch

from hf_nexus.evaluation import gradient_cosines


def test_cosines_of_known_gradients_over_parameters_of_several_shapes():
    x, y = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)
    g = {name: (torch.randn(2, 3), torch.randn(4)) for name in "abc"}
    losses = {name: lambda v=v: (v[0] * x).sum() + (v[1] * y).sum() for name, v in g.items()}
    flat = {name: torch.cat([v.reshape(-1) for v in vs]) for name, vs in g.items()}
    cosines = gradient_cosines(losses, [x, y])
    assert list(cosines) == [("a", "b"), ("a", "c"), ("b", "c")]
    for (a, b), value in cosines.items():
        assert value == pytest.approx(float(torch.cosine_similarity(flat[a], flat[b], dim=0)), abs=1e-6)


def test_unused_parameters_count_as_zero_and_a_zero_gradient_has_no_cosine():
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    cosines = gradient_cosines({"x": x.sum, "y": y.sum, "none": lambda: (x * 0).sum()}, [x, y])
    assert cosines["x", "y"] == 0.0
    assert cosines["x", "none"] != cosines["x", "none"]
    assert x.grad is None


def test_at_most_two_gradients_are_alive():
    import gc
    import weakref

    x = torch.ones(1000, requires_grad=True)
    alive: list[weakref.ref] = []
    most = 0

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, grad):
            nonlocal most
            gc.collect()
            made = grad.clone()
            most = max(most, 1 + sum(ref() is not None for ref in alive))
            alive.append(weakref.ref(made))
            return made

    gradient_cosines({name: lambda: Probe.apply(x).sum() for name in "abcd"}, [x])
    assert len(alive) == 9  # 3 + 3 + 2 + 1 backward passes, the last source's never on its own
    assert most == 2
