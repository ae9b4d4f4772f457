"""Tiny models and data shared by the tests: CPU, offline, seconds."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # rounding, on which a few bounds depend, is then the same anywhere

import pytest
import torch
from hypothesis import settings
from torch.utils.data import Dataset

settings.register_profile("no deadline", deadline=None)  # how long a first call takes is the machine's affair
settings.load_profile("no deadline")

VOCAB = 64


class Rows(Dataset):
    """`n` rows of `length` tokens of one source: `input_ids` and `labels` only, no `datasets` needed."""

    def __init__(self, n: int, seed: int, length: int = 16, pad: bool = False):
        generator = torch.Generator().manual_seed(seed)
        # Each source favours its own tokens, so that sources differ in what they ask of the model.
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
    """A Llama of about 10k parameters, dropout off."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "attn_implementation": "eager",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(shape | overrides))).to(dtype)


@pytest.fixture
def sources() -> dict[str, Rows]:
    """Three training sources of different sizes."""
    return {"text": Rows(40, 0), "code": Rows(32, 1), "math": Rows(24, 2)}


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """`make_trainer(train_dataset, model=..., trainer_kwargs=..., **config)` builds a quiet NexusTrainer on CPU."""

    def make(
        train_dataset: Any,
        model: torch.nn.Module | None = None,
        trainer_kwargs: dict[str, Any] | None = None,
        trainer_class: type | None = None,
        **config: Any,
    ) -> Any:
        from hf_nexus import NexusConfig, NexusTrainer

        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        args = NexusConfig(**{**defaults, **config})
        return (trainer_class or NexusTrainer)(
            model=model if model is not None else tiny_llama(),
            args=args,
            train_dataset=train_dataset,
            **(trainer_kwargs or {}),
        )

    return make
