"""The types of weights: float32 while they are trained, whatever a checkpoint was stored in."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_bf16_available
from torch import nn
from transformers.utils import is_peft_available, logging

__all__ = ["has_bfloat16", "precision_is_chosen", "widen_weights", "with_state"]

logger = logging.get_logger(__name__)


def precision_is_chosen(args: Any) -> bool:
    """Whether a user or a launcher has chosen a type to compute in. A `bf16` at its default is no choice."""
    return args.mixed_precision != "no" or args.bf16 != type(args).__dataclass_fields__["bf16"].default


def has_bfloat16() -> bool:
    """Whether bfloat16 is computed here. Emulation by older GPUs, which is slower than float32, does not count."""
    emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return is_bf16_available(ignore_tpu=True) and not emulated


def widen_weights(model: nn.Module, args: Any, chosen: bool) -> None:
    """
    Make trainable weights of 16 bits float32: rounding would lose most of an inner step. Frozen weights, which may be
    quantized, stay as they are where a layer can compute on two types: under autocast, or in adapters. bfloat16
    autocast is switched on in the arguments, unless the type to compute in is `chosen`.

    Raises:
        ValueError: there are such weights, and `upcast_weights` is off, or a quantized model needs autocast.
    """
    narrow = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if not narrow:
        return
    dtype, size = narrow[0].dtype, sum(p.numel() for p in narrow)
    if not args.upcast_weights:
        raise ValueError(
            f"The model has {size:,} trainable weights of {dtype}, which would round inner steps away, and "
            "upcast_weights is off. Leave it on, or load the model with dtype=torch.float32."
        )
    if not chosen and has_bfloat16():
        args.bf16, args.mixed_precision = True, "bf16"
    quantized = getattr(model, "quantization_method", None) is not None
    if args.mixed_precision == "bf16":
        alone = quantized or any(not p.requires_grad for p in model.parameters())
    else:
        alone = {*narrow} <= _of_adapters(model)
        if quantized and not alone:
            raise ValueError(
                "bf16=False: the quantized model has trainable weights outside of adapters that convert their inputs, "
                "such as modules_to_save. Set bf16=True, or load the model with dtype=torch.float32."
            )
    if alone:
        for p in narrow:
            p.data = p.data.float()
    else:
        model.float()  # without autocast, a layer computes in one type
    logger.warning(
        f"{size:,} trainable weights of {dtype} were made float32, which takes {2 * size:,} bytes more, and as many "
        "for their gradients and for each moment of the optimizer: 69 to 99.7 % of an inner step is lost in bfloat16. "
        f"The model computes in {'bfloat16 (autocast)' if args.mixed_precision == 'bf16' else 'float32'}."
    )


@contextmanager
def with_state(accelerator: Accelerator, state: Mapping[str, Any]) -> Iterator[None]:
    """
    Inside the context, the state that all accelerators share is that with which this one was created. It decides the
    type of autocast, and a later trainer, or only its arguments, replace it.
    """
    shared = vars(accelerator.state)
    before = dict(shared)
    shared.update(state)
    inside = dict(shared)
    try:
        yield
    finally:
        if shared == inside:  # else a trainer was made inside
            shared.clear()
            shared.update(before)


def _of_adapters(model: nn.Module) -> set[nn.Parameter]:
    """The adapters in layers of PEFT that convert their inputs to the type of the adapter, and their outputs back."""
    if not is_peft_available():
        return set()
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.lora import LoraLayer
    from peft.tuners.oft import OFTLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    kinds = (IA3Layer, LoraLayer, OFTLayer, TrainableTokensLayer)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, kinds)]
    return {p for layer in layers for p in {*layer.parameters()} - {*layer.base_layer.parameters()}}
