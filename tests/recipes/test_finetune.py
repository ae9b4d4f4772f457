"""`recipes/finetune.py`: a script for Trainer with two changed lines."""

import gzip
import json
import re
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, HfArgumentParser

from hf_nexus.hub.publisher import Publisher
from tests.support.hub.runs import QUICK, REPO, impatient_client
from tests.support.hub.server import ALICE, HubServer
from tests.support.saved_weights import same, saved_weights
from tests.support.tiny import tiny_llama
from tests.support.tiny_config import documents
from tests.trainer import test_publishing

SCRIPT = Path(__file__).parents[2] / "recipes/finetune.py"
SHAPE = "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2"
TRAINING = "--max_steps 4 --save_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --seed 3"
QUIET = "--use_cpu --report_to none --disable_tqdm true"
FLAGS = f"--do_train --do_eval --block_size 32 --max_eval_samples 8 --learning_rate 1e-2 {TRAINING} {QUIET}".split()
FLAGS += ["--config_overrides", SHAPE]
hub = test_publishing.hub  # the fixture


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`run(*flags)` runs the script in this process and returns its output folder."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(documents("abcd", 12, 0)))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*flags: str, script: Path = SCRIPT, out: str = "out") -> Path:
        folder = tmp_path / out
        monkeypatch.setattr("sys.argv", ["", *FLAGS, f"--train_file={text}", f"--output_dir={folder}", *flags])
        runpy.run_path(str(script), run_name="__main__")
        return folder

    return run


@pytest.fixture
def adapted(tmp_path: Path) -> list[str]:
    """The flags for adapters on a saved model."""
    pytest.importorskip("peft")
    tokenizer = ByT5Tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return ["--lora_r", "2", "--model_name_or_path", str(tmp_path / "base")]


def test_with_two_lines_changed_it_is_a_script_for_trainer(run, tmp_path):
    text, count = re.subn(
        r"from hf_nexus import Nexus\w+ as (\w+)", r"from transformers import \1", SCRIPT.read_text()
    )
    assert count == 2
    helpers = {"hf_nexus.errors", "hf_nexus.evaluation.metrics", "hf_nexus.files"}
    helpers |= {f"hf_nexus.mixture.{name}" for name in ("config", "data_files", "documents", "texts")}
    helpers.add("hf_nexus.trainer.distributed")
    assert set(re.findall(r"hf_nexus[.\w]*", text.split('"""')[2])) == helpers
    stock = tmp_path / "stock.py"
    stock.write_text(text)
    nexus, off, plain = run(out="nexus"), run("--nexus", "False", out="off"), run(script=stock, out="plain")
    assert same(saved_weights(off), saved_weights(plain))
    assert not same(saved_weights(nexus), saved_weights(plain))
    assert [(folder / "nexus.yaml").exists() for folder in (nexus, off, plain)] == [True, False, False]
    for folder in (nexus, off, plain):
        results = json.loads((folder / "all_results.json").read_text())
        assert results["eval_loss"] < 5.8 and 0 < results["eval_accuracy"] < 1  # 5.95 = log(384) untrained
        assert {"train_loss", "perplexity"} <= results.keys()
        assert (folder / "README.md").exists()


@pytest.mark.parametrize(
    "flags", [pytest.param([], marks=pytest.mark.slow), ["--streaming"]], ids=["map-style", "streaming"]
)
def test_resuming_is_exact(run, flags):
    whole = run(*flags)
    resumed = run(*flags, "--resume_from_checkpoint", str(whole / "checkpoint-2"), "--seed", "3", out="resumed")
    assert same(saved_weights(whole), saved_weights(resumed))
    half = saved_weights(whole / "checkpoint-2")
    assert not same(saved_weights(whole), half)
    shutil.rmtree(whole / "checkpoint-4")
    (whole / "model.safetensors").unlink()
    assert same(saved_weights(run(*flags, "--resume_from_checkpoint", "last")), saved_weights(resumed))


def test_streaming_with_adapters(run, adapted):
    folder = run("--streaming", "--max_train_samples", "1000", *adapted)
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 4
    adapters = load_file(folder / "adapter_model.safetensors")
    assert all("lora" in name for name in adapters)
    assert any(tensor.any() for name, tensor in adapters.items() if "lora_B" in name)  # zero before training


