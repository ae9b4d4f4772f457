"""`recipes/sft_with_trl.py` on base models: with a plain chat template, or an error before the model is loaded."""

import json
import runpy
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hf_nexus.mixture.builtin.tokenizer import train_tokenizer
from tests.support.saved_weights import same, saved_weights
from tests.support.tiny import tiny_llama

pytest.importorskip("trl")
SCRIPT = Path(__file__).parents[2] / "recipes/sft_with_trl.py"
FLAGS = "--max_steps 2 --eval_rows 2 --use_cpu --report_to none --save_strategy no --per_device_train_batch_size 2"


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 12)
    files = json.dumps({"chat": str(folder / "chat.jsonl")})
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    given = ["--model_name_or_path", str(folder / "base"), "--files", files, "--output_dir", str(folder / "out")]
    monkeypatch.setattr("sys.argv", ["", *FLAGS.split(), *given, *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_base_model_learns_a_plain_template(tmp_path, monkeypatch, capsys):
    tokenizer = train_tokenizer(["one two three"] * 3, 270)
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    start(tmp_path, monkeypatch)
    assert "has no chat template" in capsys.readouterr().out
    assert not same(saved_weights(tmp_path / "base"), saved_weights(tmp_path / "out"))
    assert "generation" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_template_without_marks_is_an_error_before_the_model(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["one two three"] * 3, 270)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "base")  # there is no model
    with pytest.raises(SystemExit, match="--assistant_only_loss False"):
        start(tmp_path, monkeypatch)
