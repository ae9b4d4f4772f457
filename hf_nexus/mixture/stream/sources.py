"""Sources of rows: every kind of dataset, read for one partition in shuffled blocks, from which reading can resume."""

import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.table import InMemoryTable
from datasets.utils.file_utils import xgetsize
from pyarrow import compute

from ..digest import digest

__all__ = [
    "Block",
    "MapStyleSource",
    "Partition",
    "ReplayedStream",
    "ResumableStream",
    "Source",
    "is_streaming",
    "layers",
    "open_source",
]

# Rows per read. The positions that `datasets` stores depend on it.
CHUNK = 64
# A block of large rows ends early.
BLOCK_BYTES = 128 << 20
# Shards of a part at least, because parts are equal to within the size of a shard, or of some part of it if sizes are
# known: a part then has at least twice the size of the largest.
_SHARDS, _LARGEST = 4, 2
# Layers of a streaming dataset under which each shard holds its own rows, unless they count rows. Under others, such
# as `skip` and `interleave_datasets`, the rows of a shard depend on the other shards.
_DIVISIBLE = {
    "ArrowExamplesIterable",
    "ExamplesIterable",
    "FilteredExamplesIterable",
    "FormattedExamplesIterable",
    "MappedExamplesIterable",
    "RebatchedArrowExamplesIterable",
    "SelectColumnsIterable",
}
# Settings of these layers that count rows over all shards, such as `with_indices` of map and filter.
_COUNTING = ("with_indices", "drop_last_batch", "is_batch_accumulate_arrow_table_function")
# Layers of `.shuffle()`, which hold rows back, so their position cannot be stored. It also sets the size of batches.
_BUFFERING = {"BufferShuffledExamplesIterable", "InterleavedShardsExamplesIterable"}
_SHUFFLING = {*_BUFFERING, "RebatchedArrowExamplesIterable"}


class ShardSlice(NamedTuple):
    """The rows of a shard whose number modulo the number of partitions is at least `low` and below `high`."""

    shard: int
    low: int
    high: int


