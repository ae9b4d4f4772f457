"""Memory of a training run, computed from the shapes before anything is allocated."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..mixture.isolation import choose_isolation
from .fields import PretrainArguments

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "SYMBOLS",
    "MemoryEstimate",
    "attention_of",
    "estimate_memory",
    "format_bytes",
    "memory_table",
    "sharding_of",
]

SYMBOLS = "L layers, h width, kv width of keys, f feed-forward width, a heads, T tokens per row, V vocabulary"
_GRADIENTS, _AUTOCAST = "gradients", "bfloat16 copies of the weights"


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Computed, not measured: bytes per device.

    What the libraries keep for themselves (the context of the device, kernels, buffers of NCCL, fragmentation) is not
    in it; leave a tenth of the device free.

    Attributes:
        parameters (`int`):
            Of the model, all trainable.
        per_parameter (`dict[str, int]`):
            Bytes per parameter, by what they are for.
        activations (`int`), formula (`str`):
            Bytes kept for the backward pass of one micro-batch, and how they come about.
        last (`int`, *optional*, defaults to 0):
            Bytes that the end of the backward pass needs beside all the gradients: for the first layer, or for the
            second of the two gradients of tied embeddings.
        shards (`int`, *optional*, defaults to 1):
            Devices that share what is counted per parameter.
        gathered (`int`, *optional*, defaults to 0):
            Bytes of weights that a device holds whole at once, beside its shard.
        accumulates (`bool`, *optional*, defaults to `False`):
            Whether gradients are kept from one micro-batch to the next. In a Nexus window they are not: an inner step
            uses them up, and while they grow, the activations shrink.
        averaged (`int`, *optional*, defaults to 0):
            Bytes per parameter for the one reduction at the end of a window of `inner_sync="local"`.
    """

    parameters: int
    per_parameter: dict[str, int]
    activations: int
    formula: str
    last: int = 0
    shards: int = 1
    gathered: int = 0
    accumulates: bool = False
    averaged: int = 0

    @property
    def held(self) -> int:
        """Bytes between two outer steps."""
        held = sum(size for what, size in self.per_parameter.items() if what not in (_GRADIENTS, _AUTOCAST))
        return held * self.parameters // self.shards

    @property
    def total(self) -> int:
        """Bytes at the worst moment."""
        gradients = self.per_parameter[_GRADIENTS] * self.parameters // self.shards
        begin = self.activations + (gradients if self.accumulates else 0)
        end = gradients + max(self.last, self.averaged * self.parameters)
        copies = self.per_parameter.get(_AUTOCAST, 0) * self.parameters  # of weights that are not sharded
        return self.held + self.gathered + copies + max(begin, end)


