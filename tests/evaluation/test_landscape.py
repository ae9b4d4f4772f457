"""Losses between minima: against closed forms, on trained networks, and parameters restored bit for bit."""

import itertools
import math
from functools import partial

import pytest
import torch

from hf_nexus.evaluation.landscape import barrier_height, minima_landscape, plane_losses, segment_losses


def bits(tensors):
    return [bytes(t.detach().contiguous().view(torch.uint8).numpy()) for t in tensors]


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(2, 2, bias=False)
        self.head = torch.nn.Linear(2, 2, bias=False)
        self.head.weight = self.embed.weight


# ---- Segments, barriers, planes ----


def test_a_segment_between_quadratic_minima_has_its_closed_form():
    a, b = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([-1.0, 1.0, 2.0])
    x = torch.zeros(3)
    positions = [i / 8 for i in range(9)]
    curvature_a, curvature_b, far = 3.0, 0.5, float((a - b).square().sum())

    def mean():
        return (curvature_a / 2 * (x - a).square().sum() + curvature_b / 2 * (x - b).square().sum()) / 2

    losses = segment_losses([x], [a], [b], positions, mean)
    expected = [far / 4 * (curvature_a * t**2 + curvature_b * (1 - t) ** 2) for t in positions]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert barrier_height(positions, losses) == 0.0  # between minima of convex losses there is none

    def two_wells():
        return curvature_a / 2 * torch.minimum((x - a).square().sum(), (x - b).square().sum()) + 7

    wells = segment_losses([x], [a], [b], positions, two_wells)
    assert barrier_height(positions, wells) == pytest.approx(curvature_a * far / 8, rel=1e-5)


def test_ends_are_exact_and_barriers_rise_above_their_line():
    a, b = [torch.randn(50)], [torch.randn(50) * 1e6]
    x = torch.zeros(50)
    seen = []
    segment_losses([x], a, b, [0, 1], lambda: seen.append(x.clone()) or 0.0)
    assert bits(seen) == bits([*a, *b])
    assert barrier_height([0, 0.25, 1], [0.0, 3.0, 4.0]) == 2.0
    assert barrier_height([0, 0.5, 1], [0.0, math.inf, 4.0]) == math.inf
    assert math.isnan(barrier_height([0, 0.5, 1], [0.0, math.nan, 4.0]))
    for positions, losses in (([0, 1], [1.0]), ([], []), ([0.5], [1.0]), ([0, 1, 1], [1.0] * 3)):
        with pytest.raises(ValueError, match="as many losses as positions"):
            barrier_height(positions, losses)


def test_a_plane_through_three_points_has_its_closed_form():
    generator = torch.Generator().manual_seed(1)
    corners, others = (torch.randn(n, 20, generator=generator, dtype=torch.float64) for n in (3, 2))
    target = torch.randn(20, generator=generator, dtype=torch.float64)
    x = {"w": torch.zeros(12, dtype=torch.float64), "b": torch.zeros(2, 4, dtype=torch.float64)}

    def point(v):
        return {"w": v[:12].clone(), "b": v[12:].view(2, 4).clone()}

    def loss():
        return (torch.cat([x["w"], x["b"].reshape(-1)]) - target).square().sum()

    plane = plane_losses(x, list(map(point, corners)), loss, others=list(map(point, others)), resolution=5, margin=0.1)
    basis = torch.linalg.qr((corners[1:] - corners[0]).T)[0]  # Gram-Schmidt, up to signs
    basis *= torch.sign(torch.einsum("ij,ji->i", (corners[1:] - corners[0]), basis))
    expected = (torch.cat([corners, others]) - corners[0]) @ basis
    assert torch.tensor(plane["points"], dtype=torch.float64).allclose(expected)
    for axis, name in enumerate("xy"):
        low, high = float(expected[:, axis].min()), float(expected[:, axis].max())
        room = 0.1 * (high - low)
        assert plane[name] == pytest.approx(torch.linspace(low - room, high + room, 5).tolist(), abs=1e-5)
    for i, j in itertools.product(range(5), range(5)):
        place = corners[0] + plane["x"][j] * basis[:, 0] + plane["y"][i] * basis[:, 1]
        assert plane["loss"][i][j] == pytest.approx(float((place - target).square().sum()))


@pytest.mark.parametrize("third", [[0.0, 0.0], [5.0, 0.0], [2.0, 0.0], [math.nan, 1.0]])
def test_there_is_no_plane_through_a_line(third):
    x = torch.zeros(2)
    corners = [[torch.tensor(p)] for p in ([0.0, 0.0], [2.0, 0.0], third)]
    assert plane_losses([x], corners, lambda: 0.0) is None
    assert plane_losses([x], corners[::-1], lambda: 0.0) is None
    with pytest.raises(ValueError, match="3 corners"):
        plane_losses([x], corners[:2], lambda: 0.0)


# ---- Restoring ----


