"""The progress of a run over streams: the next source, the position of each source, and what a checkpoint holds."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..schedule import DynamicSchedule, normalized
from ..stages import Windows
from ..tags import StreamState
from .dataset import MixtureStream
from .reader import SourceError

__all__ = ["StreamProgress", "WeightsFunction"]

logger = logging.getLogger(__name__)

# Weights of the sources at an outer step. An object whose answers depend on more than the step is also `Stateful`.
WeightsFunction = Callable[[int], Mapping[str, float]]


@runtime_checkable
class Stateful(Protocol):
    """An object whose state is saved and loaded with a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON types."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state."""


class StreamProgress:
    """
    The main process's view of a [`MixtureStream`]. It decides the source of each micro-batch when the data loader asks
    for it, which is ahead of training with workers. It keeps the positions of the rows that were trained on.

    Args:
        stream ([`MixtureStream`]):
            The data.
        weights (`Callable[[int], Mapping[str, float]]`):
            Weights of the sources at an outer step. Called once for each step, in order.
        inner_steps (`int`):
            Micro-batches of an outer step, k.
        seed (`int`, *optional*, defaults to 0), kind (`str`, *optional*, defaults to `"random"`), \
        rows (`int`, *optional*, defaults to 1):
            As in [`SourceSchedule`].
        max_epochs (`Mapping[str, float | None]`, *optional*):
            Largest number of passes over a source. The others then get its share in proportion.
        broadcast (`Callable[[np.ndarray], np.ndarray]`, *optional*):
            Returns the shares of the first rank on all ranks.
    """

    def __init__(
        self,
        stream: MixtureStream,
        weights: WeightsFunction,
        inner_steps: int,
        seed: int = 0,
        kind: str = "random",
        rows: int = 1,
        max_epochs: Mapping[str, float | None] | None = None,
        broadcast: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self.stream = stream
        self.max_epochs = {name: limit for name, limit in (max_epochs or {}).items() if limit is not None}
        self._weights: Any = weights
        self._broadcast = broadcast
        self._k = inner_steps
        self._schedule_settings = seed, kind, Windows(inner_steps), rows, stream.ranks
        self.begin(0, None)

    def begin(self, step: int, saved: Mapping[str, Any] | None) -> None:
        """
        Start at an outer step: from the beginning of the data, or from the positions of a checkpoint.

        Args:
            step (`int`):
                Number of the outer step, from 0.
            saved (`Mapping`, *optional*):
                The [`~StreamProgress.state_dict`] of a checkpoint of the same step.
        """
        saved = saved or {}
        self._first: int = saved.get("first", step)  # the step at which the data began
        self._schedule = DynamicSchedule(self.stream.names, *self._schedule_settings)
        if "schedule" in saved:
            self._schedule.load_state_dict(saved["schedule"])
        if isinstance(self._weights, Stateful) and "weights_function" in saved:
            self._weights.load_state_dict(saved["weights_function"])
        # Shares of steps for which the data loader has asked ahead of training.
        self._shares = {int(s): np.array(shares) for s, shares in saved.get("shares", {}).items()}
        self._schedules: dict[int, dict[str, Any]] = {}
        # First step without each ended source. A source with a raised limit is used again.
        left_out = saved.get("left_out", {}).items()
        self.left_out: dict[str, int] = {name: step for name, (limit, step) in left_out if self._limit(name) == limit}
        self.sent = step * self._k - 1  # the last micro-batch that the data loader has asked for
        self._positions: dict[str, Any] = {index: dict(s) for index, s in saved.get("positions", {}).items()}
        self._window: tuple[int, list[StreamState]] = (step, [])
        self.stream.begin(self._positions)

    def source_of(self, number: int) -> Any:
        """
        Index of the source of a micro-batch, or of that of each of its rows. Micro-batches are requested in order.
        Those before the first step of a resumed run are skipped by the loader, so 0 is returned for them.

        Raises:
            SourceError: every source that has a weight was read `max_epochs` times.
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

    def exhausted(self) -> list[str]:
        """Sources in use that the last window has read `max_epochs` times on this rank."""
        finished = {s.source for s in self._window[1] if s.state["pass"] >= self._limit(s.source)}
        return [name for name in self.stream.names if name in finished and name not in self.left_out]

    def leave_out(self, source: str, sent: int) -> None:
        """Leave out a source from the first step after `sent`, the last micro-batch that any rank asked for."""
        first = self.left_out[source] = sent // self._k + 1
        if self.stream.rank == 0:
            logger.warning(
                "Source %r has been read %g times (max_epochs). From step %d on, the other sources have its share.",
                source,
                self.max_epochs[source],
                first,
            )

    def note_window(self, step: int, states: Sequence[StreamState]) -> None:
        """Note the positions of the sources after the window of an outer step."""
        self._commit(step)
        self._window = (step, list(states))
        for past in [s for s in self._shares if s < step]:
            del self._shares[past]
        for past in [s for s in self._schedules if s < step]:
            del self._schedules[past]

    def _commit(self, step: int) -> None:
        """Add the window to the positions if it belongs to a step before `step`."""
        of_step, states = self._window
        if of_step < step:
            for state in states:
                state.store(self._positions)
            self._window = (step, [])

    def skipped_rows(self, step: int) -> dict[str, int]:
        """Rows of each source that this rank has skipped before an outer step because they could not be used."""
        self._commit(step)
        counts = dict.fromkeys(self.stream.names, 0)
        for states in self._positions.values():
            for name, state in states.items():
                counts[name] += state.get("skipped", 0)
        return counts

    def state_dict(self, step: int) -> dict[str, Any]:
        """State for [`~StreamProgress.begin`] to continue after `step` outer steps, as JSON types."""
        self._commit(step)
        state = {
            "first": self._first,
            "positions": self._positions,
            "left_out": {name: [self._limit(name), first] for name, first in self.left_out.items()},
            "schedule": self._schedules.get(step, self._schedule.state_dict()),
            "shares": {str(s): shares.tolist() for s, shares in self._shares.items() if s >= step},
        }
        if isinstance(self._weights, Stateful):
            state["weights_function"] = self._weights.state_dict()
        return state
