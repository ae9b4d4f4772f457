"""Gradient cosines between the sources of a run, measured during training."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.cosines import gradient_cosines

__all__ = ["source_cosines"]


def source_cosines(
    model: nn.Module, batches: Mapping[str, Any], loss: Callable[[Any], Tensor], device: torch.device
) -> dict[tuple[str, str], float]:
    """
    Gradient cosine of each pair of sources at the current weights, with dropout off. Neither the random states nor the
    gradients of the run change.
    """
    devices = [] if device.type == "cpu" else [device]
    model.eval()
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        params = [p for p in model.parameters() if p.requires_grad]
        losses = {name: partial(loss, batch) for name, batch in batches.items()}
        cosines = gradient_cosines(losses, params)
    model.train()
    return cosines
