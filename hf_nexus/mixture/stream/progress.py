"""The progress of a run over streams: the next source, the position of each source, and what a checkpoint holds."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.stateful import Stateful

from ..schedule import DynamicSchedule, WindowCounts
from ..stages import normalized
from ..step_effects import StepEffects
from ..tags import StreamState, tag_of
from .dataset import MixtureStream
from .reader import SourceError

__all__ = ["MicroBatchSampler", "StreamProgress", "WeightsFunction", "steps_ahead"]

logger = logging.getLogger(__name__)

# Weights of the sources at an outer step. An object whose answers depend on more than the step is also `Stateful`,
# and its state has JSON types.
WeightsFunction = Callable[[int], Mapping[str, float]]


def steps_ahead(owners: int, sources: int, read_ahead: int, inner_steps: int) -> int:
    """
    By how many outer steps the data loader asks ahead of training at most: for what its workers read ahead, for what
    is planned before requests and put in order after them, and for the one batch that it always holds.
    """
    return 1 + (read_ahead + 2 * (owners - 1) * (sources + 1)) // inner_steps


class StreamProgress:
    """
    The main process's view of a [`MixtureStream`]. It decides the source of each micro-batch when the data loader asks
    for it, which is ahead of training with workers. It keeps the positions of the rows that were trained on.

    `weights` is called once for each outer step, in order. `kind` and `rows` are those of [`DynamicSchedule`].
    After `max_epochs` passes over a source, the others get its share in proportion. `read_ahead` micro-batches are
    asked of the workers of the data loader before it is their turn. `broadcast` returns the shares of the first rank
    on all ranks.
    """

    def __init__(
        self,
        stream: MixtureStream,
        weights: WeightsFunction,
        inner_steps: int,
        kind: str = "random",
        rows: int = 1,
        max_epochs: Mapping[str, float | None] | None = None,
        read_ahead: int = 0,
        broadcast: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self.stream = stream
        self.max_epochs = {name: limit for name, limit in (max_epochs or {}).items() if limit is not None}
        self._weights: Any = weights
        self._broadcast = broadcast
        self._k = inner_steps
        self._read_ahead = read_ahead
        self._schedule_settings = stream.seed, kind, WindowCounts(inner_steps), rows, stream.ranks
        self.begin(0, None)

    def begin(self, step: int, saved: Mapping[str, Any] | None) -> None:
        """
        Start at an outer step, from 0: from the beginning of the data, or from the [`~StreamProgress.state_dict`] of a
        checkpoint of the same step.
        """
        saved = saved or {}
        self._first: int = saved.get("first", step)  # the step at which the data began
        self._schedule = DynamicSchedule(self.stream.names, *self._schedule_settings)
        if "schedule" in saved:
            self._schedule.load_state_dict(saved["schedule"])
        if isinstance(self._weights, Stateful) and "weights_function" in saved:
            self._weights.load_state_dict(saved["weights_function"])
        # From the step at which a source ends to the first one without it. A resumed run keeps the first.
        self._until_left_out: int = saved.get("until_left_out", 1 + self.steps_ahead)
        assert not self.max_epochs or self.steps_ahead < self._until_left_out, "the feed has checked it"
        # Shares of steps for which the data loader has asked ahead of training.
        self._shares = {int(s): np.array(shares) for s, shares in saved.get("shares", {}).items()}
        # Micro-batches of each source so far; their state and that of the schedule before each step asked for.
        self._counts: dict[str, int] = dict(saved.get("micro_batches", dict.fromkeys(self.stream.names, 0)))
        self._starts: dict[int, dict[str, Any]] = {}
        self._order: deque[tuple[str, int]] = deque()  # source and number of the micro-batches that are to come
        self._early: dict[tuple[str, int], Any] = {}  # those that came before their turn
        # First step without each ended source. A source with a raised limit is used again.
        left_out = saved.get("left_out", {}).items()
        self.left_out: dict[str, int] = {name: step for name, (limit, step) in left_out if self._limit(name) == limit}
        self.sent = step * self._k - 1  # the last micro-batch that the data loader has asked for
        stream = self.stream
        self._positions: dict[str, Any] = {
            name: {lane: state for lane, state in lanes.items() if int(lane) // stream.lanes.turns in stream.slots}
            for name, lanes in saved.get("positions", {}).items()
        }
        self._effects = StepEffects()
        self.stream.begin(self._positions)

    def index_of(self, number: int) -> Any:
        """
        Number within its source and source of a micro-batch, or of each of its rows if they are mixed. Micro-batches
        are requested in order.

        Raises:
            SourceError: every source that has a weight was read `max_epochs` times.
        """
        assert number == self.sent + 1
        step = number // self._k
        if number % self._k == 0:
            self._starts[step] = self._start()
        self.sent = number
        drawn = self._schedule.source(number - self._first * self._k, self.shares(step))
        if self.stream.mixed:
            return [self._next(int(source)) for source in drawn]
        ordinal, source = self._next(int(drawn))
        if self.ahead:
            self._order.append((self.stream.names[source], ordinal))
        return ordinal, source

    def _next(self, source: int) -> tuple[int, int]:
        """The next micro-batch of a source, or the next row if they are mixed."""
        name = self.stream.names[source]
        self._counts[name] += 1
        return self._counts[name] - 1, source

    def _start(self) -> dict[str, Any]:
        return {"schedule": self._schedule.state_dict(), "micro_batches": dict(self._counts)}

    @property
    def ahead(self) -> int:
        """How many micro-batches are planned before they are requested, and requested before it is their turn."""
        return (self.stream.owners - 1) * (len(self.stream.names) + 1)

    @property
    def steps_ahead(self) -> int:
        """[`steps_ahead`] of this run."""
        return steps_ahead(self.stream.owners, len(self.stream.names), self._read_ahead, self._k)

    def in_order(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield micro-batches in the order of training. The data loader gives them in the order of requests."""
        while True:
            while not self._order or self._order[0] not in self._early:
                if (batch := next(batches, None)) is None:
                    return
                tag = tag_of(batch)
                if tag is None or not tag.states:  # from a data loader of the user
                    yield batch
                else:
                    self._early[tag.states[0].source, tag.states[0].ordinal] = batch
            yield self._early.pop(self._order.popleft())

    def shares(self, step: int) -> np.ndarray:
        """Share of each source at an outer step, (S,)."""
        self.decide_shares(step)
        ended = [self.left_out.get(name, step + 1) <= step for name in self.stream.names]
        shares = np.where(ended, 0.0, self._shares[step])
        if not shares.sum():
            raise SourceError(
                f"There is no data left at step {step}: every source with a weight has been read max_epochs times."
            )
        return shares / shares.sum() if any(ended) else shares

    def decide_shares(self, step: int) -> None:
        """Request the weights of an outer step if they are not known. All ranks must call it for the same steps."""
        if step not in self._shares:
            shares = normalized(dict(self._weights(step)), self.stream.names)
            self._shares[step] = shares if self._broadcast is None else self._broadcast(shares)

    def _limit(self, source: str) -> float:
        return self.max_epochs.get(source, np.inf)

    def exhausted(self, states: Sequence[StreamState]) -> set[str]:
        """Sources in use that have been read `max_epochs` times on this rank after a window with these positions."""
        passes = [(s.source, state["pass"]) for s in states for state in s.lanes.values()]
        return {source for source, pass_ in passes if pass_ >= self._limit(source)} - self.left_out.keys()

    def leave_out(self, source: str, step: int) -> None:
        """Leave out a source that has ended at a step, from the first step that no data loader has asked for."""
        first = self.left_out[source] = step + self._until_left_out
        assert self.sent < first * self._k, "the data loader is further ahead than planned"
        if self.stream.rank == 0:
            logger.warning(
                "Source %r has been read %g times (max_epochs). From step %d on, the other sources have its share.",
                source,
                self.max_epochs[source],
                first,
            )

    def note_window(self, step: int, states: Sequence[StreamState]) -> None:
        """Note the positions of the sources after the window of an outer step."""
        self._effects.begin(step)
        for state in states:
            self._effects.add(partial(state.store, self._positions))
        for past in [s for s in self._shares if s < step]:
            del self._shares[past]
        for past in [s for s in self._starts if s < step]:
            del self._starts[past]

    def skipped_rows(self, step: int) -> dict[str, list[int]]:
        """
        By source that skips rows, for each lane: rows that were skipped before an outer step because they could not be
        used, as far as this rank knows. It may not have read a lane, or another rank later.
        """
        self._effects.apply(step)
        lanes = range(self.stream.lanes.slots * self.stream.lanes.turns)
        states = {name: self._positions.get(name, {}) for name in self.stream.skipping}
        return {name: [of.get(str(lane), {}).get("skipped", 0) for lane in lanes] for name, of in states.items()}

    def state_dict(self, step: int) -> dict[str, Any]:
        """State for [`~StreamProgress.begin`] to continue after `step` outer steps, as JSON types."""
        self._effects.apply(step)
        state = {
            "lanes": [self.stream.lanes.slots, self.stream.lanes.turns],
            "first": self._first,
            "until_left_out": self._until_left_out,
            "positions": self._positions,
            "left_out": {name: [self._limit(name), first] for name, first in self.left_out.items()},
            **self._starts.get(step, self._start()),
            "shares": {str(s): shares.tolist() for s, shares in self._shares.items() if s >= step},
        }
        if isinstance(self._weights, Stateful):
            state["weights_function"] = self._weights.state_dict()
        return state


