"""Hashes of rows and settings, by which other data is noticed."""

import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset, Subset

__all__ = ["digest", "plain", "sample"]

# Rows that are compared, to notice another order or other content of as many rows.
_SAMPLED = 32


def digest(value: Any) -> str:
    """A hash of the plain data in a value."""
    return blake2b(repr(plain(value)).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def plain(value: Any) -> Any:
    """A value as plain data. Of other objects only the type, because their text can contain their addresses."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    return value if value is None or isinstance(value, str | bytes | int | float) else type(value).__name__


def sample(dataset: Any) -> str | None:
    """
    A hash of some rows, as a `datasets.Dataset` stores them. `None` if they cannot be read, or differ when they are
    read again. Neither random state of the process changes.
    """
    numbers = np.linspace(0, len(dataset) - 1, _SAMPLED).astype(int).tolist()
    try:
        with _same_random_state():
            first = digest([_row(dataset, number) for number in numbers])
        with _same_random_state():
            second = digest([_row(dataset, number) for number in numbers])
    except Exception:  # what reading raises depends on the dataset
        return None
    return first if first == second else None


def _row(dataset: Any, number: int) -> Any:
    if isinstance(dataset, Subset):
        return _row(dataset.dataset, int(dataset.indices[number]))
    if isinstance(dataset, ConcatDataset):
        part = bisect_right(dataset.cumulative_sizes, number)
        inner: Any = dataset.datasets[part]
        return _row(inner, number - dataset.cumulative_sizes[part] + len(inner))
    if isinstance(dataset, Dataset):
        return repr(dataset.with_format("arrow")[number].to_pylist())
    return dataset[number]


@contextmanager
def _same_random_state() -> Iterator[None]:
    """The same random state each time, which is restored at the end."""
    states, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([]):
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(states)
            np.random.set_state(of_numpy)