def sharding_of(arguments: PretrainArguments) -> str:
    """`"ddp"` or `"fsdp2"`: as `--sharding` says, else what the training arguments or `accelerate launch` ask for."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return arguments.hardware.sharding or ("fsdp2" if arguments.training.fsdp or launched else "ddp")


def attention_of(arguments: PretrainArguments) -> str:
    """Attention implementation of the run."""
    return arguments.model.attn_implementation or "sdpa"  # what a Llama gets by default


def estimate_memory(arguments: PretrainArguments, parameters: int, devices: int) -> MemoryEstimate:
    """
    Memory per device, computed from the shapes.

    The activations count the tensors that a Llama layer of transformers saves for its backward pass with scaled
    dot-product attention, and the logits with their gradient; the tests compare the total with what is allocated.

    Args:
        arguments ([`PretrainArguments`]):
            The run.
        parameters (`int`):
            Of the model.
        devices (`int`):
            Number of training processes; under FSDP2 they share weights, gradients, moments and snapshot.

    Raises:
        ValueError: `inner_sync="local"` under FSDP2.

    Example:
        >>> from hf_nexus.pretrain.parsing import parse_arguments
        >>> from hf_nexus.pretrain.memory import estimate_memory
        >>> arguments = parse_arguments(["--config", "3b", "--dry_run", "--sharding", "fsdp2"])
        >>> f"{estimate_memory(arguments, 2_969_742_336, 8).held / 1e9:.2f} GB"
        '5.94 GB'
    """
    t, sharded = arguments.training, devices > 1 and sharding_of(arguments) == "fsdp2"
    local = t.nexus and t.inner_sync == "local" and devices > 1
    if sharded and local:
        raise ValueError(
            "inner_sync='local' is not possible under FSDP2: no rank holds all of the weights that it would walk. Use "
            "inner_sync='global', or --sharding ddp."
        )
    random = t.inner_direction == "random" and t.inner_lr > 0
    copies = (2 if random else 1) if t.nexus and t.snapshot_device is None else 0
    per_parameter = {"float32 weights": 4, _GRADIENTS: 4, "AdamW moments": 8}
    if copies:
        per_parameter["Nexus snapshot"] = 4 * copies
    if t.bf16 and not sharded:
        per_parameter[_AUTOCAST] = 2  # autocast keeps them until the backward pass is over
    if devices > 1 and not sharded:
        per_parameter["DDP gradient buckets"] = 4
    per_token, layer, formula = _activations(arguments)
    embedding = 4 * arguments.model.vocab_size * arguments.model.hidden_size
    tokens = t.per_device_train_batch_size * arguments.mixture.sequence_length
    return MemoryEstimate(
        parameters,
        per_parameter,
        tokens * per_token,
        f"{tokens} tokens x ({formula}) bytes",
        last=max(tokens * layer, embedding if arguments.model.tie_word_embeddings else 0),
        shards=devices if sharded else 1,
        gathered=_gathered(arguments, parameters) if sharded else 0,
        accumulates=not t.nexus and t.gradient_accumulation_steps > 1,
        averaged=4 if local else 0,
    )


def _activations(arguments: PretrainArguments) -> tuple[int, int, str]:
    """Bytes per token of all, of one layer in its backward pass, and how the first come about."""
    m, t, length = arguments.model, arguments.training, arguments.mixture.sequence_length
    h, ffn, heads = m.hidden_size, m.intermediate_size, m.num_attention_heads
    kv = h // heads * (m.num_key_value_heads or heads)
    if t.bf16:
        layer, layer_formula = 30 * h + 4 * kv + 8 * ffn + 4 * heads, "30h + 4kv + 8f + 4a"
    else:
        layer, layer_formula = 32 * h + 8 * kv + 16 * ffn + 4 * heads, "32h + 8kv + 16f + 4a"
    head, head_formula = 12 * h + 12 * m.vocab_size, "12(h + V)"
    attention = attention_of(arguments)
    if attention == "sdpa" and choose_isolation(arguments.mixture.isolate_documents, attention):
        # Each layer keeps the mask of documents in the dtype of the queries, and the keys and values repeated for all
        # heads, which sdpa does not do by itself under a mask; the rotary angles are no longer those of every row.
        size = 2 if t.bf16 else 4
        layer += size * length + 2 * size * (h - kv)
        layer_formula += f" + {size}T + {2 * size}(h - kv)"
        head += 8 * h // heads
        head_formula += " + 8h/a"
    in_backward = layer + 4 * h + (4 if t.bf16 else 8) * ffn  # the gradients of what it saved that are alive at once
    if t.gradient_checkpointing:  # the layers' own are there one at a time, when those of the head are gone
        return m.num_hidden_layers * 4 * h + head, in_backward, f"L * 4h + {head_formula}"
    return m.num_hidden_layers * layer + head, in_backward, f"L * ({layer_formula}) + {head_formula}"


def _gathered(arguments: PretrainArguments, parameters: int) -> int:
    """Embeddings, from the first forward to the last backward, and two layers: the one at work and the next."""
    m = arguments.model
    h, kv = m.hidden_size, m.hidden_size // m.num_attention_heads * (m.num_key_value_heads or m.num_attention_heads)
    layer = 2 * h * (h + kv) + 3 * h * m.intermediate_size + 2 * h
    outside = parameters - m.num_hidden_layers * layer
    # Under bfloat16, accelerate lets FSDP2 gather (and reduce) in bfloat16.
    return (2 if arguments.training.bf16 else 4) * (outside + min(2, m.num_hidden_layers) * layer)


def memory_table(memory: MemoryEstimate) -> "Table":
    """The estimate as a table."""
    from rich.table import Table

    table = Table(title="Memory per device, computed (not measured)")
    table.add_column("")
    table.add_column("bytes per parameter", justify="right")
    table.add_column("size", justify="right")
    shared = f" / {memory.shards}" if memory.shards > 1 else ""
    for what, size in memory.per_parameter.items():
        table.add_row(what, f"{size}{shared}", format_bytes(size * memory.parameters // memory.shards))
    if memory.gathered:
        table.add_row("gathered: embeddings, two layers", "", format_bytes(memory.gathered))
    table.add_row("activations of a micro-batch", "", format_bytes(memory.activations), end_section=True)
    table.add_row("held between steps", "", format_bytes(memory.held))
    table.add_row("most at once", "", format_bytes(memory.total))
    return table


def format_bytes(count: int) -> str:
    """A size with its unit."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
