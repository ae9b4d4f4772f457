"""Which source each micro-batch comes from: a pure function of the seed, the weights and the micro-batch's number."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

__all__ = ["DynamicSchedule", "SourceSchedule", "normalized"]

_BLOCK = 4096  # draws per random stream, so that any stretch can be had without the ones before it


class SourceSchedule:
    """
    The source of each micro-batch of a run. Micro-batch `i = outer step * k + inner step` (both from 0), the same on
    every rank, whatever the number of ranks, workers or restarts.

    Args:
        weights (`Mapping[str, float]` or `Sequence[tuple[int, Mapping[str, float]]]`):
            Share of each source, >= 0; normalised to sum to one. Or stages: for each its first micro-batch and its
            weights, as [`stage_borders`] makes them.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.
        kind (`str`, *optional*, defaults to `"random"`):
            `"random"`: independent draws from the weights, as in the paper. `"stratified"`: always the source furthest
            below its target share, so that every prefix is as balanced as it can be. What a source is owed at the end
            of a stage it is owed in the next, if it has a weight there.

    Attributes:
        names (`list[str]`), shares (`np.ndarray`):
            The sources, and the largest share of each in any stage, both (S,).

    Raises:
        ValueError: weights that are negative, or sum to zero; stages that do not start at 0 and rise, or name other
            sources than the first; an unknown kind.

    Example:
        >>> from hf_nexus.mixture import SourceSchedule
        >>> schedule = SourceSchedule({"text": 0.5, "code": 0.5}, kind="stratified")
        >>> [schedule.names[s] for s in schedule.sources(0, 4)]
        ['text', 'code', 'text', 'code']
        >>> staged = SourceSchedule([(0, {"text": 1, "code": 0}), (3, {"text": 0, "code": 1})])
        >>> [staged.names[s] for s in staged.sources(0, 5)]
        ['text', 'text', 'text', 'code', 'code']
    """

    def __init__(
        self,
        weights: Mapping[str, float] | Sequence[tuple[int, Mapping[str, float]]],
        seed: int = 0,
        kind: str = "random",
    ):
        _check_kind(kind)
        stages = [(0, weights)] if isinstance(weights, Mapping) else list(weights)
        first = [start for start, _ in stages]
        if not stages or first[0] != 0 or any(b <= a for a, b in pairwise(first)):
            raise ValueError(f"weights: stages start at micro-batches {first}; the first must be 0, and each later.")
        self.names = list(stages[0][1])
        self.first = np.array(first)
        self.stage_shares = np.stack([normalized(shares, self.names) for _, shares in stages])
        self.shares = self.stage_shares.max(axis=0)
        self.seed = seed
        self.kind = kind
        self._stratified = np.empty(0, dtype=np.int64)
        self._balance = _Balance(len(self.names))

    def sources(self, start: int, stop: int) -> np.ndarray:
        """Positions in `names` for the micro-batches `start <= i < stop`, shape `(stop - start,)`, int64."""
        if self.kind == "stratified":
            return self._balanced(stop)[start:stop]
        uniform = _uniform(self.seed, start, stop)
        drawn = np.empty(stop - start, dtype=np.int64)
        ends = [*self.first[1:], max(stop, start)]
        for first, end, shares in zip(self.first, ends, self.stage_shares, strict=True):
            part = slice(max(0, first - start), max(0, min(end, stop) - start))
            drawn[part] = _pick(shares, uniform[part])
        return drawn

    def _balanced(self, stop: int) -> np.ndarray:
        done = len(self._stratified)
        if stop > done:
            numbers = np.arange(done, max(stop, done + _BLOCK))
            stages = np.searchsorted(self.first, numbers, side="right") - 1
            more = [self._balance.take(self.stage_shares[stage]) for stage in stages]
            self._stratified = np.concatenate([self._stratified, np.array(more, dtype=np.int64)])
        return self._stratified


class DynamicSchedule:
    """
    The source of each micro-batch where the weights are decided while training: with constant shares the same as
    [`SourceSchedule`].

    Args:
        names (`Sequence[str]`):
            The sources.
        seed (`int`, *optional*, defaults to 0), kind (`str`, *optional*, defaults to `"random"`):
            As in [`SourceSchedule`].

    Raises:
        ValueError: an unknown kind.

    Example:
        >>> from hf_nexus.mixture.schedule import DynamicSchedule
        >>> schedule = DynamicSchedule(["text", "code"], kind="stratified")
        >>> [schedule.source(i, [0.5, 0.5]) for i in range(4)]
        [0, 1, 0, 1]
    """

    def __init__(self, names: Sequence[str], seed: int = 0, kind: str = "random"):
        _check_kind(kind)
        self.names = list(names)
        self.seed = seed
        self.kind = kind
        self._balance = _Balance(len(self.names))

    def source(self, i: int, shares: Sequence[float] | np.ndarray) -> int:
        """
        Position in `names` for micro-batch `i`. A stratified schedule must be asked for one after the other, from the
        one at which its state was saved.

        Args:
            i (`int`):
                Number of the micro-batch.
            shares (`Sequence[float]`):
                Share of each source now, (S,), >= 0; normalised to sum to one.

        Raises:
            ValueError: shares that are negative, or sum to zero.
        """
        current = normalized(dict(zip(self.names, shares, strict=True)), self.names)
        if self.kind == "stratified":
            assert i == self._balance.taken, f"micro-batch {self._balance.taken} is next, not {i}"
            return self._balance.take(current)
        return int(_pick(current, _uniform(self.seed, i, i + 1))[0])

    def state_dict(self) -> dict[str, Any]:
        """What later choices depend on besides the numbers and the shares, as plain data: a few numbers per source."""
        return self._balance.state_dict() if self.kind == "stratified" else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as from when [`~DynamicSchedule.state_dict`] was called."""
        if self.kind == "stratified":
            self._balance.load_state_dict(state)


