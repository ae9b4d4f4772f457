"""Streamed documents are packed once each without gaps, resume within a document, and may skip bad rows."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import default_collate
from transformers import PreTrainedTokenizerFast

from hf_nexus.mixture.documents import Document, split_text
from hf_nexus.mixture.packing import SourcePacker, tokenizer_fingerprint
from hf_nexus.mixture.stream.dataset import MixtureStream
from hf_nexus.mixture.stream.documents import StreamedDocuments
from hf_nexus.mixture.stream.lanes import Lane, Lanes
from hf_nexus.mixture.stream.reader import PartReader, SourceError

from ...support.stream_documents import documents_of
from ...support.tiny_tokenizer import BOS, EOS, adding_bos

L = 8


def stream_of(texts: list[Any], shards: int = 1, sequence_length: int = L, **config: Any) -> StreamedDocuments:
    rows = IterableDataset.from_generator(
        lambda parts: ({"text": text} for part in parts for text in part),
        gen_kwargs={"parts": [texts[i::shards] for i in range(shards)]},
    )
    return documents_of(rows, sequence_length, **config)


def start(
    source: StreamedDocuments, state: Any = None, rank: int = 0, ranks: int = 1, **options: Any
) -> MixtureStream:
    stream = MixtureStream({"a": source}, **options)
    stream.place(rank, ranks, 1)
    stream.begin(None if state is None else {"a": {str(rank): json.loads(json.dumps(state))}})
    return stream


def read(
    stream: MixtureStream, micro_batches: int, batch: int = 2, first: int = 0
) -> tuple[list[torch.Tensor], list[Any]]:
    """The rows of micro-batches, and the state of the only lane after each."""
    numbers = [((first + i) * stream.ranks + stream.rank) * batch for i in range(micro_batches)]
    rows = [stream.__getitems__([(number + row, 0) for row in range(batch)]) for number in numbers]
    return [default_collate(list(r))["input_ids"] for r in rows], [
        *(s for r in rows for s in r.tag.states[0].lanes.values())
    ]


def first_pass(source: StreamedDocuments, rank: int = 0, ranks: int = 1, **options: Any) -> list[str]:
    """The documents of the first pass of a rank, and an empty string after the last EOS."""
    stream = start(replace(source, sequence_length=1), None, rank, ranks, **options)
    tokens: list[int] = []
    count = None
    while True:
        (rows,), (state,) = read(stream, 1, batch=1, first=len(tokens))
        tokens += rows.flatten().tolist()
        (lane,) = stream._readers["a", 0]._of_number.values()
        part = lane.part
        count = count or documents_of_pass(PartReader(part.source, part.partition, None, lane.lane.sharing), lane.lane)
        if state["documents"] >= count:
            return source.encoder.tokenizer.decode(tokens).split(EOS)


def documents_of_pass(part: PartReader, lane: Lane) -> int:
    """The number of documents of a lane in the first pass."""
    count = number = 0
    while (held := part.holding(number)).at["pass"] == 0:
        count += len(held.dealt(lane))
        number = held.end
    return count


TEXTS = [f"{'fox ' * (i % 13)}number {i} jumps" for i in range(70)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_pass_holds_each_document_once_and_an_eos_after_each(ranks: int) -> None:
    source = stream_of(TEXTS, shards=2)
    found = [text for rank in range(ranks) for text in first_pass(source, rank, ranks, buffer_size=20)]
    assert sorted(text for text in found if text) == sorted(TEXTS)
    assert found.count("") == ranks  # after the last EOS of each partition


def test_rows_are_tokens_and_equal_labels_end_to_end() -> None:
    source = stream_of(TEXTS)
    row = start(source).__getitems__([(0, 0)] * 3)[2]
    assert row["input_ids"].dtype == torch.int64 and row["input_ids"].shape == (L,)
    assert row["labels"].equal(row["input_ids"]) and row["position_ids"].dtype == torch.int64
    short, long = (torch.cat(read(start(stream_of(TEXTS, sequence_length=n)), 840 // n, 1)[0], 1) for n in (3, 8))
    assert short.equal(long)  # nothing is lost between rows


@pytest.mark.parametrize("segment", [1_000_000, 7])
def test_positions_restart_at_documents_not_at_tokens(segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_nexus.mixture.documents.SEGMENT", segment)
    source = stream_of([f"{'fox ' * (i % 9)}{EOS} number {i}" for i in range(40)])
    stream = start(source, buffer_size=10)
    rows = [row for i in range(20) for row in stream.__getitems__([(2 * i, 0), (2 * i + 1, 0)])]
    tokens, positions = (torch.cat([row[name] for row in rows]) for name in ("input_ids", "position_ids"))
    eos = (tokens[:-1] == source.encoder.tokenizer.eos_token_id).nonzero().flatten().tolist()
    # Every second EOS is that of packing. Rows start again.
    assert (positions == 0).nonzero().flatten().tolist() == sorted({*range(0, 320, L), *(i + 1 for i in eos[1::2])})


@pytest.mark.parametrize("segment", [1_000_000, 30])
def test_a_bos_starts_each_document_once(segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_nexus.mixture.documents.SEGMENT", segment)
    source = stream_of(TEXTS)
    adding_bos(source.encoder.tokenizer)
    found = first_pass(source)
    assert sorted(found)[1:] == sorted(BOS + text for text in TEXTS)


@settings(max_examples=15)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(2, 60),
    st.integers(2, 40),
    st.lists(st.text(max_size=60), max_size=9),
)
def test_resume_after_each_micro_batch_gives_the_same_tokens(
    batch: int, shards: int, buffer_size: int, length: int, more: list[str]
) -> None:
    source = stream_of(TEXTS[:30] + more, shards, length, on_error="skip")
    expected, states = read(start(source, buffer_size=buffer_size), 24, batch)
    state = None
    for i, (rows, after) in enumerate(zip(expected, states, strict=True)):  # resume after each micro-batch
        (got,), (state,) = read(start(source, state, buffer_size=buffer_size), 1, batch, i)
        assert got.equal(rows) and state == after


def test_streams_leave_out_documents_by_the_hash_of_packing(tmp_path: Path) -> None:
    source = stream_of(TEXTS)
    packer = SourcePacker(source.encoder, tokenizer_fingerprint(source.encoder.tokenizer), tmp_path)
    hashes = packer.hash_documents(Dataset.from_dict({"text": TEXTS[:20]})).tolist()
    assert hashes == [Document(text).hash for text in TEXTS[:20]]
    source = stream_of(TEXTS, held_out=hashes)
    assert sorted(first_pass(source))[1:] == sorted(TEXTS[20:])


def test_empty_documents_are_left_out_without_an_eos() -> None:
    source = stream_of(["", *TEXTS, ""], on_error="raise")
    assert first_pass(source).count("") == 1
    with pytest.raises(SourceError, match=r"'a' .*a whole pass gave no token"):
        read(start(stream_of(["", ""])), 1)
    with pytest.raises(SourceError, match="that not all is held out"):
        read(start(stream_of(TEXTS, held_out=[Document(text).hash for text in TEXTS])), 1)


@pytest.mark.parametrize(("text", "length"), [("", L), ("fox", 1)])
def test_a_pass_without_tokens_ends_within_three_passes(text: str, length: int) -> None:
    """Also if many lanes share a part, of which each has few documents."""
    config = {} if not text else {"held_out": [Document(text).hash]}
    stream = MixtureStream({"a": stream_of([text] * 6400, sequence_length=length, **config)})
    stream.place(0, 1, 1, Lanes(slots=8, turns=8))
    with pytest.raises(SourceError, match=r"pass [23],.*a whole pass gave no token"):
        stream.__getitems__([(row, 0) for row in range(8)])


def test_a_pass_without_targets_ends_within_three_passes() -> None:
    rows = Dataset.from_dict({"text": ["fox jumps"] * 6400, "answer": [""] * 6400}).to_iterable_dataset()
    columns = {"prompt_column": "text", "completion_column": "answer", "loss_on": "completion"}
    stream = MixtureStream({"a": documents_of(rows, 2, **columns)})
    stream.place(0, 1, 1, Lanes(slots=8, turns=8))
    with pytest.raises(SourceError, match=r"pass [23],.*no row of a whole pass has a token to train on"):
        stream.__getitems__([(row, 0) for row in range(8)])


BAD = [None, 3, "half a pair \ud800"]


@pytest.mark.parametrize("bad", BAD, ids=["missing", "number", "surrogate"])
def test_a_bad_row_is_named_or_skipped_and_counted(bad: Any, caplog: pytest.LogCaptureFixture) -> None:
    texts = [*TEXTS[:40], bad, *TEXTS[40:], bad]
    with pytest.raises(SourceError, match=r"Source 'a': row (40|71) of shard 0 is unusable: .*on_error to 'skip'"):
        first_pass(stream_of(texts))
    source = stream_of(texts, on_error="skip")
    assert sorted(first_pass(source))[1:] == sorted(TEXTS)
    _, (*_, last) = read(start(source), 300)
    assert last["pass"] > 2 and 2 * last["pass"] <= last["skipped"] <= 2 * (last["pass"] + 1)
    assert len(re.findall(r"row (40|71) of shard 0 is skipped, like further unusable rows", caplog.text)) == 1


def test_lanes_of_a_process_warn_of_a_skipped_row_once(caplog: pytest.LogCaptureFixture) -> None:
    stream = MixtureStream({"a": stream_of([*TEXTS, *[None] * 70], on_error="skip")})
    stream.place(0, 1, 1, Lanes(slots=8, turns=1))
    rows = stream.__getitems__([(row, 0) for row in range(400)])
    assert sum(state["skipped"] > 0 for state in rows.tag.states[0].lanes.values()) > 4
    assert caplog.text.count("is skipped, like further unusable rows") == 1


def test_bytes_that_are_no_utf8_are_a_bad_row(tmp_path: Path) -> None:
    values = [text.encode() for text in TEXTS]
    values[33] = b"caf\xe9"
    raw = pa.array(values, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    rows = load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True)
    with pytest.raises(SourceError, match="row 33 of shard 0 is unusable"):
        source = documents_of(rows, L)
        first_pass(source)
    source = documents_of(rows, L, on_error="skip")
    assert sorted(first_pass(source))[1:] == sorted(TEXTS[:33] + TEXTS[34:])


@pytest.mark.parametrize("streamed", [False, True])
def test_null_rows_of_tokens_are_skipped(streamed: bool) -> None:
    """The numpy format fails if the first of several rows is null."""
    tokens = [[20 + i, 30] for i in range(40)]
    rows = Dataset.from_dict({"ids": [row for pair in tokens for row in (None, pair)]})
    rows = (rows.to_iterable_dataset(2) if streamed else rows).with_format("numpy")
    source = documents_of(rows, 3, tokens_column="ids", on_error="skip")
    found = torch.cat(read(start(source), 20)[0])
    assert sorted(found[:, 0].tolist()) == list(range(20, 60))
    with pytest.raises(SourceError, match=r"tokens_column: row .* holds None"):
        read(start(documents_of(rows, 3, tokens_column="ids")), 20)


def test_lanes_share_reads_and_calls_of_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    call, fetch = PreTrainedTokenizerFast.__call__, PartReader.fetch
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", lambda *a, **k: called.append(0) or call(*a, **k))
    monkeypatch.setattr(PartReader, "fetch", lambda *a: called.append(1) or fetch(*a))
    stream = MixtureStream({"a": stream_of(TEXTS * 9, sequence_length=30)})
    stream.place(0, 1, 1, Lanes(slots=8, turns=1))
    stream.begin(None)
    for i in range(40):
        if i == 20:
            called.clear()
        stream.__getitems__([(8 * i + row, 0) for row in range(8)])
    assert called.count(0) <= 30 and called.count(1) <= 30  # for 20 micro-batches of 8 lanes


# --- long documents


@given(st.text(alphabet="ab \n", max_size=200), st.integers(1, 30))
def test_segments_make_up_the_text(text: str, size: int) -> None:
    segments = list(split_text(text, size))
    assert "".join(segments) == text
    assert all(0 < len(segment) <= size for segment in segments[:-1]) and len(segments[-1]) <= size
    assert len(segments) <= 2 * len(text) // size + 2


def test_long_documents_are_tokenized_by_segment_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    call = PreTrainedTokenizerFast.__call__

    def noting(self: Any, texts: Any, *args: Any, **kwargs: Any) -> Any:
        called.extend(len(text) for text in texts)
        return call(self, texts, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", noting)
    monkeypatch.setattr("hf_nexus.mixture.documents.SEGMENT", 100)
    book = " ".join(f"page {i}" for i in range(1000))
    source = stream_of([book])
    whole = torch.tensor([*source.encoder.tokenizer([book])["input_ids"][0], source.encoder.tokenizer.eos_token_id])
    called.clear()
    rows, states = read(start(source), len(whole) // (2 * L))
    assert torch.cat(rows).flatten().equal(whole[: len(whole) // (2 * L) * 2 * L])
    assert max(called) <= 100
    called.clear()
    again, _ = read(start(source, states[20]), 1, first=21)
    assert again[0].equal(rows[21]) and sum(called) <= 300