class MicroBatchSampler(torch.utils.data.Sampler[tuple[int, int]]):
    """
    Indices of a [`MixtureStream`], once for each of the rows of a micro-batch on all ranks.

    A data loader gives its requests to its workers in turn. With workers, micro-batches are requested in an order in
    which each worker gets those of the lanes that it owns, and the run puts them back in order.

    `index_of` returns the number within its source and the source of a micro-batch, or of each of its rows if they are
    mixed. It is called in order, `ahead` micro-batches before the request. With `(owners - 1) * (sources + 1)` planned
    ahead, there is always one for the next worker. `rows` are those of a micro-batch over all ranks.

    `first` returns the number of the first micro-batch that is read. A resumed run skips the rows before it, but
    Accelerate asks for their indices: they are all the same, and cost no Python code.
    """

    def __init__(
        self,
        index_of: Callable[[int], Any],
        micro_batches: int,
        rows: int,
        owners: int = 1,
        ahead: int = 0,
        first: Callable[[], int] = lambda: 0,
    ):
        self.index_of = index_of
        self.micro_batches = micro_batches
        self.rows = rows
        self.owners = owners
        self.ahead = ahead
        self.first = first

    def __len__(self) -> int:
        return self.micro_batches * self.rows

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.first()
        return chain(repeat((0, 0), first * self.rows), self._indices(first))

    def _indices(self, first: int) -> Iterator[tuple[int, int]]:
        for index in self._requests(first):
            if isinstance(index, list):
                yield from index
            else:
                yield from ((index[0] * self.rows + row, index[1]) for row in range(self.rows))

    def _requests(self, first: int) -> Iterator[Any]:
        planned: list[deque[tuple[int, int]]] = [deque() for _ in range(self.owners)]
        ends: dict[int, int] = {}  # the number after those of each source
        source = worker = 0  # of the last request, and the worker that gets the next one
        for number in range(first, self.micro_batches):
            index = self.index_of(number)
            if isinstance(index, list):
                yield index
                continue
            planned[index[0] % self.owners].append(index)
            ends[index[1]] = index[0] + 1
            if sum(map(len, planned)) > self.ahead:
                yield (index := planned[worker].popleft())
                source, worker = index[1], (worker + 1) % self.owners
        if any(planned) and source not in ends:  # so few are left that none was requested yet
            source = next(iter(ends))
        while any(planned):
            if not planned[worker]:  # it reads what the run does not ask for, because the next worker has more to do
                ends[source] += (worker - ends[source]) % self.owners + 1
                planned[worker].append((ends[source] - 1, source))
            yield (index := planned[worker].popleft())
            source, worker = index[1], (worker + 1) % self.owners
