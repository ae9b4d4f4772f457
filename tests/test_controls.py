"""The controls: sums without a path, and paths in random directions."""

import pytest
import torch
from torch import nn

from hf_nexus import Nexus
from hf_nexus.controls import fill_normal_
from tests.support.smooth_problem import GAMMA, Problem, flat, window


def test_the_sum_starts_at_zero_in_each_window():
    problem, params = Problem(), Problem().params()
    nexus = Nexus(params, 0.0)
    first, second = window(nexus, problem, [0, 1]), window(nexus, problem, [0, 1])
    assert torch.equal(first, second)


def test_the_path_and_the_sum_take_turns():
    """A schedule of `inner_lr` that starts at 0 switches between them, on the same memory."""
    problem, params = Problem(), Problem().params()
    nexus = Nexus(params, 0.0)
    in_turn = []
    for gamma in (0.0, GAMMA, 0.0, GAMMA):
        nexus.inner_lr = gamma
        in_turn.append(window(nexus, problem, [0, 1]))
    assert torch.equal(in_turn[0], in_turn[2]) and torch.equal(in_turn[1], in_turn[3])
    assert not torch.allclose(in_turn[0], in_turn[1])
    assert nexus._sum is nexus._snapshot
    assert nexus.outer_step == 4


def test_a_step_too_small_for_the_dtype_is_not_taken():
    params = [nn.Parameter(torch.randn(1000, 1000))]
    assert Nexus(params, 1e-5).effective_inner_lr == 0.0
    assert Nexus(params, 1e-3).effective_inner_lr == 1e-3


def test_random_steps_are_as_long_and_p_averages_gradients():
    problem, params = Problem(), Problem().params()
    state = torch.random.get_rng_state()
    nexus = Nexus(params, GAMMA, direction="random", key=(3,))
    steps = []
    with nexus.window():
        for m in range(3):
            before = flat(params)
            problem.loss(m, params).backward()
            nexus.inner_step()
            steps.append(flat(params) - before)
    assert torch.equal(state, torch.random.get_rng_state())
    for step in steps:
        assert step.norm() == pytest.approx(GAMMA, rel=1e-9)
    assert abs(torch.cosine_similarity(steps[0], steps[1], dim=0)) < 0.99
    theta, total = problem.start, torch.zeros_like(problem.start)
    for m in range(3):
        g = problem.gradient(m, theta)
        total, theta = total + g / g.norm(), theta + steps[m]
    torch.testing.assert_close(flat([p.grad for p in params]), total / 3)


def test_random_directions_depend_on_key_and_step_only():
    def moved(key: tuple[int, ...] = (0, 0), outer_step: int = 0) -> torch.Tensor:
        params, problem = Problem().params(), Problem()
        nexus = Nexus(params, GAMMA, direction="random", key=key)
        nexus.outer_step = outer_step
        with nexus.window():
            problem.loss(0, params).backward()
            nexus.inner_step()
            return flat(params)

    assert torch.equal(moved(), moved())
    for change in ({"key": (1, 0)}, {"key": (0, 1)}, {"outer_step": 1}):
        assert not torch.allclose(moved(), moved(**change))


def test_noise_depends_on_the_key_only():
    state = torch.random.get_rng_state()
    a, b, c = [torch.empty(50)], [torch.empty(50)], [torch.empty(50)]
    fill_normal_(a, (1, 2))
    torch.manual_seed(5)
    fill_normal_(b, (1, 2))
    fill_normal_(c, (2, 1))
    torch.random.set_rng_state(state)
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[0], c[0])
