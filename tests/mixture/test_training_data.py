"""What may be passed as `train_dataset`, and what is refused with the way to pass it."""

from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict

from hf_nexus.mixture.config import MixtureConfig
from hf_nexus.mixture.indexed import MixtureDataset
from hf_nexus.mixture.loading import Mixture
from hf_nexus.mixture.stream.dataset import MixtureStream
from hf_nexus.mixture.training_data import prepare_data, split_sources

ROWS = Dataset.from_dict({"x": [1, 2, 3, 4]})


def prepare(train: Any) -> Any:
    return prepare_data(train, None, False)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "test"),
        ("train", "validation"),
        ("train", "dev"),
        ("train_sft", "test_sft", "train_gen", "test_gen"),
        ("train_prefs", "test_prefs"),
        ("auxiliary_train", "test", "validation", "dev"),
        ("train_r1", "dev_r1"),
        ("train2017", "val2017"),
        ("Train", "Eval"),
        ("trainSft", "testSft"),
        ("training", "held_out"),
        ("trainval", "test"),
        ("train", "devtest"),
        ("trainset", "testset"),
        ("traindata", "testdata"),
        ("train", "hold_out"),
        ("train", "validate"),
        ("train", "tests"),
        ("train", "evals"),
        ("train", "crossval"),
        ("train", "minitest"),
        ("trn", "tst"),
        ("train_small", "test_unseen"),
        ("train_clean", "dev_clean"),
        ("train", "validation_matched"),
        ("train", "test", "testmini"),
        ("train", "holdOutSet"),
    ],
)
@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_splits_are_not_taken_for_sources(names, kind):
    with pytest.raises(
        ValueError, match=rf"{', '.join(names)} look like splits.*dataset\['{names[0]}'\].*other names"
    ):
        prepare(kind(dict.fromkeys(names, ROWS)))


@pytest.mark.parametrize(
    "names",
    [
        ("train",),
        ("web", "unit_test_code"),
        ("contest", "training"),
        ("latest", "trains"),
        ("dev_docs", "test_cases", "train_manuals"),
        ("dataset", "training"),
        ("dev_docs", "test_cases"),
        ("learn", "dev", "blog"),
        ("microsoft_learn", "web_dev"),
        ("unit_tests", "model_evals"),
        ("train", "unit_tests"),
        ("sports_training", "math_tests"),
        ("pretraining", "sft", "test_prep"),
        ("pretrain", "dev_docs"),
        ("web", "pretraining", "code_review_dev"),
        ("strength_training", "wiki", "test_questions"),
        ("code_training_data", "eval_harness_docs"),
        ("web_train", "code_test"),
        ("train", "household"),
        ("test", "validation"),
    ],
)
def test_names_that_only_resemble_splits_are_sources(names):
    assert prepare(dict.fromkeys(names, ROWS)).names == list(names)


def test_a_source_column_of_splits_is_refused():
    rows = Dataset.from_dict({"x": [1, 2, 3, 4], "source": ["train", "test", "train", "test"]})
    with pytest.raises(ValueError, match=r"look like splits.*Keep the rows of 'train' with train_dataset\.filter"):
        split_sources(rows)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (DatasetDict({"train": ROWS, "test": ROWS}), "'a' is a DatasetDict with the keys train, test, not a dataset"),
        (
            IterableDatasetDict({"train": ROWS.to_iterable_dataset()}),
            "'a' is a IterableDatasetDict with the keys train",
        ),
        ({"train": ROWS}, "'a' is a dict with the keys train"),
        ("org/web", "'a' is a str, which is not a dataset"),
        (ROWS.to_pandas(), "'a' is a DataFrame, which is not a dataset"),
        (ROWS.data.table, "'a' is a Table, which is not a dataset"),
        (torch.utils.data.DataLoader(ROWS), "'a' is a DataLoader, which is not a dataset"),
        (iter([]), "'a' is a list_iterator, which is not a dataset"),
        ([ROWS, ROWS], "'a' is a list of datasets. Pass concatenate_datasets"),
        ([], "'a' is empty"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_source_that_is_no_dataset_is_refused(source, message, stream):
    with pytest.raises(ValueError, match=message):
        (MixtureStream if stream else MixtureDataset)({"a": source})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([ROWS, ROWS], "list of datasets. Pass a dict"),
        ({"input_ids": [[1]], "labels": [[1]]}, r"look like columns. Pass Dataset\.from_dict"),
        (MixtureDataset({"a": ROWS}), "a MixtureDataset. Pass the dict of its sources"),
        (MixtureStream({"a": ROWS}), "a MixtureStream. Pass the dict of its sources"),
        ({}, "no sources"),
        ({1: ROWS}, "names must be strings"),
    ],
)
def test_a_training_set_of_another_form_is_refused(train, message):
    with pytest.raises(ValueError, match=message):
        prepare(train)


