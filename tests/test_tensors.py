"""Norms, masked updates, and the snapshot, also on another device."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_nexus import Nexus, controls
from hf_nexus import tensors as tensors_module
from hf_nexus.tensors import (
    Buffers,
    Snapshot,
    add_scaled_,
    as_float64,
    float64_device,
    global_norm,
    random_state_kept,
)


def test_global_norm_is_wide_enough_for_all_elements():
    tensors = [torch.full((10, 10), 300.0, dtype=torch.float16), torch.full((), 300.0, dtype=torch.float16)]
    assert global_norm(tensors).dtype == torch.float32
    assert float(global_norm(tensors)) == pytest.approx(300 * 101**0.5)  # its square overflows float16


def test_a_norm_covers_parameters_of_several_types():
    tensors = [torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)]
    assert all(float(global_norm(of)) == 5 for of in (tensors, tensors[::-1]))


def test_views_with_gaps_are_stepped_and_nothing_beside_them():
    base = torch.zeros(4, 10)
    views = [base[:, :3], base[:, 5:8].t()]
    add_scaled_(views, [torch.ones(4, 3), torch.ones(3, 4)], torch.tensor(2.0), torch.tensor(True))
    assert base.sum() == 48 and all(view.eq(2).all() for view in views)


def test_steps_without_the_fused_kernel_are_the_same():
    apply, nan = torch.tensor([True, False]), torch.tensor(float("nan"))
    for flag, scale in ((apply[0], torch.tensor(-0.3)), (apply[1], nan)):
        fused, other = [torch.arange(5.0), torch.ones(2, 2)], [torch.arange(5.0), torch.ones(2, 2)]
        add_scaled_(fused, [torch.ones(5), torch.eye(2)], scale, flag)
        tensors_module._add_scaled_where_(other, [torch.ones(5), torch.eye(2)], scale, flag)
        for one, same in zip(fused, other, strict=True):
            torch.testing.assert_close(one, same)


def test_add_scaled_keeps_targets_if_the_flag_is_false():
    target, tensor = torch.ones(3), torch.tensor([1.0, float("nan"), float("inf")])
    add_scaled_([target], [tensor], torch.tensor(float("nan")), torch.tensor(False))
    assert torch.equal(target, torch.ones(3))
    add_scaled_([target], [torch.arange(3.0)], torch.tensor(2.0), torch.tensor(True))
    assert torch.equal(target, torch.tensor([1.0, 3.0, 5.0]))


@pytest.mark.parametrize("kind", ["cpu", "cuda", "xpu"])
def test_random_states_of_cpu_and_device_are_kept(monkeypatch, kind):
    """The device is a stand-in."""
    before, of_device = torch.get_rng_state(), ["before"]
    if kind != "cpu":
        monkeypatch.setattr(torch.get_device_module(kind), "get_rng_state", lambda device: of_device[-1])
        monkeypatch.setattr(
            torch.get_device_module(kind), "set_rng_state", lambda state, device: of_device.append(state)
        )
    with random_state_kept(torch.device(kind)):
        of_device.append("drawn from")
        torch.randn(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert of_device[-1] == ("drawn from" if kind == "cpu" else "before")


def test_a_snapshot_restores_exactly_in_place_and_once():
    tensors = [torch.randn(4, 3), torch.randn(()), torch.randn(3, 4).t()]
    before, pointers = [t.clone() for t in tensors], [t.data_ptr() for t in tensors]
    snapshot = Snapshot(tensors)
    snapshot.save()
    for t in tensors:
        t.mul_(1.1)
    differences = snapshot.minus_current([0, 2])
    torch.testing.assert_close(differences, [before[0] - tensors[0], before[2] - tensors[2]])
    snapshot.restore()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert [t.data_ptr() for t in tensors] == pointers
    tensors[0].mul_(1.1)
    snapshot.restore()
    assert not torch.equal(tensors[0], before[0])


def test_a_difference_on_one_device_makes_no_copy(monkeypatch):
    tensors = [torch.randn(4, 3), torch.randn(3, 4).t()]
    snapshot = Snapshot(tensors)
    snapshot.save()
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *args, **kwargs: pytest.fail("copied"))
    assert [d.stride() for d in snapshot.minus_current([0, 1])] == [t.stride() for t in tensors]


class LateCopies:
    """A stream that copies as late as it may: when it is waited for."""

    def __init__(self, device: torch.device):
        self.pending: Any = None

    def copy(self, targets: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
        assert self.pending is None
        self.pending = targets, tensors

    def wait(self) -> None:
        if self.pending is not None:
            torch._foreach_copy_(*self.pending)
            self.pending = None


def unpinned(buffers: Buffers) -> list[torch.Tensor]:
    tensors = buffers.tensors
    buffers._values = buffers._values or [torch.empty_like(t, device="cpu", requires_grad=False) for t in tensors]
    return buffers._values


@pytest.fixture
def offloaded(monkeypatch):
    """Snapshots take the off-device path on the CPU, where there is no second device."""
    monkeypatch.setattr(Buffers, "offloaded", True)
    monkeypatch.setattr(Buffers, "values", property(unpinned))
    monkeypatch.setattr(tensors_module, "_SideStream", LateCopies)


@pytest.mark.parametrize("direction", ["gradient", "random"])
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_an_offloaded_snapshot_gives_the_same_update(request, monkeypatch, direction, gamma):
    """The staging limit is three rows."""
    staged = []

    def add_staged(target, tensor, scale, real=controls._add_staged_):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", lambda rows, device: staged.append(rows.nbytes) or rows)
            real(target, tensor, scale)

    def update() -> list[torch.Tensor]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(10, 8)), nn.Parameter(torch.randn(())), nn.Parameter(torch.randn(7, 8))]
        nexus = Nexus(params, gamma, direction=direction, snapshot_device="cpu")
        with nexus.window():
            for m in range(3):
                sum((p - m).square().sum() for p in params).backward()
                if m == 1:
                    params[0].grad[0, 0] = float("nan")
                nexus.inner_step()
        return [p.grad for p in params] + [p.detach() for p in params]

    expected = update()
    request.getfixturevalue("offloaded")
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(controls, "STAGING_BYTES", 3 * 8 * 4)
    monkeypatch.setattr(controls, "_add_staged_", add_staged)
    torch.testing.assert_close(update(), expected)
    if gamma == 0 or direction == "random":
        assert max(staged) == 3 * 8 * 4
    else:
        assert not staged


class Uploads(TorchDispatchMode):
    """Counts the bytes that are copied from the CPU to another device."""

    sent = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = func.overloadpacket.__name__
        if kind == "_to_copy":
            self._count(torch.device(kwargs["device"]), args[0])
        elif kind in ("copy_", "_foreach_copy_"):
            targets, tensors = ([arg] if isinstance(arg, torch.Tensor) else arg for arg in args[:2])
            for target, tensor in zip(targets, tensors, strict=True):
                self._count(target.device, tensor)
        return func(*args, **(kwargs or {}))

    def _count(self, device: torch.device, tensor: torch.Tensor) -> None:
        self.sent += tensor.nbytes * (device.type != tensor.device.type)


def test_an_offloaded_snapshot_is_uploaded_once_per_window(monkeypatch):
    """The device is that of tensors without data."""
    monkeypatch.setattr(Buffers, "values", property(unpinned))
    tensors = [torch.empty(10, 8, device="meta"), torch.empty(3, device="meta"), torch.empty(7, device="meta")]
    snapshot = Snapshot(tensors, "cpu")
    assert snapshot.offloaded
    monkeypatch.setattr(snapshot, "_side", SimpleNamespace(copy=lambda *lists: None, wait=lambda: None))
    snapshot.save()
    with Uploads() as uploads:
        snapshot.minus_current([0, 2])
        snapshot.restore()
    assert uploads.sent == sum(t.nbytes for t in tensors)


def test_an_interrupted_difference_is_restored(offloaded, monkeypatch):
    tensors = [torch.randn(4, 3) for _ in range(3)]
    before, copy, calls = [t.clone() for t in tensors], torch.Tensor.copy_, []

    def interrupted(target, value):
        calls.append(1)
        if len(calls) == 2:  # the first is back, then Ctrl-C
            raise KeyboardInterrupt
        return copy(target, value)

    snapshot = Snapshot(tensors)
    snapshot.save()
    snapshot.wait()
    torch._foreach_mul_(tensors, 1.1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.Tensor, "copy_", interrupted)
        snapshot.minus_current([0, 1])
    assert torch.equal(tensors[0], before[0]) and not torch.equal(tensors[1], before[1])
    snapshot.restore()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_a_difference_of_some_leaves_the_others_to_restore(offloaded):
    tensors = [torch.ones(2), torch.ones(2)]
    snapshot = Snapshot(tensors)
    snapshot.save()
    snapshot.wait()
    torch._foreach_mul_(tensors, 2.0)
    assert torch.equal(snapshot.minus_current([0])[0], -torch.ones(2))
    assert tensors[0].eq(1).all() and tensors[1].eq(2).all()
    with snapshot.swapped_in():
        assert tensors[0].eq(1).all() and tensors[1].eq(1).all()
    snapshot.restore()
    assert tensors[0].eq(1).all() and tensors[1].eq(1).all()


def test_an_autocast_sees_what_an_offloaded_snapshot_restores(offloaded):
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    snapshot = Snapshot(list(layer.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        snapshot.save()
        snapshot.wait()
        with torch.no_grad():
            for p in layer.parameters():
                p.mul_(2)
        torch.clear_autocast_cache()
        assert not torch.equal(layer(x), expected)
        snapshot.minus_current([0, 1])
        snapshot.restore()
        assert torch.equal(layer(x), expected)


def test_sums_of_a_device_without_float64_are_taken_on_the_cpu():
    for name, expected in (("mps", "cpu"), ("cuda:1", "cuda:1"), ("xpu:0", "xpu:0"), ("cpu", "cpu")):
        assert float64_device(SimpleNamespace(device=torch.device(name))) == torch.device(expected)


def test_a_tensor_is_moved_before_it_becomes_float64(monkeypatch):
    """A device without float64 may cast before it copies."""

    def moved(self, *args, **kwargs):
        assert args == (torch.device("cpu"),) and not kwargs
        return self

    monkeypatch.setattr(torch.Tensor, "to", moved)
    assert as_float64(torch.ones(2)).dtype == torch.float64
