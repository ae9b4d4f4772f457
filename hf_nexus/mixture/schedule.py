"""Which source each micro-batch comes from: a pure function of the seed and the micro-batch's number."""

from collections.abc import Mapping

import numpy as np

__all__ = ["SourceSchedule"]

_BLOCK = 4096  # draws per random stream, so that any stretch can be had without the ones before it


class SourceSchedule:
    """
    The source of each micro-batch of a run. Micro-batch `i = outer step * k + inner step` (both from 0), the same on
    every rank, whatever the number of ranks, workers or restarts.

    Args:
        weights (`Mapping[str, float]`):
            Share of each source, >= 0; normalised to sum to one.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draws.
        kind (`str`, *optional*, defaults to `"random"`):
            `"random"`: independent draws from the weights, as in the paper. `"stratified"`: always the source furthest
            below its target share, so that every prefix is as balanced as it can be.

    Raises:
        ValueError: weights that are negative, or sum to zero; an unknown kind.

    Example:
        >>> from hf_nexus.mixture import SourceSchedule
        >>> schedule = SourceSchedule({"text": 0.5, "code": 0.5}, kind="stratified")
        >>> [schedule.names[s] for s in schedule.sources(0, 4)]
        ['text', 'code', 'text', 'code']
    """

    def __init__(self, weights: Mapping[str, float], seed: int = 0, kind: str = "random"):
        shares = np.array(list(weights.values()), dtype=np.float64)
        if not len(shares) or not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
            raise ValueError(f"weights={dict(weights)} must be finite, >= 0, and sum to more than zero.")
        if kind not in ("random", "stratified"):
            raise ValueError(f"source_schedule={kind!r} is not known; use 'random' or 'stratified'.")
        self.names = list(weights)
        self.shares = shares / shares.sum()
        self.seed = seed
        self.kind = kind
        self._stratified = np.empty(0, dtype=np.int64)

    def sources(self, start: int, stop: int) -> np.ndarray:
        """Positions in `names` for the micro-batches `start <= i < stop`, shape `(stop - start,)`, int64."""
        if self.kind == "stratified":
            return self._balanced(stop)[start:stop]
        first = start // _BLOCK
        blocks = [self._draw(block) for block in range(first, (max(stop, start + 1) - 1) // _BLOCK + 1)]
        return np.concatenate(blocks)[start - first * _BLOCK : stop - first * _BLOCK]

    def _draw(self, block: int) -> np.ndarray:
        # The last edge is infinity: rounding must not leave a draw of 0.999... without a source.
        edges = np.append(np.cumsum(self.shares)[:-1], np.inf)
        edges[np.flatnonzero(self.shares)[-1] :] = np.inf  # nor give it to a trailing source of weight zero
        uniform = np.random.default_rng((self.seed, block)).random(_BLOCK)
        return np.searchsorted(edges, uniform, side="right")

    def _balanced(self, stop: int) -> np.ndarray:
        done = len(self._stratified)
        if stop > done:
            counts = np.bincount(self._stratified, minlength=len(self.shares)).astype(np.float64)
            more = np.empty(max(stop - done, _BLOCK), dtype=np.int64)
            for i in range(len(more)):
                more[i] = s = np.argmax(self.shares * (done + i + 1) - counts)
                counts[s] += 1
            self._stratified = np.concatenate([self._stratified, more])
        return self._stratified
