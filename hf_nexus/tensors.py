"""Fused work on lists of tensors: the one extra copy of the parameters that a Nexus window needs."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.sgd import sgd

__all__ = ["TensorCopy", "add_scaled_", "as_gradient", "fill_normal_", "global_norm", "shard"]

# What an off-device copy may hold on the device at a time while it is being updated.
STAGING_BYTES = 64 * 2**20


@torch.no_grad()
def shard(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the local part, not a copy, if it is sharded (FSDP2), else all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_gradient(values: Tensor, param: Tensor) -> Tensor:
    """The values of this process's shard of a parameter as its `.grad`, sharded like the parameter."""
    if not isinstance(param, DTensor):
        return values
    # Without the shape, uneven shards would need a collective to find it out.
    shape, stride = param.shape, param.stride()
    return DTensor.from_local(values, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """
    The L2 norm over all elements of all tensors, computed in float32 or wider.

    Args:
        tensors (`Sequence[Tensor]`):
            At least one tensor, any shapes.

    Returns:
        `Tensor`: 0-d.
    """
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype)))


def add_scaled_(targets: Sequence[Tensor], tensors: Sequence[Tensor], scale: Tensor, apply: Tensor) -> None:
    """
    `target += scale * tensor` for each pair where `apply` is true, without asking the device for its value.

    This is a fused SGD step with learning rate `-scale`: the kernel reads the flag on the device and leaves the
    targets untouched where it is set. (Multiplying by zero instead would not do: NaN times zero is NaN.)

    Args:
        targets (`Sequence[Tensor]`):
            Updated in place.
        tensors (`Sequence[Tensor]`):
            Same shapes, dtypes and devices as the targets.
        scale (`Tensor`):
            0-d factor; may be non-finite where `apply` is false.
        apply (`Tensor`):
            0-d bool.
    """
    # The fused kernels walk memory, not indices: a pair of different layouts would be matched up wrongly.
    aligned = [
        t if t.stride() == target.stride() else torch.empty_like(target).copy_(t)
        for target, t in zip(targets, tensors, strict=True)
    ]
    sgd(
        list(targets),
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


def fill_normal_(tensors: Sequence[Tensor], key: tuple[int, ...]) -> None:
    """
    Overwrite the tensors with normal noise that depends on the key alone. The global random state is left alone.

    Args:
        tensors (`Sequence[Tensor]`):
            All on one device.
        key (`tuple[int, ...]`):
            Any integers.
    """
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")
    generator = torch.Generator(tensors[0].device).manual_seed(seed)
    for tensor in tensors:
        tensor.normal_(generator=generator)


class _SideStream:
    """Copies that run beside the device's other work until they are waited for."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.Stream(device)
        self._done: torch.Event | None = None

    def copy(self, targets: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._stream:
            torch._foreach_copy_(list(targets), list(tensors), non_blocking=True)
        for tensor in tensors:  # should it be freed meanwhile, its memory is not to be used anew before the copy
            tensor.record_stream(self._stream)
        self._done = self._stream.record_event()

    def wait(self) -> None:
        if self._done is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._done)
            self._done = None


class TensorCopy:
    """
    A second set of tensors, shaped like the first, allocated at first use and reused from then on.

    Args:
        tensors (`Sequence[Tensor]`):
            The tensors to mirror: of sharded ones, this process's shards. They are only ever written in place.
        device (`str` or `torch.device`, *optional*):
            Where the copy lives; beside each tensor by default. `"cpu"` keeps it in (pinned) host memory: it is
            written while the device goes on, and at most 64 MB of it is staged on the device at a time.
    """

    def __init__(self, tensors: Sequence[Tensor], device: str | torch.device | None = None):
        self._sources = list(tensors)
        self._device = None if device is None else torch.device(device)
        self._copies: list[Tensor] | None = None
        self._side: _SideStream | None = None

    @property
    def _tensors(self) -> list[Tensor]:
        # Looked up anew each time: FSDP2 moves its shards into padded memory at the first forward.
        return [shard(tensor) for tensor in self._sources]

    @property
    def copies(self) -> list[Tensor]:
        """The mirrored tensors, in order (allocated when first asked for)."""
        if self._copies is None:
            device, pinned = self._device, self.offloaded and self._device == torch.device("cpu")
            self._copies = [torch.empty_like(t, device=device, pin_memory=pinned) for t in self._tensors]
        return self._copies

    @property
    def offloaded(self) -> bool:
        """Whether the mirror lives on another device than the tensors."""
        return self._device is not None and self._device.type != self._sources[0].device.type

    def save(self) -> None:
        """Copy the tensors into the mirror. Before they are written to, `wait` must be called."""
        if not self.offloaded:
            torch._foreach_copy_(self.copies, self._tensors)
            return
        if self._side is None:
            self._side = _SideStream(self._sources[0].device)
        self._side.copy(self.copies, self._tensors)

    def wait(self) -> None:
        """Let what the device does from now on come after the last `save`. The host does not wait."""
        if self._side is not None:
            self._side.wait()

    def restore(self) -> None:
        """Copy the mirror back into the tensors, bit for bit."""
        self.wait()
        torch._foreach_copy_(self._tensors, self.copies, non_blocking=True)

    def zero(self) -> None:
        """Fill the mirror with zeros."""
        if self.offloaded:  # an earlier copy from or to the device may still be under way
            torch.accelerator.synchronize(self._sources[0].device)
        torch._foreach_zero_(self.copies)

    def values(self, indices: Sequence[int]) -> list[Tensor]:
        """New tensors with the mirror's values on the tensors' device, for the given positions."""
        self.wait()
        values = [torch.empty_like(shard(self._sources[i])) for i in indices]
        torch._foreach_copy_(values, [self.copies[i] for i in indices], non_blocking=True)
        return values

    def minus_tensors(self, indices: Sequence[int]) -> list[Tensor]:
        """New tensors `copy - tensor` on the tensors' device, for the given positions."""
        differences = self.values(indices)
        torch._foreach_sub_(differences, [shard(self._sources[i]) for i in indices])
        return differences

    def add_scaled(self, indices: Sequence[int], tensors: Sequence[Tensor], scale: Tensor, apply: Tensor) -> None:
        """`copy += scale * tensor` at the given positions where `apply` (0-d bool) is true."""
        copies = [self.copies[i] for i in indices]
        if not self.offloaded:
            add_scaled_(copies, tensors, scale, apply)
        elif apply.item():  # off the device the host has to know
            for copy, tensor in zip(copies, tensors, strict=True):
                _add_in_parts_(copy, tensor, scale)


def _add_in_parts_(copy: Tensor, tensor: Tensor, scale: Tensor) -> None:
    """`copy += scale * tensor` across devices, staging at most STAGING_BYTES (or one row) on the tensor's."""
    copy, tensor = torch.atleast_1d(copy, tensor)
    rows = max(1, STAGING_BYTES // max(1, tensor[:1].nbytes))
    for copy_part, part in zip(copy.split(rows), tensor.split(rows), strict=True):
        copy_part.add_((part * scale).to(copy.device))
