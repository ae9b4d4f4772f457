"""Mixtures of streams: the rows of each micro-batch, read during training from where each source stands."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ..indexed import check_sources
from ..tags import MicroBatchTag, StreamState, TaggedRows, take_rows
from .documents import PackedRowReader, StreamedDocuments
from .reader import RowReader
from .sources import Partition, open_source

__all__ = ["MicroBatchSampler", "MixtureStream"]


class MixtureStream(torch.utils.data.Dataset):
    """
    Sources, streaming or map-style, as a dataset of *micro-batches*. The index of a row is `(number of the
    micro-batch, position of its source)`, and each request returns the next rows of these sources.

    Each data loader worker of each rank reads its own [`Partition`] of every source.

    Args:
        sources (`Mapping[str, Dataset]`):
            `datasets.IterableDataset`, [`StreamedDocuments`], map-style or torch iterable datasets. The collator gets
            rows as the dataset returns them: `with_format("torch")` avoids lists of integers. Torch iterable datasets,
            and streams after `shuffle`, cannot return to a position: each worker reads all of their rows, and a
            resume reads the pass again from its start.
        seed (`int`, *optional*, defaults to 0):
            Seed of the orders of rows, which differ in each pass.
        buffer_size (`int`, *optional*, defaults to 10000):
            Streams are shuffled in blocks of half as many rows. A resume reads at most this many rows again.

    Raises:
        ValueError: There is no source, or one is empty or not a dataset.

    Example:
        >>> from datasets import Dataset
        >>> from hf_nexus.mixture.stream.dataset import MixtureStream
        >>> digits = Dataset.from_dict({"digit": list(range(10))}).to_iterable_dataset(num_shards=2)
        >>> stream = MixtureStream({"digits": digits})
        >>> rows = [stream.__getitems__([(i, 0)] * 5) for i in range(2)]
        >>> sorted(row["digit"] for five in rows for row in five)
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        >>> stream.begin({"0": {"digits": rows[0].tag.states[0].state}})
        >>> stream.__getitems__([(1, 0)] * 5) == rows[1]
        True
    """

    def __init__(self, sources: Mapping[str, Any], *, seed: int = 0, buffer_size: int = 10_000):
        documents = {n: s.documents if isinstance(s, StreamedDocuments) else s for n, s in sources.items()}
        check_sources(documents)
        if buffer_size < 2:
            raise ValueError(f"buffer_size={buffer_size} is not allowed; it must be at least 2.")
        self.sources = dict(sources)
        self.names = list(sources)
        self.seed = seed
        self.buffer_size = buffer_size
        self._opened = {name: open_source(name, s, buffer_size // 2) for name, s in documents.items()}
        self.rank, self.ranks, self.workers = 0, 1, 1
        self.begin(None)

    def place(self, rank: int, ranks: int, workers: int) -> None:
        """
        Set which partitions this rank reads.

        Args:
            rank (`int`), ranks (`int`):
                This rank, and the number of ranks.
            workers (`int`):
                Number of data loader workers, 1 if there are none.
        """
        assert 0 <= rank < ranks and workers >= 1
        self.rank, self.ranks, self.workers = rank, ranks, workers

    def begin(self, states: dict[str, Any] | None) -> None:
        """
        Start from the first rows, or from stored positions. Call it before the data loader starts its workers.

        Args:
            states (`dict`, *optional*):
                Number of each partition, as a string, to source, to the position of a [`StreamState`].
        """
        self._states = states or {}
        self._readers: dict[tuple[int, str], RowReader] = {}
        self._process = os.getpid()

    def __getitems__(self, indices: list[tuple[int, int]]) -> TaggedRows:
        """
        The rows of one micro-batch: B rows for B indices.

        Raises:
            SourceError: A source cannot be read, or is smaller than its part of a micro-batch of all ranks.
        """
        number = indices[0][0]
        assert all(index[0] == number for index in indices), "indices of several micro-batches"
        partition = self.rank * self.workers + number % self.workers
        states = []

        def take(name: str, where: list[int]) -> list[Any]:
            reader = self._reader(partition, name)
            rows = reader.take(len(where))
            size, needed = reader.source_rows(), len(where) * self.ranks
            if size is not None and size < needed:  # rows would repeat within a micro-batch
                raise reader.error(
                    f"it has about {size} rows, fewer than one micro-batch of {needed} (batch size per device times "
                    "ranks). Lower per_device_train_batch_size, or add rows to the source."
                )
            states.append(StreamState(partition, name, reader.state(), reader.source.mark))
            return rows

        rows = take_rows([self.names[position] for _, position in indices], take)
        rows.tag = MicroBatchTag(rows.tag.rows, tuple(states))
        return rows

    def _reader(self, index: int, name: str) -> RowReader:
        if (index, name) not in self._readers:
            if self._process != os.getpid():
                # A forked worker has the lock of remote file systems, but not the thread that would release it.
                import fsspec.asyn

                fsspec.asyn.reset_lock()
                self._process = os.getpid()
            partition = Partition(name, index, self.ranks * self.workers, self.rank, self.seed)
            reading = self._opened[name], partition, self._states.get(str(index), {}).get(name)
            source = self.sources[name]
            packed = isinstance(source, StreamedDocuments)
            self._readers[index, name] = PackedRowReader(source, *reading) if packed else RowReader(*reading)
        return self._readers[index, name]


class MicroBatchSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """
    Indices of a [`MixtureStream`]: the number and the source of each micro-batch, once for each of its rows on all
    ranks.

    Args:
        source_of (`Callable[[int], Any]`):
            Returns the position of a micro-batch's source, or of that of each of its rows. It is called in order, when
            the loader requests the micro-batch.
        micro_batches (`int`):
            Number of micro-batches of the run.
        rows (`int`):
            Rows of one micro-batch over all ranks: batch size per device * number of ranks.
    """

    def __init__(self, source_of: Callable[[int], Any], micro_batches: int, rows: int):
        self.source_of = source_of
        self.micro_batches = micro_batches
        self.rows = rows

    def __len__(self) -> int:
        return self.micro_batches * self.rows

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in range(self.micro_batches):
            for source in np.broadcast_to(self.source_of(number), self.rows):
                yield number, int(source)

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: the run is one sequence of micro-batches."""
