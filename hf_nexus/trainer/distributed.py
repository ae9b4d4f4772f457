"""Which launches Nexus supports, and what it sends between ranks."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.training_args import OptimizerNames
from transformers.utils import is_sagemaker_mp_enabled

__all__ = ["Shards", "average_pseudo_gradients", "broadcast", "check_supported", "max_over_ranks", "reshard"]

_LAYERWISE = {name for name in OptimizerNames if name.value.endswith("_layerwise")}
_FUSED_BACKWARD = {OptimizerNames.LOMO, OptimizerNames.ADALOMO}


def check_supported(trainer: Trainer) -> None:
    """
    Refuse what would silently train something else than the Nexus update.

    Args:
        trainer ([`~transformers.Trainer`]):
            A built trainer whose `args` carry the Nexus fields.

    Raises:
        ValueError: names what is not supported, and the way out.
    """
    args, kind = trainer.args, trainer.accelerator.distributed_type
    if args.n_gpu > 1:
        raise ValueError(
            f"Nexus does not run under DataParallel ({args.n_gpu} GPUs in one process). Start a process per GPU with "
            f"`torchrun --nproc_per_node {args.n_gpu} your_script.py ...`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if trainer.is_model_parallel or getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "Nexus does not support models that are spread over devices at load time (device_map, tp_plan, "
            "distributed_config). Load the model without them and start with "
            "`torchrun --nproc_per_node <GPUs> your_script.py ...`."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and args.world_size == 1:
        raise ValueError(
            f"This is one of {launched} processes, but each would train a model of its own: without a GPU, several "
            "processes need use_cpu=True."
        )
    if is_sagemaker_mp_enabled():
        raise ValueError(
            "Nexus does not support SageMaker model parallelism. Use DDP (`torchrun --nproc_per_node <GPUs> "
            "your_script.py ...`) or FSDP2."
        )
    if args.fp16:
        raise ValueError(
            "Nexus does not support fp16: its gradient scaling and the normalized inner steps exclude each other. "
            "Use bf16=True over float32 weights."
        )
    if args.optim in _LAYERWISE | _FUSED_BACKWARD:
        raise ValueError(
            f"optim={OptimizerNames(args.optim).value!r} updates weights inside the backward pass, where Nexus is not "
            "done with its window. Use an ordinary optimizer such as optim='adamw_torch_fused'."
        )
    single = {DistributedType.NO}
    ddp = {
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
        DistributedType.MULTI_NPU,
        DistributedType.MULTI_XPU,
    }
    if trainer.is_fsdp_enabled:
        _check_fsdp(trainer)
    elif kind not in single | ddp:
        raise ValueError(
            f"Nexus does not support {kind.value}. Use DDP (`torchrun --nproc_per_node <GPUs> your_script.py ...`) "
            "or FSDP2 (add `--fsdp True --fsdp_config '{\"fsdp_version\": 2}'`)."
        )
    if trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() != 1:
        raise ValueError("Nexus does not support tensor, context or sequence parallelism. Use DDP (torchrun) instead.")


def _check_fsdp(trainer: Trainer) -> None:
    args: Any = trainer.args
    if trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            "Nexus does not support FSDP1, whose flat parameters hide the weights. Use FSDP2: set fsdp_version to 2 "
            "in fsdp_config or in the accelerate configuration."
        )
    if args.inner_sync == "local":
        raise ValueError(
            "inner_sync='local' is not possible under FSDP: no rank holds all of the weights that it would walk. Use "
            "inner_sync='global', or DDP."
        )


def max_over_ranks(tensor: Tensor) -> Tensor:
    """The elementwise largest value on any rank. All ranks must call it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def broadcast(tensor: Tensor, device: torch.device) -> Tensor:
    """The first rank's tensor, sent over `device`. All ranks must call it."""
    tensor = tensor.to(device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor


class Shards:
    """
    How the parameters of a model lie across processes.

    Args:
        params (`Sequence[Tensor]`):
            The trainable parameters, after wrapping.

    Raises:
        ValueError: some are sharded and some are not, or in different ways.
    """

    def __init__(self, params: Sequence[Tensor]):
        layouts = {(p.device_mesh, p.placements) if isinstance(p, DTensor) else None for p in params}
        if len(layouts) > 1:
            raise ValueError(
                f"The trainable parameters are sharded in {len(layouts)} different ways; Nexus needs one for all. "
                "Wrap the whole model, adapters included, with FSDP2."
            )
        layout = layouts.pop()
        # Under HSDP only the dimension that shards: the replicas all hold the same.
        dims = [] if layout is None else [i for i, placement in enumerate(layout[1]) if placement.is_shard()]
        self.group = layout[0].get_group(dims[0]) if layout and dims else None
        self.index = layout[0].get_local_rank(dims[0]) if layout and dims else 0

    def norm(self, norm: Tensor) -> Tensor:
        """The norm over all shards, given this process's (0-d), by one scalar reduction if anything is sharded."""
        if self.group is None:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=self.group)
        return square.sqrt()


def reshard(model: nn.Module) -> None:
    """Put FSDP2 modules that a broken-off step has left gathered back to their shards, which alone were restored."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def average_pseudo_gradients(params: Sequence[Tensor], moved: bool) -> int:
    """
    Replace each rank's pseudo-gradient in `.grad` by the average over the ranks that moved: one reduction of the
    parameters' size. All ranks must call it, with the same parameters in the same order.

    A gradient that is None on some ranks counts as zero there; one that is None on all stays None.

    Args:
        params (`Sequence[Tensor]`):
            The trainable parameters.
        moved (`bool`):
            Whether this rank took any inner step. If not, its gradients are not looked at.

    Returns:
        `int`: how many ranks moved. With 0, every gradient is None.
    """
    device = params[0].device
    # Which gradients are None may differ by rank and must not decide what is sent: a flag for each travels along.
    flags = torch.tensor(
        [moved, *(moved and p.grad is not None for p in params)], dtype=params[0].dtype, device=device
    )
    values = [p.grad if moved and p.grad is not None else torch.zeros_like(p) for p in params]
    flat = torch.cat([flags, *(v.reshape(-1) for v in values)])
    del values
    dist.all_reduce(flat)
    counts = flat[: len(flags)].tolist()
    movers = round(counts[0])
    position = len(flags)
    for p, count in zip(params, counts[1:], strict=True):
        part = flat[position : position + p.numel()]
        position += p.numel()
        p.grad = torch.empty_like(p).copy_(part.view(p.shape)).div_(movers) if count else None
    return movers
