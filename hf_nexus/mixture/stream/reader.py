"""One lane's reader of one source: row after row, pass after pass, from a position that is a small dict."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .lanes import Block, Lane
from .sources import IndexedSource, ReplayedSource, ShardedSource

__all__ = ["LaneReader", "Retry", "SourceError"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Not all of their errors are an OSError.
_NETWORK_PACKAGES = {"aiohttp", "http", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"}
# Waiting does not help against these.
_PERMANENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class SourceError(RuntimeError):
    """
    A source that cannot be read on: it raised, has a row that cannot be used, or has none. The message names the
    source, the place in it and the cause.

    Example:
        >>> from hf_nexus.mixture.stream.reader import SourceError
        >>> try:
        ...     trainer.train()  # doctest: +SKIP
        ... except SourceError as error:
        ...     print(error)
    """


@dataclass(frozen=True)
class Retry:
    """
    How often reading is tried when the network fails, and how long to wait in between.

    Args:
        attempts (`int`, *optional*, defaults to 5):
            Tries in all, before a [`SourceError`].
        first_wait (`float`, *optional*, defaults to 1.0), longest_wait (`float`, *optional*, defaults to 60.0):
            Seconds before the second try, doubled before each further one. A wait is shortened by up to half, at
            random, so that workers do not come back together.

    Example:
        >>> from hf_nexus.mixture.stream.reader import Retry
        >>> Retry(attempts=3).wait(1) <= 2.0
        True
    """

    attempts: int = 5
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def wait(self, failed: int) -> float:
        """Seconds to wait after the try number `failed`, from 0."""
        # Not from the generator of the run, whose draws must not depend on the network.
        return min(self.longest_wait, self.first_wait * 2**failed) * random.SystemRandom().uniform(0.5, 1)


class LaneReader:
    """
    Reads a lane's rows of a source, endlessly.

    Args:
        source ([`ShardedSource`], [`IndexedSource`] or [`ReplayedSource`]):
            What is read.
        lane ([`Lane`]):
            For whom.
        retry ([`Retry`]):
            What to do when the network fails.
        state (`dict`, *optional*):
            A former [`~LaneReader.state`], to go on from there.

    Attributes:
        pass_ (`int`):
            Number of the pass, from 0.
        last_pass (`int`, *optional*):
            How many rows the pass before had, once one has ended.

    Raises:
        SourceError: from all methods that read.

    Example:
        >>> from hf_nexus.mixture.stream.lanes import Lane
        >>> from hf_nexus.mixture.stream.reader import LaneReader, Retry
        >>> from hf_nexus.mixture.stream.sources import IndexedSource
        >>> lane = Lane("digits", index=0, count=2, per_rank=2, seed=0)
        >>> reader = LaneReader(IndexedSource([0, 1, 2, 3, 4, 5]), lane, Retry())
        >>> first, state = reader.take(2), reader.state()
        >>> LaneReader(IndexedSource([0, 1, 2, 3, 4, 5]), lane, Retry(), state).take(4) == reader.take(4)
        True
    """

    def __init__(
        self,
        source: ShardedSource | IndexedSource | ReplayedSource,
        lane: Lane,
        retry: Retry,
        state: dict[str, Any] | None = None,
    ):
        self.source = source
        self.lane = lane
        self.retry = retry
        state = state or {"pass": 0, "block": None, "given": 0, "rows": 0}
        self.pass_: int = state["pass"]
        self.last_pass: int | None = None
        self._cursor, self._given, self._rows = state["block"], state["given"], state["rows"]
        self._block: Block | None = None
        self._blocks: Any = None

    @property
    def is_fair_share(self) -> bool:
        """Whether each lane has as many rows of the source as the others, but for one."""
        return not isinstance(self.source, ShardedSource) or self.lane.shares_all(self.source.shards)

    def take(self, count: int) -> list[Any]:
        """The next `count` rows."""
        rows: list[Any] = []
        while len(rows) < count:
            more = self.ahead(count - len(rows))
            self.advance(len(more))
            rows += more
        return rows

    def ahead(self, count: int) -> list[Any]:
        """Rows that come next, at least one and at most `count`; they come again until [`~LaneReader.advance`]."""
        block = self._current()
        numbers = block.order[self._given : self._given + count].tolist()
        return self._retried(lambda: block.fetch(numbers))

    def advance(self, count: int) -> None:
        """Count rows as given out."""
        self._given += count
        self._rows += count

    def row(self, ahead: int) -> tuple[int, str]:
        """Number of a row that [`~LaneReader.ahead`] gave, and words for where it is counted from."""
        block = self._current()
        return block.row(self._given + ahead), "" if block.shard is None else f" of shard {block.shard}"

    def state(self) -> dict[str, Any]:
        """
        Where to go on, in types that JSON has: the pass, the position at the start of the block that is read, how many
        of its rows were given out, and how many of the pass.
        """
        block, given = self._cursor, self._given
        if self._block is not None:
            at_end = given == len(self._block)
            block, given = (self._block.end, 0) if at_end else (self._block.start, given)
        return {"pass": self.pass_, "block": block, "given": given, "rows": self._rows}

    def error(self, problem: str) -> SourceError:
        """An error that says where the reader is."""
        where = self.source.where(self.lane, self.pass_, self._cursor)
        rank = self.lane.index // self.lane.per_rank
        return SourceError(f"Source {self.lane.source!r} (rank {rank}, pass {self.pass_ + 1}, {where}): {problem}")

    def _current(self) -> Block:
        """The block of the next row."""
        while self._block is None or self._given >= len(self._block):
            block = self._retried(self._next_block)
            if block is None:
                self._end_pass()
                continue
            if self._block is not None:
                self._given = 0
            if self._given > len(block):
                raise self.error(
                    f"training resumes at row {self._given} of a block that has {len(block)}: its data changed."
                )
            self._block, self._cursor = block, block.end
        return self._block

    def _next_block(self) -> Block | None:
        if self._blocks is None:
            self._blocks = self.source.blocks(self.lane, self.pass_, self._cursor)
        return next(self._blocks, None)

    def _end_pass(self) -> None:
        if not self._rows:
            raise self.error(
                f"no row of a whole pass falls to lane {self.lane.index} of {self.lane.count}. Use fewer data loader "
                "workers or ranks, or give the source more rows."
            )
        self.last_pass, self._rows = self._rows, 0
        self.pass_ += 1
        self._block, self._blocks, self._cursor, self._given = None, None, None, 0

    def _retried(self, read: Callable[[], Result]) -> Result:
        for attempt in range(self.retry.attempts):
            try:
                return read()
            except Exception as error:
                cause = f"{type(error).__name__}: {error}"
                self._blocks = None  # to open it again, at the end of the last block
                if not _is_network(error):
                    raise self.error(f"the source raised {cause}") from error
                if attempt + 1 == self.retry.attempts:
                    raise self.error(
                        f"{self.retry.attempts} attempts to read failed, the last with {cause}"
                    ) from error
                seconds = self.retry.wait(attempt)
                logger.warning("%s; trying again in %.1f s.", self.error(cause), seconds)
                time.sleep(seconds)
        raise AssertionError("attempts is at least 1")


def _is_network(error: BaseException | None) -> bool:
    while error is not None:
        packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
        if (isinstance(error, OSError) and not isinstance(error, _PERMANENT)) or packages & _NETWORK_PACKAGES:
            return True
        error = error.__cause__
    return False
