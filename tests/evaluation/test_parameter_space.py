"""Norms and distances of points in parameter space."""

import math

import pytest
import torch

from hf_nexus.evaluation.parameter_space import distance, norm

from .test_landscape import Tied


def test_distances_are_summed_in_float64_over_all_parameters(monkeypatch):
    small = torch.full((100_000,), 1e-3)  # float32 loses what it adds to the large one
    far = {"w": torch.cat([torch.tensor([1e4]), small]), "b": small[:7].clone()}
    near = {name: torch.zeros_like(t) for name, t in far.items()}
    expected = math.sqrt(1e8 + 100_007 * float(small[0]) ** 2)
    for size in (30_000, 10**6):
        monkeypatch.setattr("hf_nexus.evaluation.parameter_space.BLOCK", size)
        assert norm(far) == pytest.approx(expected, rel=1e-12)
        assert distance(near, far) == pytest.approx(expected, rel=1e-12)
    assert distance(list(near.values()), far) == distance(near, far)  # by order where there are no names


def test_points_are_matched_by_name_and_must_fit():
    a = {"x": torch.tensor([1.0]), "y": torch.tensor([5.0])}
    assert distance(a, dict(reversed(a.items()))) == 0
    with pytest.raises(ValueError, match="'z' is not in all"):
        distance(a, {**a, "z": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"y has shape \(2,\) and \(1,\)"):
        distance(a, {**a, "y": torch.zeros(2)})
    with pytest.raises(ValueError, match="1 and 2 tensors"):
        distance(a, [torch.zeros(1)])


def test_tied_parameters_count_once():
    a, b = Tied(), Tied()
    expected = float((a.embed.weight - b.embed.weight).detach().norm())
    copy = {name: t.clone() for name, t in b.state_dict().items()}  # no longer tied, but still equal
    for other in (b.state_dict(), copy):
        assert distance(a.state_dict(), other) == pytest.approx(expected)
        assert distance(other, a.state_dict()) == pytest.approx(expected)
    assert norm(a.state_dict()) == pytest.approx(float(a.embed.weight.detach().norm()))
    copy["head.weight"] += 1  # differs in one point, so not tied
    assert distance(a.state_dict(), copy) > expected + 0.1
    equal = torch.ones(3)
    assert norm([equal, equal.clone()]) == pytest.approx(6**0.5)  # equal, but not tied
