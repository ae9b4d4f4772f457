"""How sources of each kind are read: in blocks, each shuffled, each with a position to return to."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from .chunks import CHUNK, fetch_from, is_streaming, layers, outside_worker, read_chunks, rows_of, unformatted
from .lanes import Block, Lane

__all__ = ["IndexedSource", "ReplayedSource", "ShardedSource", "open_source"]

# Layers of a streaming dataset under which shards hold each row once. Under others, such as those of `skip` and
# `interleave_datasets`, a shard is not what it would be in the whole.
_DIVISIBLE = {
    "ArrowExamplesIterable",
    "ExamplesIterable",
    "FilteredExamplesIterable",
    "FormattedExamplesIterable",
    "MappedExamplesIterable",
    "RebatchedArrowExamplesIterable",
    "SelectColumnsIterable",
}
# Layers whose position cannot be stored: they hold rows back.
_BUFFERING = {"BufferShuffledExamplesIterable", "InterleavedShardsExamplesIterable"}


class ShardedSource:
    """
    A `datasets.IterableDataset`. The order of its shards is drawn for each pass, and the row at which a block starts
    is found again without reading those before it, as far as the format of the files allows.
    """

    size: int | None = None

    def __init__(self, dataset: Any, block_rows: int):
        self.divisible = layers(dataset) <= _DIVISIBLE
        self.shards = dataset.num_shards if self.divisible else 1
        self.block_rows = block_rows
        self.dataset, self.format = unformatted(dataset)

    def blocks(self, lane: Lane, pass_: int, cursor: dict[str, Any] | None) -> Iterator[Block]:
        """The lane's blocks of a pass, from a position on."""
        pieces = lane.pieces(lane.rng(pass_).permutation(self.shards).tolist())
        first = cursor["piece"] if cursor else 0
        for piece in range(first, len(pieces)):
            yield from self._read(lane, pass_, piece, pieces[piece], cursor if piece == first else None)

    def where(self, lane: Lane, pass_: int, cursor: dict[str, Any] | None) -> str:
        """Words for a position."""
        pieces = lane.pieces(lane.rng(pass_).permutation(self.shards).tolist())
        piece, row = (cursor["piece"], cursor["row"]) if cursor else (0, 0)
        shard = pieces[min(piece, len(pieces) - 1)][0]
        return f"shard {shard} of {self.shards}, after {row} rows"

    def _read(
        self, lane: Lane, pass_: int, piece: int, part: tuple[int, int, int], cursor: dict[str, Any] | None
    ) -> Iterator[Block]:
        shard, low, high = part
        # A new object each time: one that was given a state applies it again on its next pass.
        dataset = self.dataset.shard(self.shards, shard)
        if self.divisible:
            dataset = dataset.reshard()  # by row group where there are some: these are skipped without being read
        row, state = 0, None
        if cursor is not None:
            row, state = cursor["row"], cursor.get("state")
            if state is not None:
                dataset.load_state_dict(state)
        # `iter`, unlike `__iter__`, leaves it to us to deal the shards to the workers of a data loader.
        batches, ended = dataset.iter(min(CHUNK, self.block_rows)), False
        while not ended:
            chunks, count, ended = read_chunks(batches, self.block_rows)
            start, first = {"piece": piece, "row": row, "state": state}, row
            row, state = row + count, dataset.state_dict()
            end = {"piece": piece + 1, "row": 0} if ended else {"piece": piece, "row": row, "state": state}
            if count:
                owner = (first + np.arange(count)) % lane.count
                mine = np.flatnonzero((low <= owner) & (owner < high))
                order = lane.rng(pass_, lane.index, piece, first).permutation(mine)
                yield Block(start, end, fetch_from(chunks, dataset.features, self.format), order, first, shard)


