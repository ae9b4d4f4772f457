"""Memory of a training run, computed from the shapes before anything is allocated."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arguments import PretrainArguments

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SYMBOLS", "MemoryEstimate", "estimate_memory", "memory_table"]

SYMBOLS = "L layers, h width, kv width of keys, f feed-forward width, a heads, V vocabulary"


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Computed, not measured: bytes per device with a whole copy of the model on each.

    Attributes:
        parameters (`int`):
            Of the model, all trainable.
        per_parameter (`dict[str, int]`):
            Bytes per parameter, by what they are for.
        activations (`int`):
            Bytes kept for the backward pass of one micro-batch.
        formula (`str`):
            Of the activations.
    """

    parameters: int
    per_parameter: dict[str, int]
    activations: int
    formula: str

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.per_parameter.values()) * self.parameters + self.activations


def estimate_memory(arguments: PretrainArguments, parameters: int, devices: int) -> MemoryEstimate:
    """
    Memory per device, computed from the shapes.

    The activations count the tensors that a Llama layer of transformers saves for its backward pass with scaled
    dot-product attention (a test compares them with the tensors really saved), and the logits with their gradient.
    """
    m, t = arguments.model, arguments.training
    random = t.inner_direction == "random" and t.inner_lr > 0
    copies = (2 if random else 1) if t.nexus and t.snapshot_device is None else 0
    per_parameter = {"float32 weights": 4, "gradients": 4, "AdamW moments": 8}
    if copies:
        per_parameter["Nexus snapshot"] = 4 * copies
    if t.bf16:
        per_parameter["bfloat16 copies of the weights"] = 2  # autocast keeps them until the backward pass is over
    if devices > 1:
        per_parameter["DDP gradient buckets"] = 4
    h, ffn, heads = m.hidden_size, m.intermediate_size, m.num_attention_heads
    kv = h // heads * (m.num_key_value_heads or heads)
    if t.bf16:
        layer, layer_formula = 30 * h + 4 * kv + 8 * ffn + 4 * heads, "30h + 4kv + 8f + 4a"
    else:
        layer, layer_formula = 32 * h + 8 * kv + 16 * ffn + 4 * heads, "32h + 8kv + 16f + 4a"
    head = 12 * h + 12 * m.vocab_size
    if t.gradient_checkpointing:
        per_token = m.num_hidden_layers * 4 * h + layer + head
        formula = f"L * 4h + ({layer_formula}) + 12(h + V)"
    else:
        per_token = m.num_hidden_layers * layer + head
        formula = f"L * ({layer_formula}) + 12(h + V)"
    tokens = t.per_device_train_batch_size * arguments.data.sequence_length
    return MemoryEstimate(parameters, per_parameter, tokens * per_token, f"{tokens} tokens x ({formula}) bytes")


def memory_table(memory: MemoryEstimate) -> "Table":
    """The estimate as a table."""
    from rich.table import Table

    table = Table(title="Memory per device, computed (not measured)")
    table.add_column("")
    table.add_column("bytes per parameter", justify="right")
    table.add_column("size", justify="right")
    for what, size in memory.per_parameter.items():
        table.add_row(what, str(size), _size(size * memory.parameters))
    table.add_row("activations of a micro-batch", "", _size(memory.activations), end_section=True)
    table.add_row("total", "", _size(memory.total))
    return table


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
