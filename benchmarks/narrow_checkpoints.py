"""
Memory of training from a checkpoint that is stored in bfloat16, as fine-tuning scripts load it.

    python benchmarks/narrow_checkpoints.py                      # a minute on two CPU cores
    python benchmarks/narrow_checkpoints.py --hidden_size 1024 --num_hidden_layers 12

Each case starts from a model of the type in which transformers loads the checkpoint, and trains two outer
steps of two micro-batches (1 x 128 tokens) with AdamW. `held` is what torch has allocated after the last step. The
model is not read from a file, because the profiler does not see the threads that do this.
"""

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from allocations import AfterLastStep, allocated
from arms import CUDA
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments
from transformers.utils import logging

from hf_nexus import NexusConfig, NexusTrainer

LENGTH = 128
# The type of the model, adapters, and the arguments. Without the update: transformers alone.
CASES: dict[str, tuple[torch.dtype, bool, dict[str, Any]]] = {
    "Trainer, bfloat16 weights": (torch.bfloat16, False, {"nexus": False}),
    "Trainer, float32 weights, `bf16=True`": (torch.float32, False, {"nexus": False, "bf16": True}),
    "NexusTrainer": (torch.bfloat16, False, {}),
    "NexusTrainer, `bf16=False`": (torch.bfloat16, False, {"bf16": False}),
    "NexusTrainer, LoRA (r=8) on the bfloat16 base": (torch.bfloat16, True, {}),
}


class Rows(Dataset):
    """Rows of random tokens."""

    def __init__(self, vocab_size: int):
        self.ids = torch.randint(vocab_size, (16, LENGTH))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def make_trainer(shape: LlamaConfig, dtype: torch.dtype, lora: bool, config: dict[str, Any], folder: str) -> Trainer:
    """A trainer on a model of a shape and type."""
    model: Any = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    rows = Rows(shape.vocab_size)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    plain = config.pop("nexus", True) is False
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "use_cpu": not CUDA,
    }
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    cls, kind = (Trainer, TrainingArguments) if plain else (NexusTrainer, NexusConfig)
    return cls(model, kind(output_dir=folder, **settings, **quiet, **config), train_dataset=rows)


def measure(shape: LlamaConfig, dtype: torch.dtype, lora: bool, config: dict[str, Any]) -> tuple[int, int]:
    """Bytes held after the last step, and at the peak."""

    def train(at_the_end: Callable[[], None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(shape, dtype, lora, dict(config), folder)
            trainer.add_callback(AfterLastStep(at_the_end))
            trainer.train()

    return allocated(train)


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_hidden_layers", type=int, default=6)
    args = parser.parse_args()
    logging.set_verbosity_error()
    sizes = {"hidden_size": args.hidden_size, "intermediate_size": 3 * args.hidden_size, "num_attention_heads": 8}
    shape = LlamaConfig(vocab_size=8192, num_hidden_layers=args.num_hidden_layers, **sizes)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(shape).num_parameters()
    print(f"{size:,} parameters\n\n| | held (MB) | peak (MB) | held per parameter (bytes) |\n|---|---|---|---|")
    for name, case in CASES.items():
        held, peak = measure(shape, *case)
        print(f"| {name} | {held / 1e6:,.1f} | {peak / 1e6:,.1f} | {held / size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
