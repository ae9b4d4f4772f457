"""Reading a source: its parts, shared by lanes, block after block and pass after pass, and rows by their numbers."""

import heapq
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np

from ...files import printable
from ..documents import advice_on_rows
from .lanes import Lane, Lanes
from .sources import Block, Partition, Source

__all__ = ["BEGINNING", "PartReader", "RowReader", "SourceError", "Span"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
# A lane, and the numbers of its first row and of the one after its last.
Span = tuple[Lane, int, int]

# Attempts to read after network errors. Waits in seconds are doubled after each.
ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 5, 1.0, 60.0
# Packages whose network errors are not all an `OSError`.
_NETWORK_PACKAGES = {"aiohttp", "botocore", "gcsfs", "http", "httpcore", "httpcore2", "httpx", "httpx2", "requests"}
_NETWORK_PACKAGES |= {"urllib3"}
# The position before the first row: the pass, the rows before it and before the block, and the block in the source.
BEGINNING: dict[str, Any] = {"pass": 0, "since": 0, "first": 0, "block": None}
# Passes without rows, per other part, after which a source counts as empty. Each pass has other shards of the source:
# if only one of them has rows, one part in ten million ends by chance.
_EMPTY_PASSES = 16
# Errors that a retry does not solve.
_PERMANENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class SourceError(RuntimeError):
    """
    A source that cannot be read: it raised an error, or has an unusable row, or has too few rows. The message names
    the source, the position and the cause.
    """


def wait(failed: int) -> float:
    """Seconds to wait after attempt number `failed`, from 0. They are random, to spread the retries of workers."""
    # The draws of the run's own generator must not depend on the network.
    return min(LONGEST_WAIT, FIRST_WAIT * 2**failed) * random.SystemRandom().uniform(0.5, 1)


@dataclass
class Held:
    """A block that was read: its position, and the numbers of its first row and of the one after its last."""

    at: dict[str, Any]
    block: Block
    first: int
    end: int
    places: np.ndarray  # of the lane of each row among those that share the part

    @property
    def passes(self) -> int:
        """The passes with rows that ended before the block."""
        return self.at["pass"] - self.at.get("empty", 0)

    def dealt(self, lane: Lane) -> np.ndarray:
        """Which rows of the block are those of a lane."""
        return np.flatnonzero(self.places == lane.place)


class PartReader:
    """
    Reads the rows of one part of a source, endlessly, from the beginning or from a former position. Rows are numbered
    over all passes. Blocks are held until [`~PartReader.forget`], for lanes that have not come as far as others.

    Each row is dealt to the lane of `lanes` that has the least text so far. So lanes stay close together, however long
    the run is. A position has what each has more than the least, unless there is one lane. Without sizes of rows, they
    are dealt in turn.

    One of several parts may have no rows in a pass. Its next pass follows, which has other shards.

    Raises:
        SourceError: The source cannot be read (all methods that read).
    """

    def __init__(self, source: Source, partition: Partition, at: dict[str, Any] | None = None, lanes: int = 1):
        self.source = source
        self.partition = partition
        self._lane_count = lanes
        self.pass_rows: int | None = None  # rows of the last whole pass that had any
        self._empty = 0  # passes without rows since
        self._next = at or BEGINNING
        self._held: deque[Held] = deque()
        self._blocks: Any = None

    def holding(self, number: int) -> Held:
        """The block that holds a row."""
        while not self._held or self._held[-1].end <= number:
            self._read()
        held = next(held for held in self._held if held.end > number)
        assert held.first <= number, "a row was forgotten"
        return held

    def fetch(self, held: Held, places: np.ndarray) -> list[Any]:
        """Rows of a block by their places in reading order."""
        numbers = held.block.order[places].tolist()
        return self._retried(lambda: held.block.fetch(numbers))

    def position(self, number: int) -> dict[str, Any]:
        """The last known position before a row, as JSON types."""
        return next((held.at for held in self._held if held.end > number), self._next)

    def forget(self, before: int) -> None:
        """Free the blocks that end before a row."""
        while self._held and self._held[0].end <= before:
            self._held.popleft()

    def error(self, problem: str, at: dict[str, Any] | None = None) -> SourceError:
        """An error that names a position, by default the next one."""
        at = at or self._next
        where = self.source.describe(self.partition, at["pass"], at["block"])
        name, rank = self.partition.source, self.partition.rank
        return SourceError(f"Source {name!r} (rank {rank}, pass {at['pass'] + 1}, {where}): {printable(problem)}")

    def _read(self) -> None:
        block, at = self._retried(self._next_block), self._next
        if block is None:
            self._end_pass()
            return
        end = at["first"] + len(block.order)
        self._next = at | {"first": end, "block": block.end}
        if end > at["first"]:
            places, more = self._deal(block, at)
            self._held.append(Held(at, block, at["first"], end, places))
            self._next |= {"text": more} if more else {}

    def _deal(self, block: Block, at: dict[str, Any]) -> tuple[np.ndarray, list[int]]:
        """The place of the lane of each row, and how much more text than the least each lane has after the block."""
        if self._lane_count == 1:
            return np.broadcast_to(np.int64(0), len(block.order)), []  # without memory: a block may be a whole source
        places = (at["first"] + np.arange(len(block.order))) % self._lane_count
        if block.sizes is None:
            return places, []
        text = at.get("text", [0] * self._lane_count)
        order = self.partition.rng(at["pass"], self.partition.index, at["first"]).permutation(self._lane_count)
        lightest = [(text[place], rank, place) for rank, place in enumerate(order.tolist())]  # random among equal ones
        heapq.heapify(lightest)
        for i, size in enumerate(block.sizes()[block.order].tolist()):
            load, rank, places[i] = lightest[0]
            heapq.heapreplace(lightest, (load + max(size, 1), rank, int(places[i])))
        least = lightest[0][0]
        return places, [load - least for load, _, _ in sorted(lightest, key=itemgetter(2))]

    def _next_block(self) -> Block | None:
        if self._blocks is None:
            self._blocks = self.source.blocks(self.partition, self._next["pass"], self._next["block"])
        return next(self._blocks, None)

    def _end_pass(self) -> None:
        pass_, since, first = (self._next[name] for name in ("pass", "since", "first"))
        if first > since:
            self.pass_rows, self._empty = first - since, 0
        else:
            self._note_empty_pass()
        # Not in place: it may be `BEGINNING`, or in the state of a lane.
        self._next = self._next | {"pass": pass_ + 1, "since": first, "block": None}
        self._blocks = None

    def _note_empty_pass(self) -> None:
        index, count, before = self.partition.index, self.partition.count, self._next.get("empty", 0)
        problem = f"part {index + 1} of {count} of its shards has no rows"
        self._empty += 1
        if self._empty > _EMPTY_PASSES * (count - 1):
            raise self.error(problem + ("." if count == 1 else f" in {self._empty} passes in a row."))
        if not before:
            logger.warning("%s. It goes on with the shards of its next pass.", self.error(problem))
        self._next = self._next | {"empty": before + 1}

    def _retried(self, read: Callable[[], Result]) -> Result:
        for attempt in range(ATTEMPTS):
            try:
                return read()
            except Exception as error:
                cause = f"{type(error).__name__}: {error}"
                self._blocks = None  # reopen the source at the current position
                if not _is_network(error):
                    advice = advice_on_rows(error)
                    raise self.error(f"the source raised {cause}" + (advice and f". {advice}")) from error
                if attempt + 1 == ATTEMPTS:
                    raise self.error(f"{ATTEMPTS} attempts to read failed, the last with {cause}") from error
                seconds = wait(attempt)
                logger.warning("%s; trying again in %.1f s.", self.error(cause), seconds)
                time.sleep(seconds)
        raise AssertionError("attempts is at least 1")


class RowReader:
    """
    Reads the rows of a source that one process needs, each row by its number. `own` has slot and turn of the lanes
    that the process may read. `states` are those of lanes in a checkpoint, by their number as a string. A lane without
    one starts at the beginning.
    """

    _deals = False  # whether the rows of a part are dealt to its lanes by their text

    def __init__(
        self,
        name: str,
        source: Source,
        seed: int,
        lanes: Lanes,
        rank: int,
        own: Sequence[tuple[int, int]],
        states: Mapping[str, Any],
    ):
        self.source = source
        self.lanes = lanes
        self._states = states
        self._cut = lanes.parts(source.parts)
        self._parts: dict[int, PartReader] = {}
        self._pass: dict[int, int] = {}  # of the last row of each part, among the passes with rows
        self._of_part: dict[int, list[Lane]] = {}
        for slot, turn in own:
            lane = self.lane(slot, turn)
            self._of_part.setdefault(lane.part, []).append(lane)
        for index, members in self._of_part.items():
            starts = [states.get(str(lane.number), {"at": BEGINNING})["at"] for lane in members]
            partition = Partition(name, index, self._cut, rank, seed)
            at, sharing = min(starts, key=lambda at: at["first"]), members[0].sharing if self._deals else 1
            self._parts[index] = PartReader(source, partition, at, sharing)

    def lane(self, slot: int, turn: int) -> Lane:
        """A lane of the source."""
        return self.lanes.lane(slot, turn, self._cut)

    def take(self, first: int, count: int, total: int) -> tuple[list[Any], dict[str, Any]]:
        """
        `count` rows of the source from number `first` on, and the state after them of each lane that they come from.
        Micro-batches have `total` rows over all ranks.
        """
        each, number, spans = total // self.lanes.slots, first, list[Span]()  # rows of a slot
        while number < first + count:
            ordinal, row = divmod(number, total)
            visit, turn = divmod(ordinal, self.lanes.turns)
            length = min(each - row % each, first + count - number)
            start = visit * each + row % each
            spans.append((self.lane(row // each, turn), start, start + length))
            number += length
        rows = self._take(each, spans)
        return rows, {str(lane.number): self._state(each, lane, end) for lane, _, end in spans}

    def _take(self, each: int, spans: list[Span]) -> list[Any]:
        """The rows of some lanes. Lanes of a part take `each` rows in turn: those of neighbors follow each other."""
        rows: list[Any] = []
        for part, members in groupby(spans, key=lambda span: self._parts[span[0].part]):
            numbers = [(_in_part(lane, start, each), end - start) for lane, start, end in members]
            number, last = numbers[0][0], sum(numbers[-1])
            while number < last:
                held = part.holding(number)
                end = min(last, held.end)
                rows += part.fetch(held, np.arange(number, end) - held.first)
                number = end
                self._pass[part.partition.index] = held.passes
            part.forget(last)
        return rows

    def _state(self, each: int, lane: Lane, end: int) -> dict[str, Any]:
        """The state of a lane: the pass of its last row, and a position before its next one."""
        return {"pass": self._pass[lane.part], "at": self._parts[lane.part].position(_in_part(lane, end, each))}

    def source_rows(self) -> int | None:
        """Rows of the whole source: exact where they are known, and `None` elsewhere until a pass has ended."""
        return self.source.size if self.source.size is not None else self._rows_of_pass()

    def _rows_of_pass(self) -> int | None:
        return self._parts[0].pass_rows if self._cut == 1 else None  # one part says nothing about the others

    def error(self, problem: str) -> SourceError:
        """An error that names the position of a part."""
        return next(iter(self._parts.values())).error(problem)


def _in_part(lane: Lane, row: int, each: int) -> int:
    """The number of a row of a lane in its part, where lanes take `each` rows in turn."""
    visit, row = divmod(row, each)
    return (visit * lane.sharing + lane.place) * each + row


def _is_network(error: BaseException | None) -> bool:
    while error is not None:
        packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
        if (isinstance(error, OSError) and not isinstance(error, _PERMANENT)) or packages & _NETWORK_PACKAGES:
            return True
        error = error.__cause__
    return False
