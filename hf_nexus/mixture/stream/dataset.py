"""Mixtures of streams: sources that are read while training, each from the place where it was left."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..tags import TaggedRows
from .documents import DocumentPacker, StreamedDocuments
from .lanes import Lane
from .reader import LaneReader, Retry
from .sources import open_source

__all__ = ["MicroBatchSampler", "MixtureStream", "StreamState"]


@dataclass(frozen=True)
class StreamState:
    """
    Where one lane stands in one source after a micro-batch. Loaders and `send_to_device` leave it as it is.

    Args:
        lane (`int`), source (`str`):
            Who stands where.
        state (`dict`):
            The position, in types that JSON has; its `"pass"` counts the passes from 0.
    """

    lane: int
    source: str
    state: dict[str, Any]

    def store(self, states: dict[str, Any]) -> None:
        """Put it into `states`, in place of an older one, as [`~MixtureStream.begin`] takes them."""
        states.setdefault(str(self.lane), {})[self.source] = self.state


class MixtureStream(torch.utils.data.Dataset):
    """
    Sources, streaming or not, as a dataset of *micro-batches*: what is asked for is `(number of the micro-batch,
    position of its source)`, and each gives the next rows of that source.

    Micro-batch i is read in lane `i % lanes_per_rank` of its rank, so that each data loader worker has a lane of its
    own. The lanes share each source: every row belongs to one of them in each pass.

    Args:
        sources (`Mapping[str, Dataset]`):
            `datasets.IterableDataset`, [`StreamedDocuments`], map-style or torch iterable datasets. Rows are handed to
            the collator as the dataset gives them: `with_format("torch")` spares it lists of integers. Torch iterable
            datasets, and streams after `shuffle`, cannot return to a position: they are read again from the start of
            the pass to resume, and by every lane.
        seed (`int`, *optional*, defaults to 0):
            Of the orders in which rows are read, a new one in each pass.
        buffer_size (`int`, *optional*, defaults to 10000):
            Streams are shuffled in blocks of half as many rows. As many are read again, at most, to resume.
        retry ([`Retry`], *optional*):
            What to do when the network fails.

    Raises:
        ValueError: no source, an empty one, or one that is no dataset.

    Example:
        >>> from datasets import Dataset
        >>> from hf_nexus.mixture.stream.dataset import MixtureStream
        >>> digits = Dataset.from_dict({"digit": list(range(10))}).to_iterable_dataset(num_shards=2)
        >>> stream = MixtureStream({"digits": digits})
        >>> stream.place(rank=0, ranks=1, lanes_per_rank=1)
        >>> stream.begin(None)
        >>> rows = [stream.__getitems__([(i, 0)] * 5) for i in range(2)]
        >>> sorted(row["digit"] for five in rows for row in five)
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
        >>> stream.begin({"0": {"digits": rows[0].tag.state.state}})
        >>> stream.__getitems__([(1, 0)] * 5) == rows[1]
        True
    """

    def __init__(
        self, sources: Mapping[str, Any], *, seed: int = 0, buffer_size: int = 10_000, retry: Retry | None = None
    ):
        if not sources:
            raise ValueError("The mixture has no sources. Pass a dict of at least one dataset.")
        if wrong := [name for name in sources if not isinstance(name, str)]:
            raise ValueError(f"Source names must be strings, got {wrong[0]!r}.")
        if buffer_size < 2:
            raise ValueError(f"buffer_size={buffer_size} is not possible; it must be at least 2.")
        self.sources = dict(sources)
        self.names = list(sources)
        self.seed = seed
        self.buffer_size = buffer_size
        self.retry = retry or Retry()
        self._opened = {
            name: open_source(name, s.documents if isinstance(s, StreamedDocuments) else s, buffer_size // 2)
            for name, s in sources.items()
        }
        self.place(rank=0, ranks=1, lanes_per_rank=1)
        self.begin(None)

    def place(self, rank: int, ranks: int, lanes_per_rank: int) -> None:
        """
        Say which rows are this rank's, before reading.

        Args:
            rank (`int`), ranks (`int`):
                This rank and how many there are.
            lanes_per_rank (`int`):
                The number of data loader workers, 1 without any.
        """
        assert 0 <= rank < ranks and lanes_per_rank >= 1
        self.rank, self.ranks, self.lanes_per_rank = rank, ranks, lanes_per_rank

    def begin(self, states: dict[str, Any] | None) -> None:
        """
        Start over, or from stored states. To be called before each pass over the loader, whose workers start here.

        Args:
            states (`dict`, *optional*):
                For each lane, as a string, and each source, a state of [`StreamState`].
        """
        self._states = states or {}
        self._readers: dict[tuple[int, str], LaneReader | DocumentPacker] = {}
        self._process = os.getpid()

    def __getitem__(self, index: tuple[int, int]) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[tuple[int, int]]) -> TaggedRows:
        """
        The rows of one micro-batch, B for B equal pairs.

        Raises:
            SourceError: the source cannot be read on, or is smaller than a micro-batch of all ranks.
        """
        number, position = indices[0]
        assert all(index == indices[0] for index in indices), "a micro-batch crosses sources"
        name = self.names[position]
        lane = self.rank * self.lanes_per_rank + number % self.lanes_per_rank
        reader = self._reader(lane, name)
        rows = reader.take(len(indices))
        self._check_size(reader, len(indices))
        return TaggedRows(rows, name, StreamState(lane, name, reader.state()))

    def _reader(self, lane: int, name: str) -> LaneReader | DocumentPacker:
        if (lane, name) not in self._readers:
            if self._process != os.getpid():
                # In a forked worker: the thread and the lock of remote file systems stayed behind.
                import fsspec.asyn

                fsspec.asyn.reset_lock()
                self._process = os.getpid()
            state = self._states.get(str(lane), {}).get(name)
            share = Lane(name, lane, self.ranks * self.lanes_per_rank, self.lanes_per_rank, self.seed)
            rows = LaneReader(self._opened[name], share, self.retry, state)
            source = self.sources[name]
            packs = isinstance(source, StreamedDocuments)
            self._readers[lane, name] = DocumentPacker(source, rows, state) if packs else rows
        return self._readers[lane, name]

    def _check_size(self, reader: LaneReader | DocumentPacker, rows: int) -> None:
        """Refuse a source that would repeat itself within a micro-batch, once a pass over it shows its size."""
        rows_of, size = reader.rows if isinstance(reader, DocumentPacker) else reader, None
        if isinstance(reader, LaneReader) and reader.source.size is not None:
            size = reader.source.size
        elif reader.last_pass is not None and rows_of.is_fair_share:  # of other shares, one says nothing of the rest
            size = reader.last_pass * self.ranks * self.lanes_per_rank
        if size is not None and size < rows * self.ranks:
            raise reader.error(
                f"it has about {size} rows, fewer than one micro-batch of {rows * self.ranks} (batch size per device "
                "times ranks). Lower per_device_train_batch_size, or give the source more rows."
            )


class MicroBatchSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """
    What a [`MixtureStream`] is asked for: each micro-batch's number and source, once for each of its rows on all
    ranks.

    Args:
        source_of (`Callable[[int], int]`):
            Gives the position of the source of a micro-batch. It is called in order, when the micro-batch is sent for.
        micro_batches (`int`):
            Number of micro-batches of the run.
        rows (`int`):
            Rows of one micro-batch over all ranks: batch size per device * number of ranks.

    Example:
        >>> from hf_nexus.mixture.stream.dataset import MicroBatchSampler
        >>> list(MicroBatchSampler(lambda i: i % 3, micro_batches=3, rows=2))
        [(0, 0), (0, 0), (1, 1), (1, 1), (2, 2), (2, 2)]
    """

    def __init__(self, source_of: Callable[[int], int], micro_batches: int, rows: int):
        self.source_of = source_of
        self.micro_batches = micro_batches
        self.rows = rows

    def __len__(self) -> int:
        return self.micro_batches * self.rows

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in range(self.micro_batches):
            source = int(self.source_of(number))
            for _ in range(self.rows):
                yield number, source

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes: the run is one sequence of micro-batches."""
