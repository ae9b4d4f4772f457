"""Reading iterable datasets in chunks: compact while they wait, in the end the rows that the dataset would give."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["CHUNK", "fetch_from", "is_streaming", "layers", "outside_worker", "read_chunks", "rows_of", "unformatted"]

# Rows that are asked for at once. The positions that upstream stores depend on it.
CHUNK = 64
# A block of large rows ends early.
BLOCK_BYTES = 128 << 20


def is_streaming(dataset: Any) -> bool:
    """Whether it is a `datasets.IterableDataset`, found out without importing `datasets`."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(dataset, datasets.IterableDataset)


def layers(dataset: Any) -> set[str]:
    """Class names of the layers of a `datasets.IterableDataset`, such as its files, maps and filters."""
    found, todo = set(), [dataset._ex_iterable]
    while todo:
        layer = todo.pop()
        found.add(type(layer).__name__)
        todo += vars(layer).get("ex_iterables", [])
        todo += [vars(layer)["ex_iterable"]] if "ex_iterable" in vars(layer) else []
    return found


def unformatted(dataset: Any) -> tuple[Any, str | None]:
    """The dataset in the format that it is read in, tables where it is made of them, and the format its rows want."""
    format = dataset._formatting
    if dataset._ex_iterable.iter_arrow is not None:
        dataset = dataset.with_format("arrow")
    return dataset, None if format is None else format.format_type


def rows_of(chunk: Any) -> list[dict[str, Any]]:
    """The rows of a dict of columns."""
    return [dict(zip(chunk, values, strict=True)) for values in zip(*chunk.values(), strict=True)]


def read_chunks(chunks: Iterator[Any], limit: int) -> tuple[list[Any], int, bool]:
    """
    Chunks of up to `limit` rows, or `BLOCK_BYTES`, in all: tables as they are, columns as lists of rows; how many rows
    they have; and whether the end was met.
    """
    held: list[Any] = []
    rows = size = 0
    while rows + min(CHUNK, limit) <= limit and size < BLOCK_BYTES:
        chunk = next(chunks, None)
        if chunk is None:
            return held, rows, True
        if isinstance(chunk, dict):
            chunk = rows_of(chunk)
        held.append(chunk)
        rows += len(chunk)
        size += sum(map(_row_bytes, chunk)) if isinstance(chunk, list) else chunk.nbytes
    return held, rows, False


def _row_bytes(row: Any) -> int:
    """Roughly what a row takes: a list of integers has a pointer and an object for each."""
    values = row.values() if isinstance(row, dict) else ()
    return sum(len(v) if isinstance(v, str) else 36 * len(v) for v in values if isinstance(v, str | list))


def fetch_from(chunks: list[Any], features: Any, format: str | None) -> Callable[[list[int]], list]:
    """Gives rows of what was read by their numbers, in the format that the dataset has."""
    if chunks and not isinstance(chunks[0], list):
        return _fetch_from_tables(chunks, features, format)
    rows = [row for chunk in chunks for row in chunk]
    return lambda numbers: [rows[i] for i in numbers]


def _fetch_from_tables(tables: "list[pa.Table]", features: Any, format: str | None) -> Callable[[list[int]], list]:
    import pyarrow as pa
    from datasets import Dataset, DatasetInfo
    from datasets.table import InMemoryTable

    table = pa.concat_tables(tables)
    # The fingerprint would take a hash of all of it.
    block = Dataset(InMemoryTable(table), DatasetInfo(features=features), fingerprint="block").with_format(format)

    def fetch(numbers: list[int]) -> list:
        try:
            return block.__getitems__(numbers)
        except UnicodeDecodeError:
            return [{name: _decoded(table[name][i]) for name in table.column_names} for i in numbers]

    return fetch


def _decoded(value: "pa.Scalar") -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:  # shows as text that is not valid, which whoever wants text finds
        return value.as_buffer().to_pybytes().decode(errors="surrogateescape")


@contextmanager
def outside_worker() -> Iterator[None]:
    """Hides the data loader worker, by which an `IterableDataset` may leave out rows: the lanes deal them already."""
    worker = torch.utils.data._utils.worker
    info, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = info
