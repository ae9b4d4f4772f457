"""Operations on lists of tensors, the snapshot of the parameters, and the devices of tensors."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import reduce

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd

__all__ = [
    "Buffers",
    "Snapshot",
    "accelerator_or_cpu",
    "add_scaled_",
    "as_float64",
    "clear_gradients",
    "find_gradients",
    "float64_device",
    "global_norm",
    "random_state_kept",
    "set_gradients",
    "shard",
]


def accelerator_or_cpu() -> torch.device:
    """The accelerator of this machine, or the CPU if there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def float64_device(tensor: Tensor) -> torch.device:
    """The device of a tensor, or the CPU if that device has no float64."""
    return torch.device("cpu") if tensor.device.type == "mps" else tensor.device


def as_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64, on [`float64_device`]. It is moved first: one step may cast on a device without float64."""
    return tensor.to(float64_device(tensor)).double()


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """A context that restores the random state of the CPU and of a device at its end."""
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)


@torch.no_grad()
def shard(tensor: Tensor) -> Tensor:
    """Local shard of a sharded tensor (FSDP2), not a copy. Other tensors are returned as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def find_gradients(params: Sequence[Tensor]) -> tuple[list[int], list[Tensor]]:
    """Return the indices of the parameters that have a gradient, and the local shards of these gradients."""
    found = [(i, shard(_laid_out(p.grad, p))) for i, p in enumerate(params) if p.grad is not None]
    if not found:
        raise RuntimeError("inner_step() found no gradient; call loss.backward() before it.")
    if any(gradient.is_sparse for _, gradient in found):
        raise ValueError("Nexus does not support sparse gradients; build the embedding with sparse=False.")
    return [i for i, _ in found], [gradient for _, gradient in found]


def _laid_out(gradient: Tensor, p: Tensor) -> Tensor:
    """A gradient in the layout of its parameter. Tensor parallelism leaves some as a part of a sum on each rank."""
    if isinstance(gradient, DTensor) and isinstance(p, DTensor) and gradient.placements != p.placements:
        return gradient.redistribute(p.device_mesh, p.placements)
    return gradient


def set_gradients(params: Sequence[Tensor], indices: Sequence[int], gradients: Sequence[Tensor]) -> None:
    """Set `.grad` of the parameters at `indices` to local gradients, sharded like the parameters."""
    for i, gradient in zip(indices, gradients, strict=True):
        p = params[i]
        if isinstance(p, DTensor):
            mesh, shape, stride = p.device_mesh, p.shape, p.stride()
            # With the shape given, uneven shards need no collective.
            gradient = DTensor.from_local(gradient, mesh, p.placements, run_check=False, shape=shape, stride=stride)
        p.grad = gradient


def clear_gradients(params: Sequence[Tensor]) -> None:
    """Set every `.grad` to None."""
    for p in params:
        p.grad = None


def global_norm(tensors: Sequence[Tensor], copies: Tensor | None = None) -> Tensor:
    """
    L2 norm (0-d) over all elements of all tensors, at least one, computed in float32 or wider. The square of each
    tensor is divided by its number in `copies`, if given.
    """
    dtype = reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
    norms = torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype))
    return torch.linalg.vector_norm(norms if copies is None else norms / copies.to(norms.dtype).sqrt())


def add_scaled_(targets: Sequence[Tensor], tensors: Sequence[Tensor], scale: Tensor, apply: Tensor) -> None:
    """
    Compute `target += scale * tensor` for each pair if `apply` (0-d bool) is true, without a host synchronization.

    This is a fused SGD step with learning rate `-scale` (0-d), whose kernel reads the flag on the device. A factor of
    zero would not do, because NaN times zero is NaN.
    """
    torch.clear_autocast_cache()  # an autocast around several steps would go on with the weights before this one
    if scale.device.type == "mps":
        _add_scaled_where_(targets, tensors, scale, apply)
        return
    # The fused kernels pair elements by their place in memory, which fits tensors of the same dense layout only.
    dense = [t if _is_dense(t) else t.contiguous() for t in targets]
    aligned = [
        t if t.stride() == target.stride() else torch.empty_like(target).copy_(t)
        for target, t in zip(dense, tensors, strict=True)
    ]
    sgd(
        dense,
        aligned,
        [None] * len(aligned),
        fused=True,
        found_inf=(~apply).to(torch.float32),
        lr=-scale if scale.device.type == "cpu" else -scale.float(),  # type: ignore[arg-type]  # a tensor is allowed
        weight_decay=0.0,
        momentum=0.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )
    for target, stepped in zip(targets, dense, strict=True):
        if stepped is not target:
            target.copy_(stepped)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps, in any order, unlike those of `weight[:, :8]`."""
    return tensor.is_contiguous() or torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _add_scaled_where_(targets: Sequence[Tensor], tensors: Sequence[Tensor], scale: Tensor, apply: Tensor) -> None:
    """`add_scaled_` for MPS, whose fused kernel takes the step in spite of the flag before torch 2.13."""
    for target, t in zip(targets, tensors, strict=True):
        target.copy_(torch.where(apply, target + scale * t, target))


class _SideStream:
    """Stream for copies that run at the same time as the other work of a device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.Stream(device)
        self._done: torch.Event | None = None

    def copy(self, targets: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            torch._foreach_copy_(list(targets), list(tensors), non_blocking=True)
        for tensor in tensors:  # keep the allocator from reusing the memory of a freed tensor before it is copied
            tensor.record_stream(self._stream)
        self._done = self._stream.record_event()

    def wait(self) -> None:
        if self._done is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._done)
            self._done = None