@dataclass(frozen=True)
class Partition:
    """
    A part of a source. In each pass, every row of the source is in exactly one of its `count` parts. All orders are
    drawn from `seed`. `rank` is the one that reads.
    """

    source: str
    index: int
    count: int
    rank: int
    seed: int

    def rng(self, *key: int) -> np.random.Generator:
        """A generator for the source and `key`. All partitions draw the same unless their index is in `key`."""
        return np.random.default_rng((self.seed, zlib.crc32(self.source.encode()), *key))

    def slices(self, order: list[int], sizes: list[int] | None = None) -> list[ShardSlice]:
        """
        The slices of shards that make up this partition, for shards in a given order. Each partition takes an equal
        length of the shards laid end to end, which splits only the shards at its two ends. `sizes` are those of the
        shards in the order of their numbers, if they differ.
        """
        lengths = [1] * len(order) if sizes is None else [max(1, sizes[shard]) for shard in order]
        start, end = (self._border(index, lengths) for index in (self.index, self.index + 1))
        found = []
        for number in range(start // self.count, -(-end // self.count)):
            first = number * self.count
            found.append(ShardSlice(order[number], max(start - first, 0), min(end - first, self.count)))
        return found

    def _border(self, index: int, lengths: list[int]) -> int:
        """Where partition `index` starts among shards laid end to end, in units of 1 / count of a shard."""
        rest = index * sum(lengths)  # in units of 1 / count of a length
        for number, length in enumerate(lengths):
            if rest < length * self.count:
                return number * self.count + round(rest / length)
            rest -= length * self.count
        return len(lengths) * self.count

    def shuffled(self, part: ShardSlice, first: int, count: int, *key: int) -> np.ndarray:
        """Which of the `count` rows from row `first` of a shard are in a slice of it, in an order drawn for `key`."""
        owner = (first + np.arange(count)) % self.count
        return self.rng(*key).permutation(np.flatnonzero((part.low <= owner) & (owner < part.high)))


@dataclass(frozen=True)
class Block:
    """
    Rows of a partition that are read together: the position after them, a function that returns rows by their numbers
    in the block, and the partition's numbers in reading order. `first_row` is counted in the shard. `sizes` returns
    the approximate size of each row.
    """

    end: dict[str, Any]
    fetch: Callable[[list[int]], list]
    order: np.ndarray
    first_row: int = 0
    shard: int | None = None
    sizes: Callable[[], np.ndarray] | None = None


class Source(ABC):
    """
    A dataset as a reader sees it. `size` is its number of rows, where it is known. `parts` is the largest number of
    parts in which it can be read without reading the others. `sizes` are those of its shards, if parts are cut by
    them. `mark` is a hash of its first rows, where each reader must read all rows and has read the first: it is then
    the same for all readers.
    """

    size: int | None = None
    parts: int = 1
    sizes: list[int] | None = None
    mark: int | None = None

    @abstractmethod
    def blocks(self, partition: Partition, pass_: int, position: dict[str, Any] | None) -> Iterator[Block]:
        """The blocks of a partition in a pass, from a position of [`Block`] on."""

    @abstractmethod
    def describe(self, partition: Partition, pass_: int, position: dict[str, Any] | None) -> str:
        """A position as text, for errors."""


class MapStyleSource(Source):
    """Any object with `__len__` and `__getitem__`. Its rows are permuted in each pass and dealt to the partitions."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.size = len(dataset)

    def blocks(self, partition: Partition, pass_: int, position: dict[str, Any] | None) -> Iterator[Block]:
        """One block for the whole pass, whose rows are not read yet."""
        order = partition.rng(pass_).permutation(len(self.dataset))[partition.index :: partition.count]
        if position is None or position["row"] == 0:
            yield Block({"row": len(order)}, self._fetch, order)

    def describe(self, partition: Partition, pass_: int, position: dict[str, Any] | None) -> str:
        return f"{len(self.dataset)} rows"

    def _fetch(self, numbers: list[int]) -> list:
        fetch = getattr(self.dataset, "__getitems__", None)
        try:
            return fetch(numbers) if fetch is not None else [self.dataset[i] for i in numbers]
        except AttributeError:  # the numpy format fails if only the first row is null
            if len(numbers) == 1:
                raise
            return [row for i in numbers for row in self._fetch([i])]


class ResumableStream(Source):
    """
    A `datasets.IterableDataset` that can return to a position. Each pass has its own order of shards.

    A resume skips the rows before the position without reading them, as far as the file format allows.
    """

    def __init__(self, dataset: Any, block_rows: int):
        self.divisible = all(_is_divisible(layer) for layer in layers(dataset))
        self.shards = dataset.num_shards if self.divisible else 1
        self.parts = max(1, self.shards // _SHARDS)
        self.sizes = _unequal_sizes(dataset) if self.parts > 1 else None
        if self.sizes is not None:
            self.parts = max(1, min(self.parts, sum(self.sizes) // (_LARGEST * max(self.sizes))))
        self.block_rows = block_rows
        self.format = dataset._formatting.format_type if dataset._formatting else None
        # Tables take less memory than rows until rows are asked for.
        self.dataset = dataset.with_format("arrow") if dataset._ex_iterable.iter_arrow is not None else dataset

    def blocks(self, partition: Partition, pass_: int, position: dict[str, Any] | None) -> Iterator[Block]:
        slices = self._slices(partition, pass_)
        position = position or _slice_start(0)
        while position["slice"] < len(slices):
            number = position["slice"]
            yield from self._read(partition, pass_, slices[number], position)
            position = _slice_start(number + 1)

    def describe(self, partition: Partition, pass_: int, position: dict[str, Any] | None) -> str:
        slices = self._slices(partition, pass_)
        position = position or _slice_start(0)
        shard = slices[min(position["slice"], len(slices) - 1)].shard
        return f"shard {shard} of {self.shards}, after {position['row']} rows"

    def _slices(self, partition: Partition, pass_: int) -> list[ShardSlice]:
        return partition.slices(partition.rng(pass_).permutation(self.shards).tolist(), self.sizes)

    def _read(self, partition: Partition, pass_: int, part: ShardSlice, position: dict[str, Any]) -> Iterator[Block]:
        # A new object each time: `load_state_dict` also affects later iterations of the same object.
        dataset = self.dataset.shard(self.shards, part.shard) if self.divisible else _anew(self.dataset)
        if self.divisible:
            dataset = dataset.reshard()  # into row groups where there are any, which are skipped without being read
        if position["state"] is not None:
            dataset.load_state_dict(position["state"])
        # `iter`, unlike `__iter__`, does not distribute the shards over data loader workers.
        limit = max(1, self.block_rows // partition.count)  # parts share the buffer
        chunks, ended = dataset.iter(min(CHUNK, limit)), False
        while not ended:
            held, count, ended = _read_chunks(chunks, limit, BLOCK_BYTES // partition.count)
            number, first = position["slice"], position["row"]
            position = {"slice": number, "row": first + count, "state": dataset.state_dict()}
            if count:
                order = partition.shuffled(part, first, count, pass_, partition.index, number, first)
                fetch = _fetch_from(held, dataset.features, self.format)
                end = _slice_start(number + 1) if ended else position
                yield Block(end, fetch, order, first, part.shard, partial(_sizes, held))


def _slice_start(number: int) -> dict[str, Any]:
    return {"slice": number, "row": 0, "state": None}


class ReplayedStream(Source):
    """
    An iterable that cannot return to a position: a torch `IterableDataset`, or a `datasets.IterableDataset` with a
    shuffle buffer that decides which rows it has, as before `take`. Every process reads all rows and keeps its own. A
    resume reads the pass again from its start.
    """

    def __init__(self, dataset: Any, block_rows: int):
        self.dataset = dataset
        self.block_rows = block_rows

    def blocks(self, partition: Partition, pass_: int, position: dict[str, Any] | None) -> Iterator[Block]:
        row, ended = position["row"] if position else 0, False
        # A new object where possible: iterators of one stream share its position.
        dataset = _anew(self.dataset) if is_streaming(self.dataset) else self.dataset
        set_epoch = getattr(dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(pass_)
        with _outside_worker():
            rows = islice(iter(dataset), row, None)
        chunks: Iterator[Any] = iter(lambda: self._chunk(rows), [])
        if row == pass_ == 0 and self.mark is None and (chunk := next(chunks, None)) is not None:
            self.mark = zlib.crc32(digest(chunk[:4]).encode())
            chunks = chain([chunk], chunks)
        part = ShardSlice(0, partition.index, partition.index + 1)
        while not ended:
            held, count, ended = _read_chunks(chunks, self.block_rows, BLOCK_BYTES)
            first, row = row, row + count
            if count:
                order = partition.shuffled(part, first, count, pass_, partition.index, first)
                fetch, sizes = _fetch_from(held, None, None), partial(_sizes, held)
                yield Block({"row": row}, fetch, order, first, None, sizes)

    def describe(self, partition: Partition, pass_: int, position: dict[str, Any] | None) -> str:
        return f"after {position['row'] if position else 0} rows"

    def _chunk(self, rows: Iterator[Any]) -> list[Any]:
        with _outside_worker():
            return list(islice(rows, min(CHUNK, self.block_rows)))


def open_source(name: str, dataset: Any, block_rows: int) -> Source:
    """
    The source for a dataset, by its kind. Streams are read in blocks of `block_rows`, or of half of the shuffle buffer
    of the dataset if that is larger.

    Raises:
        ValueError: The dataset is split by node already.
    """
    if is_streaming(dataset):
        if dataset._distributed is not None:
            raise ValueError(
                f"Source {name!r} was split with split_dataset_by_node. Pass the whole dataset: the mixture "
                "distributes its rows over the ranks."
            )
        if dataset._formatting is not None and dataset._formatting.is_table:  # collators take rows
            dataset = dataset.with_format(None)
        dataset, buffered = _unbuffered(dataset)
        buffering = any(type(layer).__name__ in _BUFFERING for layer in layers(dataset))
        kind = ReplayedStream if buffering else ResumableStream
        return kind(dataset, max(block_rows, buffered // 2))
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return ReplayedStream(dataset, block_rows)
    return MapStyleSource(dataset)


# ---- Reading in chunks ----


def is_streaming(dataset: Any) -> bool:
    """Whether the dataset is a `datasets.IterableDataset`."""
    return isinstance(dataset, datasets.IterableDataset)


def layers(dataset: Any) -> list[Any]:
    """The layers of a `datasets.IterableDataset`, such as its files, maps and filters, from the last to the first."""
    found, todo = [], [dataset._ex_iterable]
    while todo:
        found.append(layer := todo.pop())
        todo += vars(layer).get("ex_iterables", [])
        todo += [vars(layer)["ex_iterable"]] if "ex_iterable" in vars(layer) else []
    return found


def _unbuffered(dataset: Any) -> tuple[Any, int]:
    """
    A `datasets.IterableDataset` without the shuffle buffers under which rows stay the same, and the size of the
    largest: blocks of rows are shuffled anyway. Rows do not stay the same if a layer after the buffer counts them.
    """
    after, largest, layer = list[Any](), 0, dataset._ex_iterable
    while "ex_iterable" in vars(layer):
        if type(layer).__name__ in _BUFFERING:
            while type(layer).__name__ in _SHUFFLING:
                largest, layer = max(largest, vars(layer).get("buffer_size", 0)), layer.ex_iterable
        elif _is_divisible(layer):
            after.append(layer)
            layer = layer.ex_iterable
        else:
            break
    if not largest:
        return dataset, 0
    for outer in reversed(after):
        inner, layer = layer, copy(outer)
        layer.ex_iterable = inner
    new = dataset.shard(1, 0)
    new._ex_iterable = layer
    return new, largest


def _anew(dataset: Any) -> Any:
    """
    A new object of a `datasets.IterableDataset`, with its own position. `shard(1, 0)` alone cuts the datasets of a
    concatenation into their shards, and each shard counts its rows from zero.
    """
    new = dataset.shard(1, 0)
    new._ex_iterable = _layer_anew(dataset._ex_iterable)
    return new


def _layer_anew(layer: Any) -> Any:
    if "ex_iterables" in vars(layer):
        new = copy(layer)
        new.ex_iterables = [_layer_anew(of) for of in layer.ex_iterables]
        return new
    new = layer.shard_data_sources(1, 0)
    if "ex_iterable" in vars(layer):
        new.ex_iterable = _layer_anew(layer.ex_iterable)
    return new


def _unequal_sizes(dataset: Any) -> list[int] | None:
    """
    Bytes of each shard of a `datasets.IterableDataset` whose shards are files on a disk or on the Hub. `None` if they
    are all the same, or not known.
    """
    for files in vars(layers(dataset)[-1]).get("kwargs", {}).values():
        # Row groups of a file have its name.
        if isinstance(files, list) and all(isinstance(f, str) for f in files) and len({*files}) == len(files):
            try:  # for files on the Hub, `datasets` has listed the folders
                known = all(os.path.isfile(file) or file.startswith("hf://") for file in files)
                sizes = [xgetsize(file) for file in files] if known else []
            except Exception:  # reading reports what is wrong
                return None
            if len({*sizes}) > 1:
                return sizes
    return None


def _is_divisible(layer: Any) -> bool:
    """Whether the rows of each shard do not depend on the other shards."""
    settings = vars(layer)
    counts = any(settings.get(name) for name in _COUNTING)
    # A batch without a size holds all rows.
    whole = settings.get("batched", True) and (settings.get("batch_size", 1) or 0) <= 0
    return type(layer).__name__ in _DIVISIBLE and not counts and not whole


def _read_chunks(chunks: Iterator[Any], limit: int, most: int) -> tuple[list[Any], int, bool]:
    """Chunks of at most `limit` rows or `most` bytes in total, their number of rows, and whether `chunks` ended."""
    held: list[Any] = []  # tables, or lists of rows
    rows = size = 0
    while rows + min(CHUNK, limit) <= limit and size < most:
        chunk = next(chunks, None)
        if chunk is None:
            return held, rows, True
        if isinstance(chunk, dict):
            chunk = [dict(zip(chunk, values, strict=True)) for values in zip(*chunk.values(), strict=True)]
        held.append(chunk)
        rows += len(chunk)
        size += sum(map(_row_bytes, chunk)) if isinstance(chunk, list) else chunk.nbytes
    return held, rows, False


def _row_bytes(value: Any) -> int:
    """Approximate memory of a row or one of its values. Each integer of a list takes a pointer and an object."""
    if isinstance(value, dict):
        return sum(map(_row_bytes, value.values()))
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple):
        nested = value and not isinstance(value[0], int | float)
        return sum(map(_row_bytes, value)) if nested else 36 * len(value)
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.nbytes
    if (bands := getattr(value, "getbands", None)) is not None:  # an image of PIL
        return value.width * value.height * len(bands())
    return 0


_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def _sizes(chunks: list[Any]) -> np.ndarray:
    """The approximate size of each row of the chunks: its text and the lengths of its lists."""
    if isinstance(chunks[0], list):
        return np.array([_row_bytes(row) for chunk in chunks for row in chunk])
    table = pa.concat_tables(chunks)
    sizes = np.zeros(len(table), dtype=np.int64)
    for column in table.columns:
        is_list = any(is_kind(column.type) for is_kind in _LISTS)
        if is_list or pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            count = compute.list_value_length if is_list else compute.binary_length
            sizes += count(column).fill_null(0).to_numpy().astype(np.int64)
    return sizes


def _fetch_from(chunks: list[Any], features: Any, format: str | None) -> Callable[[list[int]], list]:
    """A function that returns rows of the chunks by number, in the dataset's format."""
    if not isinstance(chunks[0], list):
        return _fetch_from_tables(chunks, features, format)
    rows = [row for chunk in chunks for row in chunk]
    return lambda numbers: [rows[i] for i in numbers]


def _fetch_from_tables(tables: list[pa.Table], features: Any, format: str | None) -> Callable[[list[int]], list]:
    table = pa.concat_tables(tables)
    # A fingerprint is given because computing one hashes the whole table.
    info = datasets.DatasetInfo(features=features)
    block = datasets.Dataset(InMemoryTable(table), info, fingerprint="block").with_format(format)

    def fetch(numbers: list[int]) -> list:
        try:
            return block.__getitems__(numbers)
        except (AttributeError, UnicodeDecodeError) as error:  # the numpy format fails if only the first row is null
            if len(numbers) > 1:
                return [row for i in numbers for row in fetch([i])]
            if isinstance(error, AttributeError):
                raise
            return [{name: _decoded(table[name][numbers[0]]) for name in table.column_names}]

    return fetch


def _decoded(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:  # becomes text that cannot be encoded, which the reader of the text reports
        if isinstance(value, pa.StructScalar):
            return {key: _decoded(item) for key, item in value.items()}
        if isinstance(value, pa.ListScalar):
            return [_decoded(item) for item in value.values]
        return value.as_buffer().to_pybytes().decode(errors="surrogateescape")


@contextmanager
def _outside_worker() -> Iterator[None]:
    """Hide the data loader worker, because torch datasets that see it skip rows, and partitions do that already."""
    worker = torch.utils.data._utils.worker
    info, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = info
