"""The documents of datatrove's and Megatron's files are those that were written."""

import os
import struct
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from datasets.table import InMemoryTable

from hf_nexus.mixture import MixtureConfig, SourceConfig, load_mixture
from hf_nexus.mixture.documents import load_documents
from hf_nexus.mixture.stream.dataset import MixtureStream

from ..support.tiny_tokenizer import tiny_tokenizer
from ..support.token_files import write_bin, write_ds

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [], [9, 10, 11, 12, 13, 0]] * 9


KINDS: dict[str, Any] = {
    "datatrove, 16 bits": lambda folder, documents: write_ds(folder / "a.ds", documents),
    "datatrove, 32 bits": lambda folder, documents: write_ds(folder / "a.ds", documents, "<u4"),
    "Megatron, 16 bits": lambda folder, documents: write_bin(folder / "a.bin", documents),
    "Megatron, 32 bits": lambda folder, documents: write_bin(folder / "a.bin", documents, 4, "<i4"),
}


def load(path: Path) -> Any:
    return load_documents("a", SourceConfig(str(path), tokens_column="input_ids"), "train")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_those_that_were_written(tmp_path, kind, caplog):
    KINDS[kind](tmp_path, DOCUMENTS)
    assert load(tmp_path)["input_ids"][:] == DOCUMENTS
    assert not caplog.records  # the index belongs to the tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_token_files_are_packed(tmp_path, kind, streaming):
    KINDS[kind](tmp_path, DOCUMENTS)
    source = {"path": str(tmp_path), "tokens_column": "input_ids", "streaming": streaming, "weight": 1}
    config = MixtureConfig.from_dict({"sources": {"a": source}, "sequence_length": 6})
    mixture = load_mixture(config, tiny_tokenizer(), cache_dir=tmp_path / "cache")
    if streaming:
        rows = torch.stack([r["input_ids"] for r in MixtureStream(mixture.train).__getitems__([(0, 0)] * 18)])
    else:
        rows = mixture.train["a"]["input_ids"][:]
        assert rows.flatten().tolist() == [*chain.from_iterable(DOCUMENTS)]
    assert sorted(rows.flatten().tolist()) == sorted([*chain.from_iterable(DOCUMENTS)])


def test_several_files_are_read_and_a_changed_one_again(tmp_path):
    for name in ("train-1.ds", "train-2.ds"):
        write_ds(tmp_path / name, DOCUMENTS)
    before = load(tmp_path)
    assert before["input_ids"][:] == DOCUMENTS * 2
    write_ds(tmp_path / "train-2.ds", DOCUMENTS[:2])
    assert load(tmp_path)["input_ids"][:] == DOCUMENTS + DOCUMENTS[:2]
    changed = load(tmp_path)._fingerprint
    assert changed != before._fingerprint
    write_ds(tmp_path / "train-2.ds", [[*DOCUMENTS[0], *DOCUMENTS[1]]])
    os.utime(tmp_path / "train-2.ds", ns=(1, 1))
    joined = load(tmp_path)
    assert joined["input_ids"][-1] == DOCUMENTS[0] + DOCUMENTS[1]
    write_ds(tmp_path / "train-2.ds", DOCUMENTS[:2])  # the same tokens, cut elsewhere
    os.utime(tmp_path / "train-2.ds", ns=(1, 1))
    assert load(tmp_path)._fingerprint != joined._fingerprint


def test_files_of_several_types_are_read_together(tmp_path):
    for name, dtype in {"a.ds": "<u2", "b.ds": "<u4"}.items():
        write_ds(tmp_path / name, DOCUMENTS, dtype)
    write_bin(tmp_path / "c.bin", DOCUMENTS, 4, "<i4")
    assert load(tmp_path)["input_ids"][:] == DOCUMENTS * 3


@pytest.mark.parametrize("borders", [[], [0], [2, 4], [0, 4, 2], [0, 2, 99]])
def test_a_damaged_index_is_an_error(tmp_path, borders):
    write_bin(tmp_path / "a.bin", [[1, 2], [3, 4]], borders=borders)
    with pytest.raises(ValueError, match=r"a\.idx' (is damaged|ends at)"):
        load(tmp_path)


@pytest.mark.parametrize("index", ["a.ds.index", "a.idx"])
def test_an_empty_index_is_an_error(tmp_path, index):
    (tmp_path / "a.ds").write_bytes(b"1234")
    (tmp_path / "a.bin").write_bytes(b"1234")
    (tmp_path / index).touch()
    with pytest.raises(ValueError, match=r"ends at 0 tokens|not an index of tokens"):
        load(tmp_path / ("a.ds" if "ds" in index else "a.bin"))


@pytest.mark.parametrize("num_proc", [None, 2])
def test_tokens_are_not_copied_for_caches_or_processes(tmp_path, monkeypatch, num_proc):
    pickled = []
    monkeypatch.setattr(InMemoryTable, "__getstate__", lambda table: pickled.append(table) or {"table": table.table})
    write_ds(tmp_path / "a.ds", DOCUMENTS)
    source = {"path": str(tmp_path), "tokens_column": "input_ids", "eval_rows": 3}
    config = MixtureConfig.from_dict({"sources": {"a": source}, "sequence_length": 4, "num_proc": num_proc})
    load_mixture(config, tiny_tokenizer(), cache_dir=tmp_path / "cache")
    assert not pickled


def test_an_index_that_is_missing_or_wrong_is_an_error(tmp_path, monkeypatch):
    write_ds(tmp_path / "a.ds", DOCUMENTS)
    (tmp_path / "a.ds").write_bytes(b"1234" * 53)
    with pytest.raises(ValueError, match=r"a\.ds\.index' ends at 108 tokens, but the file has 106"):
        load(tmp_path / "a.ds")
    (tmp_path / "a.ds.index").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "a.ds")
    (tmp_path / "b.bin").write_bytes(b"1234")
    (tmp_path / "b.idx").write_bytes(b"x" * 40)
    with pytest.raises(ValueError, match="not an index of tokens of Megatron"):
        load(tmp_path / "b.bin")
    with fsspec.open("memory://tokens/a.ds", "wb") as file:
        file.write(b"1234")
    for size in (18, 30):
        (tmp_path / "b.idx").write_bytes((b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 1, 2))[:size])
        with pytest.raises(ValueError, match="is damaged"):
            load(tmp_path / "b.bin")
    with pytest.raises(ValueError, match="token files are read in place"):
        load("memory://tokens/a.ds")
