import pytest
import torch
from torch import nn

from hf_nexus import Nexus
from hf_nexus import tensors as snapshot
from hf_nexus.tensors import TensorCopy, add_scaled_, fill_normal_, global_norm


def test_global_norm_is_that_of_all_elements_and_wide_enough():
    tensors = [torch.full((10, 10), 300.0, dtype=torch.float16), torch.full((), 300.0, dtype=torch.float16)]
    assert global_norm(tensors).dtype == torch.float32
    assert float(global_norm(tensors)) == pytest.approx(300 * 101**0.5)  # its square overflows float16


def test_add_scaled_leaves_targets_alone_where_told_to():
    target, tensor = torch.ones(3), torch.tensor([1.0, float("nan"), float("inf")])
    add_scaled_([target], [tensor], torch.tensor(float("nan")), torch.tensor(False))
    assert torch.equal(target, torch.ones(3))
    add_scaled_([target], [torch.arange(3.0)], torch.tensor(2.0), torch.tensor(True))
    assert torch.equal(target, torch.tensor([1.0, 3.0, 5.0]))


def test_noise_depends_on_the_key_alone():
    state = torch.random.get_rng_state()
    a, b, c = [torch.empty(50)], [torch.empty(50)], [torch.empty(50)]
    fill_normal_(a, (1, 2))
    torch.manual_seed(5)
    fill_normal_(b, (1, 2))
    fill_normal_(c, (2, 1))
    torch.random.set_rng_state(state)
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[0], c[0])


def test_copy_and_restore_are_exact_and_in_place():
    tensors = [torch.randn(4, 3), torch.randn(()), torch.randn(3, 4).t()]
    before, pointers = [t.clone() for t in tensors], [t.data_ptr() for t in tensors]
    copy = TensorCopy(tensors)
    copy.save()
    for t in tensors:
        t.mul_(1.1)
    differences = copy.minus_tensors([0, 2])
    torch.testing.assert_close(differences, [before[0] - tensors[0], before[2] - tensors[2]])
    copy.restore()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert [t.data_ptr() for t in tensors] == pointers


@pytest.mark.parametrize("direction", ["gradient", "random"])
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_an_offloaded_copy_gives_the_same_update_and_stages_little(monkeypatch, direction, gamma):
    """Without a second device here, the off-device path is taken on the CPU, with a staging limit of three rows."""
    staged = []

    def add_in_parts(copy, tensor, scale, real=snapshot._add_in_parts_):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "to", lambda part, device: staged.append(part.nbytes) or part)
            real(copy, tensor, scale)

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
    monkeypatch.setattr(TensorCopy, "offloaded", True)
    monkeypatch.setattr(snapshot, "_SideStream", LateCopies)
    monkeypatch.setattr(TensorCopy, "copies", property(lambda self: self._mirror()))
    monkeypatch.setattr(TensorCopy, "_mirror", _mirror, raising=False)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(snapshot, "STAGING_BYTES", 3 * 8 * 4)
    monkeypatch.setattr(snapshot, "_add_in_parts_", add_in_parts)
    torch.testing.assert_close(update(), expected)
    if gamma == 0 or direction == "random":
        assert max(staged) == 3 * 8 * 4
    else:
        assert not staged


class LateCopies:
    """A stream that copies as late as it may: when it is waited for."""

    def __init__(self, device: torch.device):
        self.pending = None

    def copy(self, targets, tensors):
        assert self.pending is None
        self.pending = targets, tensors

    def wait(self):
        if self.pending is not None:
            torch._foreach_copy_(*self.pending)
            self.pending = None


def _mirror(self) -> list[torch.Tensor]:
    if self._copies is None:
        self._copies = [torch.empty_like(t, requires_grad=False) for t in self._tensors]
    return self._copies
