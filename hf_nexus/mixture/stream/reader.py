"""Reading one partition of a source: row after row and pass after pass, from a position that is a small dict."""

import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ...files import printable
from .sources import Block, Partition, Source

__all__ = ["RowReader", "SourceError"]

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Attempts to read after network errors. Waits in seconds are doubled after each.
ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 5, 1.0, 60.0
# Packages whose network errors are not all an `OSError`.
_NETWORK_PACKAGES = {"aiohttp", "botocore", "gcsfs", "http", "httpcore", "httpcore2", "httpx", "httpx2", "requests"}
_NETWORK_PACKAGES |= {"urllib3"}
# Errors that a retry does not solve.
_PERMANENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class SourceError(RuntimeError):
    """
    A source that cannot be read: it raised an error, or has an unusable row, or has too few rows. The message names
    the source, the position and the cause.

    Example:
        >>> from hf_nexus.mixture.stream.reader import SourceError
        >>> try:
        ...     trainer.train()  # doctest: +SKIP
        ... except SourceError as error:
        ...     print(error)
    """


def wait(failed: int) -> float:
    """Seconds to wait after attempt number `failed`, from 0. They are random, to spread the retries of workers."""
    # The draws of the run's own generator must not depend on the network.
    return min(LONGEST_WAIT, FIRST_WAIT * 2**failed) * random.SystemRandom().uniform(0.5, 1)


class RowReader:
    """
    Reads the rows of one partition, endlessly, from the beginning or from a former [`~RowReader.state`].

    Raises:
        SourceError: The source cannot be read (all methods that read).
    """

    def __init__(self, source: Source, partition: Partition, state: dict[str, Any] | None = None):
        self.source = source
        self.partition = partition
        state = state or {"pass": 0, "block": None, "offset": 0, "rows": 0}
        self._pass: int = state["pass"]
        self._position = state["block"]  # the start of the current block, or of the next one
        self._offset: int = state["offset"]  # rows of that block that were taken
        self._rows: int = state["rows"]  # rows of this pass that were taken
        self._last_pass: int | None = None
        self._block: Block | None = None
        self._blocks: Any = None

    def take(self, count: int) -> list[Any]:
        """The next `count` rows."""
        rows: list[Any] = []
        while len(rows) < count:
            more = self._peek(count - len(rows))
            self._advance(len(more))
            rows += more
        return rows

    def state(self) -> dict[str, Any]:
        """
        The position as JSON types: the pass, the start of the current block, and how many rows were taken from the
        block and from the pass.
        """
        return {"pass": self._pass, "block": self._position, "offset": self._offset, "rows": self._rows}

    def source_rows(self) -> int | None:
        """Rows of the whole source: exact for map-style sources, estimated for others once a pass has ended."""
        return self.source.size if self.source.size is not None else self._estimated_rows()

    def error(self, problem: str) -> SourceError:
        """An error that names the position."""
        where = self.source.describe(self.partition, self._pass, self._position)
        name, rank = self.partition.source, self.partition.rank
        return SourceError(f"Source {name!r} (rank {rank}, pass {self._pass + 1}, {where}): {printable(problem)}")

    def _estimated_rows(self) -> int | None:
        # With unequal partitions, one of them says nothing about the others.
        if self._last_pass is None or not self.source.splits_evenly(self.partition):
            return None
        return self._last_pass * self.partition.count

    def _peek(self, count: int) -> list[Any]:
        """The next rows, at least one and at most `count`, without advancing."""
        block = self._current_block()
        numbers = block.order[self._offset : self._offset + count].tolist()
        return self._retried(lambda: block.fetch(numbers))

    def _advance(self, count: int) -> None:
        """Mark rows of the last peek as taken."""
        assert self._block is not None
        self._offset += count
        self._rows += count
        if self._offset == len(self._block.order):
            self._leave(self._block)

    def _leave(self, block: Block) -> None:
        self._position, self._offset, self._block = block.end, 0, None

    def _current_block(self) -> Block:
        while self._block is None:
            block = self._retried(self._next_block)
            if block is None:
                self._end_pass()
            elif self._offset > len(block.order):
                raise self.error(
                    f"training resumes at row {self._offset} of a block, which now has only {len(block.order)} rows. "
                    "Restore the data of the checkpoint."
                )
            elif self._offset == len(block.order):  # no row of it is in the partition
                self._leave(block)
            else:
                self._block = block
        return self._block

    def _next_block(self) -> Block | None:
        if self._blocks is None:
            self._blocks = self.source.blocks(self.partition, self._pass, self._position)
        return next(self._blocks, None)

    def _end_pass(self) -> None:
        if not self._rows:
            raise self.error(
                f"partition {self.partition.index} of {self.partition.count} has no rows. Use fewer data loader "
                "workers or ranks, or add rows to the source."
            )
        self._last_pass, self._rows = self._rows, 0
        self._pass += 1
        self._blocks, self._position, self._offset = None, None, 0

    def _retried(self, read: Callable[[], Result]) -> Result:
        for attempt in range(ATTEMPTS):
            try:
                return read()
            except Exception as error:
                cause = f"{type(error).__name__}: {error}"
                self._blocks = None  # reopen the source at the current position
                if not _is_network(error):
                    raise self.error(f"the source raised {cause}") from error
                if attempt + 1 == ATTEMPTS:
                    raise self.error(f"{ATTEMPTS} attempts to read failed, the last with {cause}") from error
                seconds = wait(attempt)
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
