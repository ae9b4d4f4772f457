"""What a checkpoint knows of the data, so that other data is noticed."""

from typing import Any

import pytest
import torch
from datasets import Dataset, interleave_datasets, load_dataset

from hf_nexus.hub.facts import public_path
from hf_nexus.mixture.config import SourceConfig
from hf_nexus.mixture.state import _describe, _settings, compare_data

ROWS = Dataset.from_dict({"x": list(range(100)), "text": [str(i) for i in range(100)]})
STREAM = ROWS.to_iterable_dataset(num_shards=4)


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
    ],
)
def test_the_same_rows_are_described_the_same(one, other):
    state = torch.get_rng_state()
    assert _describe("a", one, None) == _describe("a", other, None)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "txt"])
def test_other_files_of_a_stream_are_described_otherwise(tmp_path, suffix):
    for name in "ab":
        path = str(tmp_path / f"{name}.{suffix}")
        {"jsonl": ROWS.to_json, "csv": ROWS.to_csv, "parquet": ROWS.to_parquet, "txt": ROWS.to_csv}[suffix](path)
    kind = {"jsonl": "json", "txt": "text"}.get(suffix, suffix)
    one, other = (
        load_dataset(kind, data_files=str(tmp_path / f"{name}.{suffix}"), split="train", streaming=True)
        for name in "ab"
    )
    assert compare_data({"a": _describe("a", one, None)}, {"a": _describe("a", other, None)})
    assert not compare_data({"a": _describe("a", one, None)}, {"a": _describe("a", one, None)})


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


@pytest.mark.parametrize("path", ["/home/alice/secret/web.jsonl", "~/secret/web.jsonl"])
def test_a_description_has_no_folder_of_the_machine(path):
    one, other = (_settings(SourceConfig(path=p))["path"] for p in (path, path.replace("secret", "other")))
    assert one.startswith("web.jsonl") and "secret" not in one and one != other
    for path in ("data/web.jsonl", "s3://bucket/web.jsonl"):
        assert _settings(SourceConfig(path=path))["path"] == path


def test_a_description_has_no_signature_or_password():
    one, other = (
        _settings(SourceConfig(path=f"https://host/web.jsonl?signature={s}"))["path"] for s in ("secret", "other")
    )
    assert one == other == "https://host/web.jsonl"
    assert public_path("https://host/web.jsonl?signature=secret") == "web.jsonl"
    path = _settings(SourceConfig(path="ftp://me:secret@host/web.jsonl"))["path"]
    assert path.startswith("web.jsonl") and "secret" not in path
