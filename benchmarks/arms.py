"""What the benchmarks compare: the same small models on the same micro-batches, trained by different arms."""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_nexus import NexusConfig, NexusTrainer
from hf_nexus.mixture import MixtureDataset, MixtureSampler, SourceSchedule

__all__ = ["ARMS", "CUDA", "LENGTH", "MODELS", "NEXUS", "PLAIN", "Case", "RandomRows"]

CUDA = torch.cuda.is_available()
LENGTH = 256  # tokens per row, at most
SOURCES = ("text", "code", "mathematics")
SEED = 42

PLAIN = "plain accumulation"
NEXUS = "Nexus, gamma 0.05"
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},  # the stock Trainer
    NEXUS: {"inner_lr": 0.05},
    "gamma 0": {"inner_lr": 0.0},
    "random direction": {"inner_direction": "random"},
    **({"snapshot_device='cpu'": {"snapshot_device": "cpu"}} if CUDA else {}),
}

_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MODELS = {
    "1M": dict(zip(_SHAPE, (2048, 128, 384, 4, 4), strict=True)),
    "15M": dict(zip(_SHAPE, (8192, 384, 1024, 7, 6), strict=True)),
    "130M": dict(zip(_SHAPE, (49152, 768, 2048, 13, 12), strict=True)),
}


class RandomRows(Dataset):
    """Rows of random tokens: what they say does not matter to the clock."""

    def __init__(self, rows: int, length: int, seed: int, vocab_size: int):
        self.ids = torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


@dataclass(frozen=True)
class Case:
    """
    One model and one size of micro-batch.

    Args:
        model (`str`):
            One of `MODELS`.
        tokens (`int`):
            Tokens per micro-batch: one row if there are fewer than `LENGTH`, else a multiple of it.
        k (`int`):
            Micro-batches per outer step.
    """

    model: str
    tokens: int
    k: int

    @property
    def rows(self) -> int:
        """Rows per micro-batch."""
        return max(1, self.tokens // LENGTH)

    def build_model(self) -> LlamaForCausalLM:
        torch.manual_seed(SEED)
        return LlamaForCausalLM(LlamaConfig(**MODELS[self.model], tie_word_embeddings=True, use_cache=False))

    def sources(self, steps: int) -> dict[str, RandomRows]:
        """Enough rows for `steps` outer steps within one epoch."""
        rows = -(-steps * self.k // len(SOURCES)) * self.rows
        shape = (rows, min(self.tokens, LENGTH))
        vocab_size = MODELS[self.model]["vocab_size"]
        return {name: RandomRows(*shape, seed, vocab_size) for seed, name in enumerate(SOURCES)}

    def trainer(self, arm: str, sources: dict[str, RandomRows], steps: int) -> Trainer:
        """A trainer of a new model that reads the same micro-batches in the same order whatever the arm."""
        settings: dict[str, Any] = {
            "output_dir": tempfile.gettempdir(),  # nothing is written
            "per_device_train_batch_size": self.rows,
            "gradient_accumulation_steps": self.k,
            "max_steps": steps,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not CUDA,
            "bf16": CUDA,
            "seed": SEED,
        }
        if arm == PLAIN:
            mixture = MixtureDataset(sources)
            # The order that NexusTrainer draws for these sources.
            order = list(MixtureSampler(mixture, SourceSchedule(dict.fromkeys(sources, 1.0), SEED), self.rows, SEED))
            args = TrainingArguments(**settings, train_sampling_strategy="sequential")
            trainer = Trainer(self.build_model(), args, train_dataset=Subset(mixture, order))
        else:
            args = NexusConfig(**settings, **ARMS[arm])
            trainer = NexusTrainer(self.build_model(), args, train_dataset=sources)
        trainer.remove_callback(PrinterCallback)
        return trainer
