"""Inner steps in AdamW's geometry: the formula, its scale, and a run through NexusTrainer."""

import pytest
import torch
from torch import nn

from hf_nexus import Nexus
from hf_nexus.geometry import FLOOR, adam_metric
from tests.conftest import tiny_llama
from tests.test_nexus import GAMMA, Problem, flat
from tests.test_trainer import last_log, weights


def roots(problem: Problem, seed: int = 5) -> list[torch.Tensor]:
    """Some D^(1/2)."""
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=g, dtype=torch.float64) + 0.1 for shape in problem.shapes]


def walked(problem: Problem, gamma: float = GAMMA, **kwargs) -> Nexus:
    nexus = Nexus(problem.params(), gamma, **kwargs)
    with nexus.window():
        for m in range(4):
            problem.loss(m, nexus.params).backward()
            nexus.inner_step()
    assert torch.equal(flat(nexus.params), problem.start)
    return nexus


@pytest.mark.parametrize("gamma", [GAMMA, 0.0])
def test_definition_in_a_metric(gamma: float) -> None:
    problem = Problem()
    metric = roots(problem)
    root, theta, path = flat(metric), problem.start.clone(), []
    for m in range(4):
        g = problem.gradient(m, theta)
        path.append(g / (root * g).norm())
        theta = theta - gamma * root**2 * path[-1]
    nexus = walked(problem, gamma, metric=lambda: metric)
    torch.testing.assert_close(flat([p.grad for p in nexus.params]), sum(path) / 4)
    cosines = [(root * path[i]) @ (root * path[j]) for i in range(4) for j in range(i)]
    assert nexus.path_cosine == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-9)


def test_a_metric_of_ones_is_plain_l2_and_none_is_so_to_the_bit() -> None:
    problem = Problem()
    plain = flat([p.grad for p in walked(problem).params])
    ones = walked(problem, metric=lambda: [torch.ones_like(p) for p in problem.params()])
    torch.testing.assert_close(flat([p.grad for p in ones.params]), plain)
    assert torch.equal(flat([p.grad for p in walked(problem, metric=lambda: None).params]), plain)


def stepped(scale: float = 1.0, steps: int = 1, seed: int = 0, without: int | None = None) -> tuple:
    """AdamW after some steps on one and the same gradient."""
    g = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((8, 4), (6,))]
    gradients = [scale * torch.randn(p.shape, generator=g).exp() for p in params]
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.95))
    for _ in range(steps):
        for i, p in enumerate(params):
            p.grad = None if i == without else gradients[i].clone()
        optimizer.step()
    return optimizer, params, gradients


def test_the_metric_is_that_of_the_second_moment() -> None:
    optimizer, params, gradients = stepped()
    assert adam_metric(torch.optim.AdamW(params), params) is None
    v = flat(gradients).square()
    size = (v + FLOOR * v.mean()).sqrt()
    torch.testing.assert_close(flat(adam_metric(optimizer, params)).square(), size.mean() / size)


def test_neither_the_scale_of_the_gradients_nor_the_number_of_steps_matters() -> None:
    expected = flat(adam_metric(*stepped()[:2]))
    for scale, steps in ((1e-6, 1), (1e6, 1), (1.0, 5)):
        torch.testing.assert_close(flat(adam_metric(*stepped(scale, steps)[:2])), expected)


def test_a_step_is_about_as_long_as_in_l2() -> None:
    optimizer, params, gradients = stepped()
    root, g = flat(adam_metric(optimizer, params)), flat(gradients)
    assert (root**2 * g).norm() / (root * g).norm() == pytest.approx(1, abs=0.05)
    assert root.max() / root.min() > 2


def test_what_has_no_moment_or_none_but_zero_counts_as_in_l2() -> None:
    optimizer, params, _ = stepped(without=1)
    metric = adam_metric(optimizer, params)
    assert torch.equal(metric[1], torch.ones(6))
    assert not torch.equal(metric[0], torch.ones(8, 4))
    assert torch.equal(flat(adam_metric(*stepped(scale=0.0)[:2])), torch.ones(38))


def test_two_shards_find_the_metric_of_the_whole() -> None:
    whole, params, gradients = stepped()
    parts = []
    for i in range(2):
        p = nn.Parameter(torch.zeros_like(params[i]))
        p.grad = gradients[i].clone()
        optimizer = torch.optim.AdamW([p], betas=(0.9, 0.95))
        optimizer.step()
        parts.append((optimizer, [p]))
    # What each shard hands in, in order; then both get the norm over both.
    sent: list[list[torch.Tensor]] = [[], []]
    answers: list[torch.Tensor] = []

    def ask(i: int):
        def reduce(norm: torch.Tensor) -> torch.Tensor:
            sent[i].append(norm)
            return answers[len(sent[i]) - 1] if len(sent[i]) <= len(answers) else norm

        return reduce

    for _ in range(3):  # each round settles one more of the three sums
        sent[0].clear()
        sent[1].clear()
        metric = [adam_metric(*parts[i], ask(i))[0] for i in range(2)]
        done = len(answers)
        answers.append(torch.stack([sent[0][done], sent[1][done]]).norm())
    sent[0].clear()
    sent[1].clear()
    metric = [adam_metric(*parts[i], ask(i))[0] for i in range(2)]
    torch.testing.assert_close(flat(metric), flat(adam_metric(whole, params)))


@pytest.mark.parametrize("config", [{}, {"matrix_optimizer": "muon"}, {"inner_lr": 0.0}])
def test_a_run_in_adams_geometry_differs_from_the_second_step_on_and_resumes(
    make_trainer, sources, tmp_path, config: dict
) -> None:
    config = {"optim": "adamw_torch", "max_grad_norm": 0.0} | config
    first = [make_trainer(sources, max_steps=1, inner_geometry=g, **config) for g in ("l2", "adam")]
    for trainer in first:
        trainer.train()
    assert torch.equal(weights(first[0]), weights(first[1]))
    config |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(sources, inner_geometry="adam", output_dir=str(tmp_path / "adam"), **config)
    plain = make_trainer(sources, **config)
    whole.train()
    plain.train()
    assert (weights(whole) - weights(plain)).norm() > 1e-3 * weights(plain).norm()
    assert -1 <= last_log(whole)["path_cosine"] <= 1
    resumed = make_trainer(sources, tiny_llama(seed=9), inner_geometry="adam", **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "adam" / "checkpoint-2"))
    assert torch.equal(weights(whole), weights(resumed))


def test_what_has_no_such_geometry_is_refused(make_trainer, sources) -> None:
    with pytest.raises(ValueError, match="inner_geometry='adam' and optim='sgd' exclude each other"):
        make_trainer(sources, inner_geometry="adam", optim="sgd")
    with pytest.raises(ValueError, match="not possible with inner_direction='random'"):
        make_trainer(sources, inner_geometry="adam", inner_direction="random")