class _Balance:
    """
    What each source is owed: the sum of its shares so far less the times it was taken.

    Shares that stay the same are multiplied rather than added up, so that a source that is owed a third each time is
    owed exactly one after three, and ties are decided the same way however long it goes on.
    """

    def __init__(self, sources: int):
        self.taken = 0
        self.before = np.zeros(sources)  # targets up to where the shares changed last
        self.since = 0
        self.counts = np.zeros(sources)
        self._set_shares(np.zeros(sources))

    def _set_shares(self, shares: np.ndarray) -> None:
        self.shares = shares
        # One that is still owed from before its weight became zero must not come any more.
        self.closed = np.where(shares > 0, 0.0, -np.inf)

    def take(self, shares: np.ndarray) -> int:
        if shares is not self.shares and not np.array_equal(shares, self.shares):
            self.before = self.before + self.shares * (self.taken - self.since)
            self.since = self.taken
            self._set_shares(shares)
        self.taken += 1
        owed = self.before + shares * (self.taken - self.since) - self.counts
        source = int(np.argmax(owed + self.closed))
        self.counts[source] += 1
        return source

    def state_dict(self) -> dict[str, Any]:
        arrays = {"before": self.before, "shares": self.shares, "counts": self.counts}
        return {"taken": self.taken, "since": self.since} | {name: array.tolist() for name, array in arrays.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken, self.since = state["taken"], state["since"]
        self.before, shares, self.counts = (np.array(state[name]) for name in ("before", "shares", "counts"))
        self._set_shares(shares)


def normalized(weights: Mapping[str, float], names: Sequence[str]) -> np.ndarray:
    """
    Weights as shares that sum to one, (S,) float64, in the order of `names`.

    Raises:
        ValueError: other names, weights that are negative or not finite, or that sum to zero.

    Example:
        >>> from hf_nexus.mixture.schedule import normalized
        >>> normalized({"code": 1, "text": 3}, ["text", "code"]).tolist()
        [0.75, 0.25]
    """
    if set(weights) != set(names):
        raise ValueError(
            f"The weights name {', '.join(weights)}, but the sources are {', '.join(names)}. Give each source a "
            "weight; 0 leaves it out."
        )
    shares = np.array([weights[name] for name in names], dtype=np.float64)
    if not len(shares) or not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
        raise ValueError(f"weights={dict(weights)} must be finite, >= 0, and sum to more than zero.")
    return shares / shares.sum()


def _check_kind(kind: str) -> None:
    if kind not in ("random", "stratified"):
        raise ValueError(f"source_schedule={kind!r} is not known; use 'random' or 'stratified'.")


@lru_cache(maxsize=2)  # for who asks for one micro-batch after the other
def _draw(seed: int, block: int) -> np.ndarray:
    return np.random.default_rng((seed, block)).random(_BLOCK)


def _uniform(seed: int, start: int, stop: int) -> np.ndarray:
    first = start // _BLOCK
    blocks = range(first, (max(stop, start + 1) - 1) // _BLOCK + 1)
    draws = np.concatenate([_draw(seed, block) for block in blocks])
    return draws[start - first * _BLOCK : stop - first * _BLOCK]


def _pick(shares: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    # The last edge is infinity: rounding must not leave a draw of 0.999... without a source.
    edges = np.append(np.cumsum(shares)[:-1], np.inf)
    edges[np.flatnonzero(shares)[-1] :] = np.inf  # nor give it to a trailing source of weight zero
    return np.searchsorted(edges, uniform, side="right")
