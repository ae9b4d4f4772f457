"""Mixtures of streams: the rows of each micro-batch, read during training from where each source stands."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from ..indexed import check_sources
from ..tags import StreamState, TaggedRows, take_rows
from .documents import PackedRowReader, StreamedDocuments
from .lanes import Lanes
from .reader import RowReader
from .sources import open_source

__all__ = ["MixtureStream"]


class MixtureStream(torch.utils.data.Dataset):
    """
    Sources, streaming or map-style, as a dataset of *micro-batches*. The index of a row is `(number of the row among
    those of its source, position of the source)`. With the same [`Lanes`], a row does not depend on the numbers of
    ranks and data loader workers: each process reads the lanes that its micro-batches need.

    The collator gets rows as the dataset returns them: `with_format("torch")` avoids lists of integers. Torch iterable
    datasets cannot return to a position: each worker reads all of their rows, and a resume reads the pass again from
    its start. Rows have another order in each pass. Streams are shuffled in blocks of half of `buffer_size` rows,
    which all parts of a source share. These blocks take the place of `shuffle` of a stream, whose buffer counts if it
    is larger.

    Raises:
        ValueError: There is no source, or one is empty or not a dataset.

    Example:
        >>> from datasets import Dataset
        >>> from hf_nexus.mixture.stream.dataset import MixtureStream
        >>> digits = Dataset.from_dict({"digit": list(range(10))}).to_iterable_dataset(num_shards=2)
        >>> stream = MixtureStream({"digits": digits})
        >>> rows = [stream.__getitems__([(i, 0) for i in five]) for five in (range(5), range(5, 10))]
        >>> sorted(row["digit"] for five in rows for row in five)
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        >>> stream.begin({"digits": rows[0].tag.states[0].lanes})
        >>> stream.__getitems__([(i, 0) for i in range(5, 10)]) == rows[1]
        True
    """

    def __init__(self, sources: Mapping[str, Any], *, seed: int = 0, buffer_size: int = 10_000):
        documents = {n: s.documents if isinstance(s, StreamedDocuments) else s for n, s in sources.items()}
        check_sources(documents)
        self.sources = dict(sources)
        self.names = list(sources)
        self.seed = seed
        self.buffer_size = buffer_size
        self._opened = {name: open_source(name, s, buffer_size // 2) for name, s in documents.items()}
        self.place(0, 1, 1)
        self.begin(None)

    def place(self, rank: int, ranks: int, workers: int, lanes: Lanes | None = None, mixed: bool = False) -> None:
        """
        Set which rows this rank reads with a number of data loader workers, 1 if there are none. By default, sources
        are cut into one lane for each worker of each rank. If micro-batches are `mixed` from several sources, all
        ranks and workers read all lanes.
        """
        assert 0 <= rank < ranks and workers >= 1
        self.rank, self.ranks, self.workers = rank, ranks, workers
        self.lanes = lanes or Lanes(ranks, workers)
        self.mixed = mixed

    def begin(self, states: dict[str, Any] | None) -> None:
        """
        Start from the first rows, or from stored positions: source to number of each lane, as a string, to its state
        in a [`StreamState`]. Call it before the data loader starts its workers.
        """
        self._states = states or {}
        self._readers: dict[tuple[str, int], RowReader] = {}
        self._process = os.getpid()

    @property
    def owners(self) -> int:
        """[`Lanes.owners`] of this run. With mixed micro-batches, each worker reads all lanes."""
        return 1 if self.mixed else self.lanes.owners(self.workers)

    @property
    def skipping(self) -> list[str]:
        """The sources whose unusable rows are skipped."""
        streamed = {name: s for name, s in self.sources.items() if isinstance(s, StreamedDocuments)}
        return [name for name, source in streamed.items() if source.encoder.source.on_error == "skip"]

    @property
    def slots(self) -> range:
        """The slots from which this rank takes rows."""
        return range(self.lanes.slots) if self.mixed else self.lanes.slots_of(self.rank, self.ranks)

    def __getitems__(self, indices: list[tuple[int, int]]) -> TaggedRows:
        """
        The rows of one micro-batch: B rows for B indices. Those of a source follow each other.

        Raises:
            SourceError: A source cannot be read, or is smaller than its part of a micro-batch of all ranks.
        """
        total, states = len(indices) * self.ranks, list[StreamState]()

        def take(name: str, where: list[int]) -> list[Any]:
            first = indices[where[0]][0]
            ordinal = first // total  # of the micro-batch
            reader = self._reader(name, ordinal % self.owners)
            rows, lanes = reader.take(first, len(where), total)
            size, needed = reader.source_rows(), len(where) * self.ranks
            if size is not None and size < needed:  # rows would repeat within a micro-batch
                raise reader.error(
                    f"it has about {size} rows, fewer than one micro-batch of {needed} (batch size per device times "
                    "ranks). Lower per_device_train_batch_size, or add rows to the source."
                )
            states.append(StreamState(name, ordinal, lanes, reader.source.mark))
            return rows

        return take_rows([self.names[position] for _, position in indices], take, states)

    def _reader(self, name: str, owner: int) -> RowReader:
        """The reader of the lanes that a worker owns."""
        if (name, owner) not in self._readers:
            if self._process != os.getpid():
                # A forked worker has the lock of remote file systems, but not the thread that would release it.
                import fsspec.asyn

                fsspec.asyn.reset_lock()
                self._process = os.getpid()
            turns = range(owner, self.lanes.turns, self.owners)
            own = [(slot, turn) for slot in self.slots for turn in turns]
            reading = name, self._opened[name], self.seed, self.lanes, self.rank, own, self._states.get(name, {})
            source = self.sources[name]
            packed = isinstance(source, StreamedDocuments)
            self._readers[name, owner] = PackedRowReader(source, *reading) if packed else RowReader(*reading)
        return self._readers[name, owner]