def test_a_model_from_scratch_with_a_saved_configuration(run, adapted, tmp_path):
    base = tmp_path / "base"
    flags = ["--config_name", str(base), "--tokenizer_name", str(base)]
    folder = run(*flags, "--model_revision", "main", "--trust_remote_code", "False", "--dtype", "float32")
    shapes = {name: tensor.shape for name, tensor in saved_weights(folder).items()}
    assert shapes == {name: tensor.shape for name, tensor in saved_weights(base).items()}
    card = (folder / "README.md").read_text()
    assert "base_model:" not in card and "pretrained from scratch" in card


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_what_follows_from_a_shape_follows_from_that_given(run, kind):
    saved = json.loads((run("--model_type", kind) / "config.json").read_text())
    assert len(saved["layer_types"]) == saved["num_hidden_layers"] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_hold_out_the_same_documents_of_a_stream(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    recipe, texts = runpy.run_path(str(SCRIPT)), [f"document {i:04d}" for i in range(300)]
    for name, part in (("a", texts[:73]), ("b", texts[73:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    args = recipe["DataTrainingArguments"](train_file=str(tmp_path / "*.jsonl"), streaming=True, block_size=14)
    splits, sources = recipe["load_texts"](args, None, None)
    tokenizer, found = ByT5Tokenizer(), {}
    for split in ("train", "validation"):
        encoder = recipe["DocumentEncoder"]("a", sources["train"], tokenizer, [])
        rows = recipe["tokenize"](splits["train"], encoder, args, partial(recipe["is_of"], split, 10))
        loaded = torch.utils.data.DataLoader(
            rows, batch_size=None, num_workers=workers if split == "validation" else 0
        )
        found[split] = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in loaded]
    assert sorted(found["train"] + found["validation"]) == texts and 15 <= len(found["validation"]) <= 45


def push(run, hub: HubServer, monkeypatch: pytest.MonkeyPatch, downloaded: Path, *flags: str) -> Path:
    """Run and push. Returns the folder of the run, and writes the files of the Hub to `downloaded`."""
    monkeypatch.setattr(
        "hf_nexus.trainer.publishing.Publisher", partial(Publisher, endpoint=hub.endpoint, retry=QUICK)
    )
    with impatient_client(monkeypatch, xet=False):
        folder = run("--push_to_hub", "--hub_model_id", REPO, "--hub_token", ALICE, *flags)
    downloaded.mkdir()
    for name, data in hub.files(REPO).items():
        if "/" not in name:
            (downloaded / name).write_bytes(data)
    for name in ("eval_results.json", "README.md"):
        assert (downloaded / name).read_bytes() == (folder / name).read_bytes(), name
    return folder


def test_the_pushed_model_is_the_saved_one(run, hub: HubServer, tmp_path, monkeypatch: pytest.MonkeyPatch):
    downloaded = tmp_path / "downloaded"
    folder = push(run, hub, monkeypatch, downloaded)
    pushed = AutoModelForCausalLM.from_pretrained(downloaded).state_dict()
    assert same(saved_weights(folder), {name: pushed[name] for name in saved_weights(folder)})
    assert AutoTokenizer.from_pretrained(downloaded)("ab").input_ids == ByT5Tokenizer()("ab").input_ids


@pytest.mark.slow
def test_pushed_adapters_load_on_their_base(run, adapted, hub: HubServer, tmp_path, monkeypatch: pytest.MonkeyPatch):
    from peft import PeftModel

    folder = push(run, hub, monkeypatch, tmp_path / "downloaded", *adapted)
    assert not (tmp_path / "downloaded/model.safetensors").exists()

    def logits(adapters: Path) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            return PeftModel.from_pretrained(base, adapters)(torch.arange(8)[None]).logits

    assert torch.equal(logits(tmp_path / "downloaded"), logits(folder))
    with torch.no_grad():
        untrained = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(torch.arange(8)[None]).logits
    assert not torch.allclose(logits(folder), untrained)


def test_several_sources_are_a_mixture(run, tmp_path, monkeypatch):
    (tmp_path / "digits.txt").write_text("\n".join(documents("1234", 12, 1)))
    letters, digits = (f"{name}={tmp_path / file}.txt" for name, file in (("letters", "text"), ("digits", "digits")))
    folder = tmp_path / "mixture"
    flags = [
        "--train_source",
        letters,
        "--train_source",
        digits,
        "--mixture_weights",
        '{"letters": 0.5, "digits": 0.5}',
    ]
    monkeypatch.setattr("sys.argv", ["", *FLAGS, f"--output_dir={folder}", *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    results = json.loads((folder / "all_results.json").read_text())
    for name in ("letters", "digits"):
        assert 0 < results[f"eval_{name}_loss"] < 5.95 and 0 <= results[f"eval_{name}_accuracy"] < 1
    assert (folder / "nexus.yaml").exists() and results["perplexity"] > 1


@pytest.mark.parametrize("streaming", [False, True])
def test_each_format_trains_on_its_text(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    recipe, texts = runpy.run_path(str(SCRIPT)), documents("abcd", 40, 0)
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    (tmp_path / "a.ndjson").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.tsv").write_text("id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))
    (tmp_path / "a.txt").write_text("\n".join(texts))
    rows = Dataset.from_dict({"id": range(40), "content": texts})
    rows.to_parquet(tmp_path / "folder" / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    pairs = Dataset.from_dict({"id": range(40), "prompt": ["" for _ in texts], "completion": texts})
    pairs.to_csv(tmp_path / "pairs.csv")
    tokenizer = ByT5Tokenizer()
    for name in ("a.ndjson", "a.jsonl.gz", "a.tsv", "a.txt", "folder", "saved", "pairs.csv"):
        flags = [f"--train_source=a={tmp_path / name}", "--output_dir", str(tmp_path / "out"), *FLAGS]
        flags += ["--streaming", "--validation_split_percentage", "10"] if streaming else []
        parser = HfArgumentParser([recipe[kind] for kind in ("ModelArguments", "DataTrainingArguments")])
        _, args, _ = parser.parse_args_into_dataclasses(flags, return_remaining_strings=True)
        splits, sources = recipe["load_texts"](args.sources()["a"], None, None)
        encoder = recipe["DocumentEncoder"]("a", sources["train"], tokenizer, [])
        row = next(iter(recipe["tokenize"](splits["train"], encoder, args)))
        assert tokenizer.decode(row["input_ids"]).strip()[:31] == texts[0][:31], name


@pytest.mark.parametrize("train", ["train.txt", "train.csv"])
def test_files_of_other_formats_and_columns_train(tmp_path, monkeypatch, train):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = documents("abcd", 40, 0)
    (tmp_path / "train.txt").write_text("\n".join(texts))
    (tmp_path / "train.csv").write_text("story,label\n" + "".join(f"once {text},1\n" for text in texts))
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = [f"--train_file={tmp_path / train}", f"--validation_file={tmp_path / 'val.jsonl'}"]
    monkeypatch.setattr("sys.argv", ["", *FLAGS, f"--output_dir={tmp_path / 'out'}", *flags])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_an_error_has_the_number_of_the_row(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    recipe = runpy.run_path(str(SCRIPT))
    rows = Dataset.from_dict({"text": ["a"] * 1500 + [None]})
    source = recipe["SourceConfig"]("a")
    encoder = recipe["DocumentEncoder"]("a", source, ByT5Tokenizer(), ["text"])
    args = recipe["DataTrainingArguments"](train_file="a")
    for texts in (rows, rows.to_iterable_dataset()):
        with pytest.raises(ValueError, match="row 1500"):
            list(recipe["tokenize"](texts, encoder, args))


def test_a_source_that_fills_no_row_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, count in {"long": 40, "short": 40}.items():
        size = None if name == "long" else 9
        (tmp_path / f"{name}.txt").write_text("\n".join(text[:size] for text in documents("abcd", count, 0)))
    sources = [f"{name}={tmp_path / name}.txt" for name in ("long", "short")]
    monkeypatch.setattr("sys.argv", ["", *FLAGS, f"--output_dir={tmp_path / 'out'}", "--train_source", *sources])
    with pytest.raises(SystemExit, match=r"short\.txt: the validation split fills no row of 32 tokens\. Lower"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize("row", [120, 125])  # held out, and trained on
def test_an_error_names_the_source_and_its_row(tmp_path, monkeypatch, row):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("good", "bad"):
        rows: list[dict[str, str | None]] = [{"text": text} for text in documents("abcd", 150, 0)]
        if name == "bad":
            rows[row]["text"] = None
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = [f"{name}={tmp_path / name}.jsonl" for name in ("good", "bad")]
    monkeypatch.setattr("sys.argv", ["", *FLAGS, f"--output_dir={tmp_path / 'out'}", "--train_source", *sources])
    with pytest.raises(SystemExit, match=rf"sources\.bad\.text_column: row {row} holds None"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_an_error_in_training_is_one_line(run):
    with pytest.raises(SystemExit, match=r"^error: .*checkpoint"):
        run("--resume_from_checkpoint", "last")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--dataset_name or --train_file"),
        (["--train_source", "x"], "--train_source x: give each source once, as name=path"),
        (["--train_source", "a=x", "a=y"], "--train_source a=y: give each source once"),
        (["--train_source", "a=x", "--train_file", "y"], "names all data"),
        (["--lora_r", "2"], "--lora_r trains adapters"),
        (["--train_file", "x", "--streaming", "--do_eval", "--use_cpu"], "Add --max_eval_samples"),
    ],
)
def test_a_missing_argument_is_named(monkeypatch, flags, message):
    monkeypatch.setattr("sys.argv", ["finetune.py", "--output_dir", "nowhere", *flags])
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.mark.parametrize("flags", [["--lora_r", "2"], ["--train_file", "x", "--model_name_or_path", "nowhere/at/all"]])
def test_no_error_shows_the_token(monkeypatch, flags):
    """Not even with the values of variables, of an error in the arguments and of one of the Hub."""
    token = "hf_" + "s3cret" * 6
    monkeypatch.setattr("sys.argv", ["finetune.py", "--output_dir", "nowhere", f"--token={token}", *flags])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert token not in str(error.value)
    shown = traceback.TracebackException.from_exception(error.value.__cause__, capture_locals=True)
    assert token not in "".join(shown.format()).replace(str(sys.argv), "")
