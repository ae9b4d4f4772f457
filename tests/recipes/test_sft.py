"""`recipes/sft_with_trl.py` on base models: with a plain chat template, or an error before the model is loaded."""

import json
import re
import runpy
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from hf_nexus.mixture.builtin.tokenizer import train_tokenizer
from tests.support.saved_weights import same, saved_weights
from tests.support.tiny import tiny_llama

pytest.importorskip("trl")

from trl import SFTConfig, chat_template_utils

SCRIPT = Path(__file__).parents[2] / "recipes/sft_with_trl.py"
FLAGS = "--max_steps 2 --eval_rows 2 --use_cpu --report_to none --save_strategy no --per_device_train_batch_size 2"


CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two three"}]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model without a chat template."""
    tokenizer = train_tokenizer(["one two three"] * 3, 270)
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str, file: str = "chat.jsonl") -> None:
    (folder / "chat.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 12)
    files = json.dumps({"chat": str(folder / file)})
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    given = ["--model_name_or_path", str(folder / "base"), "--files", files, "--output_dir", str(folder / "out")]
    monkeypatch.setattr("sys.argv", ["", *FLAGS.split(), *given, *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_a_base_model_learns_a_plain_template(base, tmp_path, monkeypatch, capsys):
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


def test_trl_knows_the_template_of_the_model_in_the_header(base, tmp_path, monkeypatch):
    (name,) = re.findall(r"--model_name_or_path (\S+)", SCRIPT.read_text())
    template = {"Qwen/Qwen3-0.6B": chat_template_utils.qwen3_chat_template}[name]  # a test has no network
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(base)
    start(tmp_path, monkeypatch)
    assert not same(saved_weights(base), saved_weights(tmp_path / "out"))


def test_a_pretrained_model_has_the_defaults_of_trl(monkeypatch):
    recipe = runpy.run_path(str(SCRIPT))
    for flags, tiny in (([], True), (["--model_name_or_path=a"], False)):
        monkeypatch.setattr("sys.argv", ["sft.py", *flags])
        _, args = recipe["read_arguments"]()
        for name in ("max_length", "learning_rate", "max_steps", "per_device_train_batch_size"):
            assert (getattr(args, name) == getattr(SFTConfig(use_cpu=True, bf16=False), name)) != tiny, name


@pytest.mark.parametrize("flags", [[], ["--assistant_only_loss", "False", "--packing", "True"]])
def test_every_data_file_is_read(base, tmp_path, monkeypatch, flags):
    Dataset.from_list([{"messages": CHAT}] * 12).to_parquet(tmp_path / "folder/chat.parquet")
    for file in ("folder", "folder/chat.parquet"):
        start(tmp_path, monkeypatch, "--per_device_train_batch_size", "1", *flags, file=file)


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"messages": CHAT}, ["--eval_rows", "12"], "--eval_rows 12: source 'chat' has 12 rows"),
        ({"messages": CHAT}, ["--eval_rows", "0"], "--eval_rows 0: source 'chat' has 12 rows"),
        ({"messages": CHAT}, ["--packing", "True"], "Source 'chat' has 1 rows, fewer than one micro-batch"),
        ({"messages": CHAT}, ["--resume_from_checkpoint", "last"], "checkpoint"),
        ({"instruction": "a", "output": "b"}, [], "Source 'chat' has the columns instruction, output"),
        ({"instruction": "a", "output": "b"}, ["--assistant_only_loss", "False"], "--assistant_only_loss False may"),
        ({"text": "a"}, [], "'chat' has the columns text"),
        ("{", [], "sources.chat: .*could not be loaded"),
    ],
)
def test_an_error_is_one_line_and_names_the_source(base, tmp_path, monkeypatch, row, flags, message):
    line = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "own.jsonl").write_text((line + "\n") * 12)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        start(tmp_path, monkeypatch, *flags, file="own.jsonl")