def test_a_source_column_under_a_transform_makes_sources():
    rows = Dataset.from_dict({"x": [1, 2, 3, 4], "source": ["b", "a", "b", "a"]})
    sources = split_sources(rows.with_transform(lambda batch: {"y": [2 * x for x in batch["x"]]}))
    assert {name: [row["y"] for row in part] for name, part in sources.items()} == {"b": [2, 6], "a": [4, 8]}
    sources = split_sources(rows.with_transform(lambda batch: {"z": [s.upper() for s in batch["source"]]}))
    assert {name: [row["z"] for row in part] for name, part in sources.items()} == {"b": ["B"] * 2, "a": ["A"] * 2}


def test_a_source_column_makes_sources():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"x": [1, 2, 3, 4], "source": ["b", "a", "b", "a"]})
    sources = split_sources(rows)
    assert {name: part["x"][:] for name, part in sources.items()} == {"b": [1, 3], "a": [2, 4]}
    assert split_sources(rows.remove_columns("source")) is None
    named = rows.cast_column("source", datasets.ClassLabel(names=["a", "b"]))
    assert set(split_sources(named)) == {"a", "b"}
    assert split_sources(rows.to_iterable_dataset()) is None


def test_a_class_label_may_be_missing():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"source": datasets.ClassLabel(names=["a", "b"])})
    with pytest.raises(ValueError, match="`source` column is empty in 1 of 5 rows"):
        split_sources(datasets.Dataset.from_dict({"source": [0, 1, -1, 0, 1]}, features=features))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            ["a", None, "a", "b"],
            r"`source` column is empty in 1 of 4 rows: name theirs, or, .*remove_columns\('source'\)",
        ),
        ([["a"], ["a", "b"], [], ["a"]], r"does not hold names: .*remove_columns"),
        ([{"name": "a"}] * 4, r"does not hold names: .*remove_columns"),
        (["http://1", "http://2", "http://3", "http://1"], r"holds 3 different values in 4 rows: .*remove_columns"),
    ],
)
def test_a_source_column_that_names_no_sources_is_refused(column, message):
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=message):
        split_sources(datasets.Dataset.from_dict({"x": [1, 2, 3, 4], "source": column}))


def test_a_loaded_mixture_keeps_the_names_of_its_config():
    """It has refused names of splits. A source may be called like a column."""
    config = MixtureConfig.from_dict({"sources": {"input_ids": {"path": "a.jsonl"}}})
    data = prepare(Mixture(config, {"input_ids": ROWS}, {}, {"input_ids": None}, 0))
    assert data.names == ["input_ids"] and data.weights == {"input_ids": 1.0}


def test_decided_weights_need_whole_numbers_of_max_epochs():
    def prepared(max_epochs, dynamic):
        source = {"path": "a.jsonl", "max_epochs": max_epochs}
        config = MixtureConfig.from_dict({"sequence_length": 8, "sources": {"a": source}})
        rows = Dataset.from_dict({"input_ids": [[1] * 8]})
        return prepare_data(Mixture(config, {"a": rows}, {}, {"a": None}, 0), None, dynamic)

    with pytest.raises(ValueError, match=r"sources\.a\.max_epochs: 0\.5 .*mixture_weights_function.* a whole number"):
        prepared(0.5, dynamic=True)
    assert prepared(2.0, dynamic=True).max_epochs == {"a": 2} and prepared(0.5, dynamic=False).max_epochs == {"a": 0.5}
