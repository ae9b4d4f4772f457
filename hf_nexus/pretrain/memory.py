"""Memory of a training run, computed from the shapes before anything is allocated."""

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from transformers.training_args import OptimizerNames

from ..trainer.distributed import check_paths
from ..trainer.support import check_fsdp
from .fields import PretrainArguments
from .model import build_model, config_of, joined_documents, model_config, planned_attention

__all__ = [
    "SYMBOLS",
    "MemoryEstimate",
    "estimate_memory",
    "machine_of",
    "path_of",
    "replicas_of",
    "sharding_of",
    "weights_of",
]

SYMBOLS = "L layers, h width, kv width of keys, f feed-forward width, a heads of width d, T tokens a row, V vocabulary"
_SPLIT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")  # by tensor parallelism, in equal parts
_GRADIENTS, _AUTOCAST = "gradients", "bfloat16 copies of the weights"


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Computed bytes per device. Memory of the libraries (device context, kernels, NCCL buffers, fragmentation) is not
    included: leave a tenth of the device free.
    """

    parameters: int  # trainable ones, those of a device with tensor parallelism
    per_parameter: dict[str, int]  # bytes by purpose
    activations: int  # bytes kept for the backward pass of one micro-batch; 0 if not known, for another than a Llama
    formula: str  # of the activations
    # Bytes that the end of the backward pass needs in addition to all gradients: for the first layer, or for the
    # second of the two gradients of tied embeddings.
    last: int = 0
    shards: int = 1  # devices that share the bytes per parameter
    gathered: int = 0  # bytes of gathered weights in addition to the shard
    accumulates: bool = False  # whether gradients stay for the next micro-batch; an inner step of Nexus consumes them

    @property
    def held(self) -> int:
        """Bytes between two outer steps."""
        held = sum(size for purpose, size in self.per_parameter.items() if purpose not in (_GRADIENTS, _AUTOCAST))
        return held * self.parameters // self.shards

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        gradients = self.per_parameter[_GRADIENTS] * self.parameters // self.shards
        begin = self.activations + (gradients if self.accumulates else 0)
        end = gradients + self.last
        copies = self.per_parameter.get(_AUTOCAST, 0) * self.parameters  # of weights that are not sharded
        return self.held + self.gathered + copies + max(begin, end)


def sharding_of(arguments: PretrainArguments) -> str:
    """`"ddp"` or `"fsdp2"`: `--sharding`, else the choice of the training arguments or of `accelerate launch`."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return arguments.hardware.sharding or ("fsdp2" if arguments.training.fsdp or launched else "ddp")


def machine_of(arguments: PretrainArguments) -> int:
    """Devices of one machine: `--devices_per_node`, else those of the launcher whose devices are planned, else 8."""
    hardware, launched = arguments.hardware, arguments.training.world_size
    local = os.environ.get("LOCAL_WORLD_SIZE") if launched > 1 and hardware.devices in (None, launched) else None
    return hardware.devices_per_node or int(local or 8)


def replicas_of(arguments: PretrainArguments, devices: int) -> int:
    """
    Number of devices that read different rows: one of each group with tensor parallelism.

    Raises:
        ValueError: a layout of `tp_size` that is not possible.
    """
    tp, t = arguments.hardware.tp_size, arguments.training
    if devices % tp:
        raise ValueError(f"tp_size={tp} with {devices} devices is not allowed: it must divide them. Set --devices.")
    if tp > 1 and t.nexus and t.inner_sync != "global":
        raise ValueError(f"tp_size={tp} with inner_sync={t.inner_sync!r} is not possible. Set inner_sync to 'global'.")
    if 1 < tp < devices and sharding_of(arguments) != "fsdp2":
        raise ValueError(f"tp_size={tp} is combined with FSDP2 only. Add --sharding fsdp2, or --devices {tp}.")
    if tp > 1:
        m = config_of(arguments)
        missing = [name for name in ("hidden_size", "num_hidden_layers") if getattr(m, name, None) is None]
        if missing:
            raise ValueError(f"tp_size={tp} is not planned for a {m.model_type}: no {missing[0]}. Set tp_size to 1.")
        # getattr would raise for a size that differs between the layers of the model.
        sizes = {name: vars(m).get(m.attribute_map.get(name, name), 0) for name in _SPLIT}
        if uneven := [f"{name}={size}" for name, size in sizes.items() if isinstance(size, int) and size % tp]:
            raise ValueError(f"tp_size={tp} with {', '.join(uneven)} is not possible. Set tp_size to a divisor.")
    return devices // tp


def weights_of(arguments: PretrainArguments, parameters: int) -> int:
    """Parameters of one device before FSDP2 shards them. Tensor parallelism divides all but the embeddings."""
    if arguments.hardware.tp_size == 1:
        return parameters
    config = config_of(arguments)
    embeddings = min(parameters, config.vocab_size * config.hidden_size)
    return embeddings + (parameters - embeddings) // arguments.hardware.tp_size


def path_of(arguments: PretrainArguments, devices: int) -> int:
    """
    Devices per path with `inner_sync="node"`.

    Raises:
        ValueError: the devices cannot be split into paths.
    """
    size, machine = arguments.training.node_size, min(machine_of(arguments), devices)
    check_paths(devices, {size} if size else {machine, devices % machine or machine})
    return size or machine


