"""What a file holds is guessed from its rows, and a tokenizer is trained on any source."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Audio, Dataset

from hf_nexus.mixture import MixtureConfig, load_mixture
from hf_nexus.mixture.texts import guess_columns, guess_source, tokenizer_of_sources
from tests.support.token_files import write_ds

CHAT = [{"role": "user", "content": "one plus two"}, {"role": "assistant", "content": "three"}]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"id": 1, "text": "a"}, {"text_column": "text"}),
        ({"path": "a.py", "content": "a"}, {"text_column": "content"}),
        ({"text": "a", "messages": CHAT}, {"messages_column": "messages"}),
        ({"messages": "not a list", "text": "a"}, {"text_column": "text"}),
        ({"conversations": CHAT}, {"messages_column": "conversations"}),
        ({"prompt": "a", "completion": "b"}, {"prompt_column": "prompt", "completion_column": "completion"}),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {"prompt_column": "prompt", "completion_column": "completion"}),
        ({"question": "a", "answer": "b"}, {"prompt_column": "question", "completion_column": "answer"}),
    ],
)
def test_columns_are_guessed_from_the_rows(row, columns):
    assert guess_source("a", write("a.jsonl", [row, row]), "train").columns == columns


def test_where_nothing_fits_the_columns_are_named():
    path = write("a.jsonl", [{"id": 1, "body": "a", "text": 3}])
    with pytest.raises(ValueError, match=r"^a\.jsonl: .*id \(int\), body \(text\), text \(int\)\. Rename one"):
        guess_source("a", path, "train")


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"conversations": [{"from": "human", "value": "a"}]}, r"'conversations' have the keys from, value\. Rename"),
        ({"version": "1", "data": [{"text": "a b"}]}, r"'data' have the keys text\. .* or save items that are rows"),
        ({"id": 1, "input_ids": [5, 6]}, r"`tokens_column: input_ids`\), and the tokenizer that made them"),
    ],
)
def test_the_advice_fits_what_the_columns_hold(row, advice):
    with pytest.raises(ValueError, match=advice):
        guess_source("a", write("a.jsonl", [row]))


def test_the_only_column_of_text_is_read():
    row = {"story": "once upon a time", "label": "1", "n": 3}
    assert guess_source("a", write("a.jsonl", [row])).columns == {"text_column": "story"}
    for other in ({"summary": "a b"}, {"turns": [{"from": "a"}]}):
        with pytest.raises(ValueError, match="no column can be trained on"):
            guess_source("a", write("b.jsonl", [row | other]))


def test_no_rows_are_an_error():
    with pytest.raises(ValueError, match="a: it has no rows"):
        guess_columns("a", [])


def test_token_files_need_the_column_and_the_tokenizer():
    write_ds(Path("a.ds"), [[5, 6], [7]])
    with pytest.raises(ValueError, match="`tokens_column: input_ids`"):
        guess_source("a", "a.ds")


@pytest.mark.parametrize("missing", [{"text": None}, {"id": 1}])
def test_a_row_without_text_is_named(missing):
    path = write("a.jsonl", [{"text": "a"}, missing])
    with pytest.raises(ValueError, match=r"a\.jsonl: row 1 has no 'text', or null\. Repair"):
        guess_source("a", path)


def test_media_next_to_text_is_not_decoded():
    clips = Dataset.from_dict({"text": ["a b"] * 4, "clip": [{"bytes": b"no sound", "path": None}] * 4})
    clips.cast_column("clip", Audio()).to_parquet("clips.parquet")
    assert guess_source("a", "clips.parquet").columns == {"text_column": "text"}


def test_text_next_to_prompts_is_a_warning(caplog):
    row = {"instruction": "add", "input": "1 2", "output": "3", "id": 1}
    columns = guess_source("a", write("a.jsonl", [row])).columns
    assert columns == {"prompt_column": "instruction", "completion_column": "output"}
    assert "instruction and output are read, and the text in input is not" in caplog.text


@pytest.mark.parametrize(
    ("text", "unit"), [("a\nb\n\n" * 30, "paragraph"), ("a line\n" * 30, "line"), ("one\n\ntwo", "line")]
)
def test_one_text_file_is_split_into_documents(text, unit):
    Path("a.txt").write_text(text)
    assert guess_source("a", "a.txt", "train").sample_by == unit


def test_many_text_files_stay_whole():
    Path("books").mkdir()
    for i in range(20):
        Path(f"books/{i}.txt").write_text("first\n\nsecond")
    assert guess_source("a", "books", "train").sample_by == "document"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_trained_tokenizer_reads_every_kind_of_source(streaming):
    sources: dict[str, Any] = {
        "text": {"path": write("text.jsonl", [{"text": f"the lazy dog {i}"} for i in range(9)])},
        "chat": {"path": write("chat.jsonl", [{"messages": CHAT}] * 9), "messages_column": "messages"},
        "pairs": {"path": write("pairs.jsonl", [{"p": "quick", "c": "brown fox"}] * 9)},
        "ood": {"path": write("ood.jsonl", [{"text": "zebra crossing " * 40}])},
    }
    sources["pairs"] |= {"prompt_column": "p", "completion_column": "c"}
    for source in sources.values():
        source |= {"streaming": streaming, "weight": 1}
    sources["law"] = {"path": sources.pop("ood")["path"], "role": "ood"}
    config = MixtureConfig.from_dict({"sources": sources, "sequence_length": 4})
    tokenizer = tokenizer_of_sources(config, 400)
    learned = {word for word in ("lazy", "plus", "fox", "zebra") if len(tokenizer.tokenize(f" {word}")) == 1}
    assert learned == {"lazy", "plus", "fox"}  # nothing of the OOD source
    assert set(load_mixture(config, tokenizer).train) == {"text", "chat", "pairs"}
    again = tokenizer_of_sources(config, 400)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_tokenizer_of_text_alone_has_no_chat_template():
    config = MixtureConfig.from_dict({"sources": {"a": {"path": write("a.jsonl", [{"text": "a b"}])}}})
    assert tokenizer_of_sources(config, 300).chat_template is None


def test_the_tokenizer_skips_the_rows_that_a_stream_skips():
    rows = [{"text": "lazy dog"}, {"text": None}, {"text": "lazy dog"}]
    source = {"path": write("a.jsonl", rows), "streaming": True, "weight": 1}
    skipping = MixtureConfig.from_dict({"sources": {"a": {**source, "on_error": "skip"}}})
    assert len(tokenizer_of_sources(skipping, 300).tokenize(" lazy")) < 5
    with pytest.raises(ValueError, match="row 1 holds None"):
        tokenizer_of_sources(MixtureConfig.from_dict({"sources": {"a": source}}), 300)


def test_no_tokenizer_is_trained_for_tokens_of_another():
    sources = {"a": {"path": write("a.jsonl", [{"ids": [1]}]), "tokens_column": "ids"}, "b": {"path": "b.jsonl"}}
    with pytest.raises(ValueError, match=r"sources\.a\.tokens_column: .*in place of 'train'"):
        tokenizer_of_sources(MixtureConfig.from_dict({"sources": sources}), 300)


def test_a_tokenizer_is_trained_on_a_saved_dataset():
    Dataset.from_dict({"messages": [CHAT] * 9}).with_format("numpy").save_to_disk("saved")
    config = MixtureConfig.from_dict({"sources": {"a": {"path": "saved", "messages_column": "messages"}}})
    assert len(tokenizer_of_sources(config, 300)) > 258
    assert guess_source("a", "saved", "train").columns == {"messages_column": "messages"}
