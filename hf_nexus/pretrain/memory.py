"""Memory of a training run, computed from the shapes before anything is allocated."""

from collections import Counter
from dataclasses import dataclass

import torch
from transformers.training_args import OptimizerNames

from ..trainer.checks import check_fsdp
from .fields import PretrainArguments
from .layout import Layout
from .model import build_model, joined_documents, model_config, planned_attention

__all__ = ["SYMBOLS", "MemoryEstimate", "estimate_memory"]

SYMBOLS = "L layers, h width, kv width of keys, f feed-forward width, a heads of width d, T tokens a row, V vocabulary"
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


def estimate_memory(arguments: PretrainArguments, parameters: int, layout: Layout) -> MemoryEstimate:
    """
    Memory per device of a model with that many parameters.

    The activations are the tensors that a Llama layer of transformers saves for its backward pass with scaled
    dot-product attention, and the logits with their gradient. Tests compare the total with the allocated memory.

    Raises:
        ValueError: a setting that is not possible with FSDP2, or devices that cannot be split into paths.
    """
    t, m, sharded = arguments.training, layout.model, layout.sharded
    if sharded or layout.tp > 1:
        check_fsdp(t, version=2)
    shards = layout.path() if t.nexus and t.inner_sync == "node" else layout.replicas
    random = t.inner_direction == "random" and t.inner_lr > 0
    copies = (2 if random else 1) if t.nexus and t.snapshot_device is None else 0
    adamw = t.matrix_optimizer is None and t.optim in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)
    moments = "AdamW moments" if adamw else "optimizer state, taken as AdamW's"
    per_parameter = {"float32 weights": 4, _GRADIENTS: 4, moments: 8}
    if copies:
        per_parameter["Nexus snapshot"] = 4 * copies
    if arguments.bf16 and not sharded:
        per_parameter[_AUTOCAST] = 2  # autocast keeps them until the end of the backward pass
    if layout.replicas > 1 and not sharded:
        per_parameter["DDP gradient buckets"] = 4
    per_token, layer = 0, 0
    tokens = t.per_device_train_batch_size * arguments.mixture.sequence_length
    formula = f"not known for a model of the type {m.model_type}. The peak is higher by them"
    if m.model_type == "llama":
        per_token, layer, terms = _activations(arguments, layout)
        formula = f"{tokens} tokens x ({terms}) bytes"
    width = getattr(m, "hidden_size", 0) if getattr(m, "tie_word_embeddings", False) else 0
    return MemoryEstimate(
        layout.weights(parameters),
        per_parameter,
        tokens * per_token,
        formula,
        last=max(tokens * layer, 4 * m.vocab_size * width),
        shards=shards if sharded else 1,
        gathered=_gathered(arguments, parameters, layout) if sharded else 0,
        accumulates=not t.nexus and t.gradient_accumulation_steps > 1,
    )


def _activations(arguments: PretrainArguments, layout: Layout) -> tuple[int, int, str]:
    """Bytes per token: of the whole model, of one layer in its backward pass; and the formula of the first."""
    t, m, tp, size = arguments.training, layout.model, layout.tp, 2 if arguments.bf16 else 4
    h, heads = m.hidden_size, m.num_attention_heads
    # Tensor parallelism divides the inside of attention and feed-forward. All of the width h stays: an upper bound.
    divided = {"kv": h // heads * m.num_key_value_heads // tp, "f": m.intermediate_size // tp, "a": heads // tp}
    values = {"h": h, "V": m.vocab_size, "d": h // heads, "T": arguments.mixture.sequence_length, **divided}
    layer = Counter(h=30, kv=4, f=8, a=4) if arguments.bf16 else Counter(h=32, kv=8, f=16, a=4)
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


def _gathered(arguments: PretrainArguments, parameters: int, layout: Layout) -> int:
    """What is outside of the layers, from the first forward to the last backward, and two layers."""
    with torch.device("meta"):
        model = build_model(model_config(arguments.model, arguments.mixture.sequence_length))
    stacks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    sizes = [[sum(p.numel() for p in layer.parameters()) for layer in stack] for stack in stacks]
    layers = max(sizes, key=sum)  # those of the language model, not of an image encoder
    # With bfloat16, accelerate lets FSDP2 gather (and reduce) in bfloat16.
    size, outside = 2 if arguments.bf16 else 4, layout.weights(parameters - sum(layers))
    return size * (outside + sum(sorted(layers)[-2:]) // layout.tp)
