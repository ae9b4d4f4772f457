"""A small smooth problem with several sources, in float64, and windows over it."""

import math

import torch
from torch import nn

from hf_nexus import Nexus

GAMMA = 0.1


class Problem:
    """Losses f_m(theta) = mean(softplus(A_m theta)) + |theta - c_m|^2 / 8 over parameters of several shapes."""

    def __init__(self, k: int = 4, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.shapes = [(3, 2), (4,), ()]
        self.size = sum(math.prod(shape) for shape in self.shapes)
        self.a = torch.randn(k, 7, self.size, generator=g, dtype=torch.float64)
        self.c = torch.randn(k, self.size, generator=g, dtype=torch.float64)
        self.start = torch.randn(self.size, generator=g, dtype=torch.float64)

    def params(self) -> list[nn.Parameter]:
        pieces = self.start.split([math.prod(shape) for shape in self.shapes])
        return [nn.Parameter(piece.reshape(shape).clone()) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def loss(self, m: int, params: list[torch.Tensor]) -> torch.Tensor:
        theta = torch.cat([p.reshape(-1) for p in params])
        return nn.functional.softplus(self.a[m] @ theta).mean() + (theta - self.c[m]).square().sum() / 8

    def gradient(self, m: int, theta: torch.Tensor) -> torch.Tensor:
        theta = theta.detach().requires_grad_()
        return torch.autograd.grad(self.loss(m, [theta]), theta)[0]

    def hessian(self, m: int, theta: torch.Tensor) -> torch.Tensor:
        return torch.autograd.functional.hessian(lambda t: self.loss(m, [t]), theta)


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def window(nexus: Nexus, problem: Problem, order: list[int], scale: float = 1.0) -> torch.Tensor:
    """Run one window over the sources in `order` and return the flat pseudo-gradient."""
    with nexus.window():
        for m in order:
            (scale * problem.loss(m, nexus.params)).backward()
            nexus.inner_step()
    assert torch.equal(flat(nexus.params), problem.start)
    return flat([p.grad for p in nexus.params])


def pseudo_gradient(problem: Problem, order: list[int], gamma: float = GAMMA, scale: float = 1.0) -> torch.Tensor:
    """The flat pseudo-gradient of the first window over the sources in `order`."""
    return window(Nexus(problem.params(), gamma), problem, order, scale)


def mean_along_path(problem: Problem, order: list[int], gamma: float) -> torch.Tensor:
    """The mean of the normalized gradients along the path, computed from the definition."""
    theta, total = problem.start.clone(), torch.zeros_like(problem.start)
    for m in order:
        g = problem.gradient(m, theta)
        total += g / g.norm()
        theta = theta - gamma * g / g.norm()
    return total / len(order)
