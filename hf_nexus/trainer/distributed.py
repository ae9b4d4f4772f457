"""Shards, norms, sums and averages over ranks."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_wrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "PathGroups",
    "Shards",
    "broadcast",
    "gather",
    "is_wrapped",
    "max_over_ranks",
    "reduce_by",
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


def reduce_by(model: nn.Module, chosen: Callable[[], tuple[dist.ProcessGroup | None, bool]]) -> None:
    """
    Let DDP average gradients as chosen at each backward pass: over a group (`None`: all ranks), and whether they are
    sent in bfloat16.
    """

    def reduce(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        group, compressed = chosen()
        hook = bf16_compress_wrapper(allreduce_hook) if compressed else allreduce_hook
        return hook(group, bucket)  # type: ignore[arg-type]  # None is allowed

    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.register_comm_hook(None, reduce)


class PathGroups:
    """
    The ranks that walk one path together, and the average over the paths.

    Args:
        inner_sync (`str`):
            `"global"`: all ranks walk one path. `"node"`: the ranks of each machine do. `"local"`: each rank does.
        node_size (`int`, *optional*):
            Ranks per path with `"node"`. Defaults to the ranks of this machine, as torchrun says.

    Attributes:
        size (`int`): Ranks per path.
        path (`int`): Number of this rank's path.
        several, alone (`bool`): Whether there are several paths, and whether each is of one rank.
        inside (`ProcessGroup`, *optional*): The ranks of this path, if there are several paths of several ranks.

    Raises:
        ValueError: the ranks cannot be split into groups of this size.
    """

    def __init__(self, inner_sync: str, node_size: int | None = None):
        self.settings = inner_sync, node_size
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if _several_ranks() else (1, 0)
        node = node_size or int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        self.size = size = {"global": ranks, "local": 1, "node": node}[inner_sync]
        sizes = gather(size)
        if ranks % size or len(set(sizes)) > 1:
            raise ValueError(
                f"inner_sync='node' needs the same number of ranks in each group, but {ranks} ranks were to be split "
                f"into groups of {', '.join(map(str, sorted(set(sizes))))}. Set node_size to a divisor of {ranks}."
            )
        self.path, self._place = divmod(rank, size)
        self.inside: dist.ProcessGroup | None = None
        self._across: dist.ProcessGroup | None = None  # all ranks, if each walks its own path
        if 1 < size < ranks:  # every rank must make every group
            paths = [list(range(first, first + size)) for first in range(0, ranks, size)]
            across = [list(ranks_at) for ranks_at in zip(*paths, strict=True)]
            self.inside = [dist.new_group(path) for path in paths][self.path]
            self._across = [dist.new_group(ranks_at) for ranks_at in across][self._place]
        self.several, self.alone = size < ranks, size == 1 < ranks

    @torch.no_grad()
    def average(self, params: Sequence[Tensor], moved: bool) -> int:
        """
        Replace the pseudo-gradient in `.grad` by its average over the paths that moved. All ranks must call it, with
        the same parameters in the same order.

        The ranks of a path hold the same pseudo-gradient. Each sends an equal part of it to the other paths, and
        gathers the averaged parts of the others. This happens in buckets, so little memory is needed.

        A gradient that is None on some paths counts as zero there. One that is None on all paths stays None.

        Args:
            params (`Sequence[Tensor]`):
                The trainable parameters.
            moved (`bool`):
                Whether this path took any inner step. If not, its gradients are None.

        Returns:
            `int`: number of paths that moved. With 0, every gradient is None.
        """
        # Different gradients may be None on different paths, but all must send the same shapes.
        held = torch.tensor([moved, *(p.grad is not None for p in params)], dtype=torch.int32)
        counts = held.to(params[0].device)
        dist.all_reduce(counts, group=self._across)
        paths_moved, *counted = counts.tolist()
        present = [p for p, count in zip(params, counted, strict=True) if count]
        for p, count in zip(params, counted, strict=True):
            if not count:
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets([p.grad for p in present]):  # type: ignore[misc]
            flat = torch.cat([g.reshape(-1) for g in bucket])
            padded = nn.functional.pad(flat, (0, -len(flat) % self.size))
            part = padded.chunk(self.size)[self._place]
            dist.all_reduce(part, group=self._across)
            if self.inside is not None:
                dist.all_gather_into_tensor(padded, part.clone(), group=self.inside)
            means = padded[: len(flat)].div_(paths_moved).split([g.numel() for g in bucket])
            for gradient, mean in zip(bucket, means, strict=True):
                gradient.copy_(mean.view_as(gradient))
        return paths_moved


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of the same dtype, of 25 MB together as in DDP, or one that is larger."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        size = sum(t.nbytes for t in bucket)
        if bucket and (size + tensor.nbytes > 25 * 2**20 or bucket[0].dtype != tensor.dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
