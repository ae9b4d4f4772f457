"""Distances and losses between minima: closed forms, trained networks, and parameters restored bit for bit."""

import itertools
import math
from functools import partial

import pytest
import torch

from hf_nexus.evaluation.cosines import dot
from hf_nexus.evaluation.landscape import barrier_height, distance, minima_landscape


def bits(tensors):
    return [bytes(t.detach().contiguous().view(torch.uint8).numpy()) for t in tensors]


def landscape_of(x, minima, loss, **options):
    """The landscape for sources that all have the same loss."""
    points = {name: {"x": point} for name, point in zip("abc", minima, strict=False)}
    return minima_landscape({"x": x}, points, dict.fromkeys("abc", loss), **options)


# ---- Norms and distances ----


def test_distances_are_summed_in_float64_over_all_parameters(monkeypatch):
    small = torch.full((100_000,), 1e-3)  # float32 loses what it adds to the large one
    far = [torch.cat([torch.tensor([1e4]), small]), small[:7].clone()]
    near = [torch.zeros_like(t) for t in far]
    expected = math.sqrt(1e8 + 100_007 * float(small[0]) ** 2)
    for size in (30_000, 10**6):
        for module in ("landscape", "cosines"):
            monkeypatch.setattr(f"hf_nexus.evaluation.{module}.BLOCK", size)
        assert math.sqrt(dot(far, far)) == pytest.approx(expected, rel=1e-12)
        assert distance(near, far) == pytest.approx(expected, rel=1e-12)


def test_parameters_are_matched_by_name():
    params = {"x": torch.tensor([1.0]), "y": torch.tensor([5.0])}
    same = {"y": params["y"].clone(), "x": params["x"].clone()}
    found = minima_landscape(params, {"a": same}, {"a": lambda: params["x"] - params["y"]})
    assert found["to_start"] == {"a": 0.0} and found["end_loss"] == {"a": -4.0}


# ---- Segments, barriers, planes ----


def test_a_segment_between_quadratic_minima_has_its_closed_form():
    a, b = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([-1.0, 1.0, 2.0])
    x = torch.zeros(3)
    curvatures, far = {"a": 3.0, "b": 0.5}, float((a - b).square().sum())
    minima = {"a": {"x": a}, "b": {"x": b}}
    wells = {name: lambda n=name: curvatures[n] / 2 * (x - minima[n]["x"]).square().sum() for name in minima}
    found = minima_landscape({"x": x}, minima, wells, positions=9)
    assert found["positions"] == [i / 8 for i in range(9)]
    expected = [far / 4 * (curvatures["a"] * t**2 + curvatures["b"] * (1 - t) ** 2) for t in found["positions"]]
    assert found["segments"] == [("a", "b", pytest.approx(expected, rel=1e-5))]
    assert found["barriers"] == [("a", "b", 0.0)]  # between minima of convex losses there is none

    def two_wells():
        return 1.5 * torch.minimum((x - a).square().sum(), (x - b).square().sum()) + 7

    assert landscape_of(x, [a, b], two_wells)["barriers"][0][2] == pytest.approx(3 * far / 8, rel=1e-5)


def test_ends_are_exact_and_barriers_rise_above_their_line():
    a, b, x = torch.randn(50), torch.randn(50) * 1e6, torch.zeros(50)
    seen = []
    landscape_of(x, [a, b], lambda: seen.append(x.clone()) or 0.0, positions=2)
    start = torch.zeros(50)
    # At the start and at the ends for each source, then on the segment for both of its sources.
    assert bits(seen) == bits([start, start, a, b, a, a, b, b])
    assert barrier_height([0, 0.25, 1], [0.0, 3.0, 4.0]) == 2.0
    assert barrier_height([0, 0.5, 1], [0.0, math.inf, 4.0]) == math.inf
    assert math.isnan(barrier_height([0, 0.5, 1], [0.0, math.nan, 4.0]))


