"""
Settings of the Nexus update, and the two controls that they select in place of its path.

- `GradientSum` (`inner_lr` is 0 or too small): the parameters do not move.
- `RandomPath` (`direction="random"`): the parameters move by `inner_lr` in random directions.

With both, the pseudo-gradient is the mean of the normalized gradients.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .tensors import Buffers, Snapshot, add_scaled_, global_norm, shard

__all__ = ["GradientSum", "RandomPath", "Settings", "fill_normal_"]

Norm = Callable[[Sequence[int], Sequence[Tensor]], Tensor]

# Memory on the device at a time while a sum on another device is updated.
STAGING_BYTES = 64 * 2**20


class Settings:
    """Constructor arguments of `Nexus`, which documents them, and the choice of the control."""

    def __init__(
        self,
        params: Iterable[Tensor],
        inner_lr: float = 0.05,
        *,
        direction: str = "gradient",
        snapshot_device: str | torch.device | None = None,
        norm: Norm | None = None,
        key: tuple[int, ...] | list[tuple[int, ...]] = (0,),
    ):
        self.params = list(params)
        if not self.params:
            raise ValueError("Nexus got no parameters; pass at least one tensor that requires a gradient.")
        for p in self.params:
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"Nexus got a {p.dtype} parameter of shape {tuple(p.shape)}, which would round inner steps away. "
                    "Keep the weights in float32 (`model.float()`) and compute under bfloat16 autocast."
                )
            if norm is None and shard(p).shape != p.shape:
                raise ValueError(
                    f"Nexus got a sharded parameter of shape {tuple(p.shape)}, and a rank would step by the norm of "
                    "its own shards. Pass norm=, which returns the norm over all shards, or use NexusTrainer."
                )
        if direction not in ("gradient", "random"):
            raise ValueError(f"direction={direction!r} is not known; use 'gradient' or 'random'.")
        self.inner_lr = inner_lr
        self.direction = direction
        self.outer_step = 0  # number of windows so far; set it on resume to repeat the random directions
        self._norm = norm or (lambda indices, tensors: global_norm(tensors))
        self._keys = [key] * len(self.params) if isinstance(key, tuple) else key
        self._snapshot = Snapshot(self.params, snapshot_device)
        # Without a path there is nothing to restore, and the snapshot's memory holds the sum.
        self._sum = self._snapshot if direction == "gradient" else Buffers(self.params, snapshot_device)

    @property
    def inner_lr(self) -> float:
        """Length gamma of the inner steps of the next window."""
        return self._inner_lr

    @inner_lr.setter
    def inner_lr(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"inner_lr={value!r} is not allowed; it must be finite and >= 0 (0.05 is the default).")
        self._inner_lr = float(value)

    @property
    def min_inner_lr(self) -> float:
        """
        The `inner_lr` below which the rounding error of the displacement exceeds 1 %.

        The error grows as sqrt(N) / inner_lr for N parameters. It was measured at 5 % for float32, N = 1e6 and
        inner_lr = 1e-5.
        """
        precision = max(torch.finfo(p.dtype).eps for p in self.params) / torch.finfo(torch.float32).eps
        return 5e-8 * precision * math.sqrt(sum(p.numel() for p in self.params))

    @property
    def effective_inner_lr(self) -> float:
        """Length of the inner steps that are taken: `inner_lr`, or 0 if it is below `min_inner_lr`."""
        return self.inner_lr if self.inner_lr >= self.min_inner_lr else 0.0

    def _start_control(self) -> "GradientSum | None":
        """The control of the next window, or None if the window takes the path of the update itself."""
        if not self.effective_inner_lr:
            return GradientSum(self._sum)
        if self.direction == "random":
            keys = [(*key, self.outer_step) for key in self._keys]
            return RandomPath(self._snapshot, self.inner_lr, self._sum, self._norm, keys)
        return None


class GradientSum:
    """Mean of the normalized gradients of one window, summed in `total`. The parameters stay at theta_0."""

    def __init__(self, total: Buffers):
        self._total = total
        total.zero()

    def step(self, indices: list[int], gradients: list[Tensor], norm: Tensor, usable: Tensor) -> None:
        sums = [self._total.values[i] for i in indices]
        if not self._total.offloaded:
            add_scaled_(sums, gradients, 1 / norm, usable)
        elif usable.item():  # the flag is on another device than the sums
            for total, gradient in zip(sums, gradients, strict=True):
                _add_staged_(total, gradient, 1 / norm)

    def pseudo_gradient(self, indices: list[int], steps: int) -> list[Tensor]:
        p = self._total.to_device(indices)
        torch._foreach_div_(p, steps)
        return p


class RandomPath(GradientSum):
    """Mean of the normalized gradients along a path in random directions, which the `keys` of parameters determine."""

    def __init__(
        self,
        snapshot: Snapshot,
        inner_lr: float,
        total: Buffers,
        norm: Norm,
        keys: list[tuple[int, ...]],
    ):
        super().__init__(total)
        self._snapshot, self._inner_lr = snapshot, inner_lr
        self._norm, self._keys, self._steps = norm, keys, 0
        snapshot.save()

    def step(self, indices: list[int], gradients: list[Tensor], norm: Tensor, usable: Tensor) -> None:
        super().step(indices, gradients, norm, usable)
        directions = gradients  # overwritten to save memory
        keys = [self._keys[i] for i in indices]
        for key in set(keys):
            fill_normal_([d for d, k in zip(directions, keys, strict=True) if k == key], (*key, self._steps))
        self._steps += 1
        length = self._norm(indices, directions)
        self._snapshot.wait()
        add_scaled_(self._snapshot.tensors_at(indices), directions, -self._inner_lr / length, usable)


def fill_normal_(tensors: Sequence[Tensor], key: tuple[int, ...]) -> None:
    """Overwrite tensors of one device with normal noise that depends on the key only."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")
    generator = torch.Generator(tensors[0].device).manual_seed(seed)
    for tensor in tensors:
        tensor.normal_(generator=generator)


def _add_staged_(target: Tensor, tensor: Tensor, scale: Tensor) -> None:
    """Compute `target += scale * tensor` across devices, STAGING_BYTES (or one row) at a time."""
    target, tensor = torch.atleast_1d(target, tensor)
    rows = max(1, STAGING_BYTES // max(1, tensor[:1].nbytes))
    for target_rows, tensor_rows in zip(target.split(rows), tensor.split(rows), strict=True):
        target_rows.add_((tensor_rows * scale).to(target.device))
