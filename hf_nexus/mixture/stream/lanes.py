"""Lanes: the parts of a source that are dealt to ranks and data loader workers, whatever their numbers are."""

from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Lane", "Lanes"]

# Lanes per source: that many for the ranks, times that many for the workers.
_LEAST = 8


@dataclass(frozen=True)
class Lane:
    """
    The rows of one slot in every `turns`-th micro-batch of a source. `part` is the part of the source's shards that
    it shares with `sharing - 1` other lanes, and `place` its place among them.
    """

    number: int
    part: int
    place: int
    sharing: int


@dataclass(frozen=True)
class Lanes:
    """
    The cut of each source into `slots * turns` lanes. Micro-batch number c of a source takes its rows from the lanes
    of turn `c % turns`: equally many from each slot, in order. The cut of a run stays the same when it is resumed by
    other numbers of ranks and workers, and with it the rows of each micro-batch. Slots are divided among the ranks,
    and turns among the workers of each.

    Example:
        >>> from hf_nexus.mixture.stream.lanes import Lanes
        >>> Lanes.of_run(rows=64, ranks=4, workers=2)
        Lanes(slots=8, turns=8)
    """

    slots: int
    turns: int

    @classmethod
    def of_run(cls, rows: int, ranks: int, workers: int) -> "Lanes":
        """The cut of a new run with `rows` rows in a micro-batch of all ranks: 64 lanes, if its numbers divide 8."""
        slots = max(n for n in range(ranks, max(_LEAST, ranks) + 1, ranks) if rows % n == 0)
        return cls(slots, workers * -(-_LEAST // workers))

    def parts(self, most: int) -> int:
        """The number of parts that a source is cut into, at most `most`: each has the same number of lanes."""
        count = self.slots * self.turns
        return max(n for n in range(1, max(1, min(most, count)) + 1) if count % n == 0)

    def lane(self, slot: int, turn: int, parts: int) -> Lane:
        """A lane of a source that is cut into parts."""
        return _lanes(self.slots, self.turns, parts)[slot * self.turns + turn]

    def slots_of(self, rank: int, ranks: int) -> range:
        """The slots from which a rank takes rows. It shares the first and the last if ranks do not divide slots."""
        return range(rank * self.slots // ranks, -(-(rank + 1) * self.slots // ranks))


@lru_cache
def _lanes(slots: int, turns: int, parts: int) -> list[Lane]:
    sharing = slots * turns // parts
    lanes = []
    for part in range(parts):  # the lanes of a rank are neighbors, which share parts
        numbers = range(part * sharing, (part + 1) * sharing)
        in_order = sorted(numbers, key=lambda number: (number % turns, number // turns))
        lanes += [Lane(number, part, in_order.index(number), sharing) for number in numbers]
    return lanes