@pytest.mark.parametrize("failing", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("what", ["segment", "plane", "minima"])
def test_parameters_are_restored_bit_for_bit(failing, what):
    model = Tied()
    odd = torch.nn.Parameter(torch.tensor([math.nan, -0.0, 1e-45, math.inf, 1 / 3]))
    params = {**model.state_dict(keep_vars=True), "odd": odd}
    a, b, c = ({name: torch.randn_like(p) for name, p in params.items()} for _ in range(3))
    before, given = bits(params.values()), bits([*a.values(), *b.values(), *c.values()])
    calls = []

    def loss():
        assert not torch.is_grad_enabled()
        calls.append(odd.detach().clone())
        if failing and len(calls) == 5:
            raise failing
        return float(len(calls))

    def measure():
        if what == "segment":
            segment_losses(params, a, params, [i / 9 for i in range(10)], loss)
        elif what == "plane":
            plane_losses(params, [a, b, c], loss, others=[c], resolution=4)
        else:
            minima_landscape(params, params, {"a": a, "b": b}, {"a": loss, "b": loss})

    if failing:
        with pytest.raises(failing):
            measure()
        assert len(calls) == 5
    else:
        measure()
    assert any(not torch.equal(seen, calls[0]) for seen in calls)  # it did move
    assert bits(params.values()) == before and bits([*a.values(), *b.values(), *c.values()]) == given
    assert model.head.weight is model.embed.weight and odd.grad is None


def test_the_parameters_themselves_may_be_the_start():
    x = torch.tensor([3.0], requires_grad=True)
    minima = {"a": [torch.tensor([1.0])], "b": [torch.tensor([7.0])]}
    losses = {name: lambda m=m: (x - m[0]).square().sum() for name, m in minima.items()}
    found = minima_landscape([x], [x], minima, losses)
    assert found["start_loss"] == {"a": 4.0, "b": 16.0} and found["to_start"] == {"a": 2.0, "b": 4.0}
    assert segment_losses([x], [x], minima["b"], [0, 0.5, 1], lambda: x.sum()) == [3.0, 5.0, 7.0]


# ---- Minima ----


def test_the_landscape_of_quadratic_minima_is_exact():
    x = torch.zeros(2)
    start = [torch.tensor([3.0, 4.0])]
    minima = {"a": [torch.tensor([0.0, 0.0])], "b": [torch.tensor([4.0, 0.0])], "c": [torch.tensor([4.0, 3.0])]}
    losses = {name: lambda m=m: (x - m[0]).square().sum() + 1 for name, m in minima.items()}
    found = minima_landscape([x], start, minima, losses, positions=[0, 0.5, 1], plane="abc", resolution=3)
    assert found["parameter_norm"] == 5.0
    assert found["to_start"] == pytest.approx({"a": 5.0, "b": 17**0.5, "c": 2**0.5})
    assert found["start_loss"] == pytest.approx({"a": 26.0, "b": 18.0, "c": 3.0})
    assert found["end_loss"] == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert found["pairwise"] == [("a", "b", 4.0), ("a", "c", 5.0), ("b", "c", 3.0)]
    assert found["segments"][0] == ("a", "b", [9.0, 5.0, 9.0]) and found["barriers"][0] == ("a", "b", 0.0)
    plane = found["plane"]
    assert plane["sources"] == ["a", "b", "c"]
    assert plane["points"] == [(0.0, 0.0), (4.0, 0.0), (4.0, 3.0), (3.0, 4.0)]
    assert (plane["x"], plane["y"]) == ([-1.0, 2.0, 5.0], [-1.0, 2.0, 5.0])
    assert plane["loss"][1][1] == pytest.approx((8 + 8 + 5) / 3 + 1)


def test_missing_losses_and_planes_of_two_are_refused():
    x = torch.zeros(1)
    minima = {"a": [torch.zeros(1)], "b": [torch.ones(1)]}
    with pytest.raises(ValueError, match="'b' needs a minimizer and a loss"):
        minima_landscape([x], [x], minima, {"a": x.sum})
    with pytest.raises(ValueError, match="three sources"):
        minima_landscape([x], [x], minima, {"a": x.sum, "b": x.sum}, plane="ab")


def teacher_problem(spread):
    """A network, and for each of three sources the loss of imitating its teacher. Teachers differ by `spread`."""
    torch.manual_seed(0)
    make = partial(torch.nn.Sequential, torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    inputs, student = torch.randn(64, 3), make()
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    targets = {}
    for i, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(i)
        shifted = {k: v + spread * torch.randn(v.shape, generator=generator) for k, v in start.items()}
        targets[name] = torch.func.functional_call(student, shifted, inputs).detach()
    losses = {name: lambda t=t: (student(inputs) - t).square().mean() for name, t in targets.items()}
    return student, start, losses


def trained_minima(spread):
    student, start, losses = teacher_problem(spread)
    params = dict(student.named_parameters())
    minimizers = {}
    for name, loss in losses.items():
        student.load_state_dict(start)
        optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        minimizers[name] = {key: p.detach().clone() for key, p in params.items()}
    student.load_state_dict(start)
    return minima_landscape(params, start, minimizers, losses, plane="abc", resolution=3)


def test_closer_sources_have_closer_minima():
    found = {spread: trained_minima(spread) for spread in (0.1, 0.8)}
    for minima in found.values():
        for name in "abc":
            assert minima["end_loss"][name] < 0.05 * minima["start_loss"][name]  # they were found
    means = [sum(v for *_, v in m["pairwise"]) / m["parameter_norm"] for m in found.values()]
    assert means[0] < 0.5 * means[1]
    assert max(v for *_, v in found[0.1]["pairwise"]) < min(v for *_, v in found[0.8]["pairwise"])