class IndexedSource:
    """Anything with `__len__` and `__getitem__`: a permutation of it for each pass, dealt to the lanes in turn."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.size: int | None = len(dataset)

    def blocks(self, lane: Lane, pass_: int, cursor: dict[str, Any] | None) -> Iterator[Block]:
        """One block, of which nothing is read yet, for the whole pass."""
        order = lane.rng(pass_).permutation(len(self.dataset))[lane.index :: lane.count]
        if cursor is None or cursor["row"] == 0:
            yield Block({"row": 0}, {"row": len(order)}, self._fetch, order)

    def where(self, lane: Lane, pass_: int, cursor: dict[str, Any] | None) -> str:
        """Words for a position."""
        return f"{len(self.dataset)} rows"

    def _fetch(self, numbers: list[int]) -> list:
        fetch = getattr(self.dataset, "__getitems__", None)
        return fetch(numbers) if fetch is not None else [self.dataset[i] for i in numbers]


class ReplayedSource:
    """
    An iterable that cannot return to a position: a torch `IterableDataset`, or a `datasets.IterableDataset` with a
    shuffle buffer. Every lane reads all of it and keeps its own rows, and a resumed pass is read from its start.
    """

    size: int | None = None

    def __init__(self, dataset: Any, block_rows: int):
        self.dataset = dataset
        self.block_rows = block_rows

    def blocks(self, lane: Lane, pass_: int, cursor: dict[str, Any] | None) -> Iterator[Block]:
        """The lane's blocks of a pass, from a position on."""
        row, ended = cursor["row"] if cursor else 0, False
        rows = islice(self._rows(pass_), row, None)
        batches = iter(lambda: list(islice(rows, min(CHUNK, self.block_rows))), [])
        while not ended:
            chunks, count, ended = read_chunks(batches, self.block_rows)
            start, first, row = {"row": row}, row, row + count
            mine = np.flatnonzero((first + np.arange(count)) % lane.count == lane.index)
            order = lane.rng(pass_, lane.index, first).permutation(mine)
            if count:
                yield Block(start, {"row": row}, fetch_from(chunks, None, None), order, first)

    def where(self, lane: Lane, pass_: int, cursor: dict[str, Any] | None) -> str:
        """Words for a position."""
        return f"after {cursor['row'] if cursor else 0} rows"

    def _rows(self, pass_: int) -> Iterator[Any]:
        if is_streaming(self.dataset):
            dataset = self.dataset.shard(1, 0)  # a new object: iterators of the same one would share its position
            dataset.set_epoch(pass_)
            for batch in dataset.iter(CHUNK):
                yield from rows_of(batch)
            return
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(pass_)
        with outside_worker():
            rows = iter(self.dataset)
        while True:
            with outside_worker():
                chunk = list(islice(rows, CHUNK))
            if not chunk:
                return
            yield from chunk


def open_source(name: str, dataset: Any, block_rows: int) -> ShardedSource | IndexedSource | ReplayedSource:
    """
    The reader of a dataset, by what it is.

    Raises:
        ValueError: neither map-style nor iterable, empty, or split by node already.
    """
    if is_streaming(dataset):
        if dataset._distributed is not None:
            raise ValueError(
                f"Source {name!r} was split by node (split_dataset_by_node). Pass the whole dataset: the mixture "
                "deals its rows to the ranks."
            )
        if dataset._formatting is not None and dataset._formatting.is_table:  # collators take rows
            dataset = dataset.with_format(None)
        kind = ReplayedSource if layers(dataset) & _BUFFERING else ShardedSource
        return kind(dataset, block_rows)
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return ReplayedSource(dataset, block_rows)
    if not (callable(getattr(dataset, "__len__", None)) and callable(getattr(dataset, "__getitem__", None))):
        raise ValueError(
            f"Source {name!r} is a {type(dataset).__name__}, which can neither be indexed nor iterated as a dataset. "
            "Pass a datasets.Dataset, a datasets.IterableDataset or a torch dataset."
        )
    if len(dataset) == 0:
        raise ValueError(f"Source {name!r} is empty. Remove it, or give it rows.")
    return IndexedSource(dataset)