def estimate_memory(arguments: PretrainArguments, parameters: int, devices: int) -> MemoryEstimate:
    """
    Memory per device of a model with that many parameters on that many devices.

    The activations are the tensors that a Llama layer of transformers saves for its backward pass with scaled
    dot-product attention, and the logits with their gradient. Tests compare the total with the allocated memory.

    Raises:
        ValueError: a setting that is not possible with FSDP2, or devices that cannot be split into paths or groups.
    """
    t, replicas = arguments.training, replicas_of(arguments, devices)
    sharded = replicas > 1 and sharding_of(arguments) == "fsdp2"
    if sharded or devices > replicas:
        check_fsdp(t, version=2)
    shards = path_of(arguments, devices) if t.nexus and t.inner_sync == "node" else replicas
    random = t.inner_direction == "random" and t.inner_lr > 0
    copies = (2 if random else 1) if t.nexus and t.snapshot_device is None else 0
    adamw = t.matrix_optimizer is None and t.optim in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
    moments = "AdamW moments" if adamw else "optimizer state, taken as AdamW's"
    per_parameter = {"float32 weights": 4, _GRADIENTS: 4, moments: 8}
    if copies:
        per_parameter["Nexus snapshot"] = 4 * copies
    if t.bf16 and not sharded:
        per_parameter[_AUTOCAST] = 2  # autocast keeps them until the end of the backward pass
    if replicas > 1 and not sharded:
        per_parameter["DDP gradient buckets"] = 4
    m, per_token, layer = config_of(arguments), 0, 0
    tokens = t.per_device_train_batch_size * arguments.mixture.sequence_length
    formula = f"not known for a model of the type {m.model_type}. The peak is higher by them"
    if m.model_type == "llama":
        per_token, layer, terms = _activations(arguments, m)
        formula = f"{tokens} tokens x ({terms}) bytes"
    width = getattr(m, "hidden_size", 0) if getattr(m, "tie_word_embeddings", False) else 0
    return MemoryEstimate(
        weights_of(arguments, parameters),
        per_parameter,
        tokens * per_token,
        formula,
        last=max(tokens * layer, 4 * m.vocab_size * width),
        shards=shards if sharded else 1,
        gathered=_gathered(arguments, parameters) if sharded else 0,
        accumulates=not t.nexus and t.gradient_accumulation_steps > 1,
    )


def _activations(arguments: PretrainArguments, m: Any) -> tuple[int, int, str]:
    """Bytes per token: of the whole model, of one layer in its backward pass; and the formula of the first."""
    t, size = arguments.training, 2 if arguments.training.bf16 else 4
    h, heads, tp = m.hidden_size, m.num_attention_heads, arguments.hardware.tp_size
    # Tensor parallelism divides the inside of attention and feed-forward. All of the width h stays: an upper bound.
    divided = {"kv": h // heads * m.num_key_value_heads // tp, "f": m.intermediate_size // tp, "a": heads // tp}
    values = {"h": h, "V": m.vocab_size, "d": h // heads, "T": arguments.mixture.sequence_length, **divided}
    layer = Counter(h=30, kv=4, f=8, a=4) if t.bf16 else Counter(h=32, kv=8, f=16, a=4)
    head = Counter(h=12, V=12)
    if planned_attention(arguments) == "sdpa" and joined_documents(arguments) is None:
        # Each layer keeps the mask of documents in the dtype of the queries, and the keys and values repeated for all
        # heads, which sdpa does not repeat itself under a mask. The rotary angles are no longer those of every row.
        layer.update({"T": size, "h": 2 * size, "kv": -2 * size})
        head.update({"d": 8})

    def bytes_of(terms: Counter[str]) -> int:
        return sum(count * values[name] for name, count in terms.items())

    def formula(terms: Counter[str]) -> str:
        return " + ".join(f"{count}{name}" for name, count in terms.items() if count)

    in_backward = bytes_of(layer) + 4 * h + 2 * size * values["f"]  # the gradients of saved tensors that exist at once
    if t.activation_checkpointing:  # a layer is recomputed when the tensors of the head are gone
        layer = Counter(h=4)
    per_token = m.num_hidden_layers * bytes_of(layer) + bytes_of(head)
    shown = ", ".join(name for name in divided if layer[name])
    split = f" with {shown} divided by {tp}" if tp > 1 and shown else ""
    return per_token, in_backward, f"L * ({formula(layer)}) + {formula(head)}{split}"


def _gathered(arguments: PretrainArguments, parameters: int) -> int:
    """What is outside of the layers, from the first forward to the last backward, and two layers."""
    with torch.device("meta"):
        model = build_model(model_config(arguments.model, arguments.mixture.sequence_length))
    stack = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layers = [sum(p.numel() for p in layer.parameters()) for layer in stack]
    # With bfloat16, accelerate lets FSDP2 gather (and reduce) in bfloat16.
    size, outside = 2 if arguments.training.bf16 else 4, weights_of(arguments, parameters - sum(layers))
    return size * (outside + sum(sorted(layers)[-2:]) // arguments.hardware.tp_size)
