"""Shards, norms, sums and averages over ranks."""

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_wrapper
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from ..tensors import global_norm, shard

__all__ = [
    "PathGroups",
    "Shards",
    "broadcast",
    "check_paths",
    "compress",
    "count_paths",
    "gather",
    "is_wrapped",
    "max_over_ranks",
    "one_process_first",
    "parallelism_of",
    "reduce_over",
    "reshard",
    "share_buffers",
    "sum_over_ranks",
]


_BUCKET = 25 * 2**20  # bytes, as in DDP


# Longer than any preparation of data.
_PATIENCE = timedelta(days=7)


@contextmanager
def one_process_first(args: TrainingArguments) -> Iterator[None]:
    """
    Let the first process run the context alone, then one process on each other machine, then all others.

    A result that the first one caches on a shared disk is made once, and otherwise once on each machine. The processes
    wait for days if necessary. With [`~transformers.TrainingArguments.main_process_first`] they wait at most
    `ddp_timeout`, and each machine writes to the same cache.
    """
    if args.world_size == 1:
        yield
        return
    store, rank = _get_default_store(), args.process_index
    turn = gather(uuid4().hex)[0]  # a launcher that starts the processes again keeps the store

    def finished(of: int) -> str:
        return f"hf_nexus/{turn}/{of}"

    earlier = rank - args.local_process_index if args.local_process_index else 0
    try:
        if rank:
            store.wait([finished(earlier)], _PATIENCE)
        yield
    finally:  # after an error too: the others meet it themselves
        store.set(finished(rank), "")
    store.wait([finished(other) for other in range(args.world_size)], _PATIENCE)


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise sum over the ranks. All ranks must call it."""
    if _ranks() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise maximum over the ranks. All ranks must call it."""
    if _ranks() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def broadcast(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor of the first rank, on `device`. All ranks must call it."""
    tensor = tensor.to(device)
    if _ranks() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


def gather(value: Any) -> list[Any]:
    """The value of each rank, which can be pickled. All ranks must call it."""
    values = [value] * _ranks()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


# Another wrapper whose `modules()` hold DDP's or FSDP2's needs only tests and docs. Any other also needs,
# - if it can walk several paths: `reduce_over`, `share_buffers`; if `reduce_dtype` works with it: `compress`; all
#   three find DDP by `_ddp_modules`;
# - if the user applies it, and not Accelerate: `trainer/mixin.py` (`_prepare_for_training`);
# - if it shards weights: `Shards`, `reshard`, `trainer/mixin.py` (`sharded`), `trainer/checks.py` (`check_sharded`),
#   `docs/distributed_sharded.md`; if its parameters are no DTensors, whose sizes are those of all ranks: `controls.py`
#   (`min_inner_lr`), `nexus.py`, `trainer/window.py` (`begin`), `trainer/card.py` (`_size`);
# - if it does not average gradients, or walks a path on each rank and has no `no_sync`: `trainer/mixin.py`
#   (`_micro_step`); if the model inside cannot compute gradients alone: `trainer/mixin.py` (`source_cosines`);
# - if Accelerate has a type for it, or a setting is not possible with it: `trainer/checks.py` (`check_launch`, or for
#   the wrapped model a check like `check_sharded`; under FSDP the type is `FSDP` on any device),
#   `tests/trainer/test_checks.py`, `docs/troubleshooting.md`. `tests/trainer/distributed/fsdp_worker.py`
#   (`launched_as`) pretends a type;
# - if the class of the model gets another name: `trainer/mixin.py` (`_save`); if the model inside has other weights
#   than a saved one: the other hooks under "Saving" there, and a module like `trainer/sharded.py`;
# - if several paths are tested: `tests/trainer/distributed/four_ranks.py` (`WORKERS`);
# - if its memory or traffic are not those of DDP or FSDP2: `pretrain/layout.py`, `pretrain/memory.py`,
#   `pretrain/cost.py`, `pretrain/console.py`, `docs/cost.md`, `docs/cost_traffic.md`;
# - if it is launched in another way: `docs/trainer.md` (row "launches"), a file in `recipes/accelerate/`.
def is_wrapped(model: nn.Module) -> bool:
    """Whether the gradients of a model are reduced over the ranks, by DDP, FSDP2 or tensor parallelism."""
    wrapped = any(isinstance(module, DistributedDataParallel | FSDPModule) for module in model.modules())
    return wrapped or any(isinstance(p, DTensor) for p in model.parameters())


class Shards:
    """
    How the parameters of a model are sharded over the ranks of a path: each in its own way, by FSDP2, tensor or expert
    parallelism. `params` are the trainable parameters, after wrapping.

    Raises:
        ValueError: the weights are not sharded over the ranks of a path.
    """

    def __init__(self, params: Sequence[Tensor], groups: "PathGroups"):
        layouts = [_layout(p) for p in params]
        kinds = list(dict.fromkeys(layouts))
        spread = max((mesh.size() for mesh, _ in kinds if mesh is not None), default=groups.size)
        if groups.settings[0] == "node" and spread != groups.size:
            raise ValueError(
                f"inner_sync='node' has {groups.size} ranks per path, but the weights are spread over {spread}. Set "
                "node_size to the ranks that share one copy of the weights, and let Accelerate's FSDP2 shard them."
            )
        size, index = [1] * len(kinds), [0] * len(kinds)  # of each kind: number of shards, and which this rank holds
        for i, (mesh, dims) in enumerate(kinds):
            for dim in dims:
                size[i], index[i] = size[i] * mesh.size(dim), index[i] * mesh.size(dim) + mesh.get_local_rank(dim)
        kind_of = [kinds.index(layout) for layout in layouts]
        # For each parameter, a number that two ranks share if they hold the same shard of it on the same path.
        self.parts = [(i * groups.size * groups.paths + index[i]) * groups.paths + groups.path for i in kind_of]
        self._sharded = max(size) > 1
        self._copies: Tensor | None = None
        if len(kinds) == 1 and len(kinds[0][1]) <= 1:  # as under FSDP2: only the ranks that hold different shards
            self._group = kinds[0][0].get_group(kinds[0][1][0]) if self._sharded else None
        else:  # all ranks of the path
            self._group = groups.inside
            self._copies = torch.tensor([groups.size // size[i] for i in kind_of], device=params[0].device)

    def norm(self, indices: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
        """
        The norm (0-d) over all shards, given the indices of parameters and local tensors. One scalar reduction if any
        parameter is sharded.
        """
        copies = self._copies
        if copies is not None and len(indices) < len(copies):
            copies = copies[list(indices)]
        norm = global_norm(tensors, copies)
        if not self._sharded:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=self._group)
        return square.sqrt()


def _layout(p: Tensor) -> tuple[Any, tuple[int, ...]]:
    """The mesh of a parameter, and the dimensions of the mesh over which it is sharded."""
    if not isinstance(p, DTensor):
        return None, ()
    return p.device_mesh, tuple(i for i, placement in enumerate(p.placements) if not placement.is_replicate())


class _ShardedPaths(ParallelismConfig):  # type: ignore[misc]  # accelerate has no types
    """Weights are sharded over the ranks of a path, and FSDP2 does not know of the other paths, which are replicas."""

    @property
    def fsdp_dim_names(self) -> list[str]:
        return ["dp_shard_cp"]


def parallelism_of(args: Any) -> ParallelismConfig | None:
    """
    The `parallelism_config` of training arguments. With `inner_sync="node"` under FSDP2, one that shards the weights
    inside each path. Its sizes are those of the arguments or of `accelerate launch`, or follow from the paths.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not (args.nexus and args.inner_sync == "node" and args.world_size > 1 and (args.fsdp or launched)):
        return args.parallelism_config
    config = args.parallelism_config or ParallelismConfig()
    sizes = {f.name: getattr(config, f.name) for f in fields(config)}
    if config.total_size == 1:
        size = path_size(args.inner_sync, args.node_size)
        sizes |= {"dp_replicate_size": args.world_size // size, "dp_shard_size": size}
    return _ShardedPaths(**sizes)


def path_size(inner_sync: str, node_size: int | None) -> int:
    """
    The number of ranks per path. All ranks must call it.

    Raises:
        ValueError: the ranks cannot be split into groups of this size.
    """
    size = _own_path_size(inner_sync, node_size)
    check_paths(_ranks(), set(gather(size)))
    return size


def count_paths(inner_sync: str, node_size: int | None) -> int:
    """The number of paths, as far as this rank knows: it asks no other."""
    return _ranks() // _own_path_size(inner_sync, node_size)


def _own_path_size(inner_sync: str, node_size: int | None) -> int:
    ranks = _ranks()
    node = node_size or int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    return {"global": ranks, "local": 1, "node": node}[inner_sync]


def check_paths(ranks: int, sizes: set[int]) -> None:
    """Refuse paths of these sizes unless all have one size, which divides the ranks. Plans are checked by it, too."""
    if len(sizes) > 1 or ranks % min(sizes):
        raise ValueError(
            f"inner_sync='node' needs the same number of ranks in each group, but {ranks} ranks were to be split "
            f"into groups of {', '.join(map(str, sorted(sizes)))}. Set node_size to a divisor of {ranks}."
        )


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters of FSDP2 modules, which an evaluation or an interrupted step has left."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _ddp_modules(model: nn.Module) -> list[DistributedDataParallel]:
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def reduce_over(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """
    Let DDP reduce gradients over a group (`None`: all ranks), and send there all else that it sends: which parameters
    are unused, and its buffers.

    Raises:
        ValueError: a communication hook reduces the gradients, which does not know of the group.
    """
    wanted: Any = group or dist.group.WORLD
    for module in _ddp_modules(model):
        for hook, state in module._comm_hooks:
            if group is not None and state != weakref.ref(module):  # not that of `compress`
                raise ValueError(
                    f"The communication hook {getattr(hook, '__qualname__', hook)!r} with inner_sync='node' is not "
                    "allowed: it does not know of the paths. Remove the hook (reduce_dtype='bfloat16' sends 16 bits), "
                    "or set inner_sync to 'global'."
                )
        if module.process_group is not wanted:
            module._update_process_group(wanted)


def share_buffers(model: nn.Module) -> None:
    """Give all ranks the buffers of the first, as DDP does where all ranks walk one path. All must call it."""
    world: Any = dist.group.WORLD
    for module in _ddp_modules(model):
        module._assign_modules_buffers()  # those that were replaced since
        if module.broadcast_buffers and module.modules_buffers:
            dist._broadcast_coalesced(world, module.modules_buffers, _BUCKET, 0)


def compress(model: nn.Module, wanted: Callable[[], bool]) -> None:
    """Let DDP send gradients in bfloat16 if `wanted` at a backward pass. To be called once for each wrapped model."""

    def reduce(ddp: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        hook = bf16_compress_wrapper(allreduce_hook) if wanted() else allreduce_hook
        return hook(ddp().process_group, bucket)

    for module in _ddp_modules(model):
        if module._comm_hooks:
            hook, _ = module._comm_hooks[0]
            raise ValueError(
                f"The communication hook {getattr(hook, '__qualname__', hook)!r} with reduce_dtype='bfloat16' is not "
                "allowed: DDP takes one hook. Leave one of the two out."
            )
        module.register_comm_hook(weakref.ref(module), reduce)  # DDP would keep itself alive


class PathGroups:
    """
    The ranks that walk one path together, and the average over the paths.

    With `inner_sync="global"`, all ranks walk one path, and with `"local"` each rank walks its own. With `"node"`, it
    is `node_size` ranks, by default those of a machine, as torchrun says. `timeout` is that of their collectives, by
    default that of the backend.

    Raises:
        ValueError: the ranks cannot be split into groups of this size.
    """

    def __init__(self, inner_sync: str, node_size: int | None = None, timeout: timedelta | None = None):
        self.settings = inner_sync, node_size
        ranks, rank = _ranks(), dist.get_rank() if dist.is_initialized() else 0
        self.size = size = path_size(inner_sync, node_size)  # ranks per path
        self.path, self._place = divmod(rank, size)  # number of this rank's path, and its place there
        self.inside: dist.ProcessGroup | None = None  # the ranks of this path, if several paths have several ranks
        self._across: dist.ProcessGroup | None = None  # all ranks, if each walks its own path
        if 1 < size < ranks:  # every rank must make every group
            paths = [list(range(first, first + size)) for first in range(0, ranks, size)]
            across = [list(ranks_at) for ranks_at in zip(*paths, strict=True)]
            self.inside = [dist.new_group(path, timeout) for path in paths][self.path]
            self._across = [dist.new_group(ranks_at, timeout) for ranks_at in across][self._place]
        self.paths, self.several = ranks // size, size < ranks
        self.alone = size == 1 < ranks  # whether each rank has its own path

    @torch.no_grad()
    def average(self, params: Sequence[Tensor], moved: bool) -> None:
        """
        Replace the pseudo-gradient in `.grad` by its average over the paths that moved. All ranks must call it, with
        the same parameters in the same order. Gradients have the layout of their parameters.

        Where the ranks of a path hold the same pseudo-gradient, each sends an equal part of it to the other paths, and
        gathers the averaged parts of the others. Where it is sharded, each sends its shard.

        A gradient that is None on some paths counts as zero there. One that is None on all paths stays None. `moved`
        says whether this path took any inner step. If not, its gradients are None.
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
        sharded = isinstance(params[0], DTensor)
        parts, place = (1, 0) if sharded else (self.size, self._place)

        def average(bucket: Tensor) -> None:
            part = bucket.chunk(parts)[place]
            dist.all_reduce(part, group=self._across)
            if parts > 1:
                dist.all_gather_into_tensor(bucket, part, group=self.inside)
            bucket.div_(paths_moved)

        _change([shard(p.grad) for p in present], average, parts)  # type: ignore[arg-type]  # not None


def _change(tensors: Sequence[Tensor], change: Callable[[Tensor], Any], parts: int) -> None:
    """
    Let `change` replace the elements of tensors, in flat buckets of one dtype that are divisible into equal parts.
    One bucket is in memory at a time.
    """
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        flat = [_flat(tensor) for tensor in tensors if tensor.dtype == dtype]
        size = min(sum(map(len, flat)), _BUCKET // dtype.itemsize)
        buffer = flat[0].new_zeros(size + -size % parts)
        for pieces in _pieces(flat, size):
            sizes = list(map(len, pieces))
            bucket = buffer[: sum(sizes) + -sum(sizes) % parts]
            torch.cat(pieces, out=bucket[: sum(sizes)])
            change(bucket)
            torch._foreach_copy_(pieces, bucket[: sum(sizes)].split(sizes))


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor in the order of memory, as a view."""
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).view(-1)


def _pieces(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Parts of flat tensors, in lists that have `size` elements together. The last may have fewer."""
    pieces, room = [], size
    for tensor in tensors:
        while len(tensor):
            pieces.append(tensor[:room])
            tensor, room = tensor[room:], room - len(pieces[-1])
            if not room:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces
