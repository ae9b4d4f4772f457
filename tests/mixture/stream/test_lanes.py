"""The rows of each global micro-batch depend on neither ranks nor workers, before or after a resume."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, List, Value, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_nexus.mixture.stream.lanes import Lanes
from hf_nexus.mixture.stream.progress import MicroBatchSampler
from hf_nexus.mixture.stream.reader import RowReader, SourceError
from hf_nexus.mixture.stream.sources import Partition, open_source

from ...support.stream_documents import documents_of
from ...support.stream_readers import Readers
from ...support.streams import Replayed, sharded, texts


def _is_early(row: dict[str, Any]) -> bool:
    return row["x"] < 30


SOURCES: dict[str, Any] = {
    "map-style": lambda: [{"x": x} for x in range(90)],
    "one file": lambda: sharded([97], 0),
    "few files": lambda: sharded([30, 17, 43], 0),
    "many files": lambda: sharded([5 + i % 4 for i in range(70)], 0),
    "empty files": lambda: sharded([30 if i % 9 == 0 else 0 for i in range(27)], 0),
    "tiny": lambda: sharded([7, 8], 0),
    "replayed": lambda: Replayed(75, 0),
    "documents": lambda: documents_of(texts(60).to_iterable_dataset(3), 8),
    "documents of many files": lambda: documents_of(texts(140).to_iterable_dataset(33), 8),
    "documents of empty files": lambda: documents_of(texts(140).to_iterable_dataset(33).filter(_is_early), 8),
    "few documents": lambda: documents_of(texts(30).to_iterable_dataset(2), 8),
}
NUMBERS = st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 4))  # ranks that divide 12 rows, and workers


@settings(max_examples=5)
@given(
    kind=st.sampled_from(list(SOURCES)),
    before=NUMBERS,
    after=NUMBERS,
    at=st.integers(0, 12),
    buffer=st.integers(2, 90),
)
def test_any_ranks_and_workers_read_the_same_micro_batches(
    kind: str, before: tuple[int, int], after: tuple[int, int], at: int, buffer: int
) -> None:
    lanes, source = Lanes.of_run(12, *before), SOURCES[kind]
    whole = Readers(source(), 1, 1, lanes, buffer_size=buffer).read(at + 9, 12)
    first = Readers(source(), *before, lanes, buffer_size=buffer)
    assert first.read(at, 12) == whole[:at]
    second = Readers(source(), *after, lanes, first.states, at, buffer_size=buffer)
    assert second.read(4, 12) == whole[at : at + 4]
    third = Readers(source(), *before, lanes, second.states, at + 4, buffer_size=buffer)
    assert third.read(5, 12) == whole[at + 4 :]


@settings(max_examples=15)
@given(
    sizes=st.lists(st.integers(12, 20), min_size=1, max_size=24),
    kind=st.sampled_from(["stream", "map-style", "replayed"]),
    ranks=st.integers(1, 4),
    workers=st.integers(1, 4),
    batch=st.integers(1, 3),
    buffer=st.integers(2, 60),
)
def test_no_row_is_lost_or_repeated(
    sizes: list[int], kind: str, ranks: int, workers: int, batch: int, buffer: int
) -> None:
    """Each pass of the parts holds each row once, and micro-batches take the rows of each part one after the other."""
    dataset: Any = sharded(sizes, 0)
    if kind == "map-style":
        dataset = Dataset.from_list(list(dataset))
    elif kind == "replayed":
        dataset = dataset.shuffle(seed=3, buffer_size=7).take(sum(sizes))
    rows, lanes = ranks * batch, Lanes.of_run(ranks * batch, ranks, workers)
    own = [(slot, turn) for slot in range(lanes.slots) for turn in range(lanes.turns)]
    reader = RowReader("a", open_source("a", dataset, buffer // 2), 0, lanes, 0, own, {})
    visits = 2
    expected, first_pass = Counter[int](), []
    for part in reader._parts.values():
        for number in range(visits * lanes.turns * rows // len(reader._parts)):
            held = part.holding(number)
            expected[part.fetch(held, [number - held.first])[0]["x"]] += 1
        number = 0
        while (held := part.holding(number)).at["pass"] == 0:
            first_pass += [row["x"] for row in part.fetch(held, list(range(held.end - held.first)))]
            number = held.end
    assert sorted(first_pass) == list(range(sum(sizes)))
    found = Readers(dataset, ranks, workers, lanes, buffer_size=buffer).read(visits * lanes.turns, rows)
    assert Counter(x for batch in found for x in batch) == expected


@pytest.mark.parametrize("kind", ["generator", "parquet"])
def test_a_part_without_rows_goes_on_with_other_shards(tmp_path: Path, kind: str) -> None:
    """Its passes without rows do not count for `max_epochs`."""
    dataset: Any = sharded([12, 12, *[0] * 14], 0)
    if kind == "parquet":
        for i in range(16):
            rows = range(12 * i, 12 * i + 12 if i < 2 else 12 * i)
            table = pa.table({"x": pa.array(rows, pa.int64())})
            with pq.ParquetWriter(tmp_path / f"{i:02}.parquet", table.schema) as file:
                if rows:  # as other programs write no row group
                    file.write_table(table)
        dataset = load_dataset("parquet", data_files=f"{tmp_path}/*.parquet", split="train", streaming=True)
    readers = Readers(dataset, 1, 1, Lanes(8, 8))
    found, states = readers.read(1, 8), readers.states["a"].values()
    assert {state["pass"] for state in states} == {0} < {0, *(state["at"]["pass"] for state in states)}
    found += readers.read(39, 8)
    assert {x for batch in found for x in batch} == set(range(24))


def test_parts_without_rows_in_any_pass_are_an_error() -> None:
    with pytest.raises(SourceError, match=r"part 1 of 4 of its shards has no rows in 49 passes in a row"):
        Readers(sharded([1] * 16, 0).filter(lambda row: False), 1, 1, Lanes(8, 8)).read(1, 8)


def files_of(folder: Path, sizes: list[int]) -> Any:
    """Rows 0, 1, ... in JSON files of some numbers of rows, all of the same length."""
    ends, names = np.cumsum(sizes).tolist(), []
    for size, end in zip(sizes, ends, strict=True):
        names.append(str(folder / f"{len(names):03}.jsonl"))
        Path(names[-1]).write_text("".join(f'{{"x": {x:5}}}\n' for x in range(end - size, end)))
    return load_dataset("json", data_files=names, split="train", streaming=True)


@pytest.mark.parametrize("sizes", [[475, *[25] * 19], [190, *[10 + 2 * i for i in range(20)], 200]])
def test_files_are_read_in_proportion_to_their_sizes(tmp_path: Path, sizes: list[int]) -> None:
    dataset, total = files_of(tmp_path, sizes), sum(sizes)
    readers = Readers(dataset, 1, 1, Lanes(8, 8), buffer_size=64)
    found = readers.read(total // 8, 8)
    times = Counter(x for batch in found for x in batch)
    largest = [times[x] for x in range(sizes[0])]
    assert sum(largest) / sizes[0] > 0.8 and max(times.values()) <= 2
    assert sum(state["pass"] for state in readers.states["a"].values()) <= 8  # few have ended before all
    half = Readers(dataset, 2, 2, Lanes(8, 8), buffer_size=64)
    assert half.read(10, 8) == found[:10]
    assert Readers(dataset, 4, 1, Lanes(8, 8), half.states, 10, buffer_size=64).read(30, 8) == found[10:40]


@given(st.lists(st.integers(0, 10**9), min_size=8, max_size=40), st.integers(1, 8), st.integers(0, 9))
def test_parts_of_known_sizes_are_about_equal(sizes: list[int], count: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(sizes)).tolist()
    parts = [Partition("a", index, count, 0, 0) for index in range(count)]
    cut = [part.slices(order, sizes) for part in parts]
    units = Counter((of.shard, unit) for slices in cut for of in slices for unit in range(of.low, of.high))
    assert units == Counter((shard, unit) for shard in order for unit in range(count))
    assert [part.slices(order, [7] * len(sizes)) for part in parts] == [part.slices(order) for part in parts]
    if min(sizes) and count <= sum(sizes) // (2 * max(sizes)):
        each = [sum(sizes[of.shard] * (of.high - of.low) for of in slices) for slices in cut]
        assert all(abs(size - sum(sizes)) <= sum(sizes) / 6 for size in each)


@pytest.mark.parametrize(("rows", "ranks", "workers", "lanes"), [
    (64, 1, 1, Lanes(8, 8)),
    (64, 8, 8, Lanes(8, 8)),
    (512, 64, 4, Lanes(64, 8)),
    (12, 4, 1, Lanes(4, 8)),
    (2, 1, 3, Lanes(2, 9)),
    (7, 7, 1, Lanes(7, 8)),
])  # fmt: skip
def test_a_new_run_divides_its_lanes_evenly(rows: int, ranks: int, workers: int, lanes: Lanes) -> None:
    assert Lanes.of_run(rows, ranks, workers) == lanes


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("skipped", [0, 7])
def test_each_worker_is_asked_for_its_own_turns_only(workers: int, skipped: int) -> None:
    """A data loader gives its requests to its workers in turn. All micro-batches of the run are among them."""
    counts: Counter[int] = Counter({0: 5, 1: 2, 2: 11})
    expected: list[Any] = []

    def index_of(number: int) -> tuple[int, int]:
        source = (0, 0, 1, 0, 2, 0, 1)[number % 7]
        expected.append((counts[source], source))
        counts[source] += 1
        return expected[-1]

    sampler = MicroBatchSampler(index_of, 80 + skipped, 1, workers, (workers - 1) * 4, first=lambda: skipped)
    requests = list(sampler)[skipped:]
    assert all(ordinal % workers == i % workers for i, (ordinal, _) in enumerate(requests))
    assert set(expected) < set(requests) or sorted(expected) == sorted(requests)
    assert len(requests) == len(set(requests)) < 80 + 8 * workers
    for source in range(3):  # each worker goes forward
        for worker in range(workers):
            mine = [ordinal for ordinal, of in requests[worker::workers] if of == source]
            assert mine == sorted(mine)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("left", [1, 2])
def test_a_run_may_resume_a_few_micro_batches_before_its_end(workers: int, left: int) -> None:
    """Also where none of them is of the first source, and the worker that comes first has none."""
    expected = [(21 + i, 1) for i in range(left)]
    requests = list(MicroBatchSampler(lambda number: expected[number], left, 1, workers, (workers - 1) * 3))
    assert {*expected} <= {*requests} and len({*requests}) == len(requests)
    assert all(ordinal % workers == i % workers for i, (ordinal, _) in enumerate(requests))


@pytest.mark.parametrize("kind", ["one file", "documents"])
def test_lanes_in_one_process_share_one_reading(kind: str) -> None:
    read: list[int] = []

    def note(row: dict[str, Any]) -> dict[str, Any]:
        read.append(row["x"])
        return row

    rows = texts(1500).to_iterable_dataset().map(note)
    source = documents_of(rows, 8) if kind == "documents" else rows
    readers = Readers(source, 1, 1, Lanes(8, 8), buffer_size=400)
    readers.read(60, 8)
    assert max(Counter(read).values()) == 1


def test_documents_are_dealt_by_their_size() -> None:
    """Lanes then stay close together, although documents differ: what one has not taken yet must be held."""
    sizes = [1 if x % 7 else 60 for x in range(6000)]
    rows = Dataset.from_dict({"text": ["fox " * size for size in sizes]}).to_iterable_dataset()
    readers = Readers(documents_of(rows, 32), 1, 1, Lanes(4, 4), buffer_size=400)
    readers.read(300, 4)
    firsts = [state["at"]["first"] for state in readers.states["a"].values()]
    assert min(firsts) > 1000 and max(firsts) - min(firsts) <= 600


@pytest.mark.parametrize("kind", ["arrays", "fixed"])
def test_tokens_are_dealt_by_their_size(kind: str) -> None:
    """Without a size, all documents of a block would go to one lane, and the others would read on for theirs."""
    ids, features = [[5] * 32 for _ in range(6400)], None
    if kind == "fixed":
        features = Features(input_ids=List(Value("int64"), 32))
    rows = Dataset.from_dict({"input_ids": ids}, features).to_iterable_dataset()
    if kind == "arrays":
        rows = rows.map(lambda row: {"input_ids": np.asarray(row["input_ids"])})
    readers = Readers(documents_of(rows, 32, tokens_column="input_ids"), 1, 1, Lanes(4, 4), buffer_size=400)
    readers.read(300, 4)
    firsts = [state["at"]["first"] for state in readers.states["a"].values()]
    assert max(firsts) - min(firsts) <= 600


@pytest.mark.slow
@pytest.mark.parametrize("buffer", [4, 60])
def test_lanes_stay_together_over_many_small_blocks(buffer: int) -> None:
    """Of two documents, or of two for each lane: what a lane has more is counted from block to block."""
    rows = Dataset.from_dict({"text": ["fox " * (1 + x * 37 % 11) ** 2 for x in range(6000)]}).to_iterable_dataset()
    readers = Readers(documents_of(rows, 32), 1, 1, Lanes(4, 4), buffer_size=buffer)
    readers.read(1200, 4)
    firsts = [state["at"]["first"] for state in readers.states["a"].values()]
    assert min(firsts) > 3000 and max(firsts) - min(firsts) <= 100  # 4 times to 15 times as many without it
