"""What a checkpoint knows of the data, so that other data is noticed."""

import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets, load_dataset
from torch.utils.data import ConcatDataset

from hf_nexus.hub.facts import public_path
from hf_nexus.mixture import MixtureConfig, load_mixture, state
from hf_nexus.mixture.config import SourceConfig
from hf_nexus.mixture.documents import DocumentEncoder
from hf_nexus.mixture.state import _describe, _settings, compare_data, describe_sources
from hf_nexus.mixture.stream.documents import StreamedDocuments
from hf_nexus.mixture.training_data import prepare_data
from tests.support.tiny_tokenizer import tiny_tokenizer

ROWS = Dataset.from_dict({"x": list(range(100)), "text": [str(i) for i in range(100)]})
STREAM = ROWS.to_iterable_dataset(num_shards=4)
OTHER = ROWS.map(lambda row: {"x": row["x"] + 1})


def generated(**kwargs: Any) -> Any:
    return IterableDataset.from_generator(lambda **kwargs: iter([{"x": 1}]), gen_kwargs=kwargs)


def doubled(batch: dict, w: int = 0) -> dict:
    return batch


def subset(seed: int) -> Any:
    order = torch.randperm(100, generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.utils.data.Subset(ROWS, order)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ROWS, ROWS.shuffle(seed=1)),
        (ROWS.shuffle(seed=1), ROWS.shuffle(seed=2)),
        (ROWS, ROWS.map(lambda row: {"x": row["x"] + 1})),
        (ROWS, ROWS.select(range(99))),
        (subset(0), subset(1)),
        (STREAM, STREAM.skip(3)),
        (STREAM.skip(3), STREAM.skip(4)),
        (STREAM.take(3), STREAM.take(4)),
        (STREAM, STREAM.repeat(2)),
        (STREAM, STREAM.filter(lambda row: True)),
        (STREAM, ROWS.to_iterable_dataset(num_shards=5)),
        (STREAM, OTHER.to_iterable_dataset(num_shards=4)),
        (ROWS.to_iterable_dataset(), ROWS.shuffle(seed=1).to_iterable_dataset()),
        *(
            (ordered([STREAM, OTHER.to_iterable_dataset()]), ordered([OTHER.to_iterable_dataset(), STREAM]))
            for ordered in (concatenate_datasets, interleave_datasets)
        ),
        (generated(shards=[1, 2]), generated(shards=[2, 1])),
        (generated(rows=ROWS), generated(rows=OTHER)),
        *(
            (STREAM.map(doubled, batched=True, **one), STREAM.map(doubled, batched=True, **other))
            for one, other in (
                ({"batch_size": 2}, {"batch_size": 4}),
                ({"fn_kwargs": {"w": 7}}, {"fn_kwargs": {"w": 9}}),
                ({"remove_columns": ["x"]}, {"remove_columns": ["text"]}),
            )
        ),
        (STREAM.map(partial(doubled, w=7)), STREAM.map(partial(doubled, w=9))),
        (STREAM.filter(bool, input_columns="x"), STREAM.filter(bool, input_columns="text")),
        (STREAM.select_columns("x"), STREAM.select_columns("text")),
        (ROWS.to_list(), OTHER.to_list()),
        (ROWS.to_list(), ROWS.to_list()[::-1]),
        (ConcatDataset([ROWS, OTHER]), ConcatDataset([OTHER, ROWS])),
        (STREAM.shuffle(seed=1), STREAM.shuffle(seed=2)),
        (STREAM.shuffle(seed=1, buffer_size=5), STREAM.shuffle(seed=1, buffer_size=6)),
        *(
            (interleave_datasets([STREAM, STREAM], **one), interleave_datasets([STREAM, STREAM], **other))
            for one, other in (
                ({"probabilities": [0.5, 0.5], "seed": 1}, {"probabilities": [0.5, 0.5], "seed": 2}),
                ({"probabilities": [0.5, 0.5], "seed": 1}, {"probabilities": [0.4, 0.6], "seed": 1}),
                ({}, {"stopping_strategy": "all_exhausted"}),
            )
        ),
    ],
)
def test_other_rows_are_described_otherwise(one, other):
    first, second = _describe("a", one, None), _describe("a", other, None)
    assert first == _describe("a", one, None)
    assert compare_data({"a": first}, {"a": second})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ROWS, ROWS.with_format("torch")),
        (ROWS, Dataset.from_list(ROWS.to_list())),
        (ROWS, ROWS.flatten_indices()),
        (ROWS.select(range(50)), ROWS.select(range(50)).flatten_indices()),
        (ROWS, ROWS.with_transform(lambda batch: {"y": torch.rand(len(batch["x"]))})),
        (STREAM, STREAM.with_format("torch")),
        (STREAM.shuffle(seed=1), STREAM.shuffle(seed=1)),
        (subset(0), subset(0)),
        (generated(made=object()), generated(made=object())),
        (STREAM.map(doubled, fn_kwargs={"w": object()}), STREAM.map(doubled, fn_kwargs={"w": object()})),
        (STREAM.map(len), STREAM.map(len, batch_size=7)),
        [interleave_datasets([STREAM, STREAM], kind([0.5, 0.5]), seed=1) for kind in (list, np.array)],
    ],
)
def test_the_same_rows_are_described_the_same(one, other):
    assert _describe("a", one, None) == _describe("a", other, None)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "csv", "parquet", "txt"])