class Buffers:
    """Memory in the shapes of tensors (local shards), allocated at first use, on `device` if given."""

    def __init__(self, tensors: Sequence[Tensor], device: str | torch.device | None = None):
        self._all_tensors = list(tensors)
        self._device = None if device is None else torch.device(device)
        self._values: list[Tensor] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Local shards of the tensors as they are now: FSDP2 moves its shards at the first forward."""
        return [shard(tensor) for tensor in self._all_tensors]

    def tensors_at(self, indices: Sequence[int]) -> list[Tensor]:
        """Local shards of some of the tensors."""
        return [shard(self._all_tensors[i]) for i in indices]

    @property
    def values(self) -> list[Tensor]:
        """The buffers, one per tensor."""
        if self._values is None:
            device, pinned = self._device, self.offloaded and self._device == torch.device("cpu")
            self._values = [torch.empty_like(t, device=device, pin_memory=pinned) for t in self.tensors]
        return self._values

    @property
    def offloaded(self) -> bool:
        """Whether the buffers are on another type of device than the tensors."""
        return self._device is not None and self._device.type != self._all_tensors[0].device.type

    def zero(self) -> None:
        """Fill the buffers with zeros."""
        if self.offloaded:  # an earlier copy from or to the device may still be running
            torch.accelerator.synchronize(self._all_tensors[0].device)
        torch._foreach_zero_(self.values)

    def to_device(self, indices: Sequence[int]) -> list[Tensor]:
        """Copies of the buffers at `indices`, on the device of the tensors."""
        copies = [torch.empty_like(tensor) for tensor in self.tensors_at(indices)]
        torch._foreach_copy_(copies, [self.values[i] for i in indices], non_blocking=True)
        return copies


class Snapshot(Buffers):
    """Copy of tensors that can be restored bit for bit. Call `wait` between `save` and a change of the tensors."""

    def __init__(self, tensors: Sequence[Tensor], device: str | torch.device | None = None):
        super().__init__(tensors, device)
        self._side: _SideStream | None = None
        self._displaced: Sequence[int] = ()  # indices of the tensors to restore

    @torch.no_grad()
    def save(self) -> None:
        """Copy the tensors into the snapshot."""
        if not self.offloaded:
            torch._foreach_copy_(self.values, self.tensors)
        else:
            if self._side is None:
                self._side = _SideStream(self._all_tensors[0].device)
            self._side.copy(self.values, self.tensors)
        self._displaced = range(len(self.values))  # not earlier: an interrupted copy must not be restored

    def wait(self) -> None:
        """Make the device of the tensors, not the host, wait until an offloaded copy is complete."""
        if self._side is not None:
            self._side.wait()

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the snapshot back into the tensors, if it was saved and not restored since."""
        if displaced := self._displaced:
            self.wait()
            torch._foreach_copy_(self.tensors_at(displaced), [self.values[i] for i in displaced], non_blocking=True)
            torch.clear_autocast_cache()
            self._displaced = ()

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Context in which the tensors have the values of the snapshot, if there is one to restore."""
        if not self._displaced:
            yield
            return
        # `.data` hides the writes from autograd, whose saved tensors have their values back afterwards.
        tensors = [tensor.data for tensor in self.tensors]
        self.wait()
        current = [tensor.clone() for tensor in tensors]
        torch._foreach_copy_(tensors, self.values)
        try:
            yield
        finally:
            torch._foreach_copy_(tensors, current)

    @torch.no_grad()
    def minus_current(self, indices: Sequence[int]) -> list[Tensor]:
        """
        New tensors `snapshot - tensor` at `indices`, on the device of the tensors. An offloaded snapshot also restores
        these tensors, which saves a second upload.
        """
        self.wait()
        values, tensors = [self.values[i] for i in indices], self.tensors_at(indices)
        if not self.offloaded:
            return list(torch._foreach_sub(values, tensors))
        differences = []
        for value, tensor in zip(values, tensors, strict=True):
            start = value.to(tensor.device, non_blocking=True)
            differences.append(start - tensor)
            tensor.copy_(start)
        torch.clear_autocast_cache()
        restored = set(indices)  # not earlier: an interruption leaves some of them displaced
        self._displaced = [i for i in self._displaced if i not in restored]
        return differences