def test_a_plane_through_three_points_has_its_closed_form():
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    target = torch.randn(20, generator=generator, dtype=torch.float64)
    *corners, start = points

    def split(v):
        return {"w": v[:12].clone(), "b": v[12:].view(2, 4).clone()}

    x = split(start)

    def loss():
        return (torch.cat([x["w"], x["b"].reshape(-1)]) - target).square().sum()

    minima = dict(zip("abc", map(split, corners), strict=True))
    plane = minima_landscape(x, minima, dict.fromkeys("abc", loss), resolution=5)["plane"]
    sides = torch.stack(corners[1:]) - corners[0]
    basis = torch.linalg.qr(sides.T)[0]  # Gram-Schmidt, up to signs
    basis *= torch.sign(torch.einsum("ij,ji->i", sides, basis))
    expected = (points - corners[0]) @ basis
    assert torch.tensor(plane["points"], dtype=torch.float64).allclose(expected)
    for axis, name in enumerate("xy"):
        low, high = float(expected[:, axis].min()), float(expected[:, axis].max())
        room = 0.25 * (high - low)
        assert plane[name] == pytest.approx(torch.linspace(low - room, high + room, 5).tolist(), abs=1e-5)
    for i, j in itertools.product(range(5), range(5)):
        place = corners[0] + plane["x"][j] * basis[:, 0] + plane["y"][i] * basis[:, 1]
        assert plane["loss"][i][j] == pytest.approx(float((place - target).square().sum()))


@pytest.mark.parametrize("third", [[0.0, 0.0], [5.0, 0.0], [2.0, 0.0], [math.nan, 1.0]])
def test_there_is_no_plane_through_a_line(third):
    corners = [torch.tensor(p) for p in ([0.0, 0.0], [2.0, 0.0], third)]
    for minima in (corners, corners[::-1]):
        assert landscape_of(torch.zeros(2), minima, lambda: 0.0, resolution=2)["plane"] is None


# ---- Restoring ----


@pytest.mark.parametrize(("failing", "at"), [(None, 0), (ValueError, 5), (ValueError, 11), (KeyboardInterrupt, 40)])
def test_parameters_are_restored_bit_for_bit(failing, at):
    """Also after an exception at the ends, on a segment and on the plane."""
    odd = torch.nn.Parameter(torch.tensor([math.nan, -0.0, 1e-45, math.inf, 1 / 3]))
    params = {**dict(torch.nn.Linear(2, 2).named_parameters()), "odd": odd}
    minima = {name: {key: torch.randn_like(p) for key, p in params.items()} for name in "abc"}
    given = [t for point in minima.values() for t in point.values()]
    before, points = bits(params.values()), bits(given)
    calls = []

    def loss():
        assert not torch.is_grad_enabled()
        calls.append(odd.detach().clone())
        if failing and len(calls) == at:
            raise failing
        return float(len(calls))

    losses = dict.fromkeys("abc", loss)
    if failing:
        with pytest.raises(failing):
            minima_landscape(params, minima, losses, positions=3, resolution=3)
        assert len(calls) == at
    else:
        minima_landscape(params, minima, losses, positions=3, resolution=3)
        assert len(calls) == 3 * 2 * 3 + 2 * 3 + 3 * 3**2
    assert any(not torch.equal(seen, calls[0]) for seen in calls)  # it did move
    assert bits(params.values()) == before and bits(given) == points and odd.grad is None


# ---- Minima ----


def test_the_landscape_of_quadratic_minima_is_exact():
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    ends = {"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([4.0, 0.0]), "c": torch.tensor([4.0, 3.0])}
    minima = {name: {"x": end} for name, end in ends.items()}
    losses = {name: lambda m=m: (x - m).square().sum() + 1 for name, m in ends.items()}
    found = minima_landscape({"x": x}, minima, losses, positions=3, resolution=3)
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


def test_three_sources_span_a_plane_and_two_do_not():
    points = [torch.tensor([float(i), float(i**2)]) for i in range(4)]
    minima = {name: {"x": point} for name, point in zip("abcd", points, strict=True)}
    x = torch.zeros(2)
    for names, spanned in (("ab", None), ("dbca", ["d", "b", "c"])):
        chosen = {name: minima[name] for name in names}
        plane = minima_landscape({"x": x}, chosen, dict.fromkeys(names, x.sum), resolution=2)["plane"]
        assert (plane and plane["sources"]) == spanned


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
    return minima_landscape(params, minimizers, losses)


def test_closer_sources_have_closer_minima():
    found = {spread: trained_minima(spread) for spread in (0.1, 0.8)}
    for minima in found.values():
        for name in "abc":
            assert minima["end_loss"][name] < 0.05 * minima["start_loss"][name]  # they were found
    means = [sum(v for *_, v in m["pairwise"]) / m["parameter_norm"] for m in found.values()]
    assert means[0] < 0.5 * means[1]
    assert max(v for *_, v in found[0.1]["pairwise"]) < min(v for *_, v in found[0.8]["pairwise"])