def test_other_files_of_a_stream_are_described_otherwise(tmp_path, suffix):
    kind = {"jsonl": "json", "jsonl.gz": "json", "txt": "text"}.get(suffix, suffix)

    def described(file, rows=ROWS):
        path = tmp_path / f"{file}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        {"json": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet, "text": rows.to_csv}[kind](str(path))
        return _describe("a", load_dataset(kind, data_files=str(path), split="train", streaming=True), None)

    one = described("d/a")
    assert compare_data({"a": one}, {"a": described("d/b")})  # another name
    assert compare_data({"a": one}, {"a": described("e/a", ROWS.select(range(99)))})  # another size
    assert not compare_data({"a": one}, {"a": described("e/a")})


@pytest.fixture
def stream(tmp_path) -> Any:
    """A function that makes a stream of files on a disk."""

    def make(*names: str, disk: str) -> Any:
        files = [tmp_path / disk / name for name in names]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            ROWS.to_json(str(file))
        return load_dataset("json", data_files=[*map(str, files)], split="train", streaming=True)

    return make


@pytest.mark.parametrize("other", [[1, *[3] * 7], [2, *[3] * 8], [3] * 8])
def test_a_cut_by_the_sizes_of_files_is_described(tmp_path, other):
    """A checkpoint without it was written when parts had equal numbers of files."""

    def described(disk, rows):
        files = [tmp_path / disk / f"{i}.jsonl" for i in range(len(rows))]
        files[0].parent.mkdir()
        for file, count in zip(files, rows, strict=True):
            file.write_text('{"x": 1}\n' * count)
        stream = load_dataset("json", data_files=[*map(str, files)], split="train", streaming=True)
        return _describe("a", stream, None)

    one = described("old", [2, *[3] * 7])
    assert one == described("moved", [2, *[3] * 7]) != described("other", other)
    former = {name: fact for name, fact in one.items() if name != "cut by shard sizes"}
    assert compare_data({"a": former}, {"a": one}) == ["a: cut by shard sizes is new"]
    assert "cut by shard sizes" not in described("equal", [3] * 9) | described("few", [2, *[3] * 6])


def test_the_folders_of_files_are_described_and_may_move(stream):
    names = "a/x.jsonl", "b/x.jsonl", "b/y.jsonl"
    one = _describe("a", stream(*names, disk="old"), None)
    assert one == _describe("a", stream(*names, disk="new/b"), None)
    assert one != _describe("a", stream(*names[::-1], disk="old"), None)
    assert one != _describe("a", stream("a/x.jsonl", "c/x.jsonl", "b/y.jsonl", disk="old"), None)
    one, other = (concatenate_datasets([stream(name, disk="old") for name in order]) for order in (names, names[::-1]))
    assert _describe("a", one, None) != _describe("a", other, None)
    one, other = (generated(files=[f"{disk}/a", f"{disk}/b"]) for disk in ("/old", "/new/b"))
    assert _describe("a", one, None) == _describe("a", other, None)


