"""Hashes of rows and settings, by which other data is noticed."""

import os
from bisect import bisect_right
from collections.abc import Mapping
from functools import cache, partial
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset, Subset

__all__ = ["are_numbers", "digest", "sample"]

# Rows that are compared, to notice another order or other content of as many rows.
_SAMPLED = 32


def digest(value: Any) -> str:
    """A hash of the plain data in a value. Of other objects only the type, because their text can be an address."""
    found = blake2b(digest_size=8)
    _add(found, value)
    return found.hexdigest()


def sample(dataset: Any) -> str | None:
    """
    A hash of some rows, as a list or a `datasets.Dataset` stores them. `None` for other datasets: reading their rows
    could open files that workers would share, or advance random states.
    """
    found, size = blake2b(digest_size=8), len(dataset)
    as_arrow = cache(partial(Dataset.with_format, type="arrow"))
    try:
        for number in np.linspace(0, size - 1, min(size, _SAMPLED)).astype(int).tolist():
            inner, row = _place(dataset, number)
            if isinstance(inner, Dataset):
                for column in as_arrow(inner)[row].itercolumns():
                    _add_cells(found, column.combine_chunks())
            elif isinstance(inner, list):
                _add(found, inner[row])
            else:
                return None
    except Exception:  # what reading raises depends on the dataset
        return None
    return found.hexdigest()


def _place(dataset: Any, number: int) -> tuple[Any, int]:
    """The dataset that stores a row, and the row's number in it."""
    if isinstance(dataset, Subset):
        return _place(dataset.dataset, int(dataset.indices[number]))
    if isinstance(dataset, ConcatDataset):
        part = bisect_right(dataset.cumulative_sizes, number)
        inner: Any = dataset.datasets[part]
        return _place(inner, number - dataset.cumulative_sizes[part] + len(inner))
    return dataset, number


def are_numbers(items: list | tuple) -> bool:
    """Whether a list has only numbers, and may be long."""
    return {*map(type, items)} <= {bool, int, float}


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        value = [*value.items()]
    if isinstance(value, list | tuple):
        found.update(b"[%d]" % len(value))
        if are_numbers(value):
            for start in range(0, len(value), 10_000):
                found.update(repr(value[start : start + 10_000]).encode())
            return
        for item in value:
            _add(found, item)
        return
    if isinstance(value, torch.Tensor):
        found.update(str(value.dtype).encode())  # numpy does not have all types
        value = value.detach().cpu().contiguous().reshape(*value.shape, 1).view(torch.uint8).numpy()
    if isinstance(value, np.ndarray | np.generic) and value.dtype.hasobject:
        _add(found, value.tolist())
    elif isinstance(value, np.ndarray | np.generic):
        found.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, str | bytes):
        content = value.encode(errors="surrogatepass") if isinstance(value, str) else value
        found.update(f"{type(value).__name__}{len(content)}".encode())
        found.update(content)
    else:
        is_plain = value is None or isinstance(value, int | float)
        found.update(f"{value if is_plain else type(value).__name__},".encode())


def _add_cells(found: Any, cells: Any) -> None:
    """Add Arrow data without making an object of each number."""
    if isinstance(cells, pa.ExtensionArray):
        cells = cells.storage
    if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        _add_cells(found, cells.value_lengths())
        _add_cells(found, cells.flatten())
    elif pa.types.is_struct(cells.type):
        columns = dict(zip(cells.type.names, cells.flatten(), strict=True))
        if columns.keys() == {"bytes", "path"}:  # an image or a sound, whose folder may have been moved
            columns["path"] = pa.array([path and os.path.basename(path) for path in columns["path"].to_pylist()])
        found.update(repr(cells.is_valid().to_pylist()).encode())
        for column in columns.values():
            _add_cells(found, column)
    elif pa.types.is_primitive(cells.type) and not cells.null_count:
        _add(found, cells.to_numpy(zero_copy_only=False))
    else:
        _add(found, cells.to_pylist())
