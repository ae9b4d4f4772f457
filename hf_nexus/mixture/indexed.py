"""Map-style mixtures: several sources as one dataset, and the order of their rows."""

import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch

from .schedule import SourceSchedule
from .tags import TaggedRows, take_rows

__all__ = ["MixtureDataset", "MixtureSampler", "check_sources", "holds_datasets"]

# Packages whose tables have a length and can be indexed, but not by the number of a row.
_TABLES = {"pandas", "polars", "pyarrow"}
# Micro-batches or rows whose order is made at once.
_AT_ONCE = 4096


def holds_datasets(value: Any) -> bool:
    """Whether a value is a list of datasets, in place of one dataset or a list of rows."""
    first = value[0] if isinstance(value, list | tuple) and value else None
    return isinstance(first, torch.utils.data.Dataset) or getattr(first, "column_names", None) is not None


def check_sources(sources: Mapping[str, Any]) -> None:
    """Raise `ValueError` for no source, an empty one, or something else than a dataset, such as a `DatasetDict`."""
    if not sources:
        raise ValueError("The mixture has no sources. Pass a dict of at least one dataset.")
    for name, dataset in sources.items():
        if not isinstance(name, str):
            raise ValueError(f"Source names must be strings, got {name!r}.")
        kind = type(dataset)
        if isinstance(dataset, Mapping):
            raise ValueError(
                f"Source {name!r} is a {kind.__name__} with the keys {', '.join(map(str, dataset))}, not a dataset. "
                "Pass one dataset of it, such as its training split."
            )
        if holds_datasets(dataset):
            raise ValueError(
                f"Source {name!r} is a list of datasets. Pass concatenate_datasets(...) of them, or each."
            )
        if isinstance(dataset, torch.utils.data.IterableDataset):
            continue
        indexed = callable(getattr(dataset, "__len__", None)) and callable(getattr(dataset, "__getitem__", None))
        if not indexed or isinstance(dataset, str) or kind.__module__.partition(".")[0] in _TABLES:
            raise ValueError(
                f"Source {name!r} is a {kind.__name__}, which is not a dataset. Pass a datasets.Dataset, a "
                "datasets.IterableDataset or a torch dataset."
            )
        if len(dataset) == 0:
            raise ValueError(f"Source {name!r} is empty. Remove it, or add rows.")


class MixtureDataset(torch.utils.data.Dataset):
    """
    The rows of several map-style sources under one range of indices: first all of the first source, and so on.

    Raises:
        ValueError: no source, or an empty one.
    """

    def __init__(self, sources: Mapping[str, Any]):
        check_sources(sources)
        self.sources = dict(sources)
        self.names = list(sources)
        self.sizes = [len(dataset) for dataset in sources.values()]
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getitem__(self, index: int) -> Any:
        source = int(np.searchsorted(self.offsets, index, side="right")) - 1
        return self.sources[self.names[source]][int(index - self.offsets[source])]

    def __getitems__(self, indices: list[int]) -> TaggedRows:
        """The rows of one micro-batch, tagged with their sources."""
        sources = np.searchsorted(self.offsets, indices, side="right") - 1
        of_source = (np.asarray(indices) - self.offsets[sources]).tolist()

        def take(name: str, where: list[int]) -> Iterable[Any]:
            dataset, local = self.sources[name], [of_source[i] for i in where]
            fetch = getattr(dataset, "__getitems__", None)
            return fetch(local) if fetch is not None else (dataset[i] for i in local)

        return take_rows([self.names[source] for source in sources], take)


class MixtureSampler(torch.utils.data.Sampler[int]):
    """
    Row indices of a [`MixtureDataset`]. Each group of `schedule.rows` indices is one micro-batch over all ranks, of
    one source or mixed.

    The run is one sequence of micro-batches, and `total rows // rows` of them make an epoch, for any weights. Each
    source is read in an order drawn from (seed, source, pass): each pass has another order, and holds every row once.

    Raises:
        ValueError: a source of positive weight has fewer rows than one micro-batch.
    """

    def __init__(self, dataset: MixtureDataset, schedule: SourceSchedule):
        assert schedule.names == dataset.names
        rows = schedule.rows
        for name, size, share in zip(dataset.names, dataset.sizes, schedule.largest_shares, strict=True):
            if share > 0 and size < rows:
                raise ValueError(
                    f"Source {name!r} has {size} rows, fewer than one micro-batch of {rows} (batch size per device "
                    "times ranks). Lower per_device_train_batch_size, or give the source more rows."
                )
        self.dataset = dataset
        self.schedule = schedule
        self.epoch = 0
        self._first = (0, 0)  # of a resumed run: its first epoch, and micro-batch in that

    def set_epoch(self, epoch: int) -> None:
        """Read epoch number `epoch` next."""
        self.epoch = epoch

    def skip_to(self, epoch: int, micro_batch: int) -> None:
        """
        Begin an epoch at one of its micro-batches. A resumed run skips the rows before it, but Accelerate asks for
        their indices: they are all 0, and cost no Python code.
        """
        self._first = epoch, micro_batch

    def micro_batches_per_epoch(self) -> int:
        """Micro-batches of one epoch."""
        return len(self.dataset) // self.schedule.rows

    def __len__(self) -> int:
        return self.micro_batches_per_epoch() * self.schedule.rows

    def __iter__(self) -> Iterator[int]:
        start, (epoch, first) = self.epoch * self.micro_batches_per_epoch(), self._first
        skipped = first if epoch == self.epoch else 0
        rest = self._indices(start + skipped, start + self.micro_batches_per_epoch())
        return chain(repeat(0, skipped * self.schedule.rows), rest)

    def _indices(self, start: int, stop: int) -> Iterator[int]:
        """Row indices of the micro-batches `start <= i < stop` of the run."""
        rows, read = self.schedule.rows, np.zeros(len(self.dataset.names), dtype=np.int64)
        for sources in self._sources(0, start):
            read += np.bincount(sources.ravel(), minlength=len(read)) * (rows if sources.ndim == 1 else 1)
        readers = [self._read(source, int(count)) for source, count in enumerate(read)]
        for sources in self._sources(start, stop):
            for of_micro_batch in sources:
                for source in np.broadcast_to(of_micro_batch, rows):
                    yield next(readers[source])

    def _sources(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """The sources of micro-batches in parts, as they are needed: a run may end before the epoch."""
        for first in range(start, stop, _AT_ONCE):
            yield self.schedule.sources(first, min(first + _AT_ONCE, stop))

    def _read(self, source: int, skip: int) -> Iterator[int]:
        """Endless indices of one source, from its `skip`-th read on."""
        size, offset = self.dataset.sizes[source], int(self.dataset.offsets[source])
        name = zlib.crc32(self.dataset.names[source].encode())
        pass_, position = divmod(skip, size)
        while True:
            order = np.random.default_rng((self.schedule.seed, name, pass_)).permutation(size)
            for first in range(position, size, _AT_ONCE):
                yield from (order[first : first + _AT_ONCE] + offset).tolist()
            pass_, position = pass_ + 1, 0