def test_each_source_and_argument_may_move_alone(stream):
    web = stream("web/1", "web/2", disk="d")
    old, new = (stream("code/a", "code/b", disk=disk) for disk in ("o'ld", "new"))
    one, other = (_describe("a", interleave_datasets([web, code]), None) for code in (old, new))
    assert one == other != _describe("a", interleave_datasets([web, web]), None)
    one, other, renamed = (
        _describe("a", generated(files=[f"{disk}/a/1", f"{disk}/a/2"], words=words, rows=(1,)), None)
        for disk, words in (("/data", "/home/me/v.txt"), ("/mnt/x", "/data/v.txt"), ("/data", "/home/me/w.txt"))
    )
    assert one == other != renamed


def test_signatures_and_commits_of_files_are_not_described():
    old, new = ({"files": [f"https://a/x?sig={s * 40}", f"hf://datasets/me/b@{s * 40}/y"]} for s in "ab")
    assert _describe("a", generated(**old), None) == _describe("a", generated(**new), None)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"tokens_column": "ids"}, {"tokens_column": "tokens"}),
        ({"tokens_column": "ids"}, {"tokens_column": "ids", "packed": True}),
        *([{"prompt_column": "a", "completion_column": "b", "loss_on": on} for on in ("all", "completion")],),
    ],
)
def test_settings_that_decide_rows_and_labels_are_described(one, other):
    one, other = (_settings(SourceConfig(path="a.jsonl", **settings)) for settings in (one, other))
    assert compare_data({"a": one}, {"a": other}) and not compare_data({"a": one}, {"a": one})


def described_path(path: str, rows: Any = STREAM) -> Any:
    encoder = DocumentEncoder("a", SourceConfig(path=path, streaming=True), tiny_tokenizer(), ["text"])
    return _describe("a", StreamedDocuments(rows, encoder, 8), None).get("path")


def test_the_paths_of_remote_streams_alone_are_described():
    for path in ("/home/alice/secret/web.jsonl", "~/secret/web.jsonl", "web.jsonl", "./web.jsonl"):
        assert described_path(path) is None
    for path in ("org/web", "s3://bucket/web.jsonl"):
        assert described_path(path) == path


def test_a_description_has_no_signature_or_password():
    one, other = (described_path(f"https://host/web.jsonl?signature={s}") for s in ("secret", "other"))
    assert one == other == "https://host/web.jsonl"
    assert public_path("https://host/web.jsonl?signature=secret") == "web.jsonl"
    path = described_path("ftp://me:secret@host/web.jsonl")
    assert path.startswith("web.jsonl") and "secret" not in path


def test_a_tokenizer_is_described_once_and_compared_once(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "fox"}\n' * 9)
    source = {"path": str(tmp_path / "a.jsonl"), "streaming": True, "weight": 1}

    def described(length, tokenizer):
        config = MixtureConfig.from_dict({"sequence_length": length, "sources": dict.fromkeys("abc", source)})
        mixture = load_mixture(config, tokenizer, cache_dir=str(tmp_path / "cache"))
        return describe_sources(prepare_data(mixture, None, False))

    one, longer, other = (
        described(8, tiny_tokenizer()),
        described(16, tiny_tokenizer()),
        described(8, tiny_tokenizer("x")),
    )
    names = "source 'a', source 'b', source 'c'"
    assert compare_data(one, longer) == [f"{names}: sequence_length was 8 and is 16"]
    assert re.fullmatch(rf"{names}: tokenizer was '\w+' and is '\w+'", *compare_data(one, other))
    calls = []
    monkeypatch.setattr(state, "tokenizer_fingerprint", lambda tokenizer: calls.append(1) or "x")
    described(8, tiny_tokenizer())
    assert len(calls) == 1
