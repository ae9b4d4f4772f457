"""The geometry of an adaptive optimizer: its second moments as a metric for the inner steps (experimental)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .snapshot import global_norm, shard

__all__ = ["adam_metric"]

# Second moments below this share of their mean count as that much: a weight whose gradient is zero nearly always (the
# embedding of a rare token) would otherwise take the whole of the first step in which it is not. It bounds D within 32
# times its value at the mean, as AdamW's own update of such a weight is bounded by (1 - beta2)^(-1/2), 32 at 0.999.
FLOOR = 1e-3


@torch.no_grad()
def adam_metric(
    optimizer: Optimizer, params: Sequence[Tensor], reduce_norm: Callable[[Tensor], Tensor] = lambda norm: norm
) -> list[Tensor] | None:
    """
    The square root of D = c (v_hat + eps)^(-1/2), of AdamW's bias-corrected second moment v_hat, for each parameter.

    eps is `FLOOR` times the mean of v_hat, and c the mean of (v_hat + eps)^(1/2), so that the scale of v_hat does not
    matter, and a step of `inner_lr` has about that length in L2 too where g^2 is about v_hat. With c = 1, since v_hat
    is the moment of p itself, p would settle at elements of about 1/N for N parameters, where AdamW's epsilon drowns
    them if there are many, and steps would be sqrt(N) times as long. Parameters without a second moment have D = 1.

    Args:
        optimizer ([`torch.optim.Optimizer`]):
            Whose state it is.
        params (`Sequence[Tensor]`):
            What is walked.
        reduce_norm (`Callable[[Tensor], Tensor]`, *optional*):
            As in [`Nexus`].

    Returns:
        `list[Tensor]`, *optional*: of this process's shards; `None` before the optimizer's first step.

    Example:
        >>> import torch
        >>> from hf_nexus.geometry import adam_metric
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> adam_metric(optimizer, [weight]) is None
        True
        >>> weight.grad = torch.tensor([1.0, 4.0])
        >>> optimizer.step()
        >>> [round(float(d) ** 2, 2) for d in adam_metric(optimizer, [weight])[0]]
        [2.49, 0.63]
    """
    betas = {id(p): group["betas"][1] for group in optimizer.param_groups if "betas" in group for p in group["params"]}
    moments: dict[int, Tensor] = {}
    for i, p in enumerate(params):
        state: Mapping[str, Any] = optimizer.state.get(p, {})
        if "exp_avg_sq" in state:
            moments[i] = shard(state["exp_avg_sq"]) / (1 - betas[id(p)] ** float(state["step"]))
    if not moments:
        return None
    values = list(moments.values())

    def total(tensors: Sequence[Tensor]) -> Tensor:  # of non-negative ones, over all shards
        return reduce_norm(global_norm([t.sqrt() for t in tensors])).square()

    size = total([torch.ones_like(v) for v in values])
    torch._foreach_add_(values, FLOOR * float(total(values) / size))
    torch._foreach_sqrt_(values)
    c = float(total(values) / size)
    metric = [torch.ones_like(shard(p)) for p in params]
    for i, v in zip(moments, values, strict=True):
        if c > 0:  # all zero: every gradient so far was
            metric[i] = (c / v).sqrt_()
    return metric
