"""Which launches Nexus supports, and what it sends between ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

__all__ = ["average_pseudo_gradients", "check_supported", "check_weights"]

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
    if args.fp16:
        raise ValueError(
            "Nexus does not support fp16: its gradient scaling and the normalized inner steps exclude each other. "
            "Use bf16=True over float32 weights."
        )
    if args.optim in _LAYERWISE | _FUSED_BACKWARD:
        raise ValueError(
            f"optim={OptimizerNames(args.optim).value!r} updates weights inside the backward pass, where Nexus has not finished its "
            "window. Use an ordinary optimizer such as optim='adamw_torch_fused'."
        )
    single = {DistributedType.NO}
    ddp = {
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
        DistributedType.MULTI_NPU,
        DistributedType.MULTI_XPU,
    }
    if kind not in single | ddp or trainer.is_fsdp_enabled:
        raise ValueError(
            f"Nexus does not support {kind.value} yet. Use DDP: `torchrun --nproc_per_node <GPUs> your_script.py ...` "
            "without fsdp or deepspeed arguments, and snapshot_device='cpu' if memory is short."
        )
    if trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() != 1:
        raise ValueError("Nexus does not support tensor, context or sequence parallelism. Use DDP (torchrun) instead.")


def check_weights(model: nn.Module) -> None:
    """
    Refuse trainable weights of less than 32 bits: most of an inner step would be rounded away.

    Raises:
        ValueError: names the first such parameter and the fix.
    """
    for name, p in model.named_parameters():
        if p.requires_grad and p.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"Parameter {name!r} is {p.dtype}; Nexus needs float32 trainable weights, since 69 to 99.7 % of an "
                "inner step is lost in bfloat16. Load with `from_pretrained(..., dtype=torch.float32)` or call "
                "`model.float()`, and pass bf16=True to compute in bfloat16."
            )


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
