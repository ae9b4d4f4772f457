"""The configuration for the files of a user: it runs as it is, and its model fits the data and the machine."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from hf_nexus.pretrain import starter
from hf_nexus.pretrain.parsing import parse_arguments
from hf_nexus.pretrain.run import pretrain
from hf_nexus.pretrain.sections import load_config
from tests.support.tiny_config import documents


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three files of different formats and an OOD file, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    Path("code.jsonl").write_text("".join(json.dumps({"content": d}) + "\n" for d in documents("abcd", 80, 0)))
    pq.write_table(pa.table({"text": documents("1234", 80, 1)}), "digits.parquet")
    Path("signs.txt").write_text("\n\n".join(documents("+-*/", 80, 2)))
    Path("law.csv").write_text("text\n" + "\n".join(documents("wxyz", 20, 3)))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed: each model trains on 1000 tokens per second."""
    monkeypatch.setattr(starter, "_tokens_per_second", lambda *args: 1000.0)


JSONL = "".join(json.dumps({"text": text}) + "\n" for text in documents("abcd", 80, 0))
FILES = ["code.jsonl", "digits.parquet", "signs.txt"]


def test_it_trains_evaluates_and_logs_as_it_stands(capsys):
    threads = torch.get_num_threads()
    text = starter.starter_yaml(FILES, ["law.csv"])
    torch.set_num_threads(threads)
    printed = capsys.readouterr()
    assert printed.out == "" and "law.csv: 20 documents" in printed.err
    assert text.count(" # ") > 10 and "overwrite_output_dir" not in text
    Path("mine.yaml").write_text(text)
    flags = ["--max_steps", "20", "--hidden_size", "16", "--num_attention_heads", "2", "--num_key_value_heads", "1"]
    arguments = parse_arguments(["--config", "mine.yaml", *flags, "--cpu_threads", str(threads)])
    assert arguments.training.gradient_accumulation_steps == 4
    assert list(arguments.mixture.train_sources) == ["code", "digits", "signs"]
    assert list(arguments.mixture.ood_sources) == ["law"]
    trainer = pretrain(arguments)
    history = trainer.state.log_history
    assert sum("loss" in entry for entry in history) == 20
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 5, 10, 15, 20]
    assert all(f"eval_{name}_loss" in evaluations[0] for name in ("code", "digits", "signs", "law"))
    sizes = {name: source.tokens for name, source in arguments.mixture.train_sources.items()}
    used = trainer.train_dataset.sources if hasattr(trainer.train_dataset, "sources") else {}
    assert all(
        abs(len(used[name]) * arguments.mixture.sequence_length / size - 1) < 0.2 for name, size in sizes.items()
    )


def model_of(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)["model"]


def test_the_model_grows_with_data_and_speed(monkeypatch):
    def fit(tokens: int, speed: float) -> tuple[int, int]:
        monkeypatch.setattr(starter, "_tokens_per_second", lambda *args: speed)
        model, steps, _ = starter._fit(2048, tokens, 256, 4)
        return model.hidden_size, steps

    assert fit(10**9, 1e6)[0] > fit(10**9, 3e5)[0] > fit(10**9, 1e4)[0] == 128
    assert fit(10**6, 1e6)[0] == 128  # 20 tokens per parameter would be too many passes
    assert fit(10**6, 1e6)[1] == 4 * 10**6 // 4096  # four passes
    assert fit(1000, 1e6)[1] == 100  # a small file is repeated


def test_a_model_that_needs_too_much_memory_is_not_chosen(monkeypatch):
    def speed(model: Any, *args: Any) -> float:
        if model.hidden_size > 256:
            raise torch.OutOfMemoryError
        return 1e9

    monkeypatch.setattr(starter, "_tokens_per_second", speed)
    assert starter._fit(2048, 10**12, 256, 4)[0].hidden_size == 256


