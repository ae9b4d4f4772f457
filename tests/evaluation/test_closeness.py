"""Gradient cosines, and what lies between minima: against values that are known exactly, and on trained networks."""

import gc
import itertools
import math
from functools import partial

import pytest
import torch

from hf_nexus.compare.records import Minima, RunRecord
from hf_nexus.evaluation import closeness, gradient_cosines
from hf_nexus.evaluation.closeness import count_sketch
from hf_nexus.evaluation.landscape import barrier_height, minima_landscape, plane_losses, segment_losses
from hf_nexus.evaluation.points import distance, norm


def cosine(a, b):
    return float(torch.cosine_similarity(a.double(), b.double(), dim=0))


def linear(vector, x):
    """A loss whose gradient is `vector`."""
    return lambda: (vector * x).sum()


def bits(tensors):
    return [bytes(t.detach().contiguous().view(torch.uint8).numpy()) for t in tensors]


# ---- Gradient cosines ----


def test_cosines_of_known_gradients_over_parameters_of_several_shapes():
    x, y = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)
    g = {name: (torch.randn(2, 3), torch.randn(4)) for name in "abc"}
    losses = {name: lambda v=v: (v[0] * x).sum() + (v[1] * y).sum() for name, v in g.items()}
    flat = {name: torch.cat([v.reshape(-1) for v in vs]) for name, vs in g.items()}
    cosines = gradient_cosines(losses, [x, y])
    assert list(cosines) == [("a", "b"), ("a", "c"), ("b", "c")]
    for (a, b), value in cosines.items():
        assert value == pytest.approx(float(torch.cosine_similarity(flat[a], flat[b], dim=0)), abs=1e-6)


