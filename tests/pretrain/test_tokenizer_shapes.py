"""Tokenizers of all common shapes train from a YAML file."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..support.tiny_config import run, write_config
from ..support.tokenizer_shapes import SHAPES

TEXT = "the quick “fox” 12"
# Whether a BOS starts each document, and the entries of the embedding, which Qwen's models round up.
STARTED = {"gpt2": False, "llama2": True, "llama3": True, "gemma": True, "qwen": False, "byt5": False}
ROWS = {"qwen": 384}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two training steps on two sources and an OOD source."""
    content = yaml.safe_load(write_config(tmp_path_factory.mktemp("data")).read_text())
    steps = {"max_steps": 2, "eval_steps": 2, "save_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 1}}
    content["training"] |= {**steps, "gradient_accumulation_steps": 2, "logging_steps": 1}
    return content


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_tokenizer_trains(shape: str, config: dict[str, Any], tmp_path: Path) -> None:
    SHAPES[shape](tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    model = {"tokenizer": str(tmp_path / "tokenizer"), "vocab_size": ROWS.get(shape, len(tokenizer))}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**config, "model": {**config["model"], **model}}))
    trainer = run(tmp_path / "run.yaml", tmp_path / "out")

    losses = {key: value for log in trainer.state.log_history for key, value in log.items() if key.endswith("loss")}
    assert trainer.state.global_step == 2 and {"loss", "eval_letters_loss", "eval_signs_loss"} <= losses.keys()
    assert all(map(math.isfinite, losses.values()))
    rows = trainer.train_dataset.sources["letters"]["input_ids"][:].flatten().tolist()
    after_eos = {after for token, after in pairwise(rows) if token == tokenizer.eos_token_id}
    assert after_eos and (after_eos == {tokenizer.bos_token_id}) == STARTED[shape]
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(saved) is type(tokenizer) and saved(TEXT) == tokenizer(TEXT)
    assert saved.get_vocab() == tokenizer.get_vocab() and weights.config.vocab_size == model["vocab_size"]
    assert weights.generation_config.eos_token_id == tokenizer.eos_token_id
