"""Tiny models and data: CPU, offline, milliseconds."""

from typing import Any

import torch
from torch.utils.data import Dataset

VOCAB = 64


class Rows(Dataset):
    """`n` rows of `length` tokens of one source: `input_ids` and `labels` only, no `datasets` needed."""

    def __init__(self, n: int, seed: int, length: int = 16, pad: bool = False):
        generator = torch.Generator().manual_seed(seed)
        # Each source has its own frequent tokens, so the gradients of sources differ.
        self.ids = (torch.randint(0, VOCAB // 4, (n, length), generator=generator) + seed * 7) % VOCAB
        self.labels = self.ids.clone()
        if pad:  # rows of different numbers of loss tokens
            for i in range(n):
                self.labels[i, length - i % (length // 2) :] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> torch.nn.Module:
    """A Llama of about 4k parameters, dropout off. It has one layer: few tests see more, and those ask for two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(shape | overrides))).to(dtype)


def two_layers(seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A tiny Llama for what differs between layers: units of FSDP2, buckets of DDP, recomputed activations."""
    return tiny_llama(seed, **({"num_hidden_layers": 2} | overrides))


def distance(weights: Any, expected: Any) -> float:
    """L2 distance relative to the norm of `expected`, in float64."""
    a, b = torch.as_tensor(weights, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64)
    return float((a - b).norm() / b.norm())