def test_cosines_of_quadratics_are_those_of_the_ways_to_their_minima():
    x = torch.randn(7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    minima = {name: torch.randn(7, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc", 1)}
    losses = {name: lambda m=m: 3 * (x - m).square().sum() for name, m in minima.items()}
    for (a, b), value in gradient_cosines(losses, [x]).items():
        assert value == pytest.approx(cosine(x.detach() - minima[a], x.detach() - minima[b]), abs=1e-6)


@pytest.mark.parametrize("projection", [None, 10**6], ids=["exact", "projected"])
def test_unused_parameters_count_as_zero_and_a_zero_gradient_has_no_cosine(projection):
    x, y = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    losses = {"x": x.sum, "y": y.sum, "none": lambda: (x * 0).sum()}
    cosines = gradient_cosines(losses, [x, y], projection=projection)
    assert cosines["x", "y"] == 0.0
    assert cosines["x", "none"] != cosines["x", "none"]
    assert x.grad is None


@pytest.mark.parametrize("projection", [None, 10**6], ids=["exact", "projected"])
def test_a_source_of_several_batches_has_the_gradient_of_their_weighted_mean(projection):
    x, y = torch.zeros(5, requires_grad=True), torch.zeros(2, requires_grad=True)
    x.grad = torch.full((5,), 7.0)
    g = [torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def forbidden():
        raise AssertionError("a batch without tokens has no mean loss")

    losses = {
        "many": [(linear(g[0], x), 3), (forbidden, 0), (linear(g[1], x), 1.0), (lambda: y.sum() * 0 + x.sum(), 2.0)],
        "one": linear(g[2], x),
        "single": [(linear(g[3], x), 0.1)],
    }
    means = {"many": (3 * g[0] + g[1] + 2) / 6, "one": g[2], "single": g[3]}
    cosines = gradient_cosines(losses, [x, y], projection=projection)
    for (a, b), value in cosines.items():
        assert value == pytest.approx(cosine(means[a], means[b]), abs=1e-6)
    assert x.grad.tolist() == [7.0] * 5 and y.grad is None
    assert cosines == gradient_cosines(losses, [x, y], projection=projection)


def test_batches_that_can_be_read_once_only_and_impossible_weights_are_refused():
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"'b' can be read only once.*list"):
        gradient_cosines({"a": x.sum, "b": iter([(x.sum, 1.0)])}, [x])
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="'a' has weight"):
            gradient_cosines({"a": [(x.sum, weight)], "b": x.sum}, [x])
    with pytest.raises(ValueError, match="projection=0"):
        gradient_cosines({"a": x.sum, "b": x.sum}, [x], projection=0)


@pytest.mark.parametrize(
    ("batches", "projection", "passes", "held"),
    [(1, None, 10, 1), (3, None, 30, 2), (1, 8, 4, 0), (3, 8, 12, 0)],
    ids=["one batch", "several batches", "one batch projected", "several batches projected"],
)
def test_few_gradients_are_alive_while_the_next_is_computed(batches, projection, passes, held):
    """Of 4 sources the exact way takes 4 + 3 + 2 + 1 gradients, less the last source's own, and the projection 4."""
    x = torch.ones(1013, requires_grad=True)
    alive = []

    def loss():
        gc.collect()
        alive.append(sum(type(o) is torch.Tensor and o.shape == x.shape for o in gc.get_objects()))
        return x.sum()

    source = loss if batches == 1 else [(loss, 1.0)] * batches
    gc.freeze()  # only what is made from here on is looked through
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
def test_the_error_of_projected_cosines_shrinks_with_the_root_of_the_dimension(wanted):
    generator = torch.Generator().manual_seed(3)
    a, b = torch.linalg.qr(torch.randn(4000, 2, generator=generator))[0].T
    b = wanted * a + (1 - wanted**2) ** 0.5 * b
    errors = {size: (projected(a, b, size, 300) - wanted).square().mean().sqrt() for size in (16, 64, 256)}
    for size, error in errors.items():  # of 300 values: the estimate is good to 4 %
        assert float(error) * size**0.5 == pytest.approx(1 - wanted**2, rel=0.2)


def test_inner_products_of_sketches_are_exact_in_expectation():
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    a[0], b[0] = 9.0, -7.0  # one element that carries most of it
    products = torch.stack([count_sketch([a], 8, s) @ count_sketch([b], 8, s) for s in range(3000)])
    assert float((products.mean() - a @ b).abs()) < 4 * float(products.std()) / 3000**0.5
    assert float(products.std()) > 1  # far from exact one by one


def test_every_block_of_every_parameter_has_places_of_its_own(monkeypatch):
    monkeypatch.setattr(closeness, "BLOCK", 64)
    v = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert count_sketch([torch.cat([v, -v])], 512, 0).abs().sum() > 1
    assert count_sketch([v, -v], 512, 0).abs().sum() > 1
    assert torch.equal(count_sketch([v, v], 512, 0), count_sketch([v.view(8, 8), v], 512, 0))
    assert not torch.equal(count_sketch([v], 512, 0), count_sketch([v], 512, 1))


def test_sketches_leave_the_global_random_state_alone():
    state = torch.get_rng_state()
    count_sketch([torch.ones(10)], 4, 0)
    assert torch.equal(torch.get_rng_state(), state)


# ---- Distances ----


def test_distances_are_summed_in_float64_over_all_parameters(monkeypatch):
    small = torch.full((100_000,), 1e-3)  # float32 loses what it adds to the large one
    far = {"w": torch.cat([torch.tensor([1e4]), small]), "b": small[:7].clone()}
    near = {name: torch.zeros_like(t) for name, t in far.items()}
    expected = math.sqrt(1e8 + 100_007 * float(small[0]) ** 2)
    for size in (30_000, 10**6):
        monkeypatch.setattr("hf_nexus.evaluation.points.BLOCK", size)
        assert norm(far) == pytest.approx(expected, rel=1e-12)
        assert distance(near, far) == pytest.approx(expected, rel=1e-12)
    assert distance(list(near.values()), far) == distance(near, far)  # by order where there are no names
    assert distance(near, far, relative_to=far) == pytest.approx(1.0, rel=1e-12)
    with pytest.raises(ValueError, match="norm 0"):
        distance(near, far, relative_to=near)


def test_points_are_matched_by_name_and_must_fit():
    a = {"x": torch.tensor([1.0]), "y": torch.tensor([5.0])}
    assert distance(a, dict(reversed(a.items()))) == 0
    with pytest.raises(ValueError, match="'z' is not in all"):
        distance(a, {**a, "z": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"y has shape \(2,\) and \(1,\)"):
        distance(a, {**a, "y": torch.zeros(2)})
    with pytest.raises(ValueError, match="1 and 2 tensors"):
        distance(a, [torch.zeros(1)])


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(2, 2, bias=False)
        self.head = torch.nn.Linear(2, 2, bias=False)
        self.head.weight = self.embed.weight


def test_tied_parameters_count_once():
    a, b = Tied(), Tied()
    expected = float((a.embed.weight - b.embed.weight).norm())
    copy = {name: t.clone() for name, t in b.state_dict().items()}  # no longer tied, but still equal
    for other in (b.state_dict(), copy):
        assert distance(a.state_dict(), other) == pytest.approx(expected)
        assert distance(other, a.state_dict()) == pytest.approx(expected)
    assert norm(a.state_dict()) == pytest.approx(float(a.embed.weight.norm()))
    copy["head.weight"] += 1  # what differs in one of them is no repetition
    assert distance(a.state_dict(), copy) > expected + 0.1
    equal = torch.ones(3)
    assert norm([equal, equal.clone()]) == pytest.approx(6**0.5)  # equal, and not tied


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


def test_the_ends_of_a_segment_are_exact_and_a_barrier_is_measured_from_the_line_between_them():
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


# ---- Putting back ----


@pytest.mark.parametrize("failing", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("what", ["segment", "plane", "minima"])
def test_parameters_are_put_back_bit_for_bit_whatever_interrupts(failing, what):
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


def test_what_is_known_of_quadratic_minima_is_found_and_fills_a_record(tmp_path):
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
    record = RunRecord("arm", 0, minima=Minima(steps={}, converged={}, **found))
    record.save(tmp_path)
    assert RunRecord.load(tmp_path).minima.mean_distance == 4.0


def test_a_landscape_says_what_is_missing():
    x = torch.zeros(1)
    minima = {"a": [torch.zeros(1)], "b": [torch.ones(1)]}
    with pytest.raises(ValueError, match="'b' needs a minimizer and a loss"):
        minima_landscape([x], [x], minima, {"a": x.sum})
    with pytest.raises(ValueError, match="three sources"):
        minima_landscape([x], [x], minima, {"a": x.sum, "b": x.sum}, plane="ab")


def teacher_problem(spread):
    """A network, and for each of three sources the loss to imitate a teacher; teachers differ by `spread`."""
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


def test_the_minima_that_training_finds_lie_closer_for_the_sources_that_are_closer():
    found = {spread: trained_minima(spread) for spread in (0.1, 0.8)}
    for minima in found.values():
        for name in "abc":
            assert minima["end_loss"][name] < 0.05 * minima["start_loss"][name]  # they were found
    means = [Minima({}, {}, **minima).relative_distance for minima in found.values()]
    assert means[0] < 0.5 * means[1]
    assert max(v for *_, v in found[0.1]["pairwise"]) < min(v for *_, v in found[0.8]["pairwise"])
