"""Which source each micro-batch comes from: a function of the seed, of its number, and of the weights up to it."""

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from .stages import normalized

__all__ = ["DynamicSchedule", "SourceSchedule", "WindowCounts"]

# Draws per random stream. Any range of draws can be made without the ones before its block.
_BLOCK = 4096
_KINDS = ("random", "stratified", "mixed", "blocked")


@dataclass(frozen=True)
class WindowCounts:
    """The windows of a run, as the Trainer counts them. The last one of an epoch may be short."""

    inner_steps: int  # micro-batches of a window, k
    epoch: int | None = None  # micro-batches of an epoch; by default the data has no end

    def count(self, max_steps: int, epochs: float) -> int:
        """Outer steps of a run of `max_steps`, or of some epochs if it is not positive."""
        return max_steps if max_steps > 0 else math.ceil(epochs * self._per_epoch())

    def micro_batches(self, steps: int) -> int:
        """Micro-batches of the first outer steps."""
        if self.epoch is None:
            return steps * self.inner_steps
        epochs, rest = divmod(steps, self._per_epoch())
        return epochs * self.epoch + rest * self.inner_steps

    def numbers(self, micro_batches: np.ndarray) -> np.ndarray:
        """The outer step of each micro-batch, by its number."""
        if self.epoch is None:
            return micro_batches // self.inner_steps
        epochs, rest = np.divmod(micro_batches, self.epoch)
        return epochs * self._per_epoch() + rest // self.inner_steps

    def _per_epoch(self) -> int:
        assert self.epoch is not None, "data without an end needs max_steps"
        return max(1, math.ceil(self.epoch / self.inner_steps))


class DynamicSchedule:
    """
    The source of each micro-batch where the shares of the sources are known when it is asked for.

    Args:
        names (`Sequence[str]`):
            The sources.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.
        kind (`str`, *optional*, defaults to `"random"`):
            `"random"`: independent draws from the weights, as in the paper. `"stratified"`: always the source furthest
            below its target share, which keeps every prefix as balanced as possible. A source that is below its
            target at the end of a stage stays so in the next, if it has a weight there. Two are controls. `"mixed"`:
            each micro-batch has rows of all sources, the product of rows and share of each, rounded up or down.
            `"blocked"`: all micro-batches of a window have one source, drawn from the weights.
        windows ([`WindowCounts`], *optional*):
            The windows of micro-batches, for `"blocked"`.
        rows (`int`, *optional*, defaults to 1):
            Rows of a micro-batch over all ranks.
        ranks (`int`, *optional*, defaults to 1):
            For `"mixed"`: the number of ranks, which get equal parts of a micro-batch.

    Raises:
        ValueError: The kind is unknown, or mixes micro-batches of one row.

    Example:
        >>> from hf_nexus.mixture.schedule import DynamicSchedule
        >>> schedule = DynamicSchedule(["text", "code"], kind="stratified")
        >>> [schedule.source(i, [0.5, 0.5]) for i in range(4)]
        [0, 1, 0, 1]
    """

    def __init__(
        self,
        names: Sequence[str],
        seed: int = 0,
        kind: str = "random",
        windows: WindowCounts | None = None,
        rows: int = 1,
        ranks: int = 1,
    ):
        if kind not in _KINDS:
            raise ValueError(f"source_schedule={kind!r} is not known; use one of {', '.join(map(repr, _KINDS))}.")
        if kind == "mixed" and rows < 2:
            raise ValueError(
                "source_schedule='mixed' needs micro-batches of 2 rows or more. Raise per_device_train_batch_size."
            )
        self.names = list(names)
        self.seed = seed
        self.kind = kind
        self.rows = rows
        self._windows = windows
        # Equally spaced points put each source into a micro-batch as often as its share asks for. Each rank gets every
        # `ranks`-th point, and so the same mix.
        self._order = np.arange(rows).reshape(-1, ranks).T.ravel()
        # How far each source is below its target: the sum of its shares so far, less the times that it was taken.
        # Constant shares are multiplied instead of summed. After three steps of a third, the target is exactly one,
        # and ties stay ties.
        none = np.zeros(len(self.names))
        self._balance: dict[str, Any] = {"taken": 0, "since": 0, "before": none, "counts": none.copy(), "shares": none}

    def points(self, start: int, stop: int) -> np.ndarray:
        """
        Where the micro-batches `start <= i < stop` fall between 0 and 1, float64 of shape `(stop - start,)`, or
        `(stop - start, rows)` for `"mixed"`.
        """
        if self.kind == "blocked":
            assert self._windows is not None
            first, last = self._windows.numbers(np.array([start, stop])).tolist()
            return _uniform(self.seed, first, last + 1)[self._windows.numbers(np.arange(start, stop)) - first]
        uniform = _uniform(self.seed, start, stop)
        return (uniform[:, None] + self._order) / len(self._order) if self.kind == "mixed" else uniform

    def source(self, i: int, shares: Sequence[float] | np.ndarray) -> Any:
        """
        Position in `names` for micro-batch `i`, or for each of its rows, `(rows,)`, if it is mixed. A stratified
        schedule must be asked for each micro-batch in order. The current `shares` of the sources, (S,), are those of
        [`normalized`].
        """
        current, balance = np.asarray(shares), self._balance
        if self.kind != "stratified":
            return _pick(current, self.points(i, i + 1))[0]
        assert i == balance["taken"], f"micro-batch {balance['taken']} is next, not {i}"
        if current is not balance["shares"] and not np.array_equal(current, balance["shares"]):
            before = balance["before"] + balance["shares"] * (i - balance["since"])  # targets until now
            balance |= {"before": before, "since": i, "shares": current}
        balance["taken"] += 1
        missing = balance["before"] + current * (balance["taken"] - balance["since"]) - balance["counts"]
        # A source without a weight is never taken, even if it is below its target from before.
        source = int(np.argmax(np.where(current > 0, missing, -np.inf)))
        balance["counts"][source] += 1
        return source

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON types, a few numbers per source. Draws need none."""
        if self.kind != "stratified":
            return {}
        return {n: value.tolist() if isinstance(value, np.ndarray) else value for n, value in self._balance.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of [`~DynamicSchedule.state_dict`]."""
        if self.kind == "stratified":
            self._balance |= {n: np.array(value) if isinstance(value, list) else value for n, value in state.items()}