def test_torch_built_for_gpus_runs_on_a_cpu(monkeypatch):
    def built_for(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", built_for)
    assert starter._tokens_per_second(starter.ModelArguments(vocab_size=64, num_hidden_layers=1), 8, 1) > 0


def test_a_named_tokenizer_is_used(fast):
    starter_file = yaml.safe_load(starter.starter_yaml(FILES))
    assert starter_file["model"]["tokenizer"] == "train" and starter_file["model"]["vocab_size"] <= 1024
    from tests.support.tiny_tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained("tok")
    text = starter.starter_yaml(FILES, tokenizer="tok")
    assert text.startswith(f"# Written by: hf-nexus init {' '.join(FILES)} --tokenizer tok\n")
    model = model_of(text)
    assert model["tokenizer"] == "tok" and model["vocab_size"] == len(tokenizer)
    Path("chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    tokenizer.chat_template = None
    tokenizer.save_pretrained("bare")
    with pytest.raises(ValueError, match="chat template"):
        starter.starter_yaml(["chat.jsonl"], tokenizer="bare")


def test_an_ood_file_among_the_files_is_only_evaluated(fast, capsys):
    loaded = yaml.safe_load(starter.starter_yaml([*FILES, f"./{FILES[0]}"], ood=FILES[:1]))
    roles = [source.get("role") for source in loaded["data"]["sources"].values()]
    assert roles == [None] * (len(FILES) - 1) + ["ood"]
    assert f"{FILES[0]}, ./{FILES[0]}: only evaluated" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--ood names all files"):
        starter.starter_yaml(FILES[:1], ood=FILES[:1])


def test_a_file_that_is_named_twice_is_one_source(fast):
    again = [f"./{FILES[0]}", f"./{FILES[1]}"]
    loaded = yaml.safe_load(starter.starter_yaml([*FILES[1:], again[1]], ood=[FILES[0], again[0]]))
    assert [source["path"] for source in loaded["data"]["sources"].values()] == [*FILES[1:], FILES[0]]


def test_names_are_those_of_files_and_differ():
    paths = ["a/web.jsonl.gz", "b/web.jsonl", "c/*.parquet", "ood.txt", "my text (1).csv", "*.jsonl"]
    names = [name for name, _ in starter._names(paths)]
    assert names == ["web", "web_2", "c", "ood_4", "my_text_1_", "data"]
    paths = ["a_3.jsonl", "a.jsonl", "a.csv", "macro.jsonl", "a_4.txt", "b_8.csv", "b.txt", "b.csv"]
    assert [name for name, _ in starter._names(paths)] == [
        *("a_3", "a", "a_4", "macro_4", "a_4_5", "b_8", "b", "b_9"),
    ]


@pytest.mark.parametrize("name", ["2024.jsonl", "no.jsonl", "on.csv", "1e3.jsonl"])
def test_names_that_are_no_text_in_yaml_are_quoted(fast, name):
    Path(name).write_text("text\n" + "\n".join(documents("abcd", 80, 0)) if ".csv" in name else JSONL)
    Path("mine.yaml").write_text(starter.starter_yaml([name]))
    assert list(load_config("mine.yaml")["data"]["sources"]) == [name.partition(".")[0]]


def test_nothing_is_evaluated_where_nothing_is_held_out(fast):
    Path("few.jsonl").write_text("\n".join(JSONL.splitlines()[:3]))
    Path("same.jsonl").write_text("\n".join(JSONL.splitlines()[:2] * 40))
    text = starter.starter_yaml(["few.jsonl", "same.jsonl"])
    Path("mine.yaml").write_text(text)
    training = parse_arguments(["--config", "mine.yaml", "--dry_run"]).training
    assert training.eval_strategy == "no" and not training.eval_on_start


def test_a_short_file_has_short_rows(fast):
    Path("short.txt").write_text("\n".join(documents("abcd", 8, 0)))
    data = yaml.safe_load(starter.starter_yaml(["short.txt", "code.jsonl"]))["data"]
    assert data["sequence_length"] == 32


def write_rows(path: str, texts: list[str]) -> None:
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize(
    "sizes",
    [[90_000] * 3, *(pytest.param(s, marks=pytest.mark.slow) for s in ([100, 90_000, 100], [100] * 6 + [90_000] * 2))],
)
def test_long_ood_documents_do_not_shorten_rows(fast, sizes):
    write_rows("web.jsonl", documents("abcd", 80, 0) * 20)
    write_rows("law.jsonl", ["1 2 3 4 " * (size // 8) for size in sizes])
    short, long = (yaml.safe_load(starter.starter_yaml(["web.jsonl"], ood))["data"] for ood in ([], ["law.jsonl"]))
    assert long["sequence_length"] == short["sequence_length"] >= 128
    assert long["sources"]["law"]["max_tokens"] >= 90_000


@pytest.mark.slow
def test_few_long_documents_are_held_out(fast):
    write_rows("books.jsonl", ["1 2 3 4 " * size for size in range(5_000, 5_200)])
    write_rows("poems.jsonl", ["1 2 3 4 " * size for size in range(20, 220)])
    sources = yaml.safe_load(starter.starter_yaml(["books.jsonl", "poems.jsonl"]))["data"]["sources"]
    assert sources["books"]["eval_rows"] == 9 and sources["poems"]["eval_rows"] == 10


def test_a_mixture_alone_gets_the_same_training_settings():
    sources: dict[str, Any] = {"code": {"path": "code.jsonl", "text_column": "content", "eval_rows": 4}}
    Path("mixture.yaml").write_text(yaml.safe_dump({"sources": sources, "sequence_length": 32}))
    flags = ["--hidden_size", "16", "--num_attention_heads", "2", "--max_steps", "4", "--vocab_size", "300"]
    trainer = pretrain(parse_arguments(["--config", "mixture.yaml", *flags]))
    assert trainer.args.output_dir == "runs/mixture" and trainer.args.gradient_accumulation_steps == 4
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [0, 1, 2, 3, 4]
    del sources["code"]["eval_rows"]
    Path("mixture.yaml").write_text(yaml.safe_dump({"sources": sources}))
    training = parse_arguments(["--config", "mixture.yaml", "--dry_run"]).training
    assert training.eval_strategy == "no" and not training.eval_on_start


@pytest.mark.parametrize(
    ("source", "named", "expected"),
    [
        ({"eval_rows": 4}, {}, {"logging_steps": 10, "eval_strategy": "steps", "eval_steps": 0.1}),
        ({}, {}, {"logging_steps": 10}),
        ({"role": "train", "eval_rows": None}, {}, {"logging_steps": 10}),
        ({"eval_rows": 4}, {"eval_strategy": "no", "logging_steps": 3}, {"logging_steps": 3, "eval_strategy": "no"}),
    ],
)
def test_a_file_that_names_no_steps_logs_and_evaluates(tmp_path, source, named, expected):
    content = {"data": {"sources": {"web": {"path": "x.jsonl", **source}}}, "training": {"max_steps": 5, **named}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    found = load_config(str(tmp_path / "mine.yaml"))["training"]
    assert {key: found.get(key) for key in expected} == expected and found["max_steps"] == 5
    assert ("eval_strategy" in found) == ("eval_strategy" in expected)
