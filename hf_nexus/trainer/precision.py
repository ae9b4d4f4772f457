"""What the precision of the weights and of the computation allows."""

import math

import torch
from torch import nn
from transformers.utils import logging

from ..nexus import Nexus

__all__ = ["AUTOCAST_FLOOR", "check_weights", "warn_of_short_steps"]

logger = logging.get_logger(__name__)

# Root mean square of an inner step below which bfloat16 autocast's noise drowns over a third of the path's signal.
AUTOCAST_FLOOR = 3e-6


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


def warn_of_short_steps(nexus: Nexus, autocast: bool) -> None:
    """
    Warn if inner steps are too short to be told from rounding, or from the noise of bfloat16 compute.

    Args:
        nexus ([`Nexus`]):
            The walker, with the configured `inner_lr`.
        autocast (`bool`):
            Whether the model computes under bfloat16 autocast.
    """
    size = sum(p.numel() for p in nexus.params)
    per_weight = nexus.inner_lr / math.sqrt(size)
    if 0 < nexus.inner_lr < nexus.min_inner_lr:
        logger.warning(
            f"inner_lr={nexus.inner_lr} is below {nexus.min_inner_lr:.1e}, where rounding would drown the path of "
            f"{size:,} parameters: normalized gradients are averaged without moving instead."
        )
    elif autocast and 0 < per_weight < AUTOCAST_FLOOR:
        logger.warning(
            f"inner_lr={nexus.inner_lr} moves each of {size:,} weights by {per_weight:.1e} on average. At 3e-6, "
            "bfloat16 autocast was measured to keep 63 % of the path's signal, at 3e-7 only 8 %. Raise inner_lr to "
            f"{AUTOCAST_FLOOR * math.sqrt(size):.2g} or more."
        )
