"""How far a run over streams has come: which source is next, where each of them stands, and what to save of it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..schedule import DynamicSchedule, normalized
from .dataset import MixtureStream, StreamState
from .reader import SourceError

__all__ = ["StreamProgress", "WeightsFunction"]

logger = logging.getLogger(__name__)

# Weights of the sources at an outer step. If they are no pure function of it, the object is also `Stateful`.
WeightsFunction = Callable[[int], Mapping[str, float]]


@runtime_checkable
class Stateful(Protocol):
    """What has to be saved and loaded with a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """The state, in types that JSON has."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a former state."""


class StreamProgress:
    """
    The main process's view of a [`MixtureStream`]. It decides the source of each micro-batch at the moment it is sent
    for, which a loader with workers does ahead of training, and keeps the positions of what was trained on.

    Args:
        stream ([`MixtureStream`]):
            The data.
        weights (`Callable[[int], Mapping[str, float]]`):
            Weights of the sources at an outer step. Asked once for each step, in order, unless it is resumed.
        inner_steps (`int`):
            Micro-batches of an outer step, k.
        seed (`int`, *optional*, defaults to 0), kind (`str`, *optional*, defaults to `"random"`):
            As in [`SourceSchedule`].
        max_epochs (`Mapping[str, float | None]`, *optional*):
            How often a source may be read; one that has been hands its weight to the others in proportion.
        broadcast (`Callable[[np.ndarray], np.ndarray]`, *optional*):
            Makes the first rank's shares those of all.
    """

    def __init__(
        self,
        stream: MixtureStream,
        weights: WeightsFunction,
        inner_steps: int,
        seed: int = 0,
        kind: str = "random",
        max_epochs: Mapping[str, float | None] | None = None,
        broadcast: Callable[[np.ndarray], np.ndarray] = lambda shares: shares,
    ):
        self.stream = stream
        self.max_epochs = {name: limit for name, limit in (max_epochs or {}).items() if limit is not None}
        self._weights = weights
        self._broadcast = broadcast
        self._k = inner_steps
        self._schedule_settings = seed, kind
        self.begin(0, None)

    def begin(self, step: int, saved: Mapping[str, Any] | None) -> None:
        """
        Start at an outer step: with fresh data, or where a former run stood after so many steps.

        Args:
            step (`int`):
                Number of the outer step, from 0.
            saved (`Mapping`, *optional*):
                A former [`~StreamProgress.state_dict`] of the same step.
        """
        saved = saved or {}
        self._first: int = saved.get("first", step)  # fresh data begins at its own beginning, whatever the step
        self._schedule = DynamicSchedule(self.stream.names, *self._schedule_settings)
        if "schedule" in saved:
            self._schedule.load_state_dict(saved["schedule"])
        if isinstance(self._weights, Stateful) and "weights_function" in saved:
            self._weights.load_state_dict(saved["weights_function"])
        # What was decided for steps that a loader has sent for ahead of training.
        self._shares = {int(s): np.array(shares) for s, shares in saved.get("shares", {}).items()}
        self._schedules: dict[int, dict[str, Any]] = {}
        # Source to the first step without it; one whose limit was raised since is in use again.
        retired = saved.get("retired", {}).items()
        self.retired: dict[str, int] = {name: first for name, (limit, first) in retired if self._limit(name) == limit}
        self.sent = step * self._k - 1  # the last micro-batch sent for
        self._partitions: dict[str, Any] = {
            index: dict(states) for index, states in saved.get("partitions", {}).items()
        }
        self._pending: tuple[int, list[StreamState]] = (step, [])
        self.stream.begin(self._partitions)

    def source_of(self, number: int) -> int:
        """
        The position of a micro-batch's source. Asked for one after the other. Those before the step that the run
        goes on with are sent for only to be skipped: their source is not decided, and 0 is returned.

        Raises:
            SourceError: every source that has a weight was read as often as it may be.
        """
        if number <= self.sent:
            return 0
        step = number // self._k
        if number % self._k == 0:
            self._schedules[step] = self._schedule.state_dict()
        self.sent = number
        return self._schedule.source(number - self._first * self._k, self.shares(step))

    def shares(self, step: int) -> np.ndarray:
        """Share of each source at an outer step, (S,)."""
        self.decide(step)
        gone = [self.retired.get(name, step + 1) <= step for name in self.stream.names]
        shares = np.where(gone, 0.0, self._shares[step])
        if not shares.sum():
            raise SourceError(
                f"There is no data left at step {step}: every source with a weight has been read max_epochs times."
            )
        return shares / shares.sum()

    def decide(self, step: int) -> None:
        """Ask for the weights of an outer step, if they are not known. All ranks must do so for the same steps."""
        if step not in self._shares:
            self._shares[step] = self._broadcast(normalized(dict(self._weights(step)), self.stream.names))

    def _limit(self, source: str) -> float:
        return self.max_epochs.get(source, np.inf)

    def exhausted(self) -> list[str]:
        """Sources that the window fetched last has finished on this rank, and that are still in use."""
        finished = {s.source for s in self._pending[1] if s.state["pass"] >= self._limit(s.source)}
        return [name for name in self.stream.names if name in finished and name not in self.retired]

    def retire(self, source: str, sent: int) -> None:
        """Leave out a source from the first step of which no rank has sent for a micro-batch (the last is `sent`)."""
        first = self.retired[source] = sent // self._k + 1
        if self.stream.rank == 0:
            logger.warning(
                "Source %r has been read %g times, its max_epochs: from step %d on the other sources have its share.",
                source,
                self.max_epochs[source],
                first,
            )

    def fetched(self, step: int, states: Sequence[StreamState]) -> None:
        """Take note of where the window of an outer step leaves the sources."""
        self._commit(step)
        self._pending = (step, list(states))
        for past in [s for s in self._shares if s < step]:
            del self._shares[past]
        for past in [s for s in self._schedules if s < step]:
            del self._schedules[past]

    def _commit(self, step: int) -> None:
        """Count what was fetched for steps before `step` as trained on."""
        window, states = self._pending
        if window < step:
            for state in states:
                state.store(self._partitions)
            self._pending = (step, [])

    def skipped_rows(self, step: int) -> dict[str, int]:
        """For each source, rows that this rank skipped before an outer step because they could not be used."""
        self._commit(step)
        counts = dict.fromkeys(self.stream.names, 0)
        for states in self._partitions.values():
            for name, state in states.items():
                counts[name] += state.get("skipped", 0)
        return counts

    def state_dict(self, step: int) -> dict[str, Any]:
        """What [`~StreamProgress.begin`] needs to go on after `step` outer steps, in types that JSON has."""
        self._commit(step)
        state = {
            "first": self._first,
            "partitions": self._partitions,
            "retired": {name: [self._limit(name), first] for name, first in self.retired.items()},
            "schedule": self._schedules.get(step, self._schedule.state_dict()),
            "shares": {str(s): shares.tolist() for s, shares in self._shares.items() if s >= step},
        }
        if isinstance(self._weights, Stateful):
            state["weights_function"] = self._weights.state_dict()
        return state
