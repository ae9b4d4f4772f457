"""A configuration of a Llama that trains in seconds, on local files."""

import json
import random
from pathlib import Path

import yaml

from hf_nexus import NexusTrainer
from hf_nexus.mixture.builtin.tokenizer import train_tokenizer
from hf_nexus.pretrain.fields import PretrainArguments
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.run import pretrain

STEPS = 6


def documents(alphabet: str, count: int, seed: int) -> list[str]:
    """Texts of random words of four letters."""
    words = random.Random(seed)
    return [" ".join("".join(words.choices(alphabet, k=4)) for _ in range(60)) for _ in range(count)]


def write_config(folder: Path) -> Path:
    """Write three files, one of them OOD, a tokenizer, and the configuration, whose path is returned."""
    texts = {"letters": documents("abcd", 60, 0), "digits": documents("1234", 60, 1), "signs": documents("+-*/", 8, 2)}
    for name, lines in texts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    train_tokenizer([line for name in ("letters", "digits") for line in texts[name]], 300).save_pretrained(
        folder / "tok"
    )
    train = {name: {"path": str(folder / f"{name}.jsonl"), "eval_rows": 8} for name in ("letters", "digits")}
    content = {
        "model": {
            "vocab_size": 304,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tokenizer": str(folder / "tok"),
        },
        "data": {
            "sequence_length": 32,
            "sources": {**train, "signs": {"path": str(folder / "signs.jsonl"), "role": "ood"}},
        },
        "training": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 2},
            "warmup_steps": 1,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "eval_on_start": True,
            "save_strategy": "steps",
            "save_steps": 3,
            "dataloader_pin_memory": False,
            "report_to": "none",
            "use_cpu": True,
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def planned(config: Path | str, *flags: str) -> PretrainArguments:
    """The arguments of a dry run."""
    return parse_arguments(["--config", str(config), "--dry_run", *flags])


def run(config: Path, output: Path, *flags: str) -> NexusTrainer:
    """The trainer of a finished run."""
    return pretrain(parse_arguments(["--config", str(config), "--output_dir", str(output), *flags]))
