"""A folder with a model, its tokenizer and its `pretrain.yaml`, and small files of data that it names."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_nexus.evaluation.models import load_model
from tests.support.tiny import tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer

WORDS = {"web": "fox", "code": "bug", "math": "sum", "law": "judge", "plain": "hen"}


def write_run(root: Path) -> Path:
    """Write the data, `mixture.yaml` and the folder `run`. `law` is OOD, and `plain` has no held-out rows."""
    sources: dict[str, dict[str, Any]] = {}
    for name, word in WORDS.items():
        texts = [f"the {word} number {i} jumps over {'the lazy dog ' * (i % 4)}" for i in range(40)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        role = {"role": "ood"} if name == "law" else {"weight": 3 if name == "web" else 1, "eval_rows": 9}
        sources[name] = {"path": str(root / f"{name}.jsonl"), **role}
    del sources["plain"]["eval_rows"]
    save(
        tiny_llama(vocab_size=len(tiny_tokenizer()), tie_word_embeddings=True, attn_implementation="sdpa"),
        root / "run",
    )
    data = {"sequence_length": 16, "sources": sources}
    (root / "run" / "pretrain.yaml").write_text(yaml.safe_dump({"data": data}, sort_keys=False))
    (root / "mixture.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return root / "run"


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def moved(folder: Path, target: Path, seed: int) -> dict[str, torch.Tensor]:
    """Save the model of a folder with other weights nearby, and return these."""
    model = load_model(str(folder))[0]
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    save(model, target)
    return {name: p.detach() for name, p in model.named_parameters()}
