"""
Lanes: how the rows of a source are dealt to ranks and data loader workers, whatever their numbers are.

For instance 4 slots x 3 turns of a source whose shards are cut into 2 parts:

             turn 0    turn 1    turn 2
    slot 0   lane 0    lane 1    lane 2    | part 0: its rows, or documents, are dealt to 6 lanes,
    slot 1   lane 3    lane 4    lane 5    | each of which has a place among the 6
    slot 2   lane 6    lane 7    lane 8    | part 1
    slot 3   lane 9    lane 10   lane 11   |

Micro-batch number c of the source is visit `c // 3` of turn `c % 3`: it has the next rows of the 4 lanes of that
turn. Of two ranks, one takes the rows of slots 0 and 1. Of three workers, each fetches the micro-batches of one turn.
What a process takes from one lane for a micro-batch is a span.
"""

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
    The cut of each source into `slots * turns` lanes. A micro-batch takes equally many rows from each slot, in order.
    The cut of a run stays the same when it is resumed by other numbers of ranks and workers, and with it the rows of
    each micro-batch.

    Example:
        >>> from hf_nexus.mixture.stream.lanes import Lanes
        >>> Lanes.of_run(rows=64, ranks=4, workers=2)
        Lanes(slots=8, turns=8)
    """

    slots: int
    turns: int

    @classmethod
    def of_run(cls, rows: int, ranks: int, workers: int) -> "Lanes":
        """
        The cut of a new run with `rows` rows in a micro-batch of all ranks: 64 lanes, if 8 divides the rows, and ranks
        and workers divide 8.
        """
        slots = max(n for n in range(ranks, max(_LEAST, ranks) + 1, ranks) if rows % n == 0)
        return cls(slots, workers * -(-_LEAST // workers))

    def owners(self, workers: int) -> int:
        """How many workers divide the turns among them: worker `c % owners` gets micro-batch c of a source."""
        return 1 if self.turns % workers else workers

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