class SourceSchedule(DynamicSchedule):
    """
    The [`DynamicSchedule`] of weights that are known for the whole run. A micro-batch has the same source for any
    number of ranks, workers or restarts.

    Args:
        weights (`Mapping[str, float]` or `Sequence[tuple[int, Mapping[str, float]]]`):
            Mixture weights, >= 0, normalized to sum to one. For stages: the first micro-batch and the weights of each.
        seed, kind, windows, rows, ranks:
            As in [`DynamicSchedule`].

    Attributes:
        names (`list[str]`), largest_shares (`np.ndarray`):
            The sources, and the largest share of each in any stage, both (S,).

    Raises:
        ValueError: Weights are negative or sum to zero, stages do not start at 0 and rise or name different sources,
            or the kind is unknown, or mixes micro-batches of one row.

    Example:
        >>> from hf_nexus.mixture import SourceSchedule
        >>> schedule = SourceSchedule({"text": 0.5, "code": 0.5}, kind="stratified")
        >>> [schedule.names[s] for s in schedule.sources(0, 4)]
        ['text', 'code', 'text', 'code']
        >>> staged = SourceSchedule([(0, {"text": 1, "code": 0}), (3, {"text": 0, "code": 1})])
        >>> [staged.names[s] for s in staged.sources(0, 5)]
        ['text', 'text', 'text', 'code', 'code']
        >>> SourceSchedule({"text": 0.5, "code": 0.5}, kind="mixed", rows=4).sources(0, 2).tolist()
        [[0, 0, 1, 1], [0, 0, 1, 1]]
    """

    def __init__(
        self,
        weights: Mapping[str, float] | Sequence[tuple[int, Mapping[str, float]]],
        seed: int = 0,
        kind: str = "random",
        windows: WindowCounts | None = None,
        rows: int = 1,
        ranks: int = 1,
    ):
        stages = [(0, weights)] if isinstance(weights, Mapping) else list(weights)
        first = [start for start, _ in stages]
        if not stages or first[0] != 0 or any(b <= a for a, b in pairwise(first)):
            raise ValueError(f"weights: stages start at micro-batches {first}; the first must be 0, and each later.")
        super().__init__(list(stages[0][1]), seed, kind, windows, rows, ranks)
        self.first = np.array(first)
        self.stage_shares = np.stack([normalized(weights, self.names) for _, weights in stages])
        self.largest_shares = self.stage_shares.max(axis=0)
        self._stratified = array("i")

    def sources(self, start: int, stop: int) -> np.ndarray:
        """
        Positions in `names` for the micro-batches `start <= i < stop`, shape `(stop - start,)`, int64. Those of
        `"mixed"` have the shape `(stop - start, rows)`.
        """
        if self.kind == "stratified":
            done = len(self._stratified)
            if stop > done:
                shares = list(self.stage_shares)  # the same arrays at each micro-batch of a stage
                coming = self._stages(done, max(stop, done + _BLOCK))
                self._stratified.extend(self.source(i, shares[stage]) for i, stage in enumerate(coming, done))
            return np.array(self._stratified[start:stop], dtype=np.int64)
        points, stages = self.points(start, stop), self._stages(start, stop)
        drawn = np.empty(points.shape, dtype=np.int64)
        for stage in np.unique(stages):
            drawn[stages == stage] = _pick(self.stage_shares[stage], points[stages == stage])
        return drawn

    def _stages(self, start: int, stop: int) -> np.ndarray:
        return np.searchsorted(self.first, np.arange(start, stop), side="right") - 1


@lru_cache(maxsize=2)  # callers often ask for one micro-batch after the other
def _draw(seed: int, block: int) -> np.ndarray:
    return np.random.default_rng((seed, block)).random(_BLOCK)


def _uniform(seed: int, start: int, stop: int) -> np.ndarray:
    first = start // _BLOCK
    blocks = range(first, (max(stop, start + 1) - 1) // _BLOCK + 1)
    draws = np.concatenate([_draw(seed, block) for block in blocks])
    return draws[start - first * _BLOCK : stop - first * _BLOCK]


def _pick(shares: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    edges = np.cumsum(shares)
    # Rounding must neither leave a draw of 0.999... without a source nor give it to one without a weight.
    edges[np.flatnonzero(shares)[-1] :] = np.inf
    return np.searchsorted(edges, uniform, side="right")
