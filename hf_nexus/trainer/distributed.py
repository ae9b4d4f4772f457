"""Shards, norms, sums and averages over ranks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "Shards",
    "average_pseudo_gradients",
    "broadcast",
    "gather",
    "is_wrapped",
    "max_over_ranks",
    "reshard",
    "sum_over_ranks",
]


def _several_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise sum over the ranks. All ranks must call it."""
    if _several_ranks():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise maximum over the ranks. All ranks must call it."""
    if _several_ranks():
        tensor = tensor.clone()
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def broadcast(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor of the first rank, on `device`. All ranks must call it."""
    tensor = tensor.to(device)
    if _several_ranks():
        dist.broadcast(tensor, src=0)
    return tensor


def gather(value: Any) -> list[Any]:
    """The value of each rank, which can be pickled. All ranks must call it."""
    values = [value]
    if _several_ranks():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def is_wrapped(model: nn.Module) -> bool:
    """Whether the gradients of a model are reduced over the ranks, by DDP or FSDP2."""
    return any(isinstance(module, DistributedDataParallel | FSDPModule) for module in model.modules())


class Shards:
    """
    How the parameters of a model are sharded over processes.

    Args:
        params (`Sequence[Tensor]`):
            The trainable parameters, after wrapping.

    Raises:
        ValueError: some are sharded and some are not, or they are sharded in different ways.
    """

    def __init__(self, params: Sequence[Tensor]):
        layouts = {(p.device_mesh, p.placements) if isinstance(p, DTensor) else None for p in params}
        if len(layouts) > 1:
            raise ValueError(
                f"The trainable parameters are sharded in {len(layouts)} different ways; Nexus needs one for all. "
                "Wrap the whole model, adapters included, with FSDP2."
            )
        layout = layouts.pop()
        # Under HSDP, only the sharded dimension: replicas hold the same shards.
        dims = [] if layout is None else [i for i, placement in enumerate(layout[1]) if placement.is_shard()]
        self.group = layout[0].get_group(dims[0]) if layout and dims else None
        self.index = layout[0].get_local_rank(dims[0]) if layout and dims else 0

    def norm(self, norm: Tensor) -> Tensor:
        """The norm over all shards, given the norm of the local shard (0-d). One scalar reduction if sharded."""
        if self.group is None:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters of FSDP2 modules after an interrupted step. Only the shards were restored."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def average_pseudo_gradients(params: Sequence[Tensor], moved: bool) -> int:
    """
    Replace the pseudo-gradient in `.grad` on each rank by the average over the ranks that moved, in one reduction of
    the size of the parameters. All ranks must call it, with the same parameters in the same order.

    A gradient that is None on some ranks counts as zero there. One that is None on all ranks stays None.

    Args:
        params (`Sequence[Tensor]`):
            The trainable parameters.
        moved (`bool`):
            Whether this rank took any inner step. If not, its gradients are ignored.

    Returns:
        `int`: number of ranks that moved. With 0, every gradient is None.
    """
    device = params[0].device
    # Different gradients may be None on different ranks, but all ranks must send the same shapes. A flag per parameter
    # shows which gradients are None.
    flags = torch.tensor(
        [moved, *(moved and p.grad is not None for p in params)], dtype=params[0].dtype, device=device
    )
    values = [p.grad if moved and p.grad is not None else torch.zeros_like(p) for p in params]
    flat = torch.cat([flags, *(v.reshape(-1) for v in values)])
    del values
    dist.all_reduce(flat)
    counts = flat[: len(flags)].tolist()
    ranks_moved = round(counts[0])
    start = len(flags)
    for p, count in zip(params, counts[1:], strict=True):
        values_of_p = flat[start : start + p.numel()]
        start += p.numel()
        p.grad = torch.empty_like(p).copy_(values_of_p.view(p.shape)).div_(ranks_moved) if count else None
    return ranks_moved
