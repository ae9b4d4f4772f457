"""Streams give every row once per pass, resume exactly, and name the position of an error."""

import json
import pickle
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader

from hf_nexus.mixture.stream import sources
from hf_nexus.mixture.stream.dataset import MixtureStream
from hf_nexus.mixture.stream.progress import MicroBatchSampler, StreamProgress
from hf_nexus.mixture.stream.reader import SourceError, wait
from hf_nexus.mixture.stream.sources import Partition, ReplayedStream, ResumableStream, layers, open_source
from hf_nexus.mixture.tags import _KEY, StreamState, TaggingCollator


def generate(shards: list[list[int]]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for x in shard:
            yield {"x": x, "ids": [x, x + 1]}


def sharded(sizes: list[int]) -> IterableDataset:
    """Rows 0, 1, ... in shards of some sizes."""
    ends = np.cumsum(sizes).tolist()
    shards = [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
    return IterableDataset.from_generator(generate, gen_kwargs={"shards": shards})


class Replayed(torch.utils.data.IterableDataset):
    """Distributes its rows over the loader's workers, as in the documentation of torch."""

    def __iter__(self) -> Iterator[dict[str, int]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter([{"x": x} for x in range(first, 90, step)])


def read(stream: MixtureStream, numbers: range, batch: int = 1, source: int = 0) -> list[tuple[list[int], Any]]:
    """The rows of micro-batches and the states after them, as a checkpoint restores them."""
    firsts = [(i * stream.ranks + stream.rank) * batch for i in numbers]
    batches = [stream.__getitems__([(first + row, source) for row in range(batch)]) for first in firsts]
    return [([int(row["x"]) for row in rows], json.loads(json.dumps(vars(rows.tag.states[0])))) for rows in batches]


def start(dataset: Any, rank: int = 0, ranks: int = 1, workers: int = 1, states: Any = None, **options: Any) -> Any:
    stream = MixtureStream({"a": dataset}, **options)
    stream.place(rank, ranks, workers)
    stream.begin(states)
    return stream


def passes(micro_batches: list[tuple[list[int], Any]]) -> dict[int, list[int]]:
    """The rows of each pass, read by one process."""
    found: dict[int, list[int]] = {}
    rows: list[int] = []
    for new, state in micro_batches:
        rows += new
        (lane,) = state["lanes"].values()
        found[lane["pass"]] = rows[lane["at"]["since"] :]
        if lane["pass"]:
            found[lane["pass"] - 1] = found[lane["pass"] - 1] + new[: len(new) - len(found[lane["pass"]])]
    return found


# --- every row once


@pytest.mark.parametrize("kind", ["stream", "map-style", "replayed"])
def test_each_pass_has_another_order_the_same_in_each_run(kind: str) -> None:
    dataset: Any = sharded([80])
    dataset = {"stream": dataset, "map-style": Dataset.from_list(list(dataset)), "replayed": Replayed()}[kind]
    one, other = (passes(read(start(dataset), range(200))) for _ in range(2))
    assert one == other and one[0] != one[1]


def test_rows_are_shuffled_by_seed_within_half_the_buffer() -> None:
    rows = [passes(read(start(sharded([1000]), seed=seed, buffer_size=400), range(1000)))[0] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    for block in range(0, 1000, 192):  # whole chunks of 64
        part = rows[0][block : block + 192]
        assert sorted(part) == list(range(block, block + len(part))) != part


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_read_each_row_once(workers: int) -> None:
    for dataset in (Replayed(), sharded([45, 45]), sharded([45, 45]).shuffle(seed=0, buffer_size=8)):
        stream = start(dataset, workers=max(1, workers))
        sampler = BatchSampler(MicroBatchSampler(lambda i: (i, 0), 30, 3), 3, drop_last=True)
        loader = DataLoader(stream, batch_sampler=sampler, num_workers=workers, collate_fn=list)
        assert sorted(row["x"] for rows in loader for row in rows) == list(range(90))


# --- resume


def kinds(tmp_path: Path) -> dict[str, Any]:
    table = Dataset.from_dict({"x": list(range(90)), "ids": [[x, x + 1] for x in range(90)]})
    for shard in range(3):
        table.shard(3, shard).to_parquet(tmp_path / f"{shard}.parquet", batch_size=7)
        table.shard(3, shard).to_json(tmp_path / f"{shard}.jsonl")
    stream = table.to_iterable_dataset(num_shards=3)
    files = {
        "parquet": load_dataset("parquet", data_files=f"{tmp_path}/*.parquet", split="train", streaming=True),
        "jsonl": load_dataset("json", data_files=f"{tmp_path}/*.jsonl", split="train", streaming=True),
    }
    generated = sharded([30, 17, 43])
    twice = {"function": lambda rows: {"x": [x for x in rows["x"] for _ in (0, 1)]}, "remove_columns": ["ids"]}
    return files | {
        "map-style": table,
        "list": [{"x": x} for x in range(90)],
        "arrow": stream,
        "generator": generated,
        "mapped": stream.map(lambda row: {"y": row["x"]}),
        "mapped generator": generated.map(lambda row: {"y": row["x"]}),
        "mapped in batches": files["parquet"].map(**twice, batched=True, batch_size=7),
        "filtered": files["jsonl"].filter(lambda row: row["x"] % 3),
        "filtered generator": generated.filter(lambda row: row["x"] % 3),
        "tensors": files["parquet"].with_format("torch"),
        "mapped tables": stream.with_format("arrow").map(lambda t: t.append_column("y", t["x"]), batched=True),
        "numbered": files["jsonl"].filter(lambda row, i: i % 10, with_indices=True),
        "numbered generator": generated.map(lambda row, i: {"x": 2 * row["x"] + i % 2}, with_indices=True),
        "numbered batches": stream.map(lambda rows, i: {"x": i}, with_indices=True, batched=True, batch_size=7),
        "numbered tables": stream.with_format("arrow").filter(_is_odd, with_indices=True, batched=True, batch_size=7),
        "numbered and skipped": generated.filter(lambda row, i: i % 10, with_indices=True).skip(5).take(60),
        "whole batches": files["parquet"].map(**twice, batched=True, batch_size=7, drop_last_batch=True),
        "one batch": generated.map(lambda rows: {"x": rows["x"][::-1]}, batched=True, batch_size=None),
        "joined": generated.batch(7, drop_last_batch=True).map(lambda rows: {"x": sum(rows["x"])}),
        "added column": stream.remove_columns("x").add_column("x", list(range(90))),
        "concatenated": concatenate_datasets([stream, generated]),
        "numbered and concatenated": concatenate_datasets(
            [generated.filter(lambda row, i: i % 10, with_indices=True), generated.skip(50).map(lambda row: row)]
        ),
        "concatenated and filtered": concatenate_datasets([stream.skip(20), stream.take(9)]).filter(lambda row: True),
        "concatenated and shuffled": concatenate_datasets([generated.take(40), generated.skip(20)]).shuffle(seed=0),
        "side by side": concatenate_datasets([stream.select_columns("x"), stream.select_columns("ids")], axis=1),
        "repeated": generated.repeat(2),
        "skipped": stream.skip(20),
        "taken": generated.take(60),
        "interleaved": interleave_datasets([stream, generated], probabilities=[0.5, 0.5], seed=1),
        "shuffled": generated.shuffle(seed=0, buffer_size=10),
        "shuffled and mapped": files["parquet"]
        .shuffle(seed=0)
        .map(**twice, batched=True, batch_size=7)
        .shuffle(seed=1),
        "shuffled and taken": generated.shuffle(seed=0, buffer_size=10).take(60),
        "replayed": Replayed(),
    }


def _is_odd(table: Any, numbers: list[int]) -> list[bool]:
    return [number % 2 == 1 for number in numbers]


def test_a_pass_of_all_readers_gives_the_rows_of_the_dataset(tmp_path: Path) -> None:
    for name, dataset in kinds(tmp_path).items():
        rows: list[int] = []
        plain = dataset.with_format(None) if isinstance(dataset, IterableDataset) else dataset
        expected = sorted(int(row["x"]) for row in plain)
        for rank in range(3):  # of each three rows, one
            rows += [row for rows, _ in read(start(dataset, rank, ranks=3), range(len(expected) // 3)) for row in rows]
        left = Counter(expected)
        left.subtract(rows)
        assert min(left.values()) == 0 and left.total() == len(expected) % 3, name


@pytest.mark.parametrize(
    ("ranks", "workers", "batch", "buffer_size"),
    [(2, 2, 3, 30), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 2, 1, 200), (1, 2, 2, 10)))],
)
def test_every_kind_of_source_resumes_with_the_same_rows(
    tmp_path: Path, ranks: int, workers: int, batch: int, buffer_size: int
) -> None:
    count, reader = 200 // batch // ranks, {"rank": ranks - 1, "ranks": ranks, "workers": workers}
    for name, dataset in kinds(tmp_path).items():
        expected = read(start(dataset, **reader, buffer_size=buffer_size), range(count), batch)
        assert max(lane["pass"] for lane in expected[-1][1]["lanes"].values()) >= 1, name
        states: dict[str, Any] = {}
        for first in range(0, count, 7):  # resume, and resume the resumed run
            stream = start(dataset, **reader, states=json.loads(json.dumps(states)), buffer_size=buffer_size)
            got = read(stream, range(first, min(first + 7, count)), batch)
            assert [rows for rows, _ in got] == [rows for rows, _ in expected[first : first + 7]], (name, first)
            for _, state in got:
                StreamState(**state).store(states)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_resume_as_accelerate_skips(tmp_path: Path, workers: int) -> None:
    from accelerate import skip_first_batches

    dataset = kinds(tmp_path)["mapped in batches"]

    def loader(states: Any, first: int) -> Any:
        stream = start(dataset, workers=max(1, workers), states=states, buffer_size=20)
        batches = BatchSampler(MicroBatchSampler(lambda i: (i, 0), 50, 4), 4, drop_last=True)
        collate = TaggingCollator(lambda rows: {"x": [int(row["x"]) for row in rows]})
        whole = DataLoader(stream, batch_sampler=batches, num_workers=workers, collate_fn=collate)
        return skip_first_batches(whole, first)

    expected = list(loader(None, 0))
    assert len(expected) == 50 and expected[0][_KEY].rows == {"a": 4}
    for first in (1, 24):
        states: dict[str, Any] = {}
        for batch in expected[:first]:
            batch[_KEY].states[0].store(states)
        assert [b["x"] for b in loader(states, first)] == [b["x"] for b in expected[first:]]


@pytest.mark.parametrize("kind", ["rows", pytest.param("documents", marks=pytest.mark.slow)])
def test_a_late_resume_reads_no_more_than_buffer_and_batch(kind: str) -> None:
    from ...support.stream_documents import documents_of

    read_rows: list[int] = []

    def note(row: dict[str, Any]) -> dict[str, Any]:
        read_rows.append(row["x"])
        return row

    table = Dataset.from_dict({"x": list(range(8000)), "text": [f"number {x}" for x in range(8000)]})
    dataset: Any = table.to_iterable_dataset(num_shards=3).map(note)
    batch = 3
    source = dataset if kind == "rows" else documents_of(dataset, sequence_length=4)
    stream = start(source, buffer_size=200)
    for i in range(4001):
        rows = stream.__getitems__([(batch * i + row, 0) for row in range(batch)])
        if i in (10, 4000):
            read_rows.clear()
            resumed = start(source, states={"a": rows.tag.states[0].lanes}, buffer_size=200)
            resumed.__getitems__([(batch * (i + 1) + row, 0) for row in range(batch)])
            assert 0 < len(read_rows) <= 200 + batch
            assert len(json.dumps(rows.tag.states[0].lanes)) < 1000


# --- errors


def test_a_source_without_rows_is_an_error_that_names_it() -> None:
    with pytest.raises(SourceError, match=r"'a' \(rank 2.*part 1 of 1 of its shards has no rows"):
        read(start(sharded([1]).filter(lambda row: False), rank=2, ranks=3, workers=2), range(0, 1))


@pytest.mark.parametrize("dataset", [sharded([3, 2]), [{"x": x} for x in range(5)]], ids=["stream", "map-style"])
def test_fewer_rows_than_one_micro_batch_are_an_error(dataset: Any) -> None:
    with pytest.raises(SourceError, match=r"about (4|5|6) rows, fewer than one micro-batch of 8"):
        read(start(dataset, ranks=2), range(2), batch=4)


def test_what_cannot_be_read_is_refused_at_once() -> None:
    for source, message in (
        ([], "'a' is empty"),
        (iter([1]), "'a' is a list_iterator, which is not a dataset"),
        (split_dataset_by_node(sharded([4, 4]), 0, 2), "'a' was split with split_dataset_by_node"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureStream({"a": source})
    with pytest.raises(ValueError, match="no sources"):
        MixtureStream({})


class Unsteady:
    """A map function that raises an error before some rows, for a number of times."""

    def __init__(self, error: Exception, at: set[int], times: int):
        self.error, self.at, self.times = error, at, times
        self.failed: dict[int, int] = {}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        x = row["x"]
        if x in self.at and self.failed.get(x, 0) < self.times:
            self.failed[x] = self.failed.get(x, 0) + 1
            raise self.error
        return row


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_nexus.mixture.stream.reader.FIRST_WAIT", 0.001)


def network_errors() -> list[Exception]:
    import aiohttp
    import requests
    from huggingface_hub.errors import HfHubHTTPError

    transport = sys.modules[HfHubHTTPError.__mro__[1].__module__]  # httpx, whose name depends on the version

    return [
        ConnectionResetError("reset"),
        TimeoutError("slow"),
        requests.ReadTimeout("slow"),
        transport.ReadTimeout("slow"),
        aiohttp.ClientPayloadError("cut"),
    ]


@pytest.mark.parametrize("error", network_errors(), ids=lambda e: type(e).__name__)
@pytest.mark.usefixtures("impatient")
def test_network_errors_are_retried_without_losing_a_row(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    dataset = sharded([30, 30, 30])
    expected = read(start(dataset, buffer_size=20), range(100))
    unsteady = dataset.map(Unsteady(error, {0, 17, 40, 89}, times=2))
    got = read(start(unsteady, buffer_size=20), range(100))
    assert [rows for rows, _ in got] == [rows for rows, _ in expected]
    assert "trying again in" in caplog.text and "'a'" in caplog.text


@pytest.mark.usefixtures("impatient")
def test_a_lasting_network_error_ends_after_the_last_attempt() -> None:
    unsteady = Unsteady(TimeoutError("slow"), {17}, times=99)
    with pytest.raises(
        SourceError, match=r"'a' .*shard 0 of 1, after 1\d rows.*5 attempts .* TimeoutError: slow"
    ) as caught:
        read(start(sharded([30]).map(unsteady), buffer_size=20), range(100))
    assert unsteady.failed == {17: 5}
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_waits_grow_up_to_a_limit() -> None:
    waits = [wait(failed) for failed in range(9)]
    assert all(0.5 <= wait / min(60, 2**failed) <= 1 for failed, wait in enumerate(waits))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [ValueError("bad file"), FileNotFoundError("gone")], ids=["other", "permanent"])
def test_a_source_that_raises_is_named_at_once(workers: int, error: Exception) -> None:
    unsteady = sharded([30, 30]).map(Unsteady(error, {40}, times=99))
    stream = start(unsteady, workers=max(1, workers), buffer_size=20)
    sampler = BatchSampler(MicroBatchSampler(lambda i: (i, 0), 60, 2), 2, drop_last=True)
    loader = DataLoader(stream, batch_sampler=sampler, num_workers=workers, collate_fn=list)
    expected = rf"'a' \(rank 0, pass 1, shard 1.*the source raised {type(error).__name__}"
    assert re.search(expected, str(error_of(loader)))


def error_of(loader: DataLoader) -> SourceError | None:
    """The error without its traceback, which is in a cycle with the loader and makes its workers stop slowly."""
    try:
        list(loader)
    except SourceError as error:
        return error.with_traceback(None)
    return None


# --- rows


def test_rows_reach_the_collator_as_the_dataset_gives_them() -> None:
    table = Dataset.from_dict({"ids": [[1, 2, 3]] * 4, "label": [1] * 4, "name": ["a"] * 4})
    for dataset in (table.to_iterable_dataset(), IterableDataset.from_generator(lambda: iter(table))):
        assert start(dataset).__getitems__([(0, 0)])[0] == table[0]
        tensors = start(dataset.with_format("torch")).__getitems__([(0, 0)])[0]
        assert tensors["ids"].dtype == torch.int64 and tensors["ids"].tolist() == [1, 2, 3]
    assert start(table.to_iterable_dataset().with_format("arrow")).__getitems__([(0, 0)])[0] == table[0]


def test_states_pass_through_collators_and_devices_untouched() -> None:
    from accelerate.utils import send_to_device
    from torch.utils.data._utils.pin_memory import pin_memory

    rows = start(sharded([9])).__getitems__([(0, 0)] * 2)
    batch = TaggingCollator(lambda rows: {"x": torch.tensor([row["x"] for row in rows])})(rows)
    assert batch[_KEY] is rows.tag and rows.tag.rows == {"a": 2}
    assert send_to_device(batch, "cpu")[_KEY] is rows.tag
    assert pickle.loads(pickle.dumps(batch))[_KEY] == rows.tag
    if torch.cuda.is_available():
        assert pin_memory(batch)[_KEY] is rows.tag


# --- order of micro-batches


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_gets_the_same_numbers_and_sources(ranks: int) -> None:
    from accelerate.data_loader import BatchSamplerShard

    batch = 2
    for rank in range(ranks):
        sampler = MicroBatchSampler(lambda i: (i, i % 3), 7, batch * ranks)
        assert len(sampler) == 7 * batch * ranks
        shard = BatchSamplerShard(BatchSampler(sampler, batch, drop_last=True), ranks, rank)
        firsts = [(i * ranks + rank) * batch for i in range(7)]
        assert list(shard) == [[(first + row, i % 3) for row in range(batch)] for i, first in enumerate(firsts)]


def test_the_source_of_a_skipped_micro_batch_is_not_decided() -> None:
    asked: list[int] = []

    def weights(step: int) -> dict[str, float]:
        asked.append(step)
        return {"a": 1.0}

    progress = StreamProgress(MixtureStream({"a": sharded([9])}), weights, inner_steps=3)
    progress.begin(2, None)
    sampler = MicroBatchSampler(progress.index_of, 9, rows=2, first=lambda: progress.sent + 1)
    indices = iter(sampler)
    assert list(islice(indices, 12)) == [(0, 0)] * 12 and asked == []
    assert len(list(indices)) == 6 and asked == [2] and progress.sent == 8


# --- upstream


def test_upstream_has_the_layers_that_we_know() -> None:
    """The names of layers decide whether a stream has shards and a position."""
    stream = sharded([5, 5])
    table = Dataset.from_dict({"x": [1]}).to_iterable_dataset()
    names = {type(layer).__name__ for layer in layers(stream)} | {type(layer).__name__ for layer in layers(table)}
    assert names == {"ExamplesIterable", "ArrowExamplesIterable"}
    chain = table.map(lambda row: row).filter(lambda row: True).select_columns(["x"]).with_format("torch")
    names = {type(layer).__name__ for layer in layers(chain)}
    assert {"MappedExamplesIterable", "FilteredExamplesIterable", "SelectColumnsIterable"} < names
    assert open_source("a", stream.map(lambda row: row), 5).shards == 2
    counting = (
        stream.map(lambda row, i: row, with_indices=True),
        stream.filter(lambda row, i: True, with_indices=True),
        stream.map(lambda rows: rows, batched=True, drop_last_batch=True),
        stream.map(lambda rows: rows, batched=True, batch_size=None),
        stream.batch(2, drop_last_batch=True).map(lambda row: row),
        stream.add_column("y", [0] * 10),
    )
    for other in (*counting, stream.skip(1), stream.take(1), interleave_datasets([stream, stream]), stream.repeat(2)):
        source = open_source("a", other, 5)
        assert isinstance(source, ResumableStream) and source.shards == 1
    names = [type(layer).__name__ for layer in layers(table.shuffle(buffer_size=4))]
    assert names[:2] == ["BufferShuffledExamplesIterable", "InterleavedShardsExamplesIterable"]
    assert names[2:] == ["RebatchedArrowExamplesIterable", "ArrowExamplesIterable"]
    assert table._ex_iterable.iter_arrow is not None and stream._ex_iterable.iter_arrow is None
    assert table._formatting is None and table.with_format("torch")._formatting.format_type == "torch"
    assert table.with_format("arrow")._formatting.is_table
    assert table._distributed is None


def test_blocks_take_the_place_of_a_shuffle_buffer() -> None:
    def opened(stream: Any) -> Any:
        return open_source("a", stream, 5)

    table = Dataset.from_dict({"x": range(10)}).to_iterable_dataset(2)
    for stream in (sharded([5, 5]), table):
        shuffled = stream.shuffle(seed=1, buffer_size=40)
        for other in (shuffled, shuffled.map(lambda row: row), shuffled.filter(bool).shuffle(buffer_size=7)):
            source = opened(other)
            assert isinstance(source, ResumableStream) and (source.shards, source.block_rows) == (2, 20)
            left = {type(layer).__name__ for layer in layers(source.dataset)}
            assert not left & {"BufferShuffledExamplesIterable", "InterleavedShardsExamplesIterable"}
        assert opened(stream.shuffle(buffer_size=4)).block_rows == 5
        assert opened(stream.take(7).shuffle(buffer_size=40)).shards == 1
        for other in (shuffled.take(3), shuffled.map(lambda row, i: row, with_indices=True), shuffled.repeat(2)):
            assert isinstance(opened(other), ReplayedStream)
        assert len(layers(shuffled)) > len(layers(stream))  # it is not changed


@pytest.mark.parametrize(
    "value",
    [
        "x" * 3000,
        b"x" * 3000,
        [1] * 100,
        [[[0.5] * 10] * 10],
        {"array": np.zeros(400), "sampling_rate": 16_000},
        torch.zeros(800),
        Image.new("RGB", (32, 32)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_block_of_rows_is_limited_by_their_memory(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 600_000)
    stream = IterableDataset.from_generator(lambda: ({"x": value} for _ in range(2000)))
    block = next(open_source("a", stream, 2000).blocks(Partition("a", 0, 1, 0, 0), 0, None))
    assert 128 <= len(block.order) < 320


def test_parquet_row_groups_before_the_position_are_not_read(tmp_path: Path) -> None:
    Dataset.from_dict({"x": list(range(100))}).to_parquet(tmp_path / "a.parquet", batch_size=10)
    dataset = load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True)
    assert dataset.reshard().num_shards == 10
    stream = start(dataset, buffer_size=10)
    (*_, last) = read(stream, range(93))
    (lane,) = last[1]["lanes"].values()
    assert lane["at"]["block"]["state"]["examples_iterable"]["examples_iterable"]["shard_idx"] >= 8
