"""
Whose the rows of a source are, and blocks of them.

The rows are dealt to *lanes*, one for each data loader worker of each rank. Within a pass over the source every row
belongs to exactly one lane, whatever the number of lanes, shards and rows.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Block", "Lane"]

# Up to so many lanes read all of a source to keep their own rows, unless there are so many shards for each.
_FEW_LANES, _FEW_SHARDS = 8, 4


@dataclass(frozen=True)
class Lane:
    """
    One reader among those that share a source.

    Args:
        source (`str`):
            Name of the source.
        index (`int`), count (`int`):
            Number of this lane, and of all lanes.
        per_rank (`int`):
            Lanes of each rank.
        seed (`int`):
            Seed of all orders.
    """

    source: str
    index: int
    count: int
    per_rank: int
    seed: int

    def rng(self, *numbers: int) -> np.random.Generator:
        """A generator for the source and `numbers`. Without the lane's index among them, all lanes draw the same."""
        return np.random.default_rng((self.seed, zlib.crc32(self.source.encode()), *numbers))

    def shares_all(self, shards: int) -> bool:
        """Whether the rows of each shard are dealt to all lanes, which then get equally many."""
        return self.count <= _FEW_LANES and shards < _FEW_SHARDS * self.count

    def pieces(self, order: list[int]) -> list[tuple[int, int, int]]:
        """
        The lane's part of shards that lie end to end in `order`: `(shard, low, high)` for rows j of the shard with
        `low <= j % count < high`. Every lane gets the same length of shards, so that only the shards at its two ends
        are shared with others. Where there are few of both, shards of different sizes would make for very different
        parts: then all lanes share all shards.
        """
        if self.shares_all(len(order)):
            owned = [(self.index + i) % self.count for i in range(len(order))]  # in turn, for odd rows left over
            return [(shard, row, row + 1) for shard, row in zip(order, owned, strict=True)]
        start, end = self.index * len(order), (self.index + 1) * len(order)  # in units of 1 / count of a shard
        parts = []
        for position in range(start // self.count, -(-end // self.count)):
            begin = position * self.count
            parts.append((order[position], max(start - begin, 0), min(end - begin, self.count)))
        return parts


@dataclass(frozen=True)
class Block:
    """
    Rows that were read in one go.

    Args:
        start (`dict`), end (`dict`):
            Positions before and after it.
        fetch (`Callable`):
            Gives the rows with some numbers, counted from the start of the block.
        order (`np.ndarray`):
            Numbers of the rows that are the lane's, in the order in which they are given out.
        first_row (`int`), shard (`int`, *optional*):
            Where the block lies, for errors.
    """

    start: dict[str, Any]
    end: dict[str, Any]
    fetch: Callable[[list[int]], list]
    order: np.ndarray
    first_row: int = 0
    shard: int | None = None

    def __len__(self) -> int:
        return len(self.order)

    def row(self, entry: int) -> int:
        """The number in its shard, or its source, of the row that is given out as the `entry`-th."""
        return self.first_row + int(self.order[entry])
