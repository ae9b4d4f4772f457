"""What few seeds can tell: intervals, paired differences, many comparisons, figures at a matched loss."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import TypeVar

__all__ = ["Correlation", "Estimate", "PairedDifference", "correlate", "holm", "mean", "paired_difference", "value_at"]

Key = TypeVar("Key", bound=Hashable)

_EPSILON = 2.0**-52
# Up to here all n! orders are counted (40,320); beyond, the usual approximation by a t-distribution is close enough.
_EXACT_SPEARMAN = 8


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % t-interval.

    Args:
        mean (`float`): Of the values.
        half (`float`, *optional*): Half the width of the interval, `mean - half` to `mean + half`; `None` where
            there is no spread to tell it from: a single value, or values that are all the same.
        n (`int`): How many values.

    Example:
        >>> Estimate(2.0, 0.5, n=3).low
        1.5
    """

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.half is None else self.mean + self.half


@dataclass(frozen=True)
class PairedDifference(Estimate):
    """The mean of paired differences, with the p-value of a two-sided paired t-test.

    Args:
        p (`float`, *optional*): `None` wherever `half` is: there is no test then. It is below 0.05 exactly
            where the interval leaves out 0.

    Example:
        >>> PairedDifference(-0.1, 0.02, n=3, p=0.002).high
        -0.08
    """

    p: float | None = None


@dataclass(frozen=True)
class Correlation:
    """Pearson's and Spearman's correlation of `n` pairs, each with its two-sided p-value.

    Example:
        >>> Correlation(0.9, 0.04, 1.0, 0.02, n=5).spearman
        1.0
    """

    pearson: float
    pearson_p: float
    spearman: float
    spearman_p: float
    n: int


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent values with its 95 % t-interval.

    Args:
        values (`Sequence[float]`): One for each seed.

    Raises:
        ValueError: there is no value, or one that is not finite.

    Example:
        >>> from hf_nexus.evaluation.statistics import mean
        >>> estimate = mean([1.0, 2.0, 3.0])
        >>> estimate.mean, round(estimate.half, 3), estimate.n
        (2.0, 2.484, 3)
        >>> mean([1.0])
        Estimate(mean=1.0, half=None, n=1)
    """
    _check(values)
    half, _ = _t_test(values, max(map(abs, values)))
    return Estimate(math.fsum(values) / len(values), half, len(values))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> PairedDifference:
    """`values - baseline`, paired by position: mean, 95 % t-interval, and the p-value of a two-sided paired t-test.

    Pairing by seed takes out what a seed does to both. Differences that are all the same (up to rounding) give neither
    interval nor p-value: the formula would say 0 and 0, a certainty that two or three equal numbers do not carry.

    Args:
        values (`Sequence[float]`), baseline (`Sequence[float]`): Of the same seeds in the same order.

    Raises:
        ValueError: the lengths differ, there is no value, or one that is not finite.

    Example:
        >>> from hf_nexus.evaluation.statistics import paired_difference
        >>> found = paired_difference([2.0, 2.1, 2.3], [2.1, 2.3, 2.4])
        >>> round(found.mean, 3), round(found.half, 3), round(found.p, 3)
        (-0.133, 0.143, 0.057)
        >>> paired_difference([1.0, 2.0], [1.0, 2.0])
        PairedDifference(mean=0.0, half=None, n=2, p=None)
    """
    _check(values)
    _check(baseline)
    if len(values) != len(baseline):
        raise ValueError(
            f"Paired values must be equally many, got {len(values)} and {len(baseline)}: keep the seeds both have."
        )
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    half, p = _t_test(differences, max(map(abs, (*values, *baseline))))
    return PairedDifference(math.fsum(differences) / len(differences), half, len(differences), p)


def holm(p_values: Mapping[Key, float | None]) -> dict[Key, float | None]:
    """Holm's correction: among results below 0.05 after it, the chance of even one false find is at most 0.05.

    Args:
        p_values (`Mapping[Key, float | None]`): Of the comparisons made. `None` was not tested: it stays so, and
            does not count.

    Returns:
        `dict[Key, float | None]`: The same keys; never below the raw values, in their order, at most 1.

    Raises:
        ValueError: a value is not in 0..1.

    Example:
        >>> from hf_nexus.evaluation.statistics import holm
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None})
        {'a': 0.03, 'b': 0.06, 'c': 0.06, 'd': None}
    """
    tested = [(p, key) for key, p in p_values.items() if p is not None]
    if wrong := {key: p for p, key in tested if not 0 <= p <= 1}:
        raise ValueError(f"p-values must be in 0..1, got {wrong}.")
    corrected: dict[Key, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (p, key) in enumerate(sorted(tested, key=lambda pair: pair[0])):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        corrected[key] = largest
    return corrected


def value_at(xs: Sequence[float], ys: Sequence[float], x: float) -> float | None:
    """What a figure was when training had come down to a certain loss: the figure at matched training loss.

    Args:
        xs (`Sequence[float]`): Training losses, in order of training. They need not fall throughout: the first
            passage from above counts.
        ys (`Sequence[float]`): The figure at the same points. Points at which either is not finite are passed over.
        x (`float`): The loss to match.

    Returns:
        `float`, *optional*: interpolated linearly between the two neighbours; `None` if the loss never came down to
        `x`, or began below it.

    Raises:
        ValueError: the lengths differ.

    Example:
        >>> from hf_nexus.evaluation.statistics import value_at
        >>> value_at([4.0, 3.0, 2.0], [5.0, 4.5, 4.0], 2.5)
        4.25
        >>> value_at([4.0, 3.0, 2.0], [5.0, 4.5, 4.0], 1.0) is None
        True
    """
    if len(xs) != len(ys):
        raise ValueError(f"A curve needs as many figures as losses, got {len(xs)} losses and {len(ys)} figures.")
    points = [(a, b) for a, b in zip(xs, ys, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if points and points[0][0] == x:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 > x >= x1:
            between = y0 + (x0 - x) / (x0 - x1) * (y1 - y0)
            return min(max(between, min(y0, y1)), max(y0, y1))  # rounding does not lead out of them
    return None


def correlate(xs: Sequence[float], ys: Sequence[float]) -> Correlation | None:
    """Pearson's and Spearman's correlation, with two-sided p-values.

    Spearman's p-value is exact up to 8 pairs: the share of all orders that correlate as much. (The usual approximation
    gives 0 for any three pairs in order, of which every third set of three is, one way or the other.)

    Args:
        xs (`Sequence[float]`), ys (`Sequence[float]`): Pairs by position.

    Returns:
        [`Correlation`], *optional*: `None` for fewer than 3 pairs, or where one side is the same throughout.

    Raises:
        ValueError: the lengths differ, there is no value, or one that is not finite.

    Example:
        >>> from hf_nexus.evaluation.statistics import correlate
        >>> found = correlate([1, 2, 3, 4], [1, 2, 3, 5])
        >>> round(found.pearson, 3), round(found.spearman, 3), round(found.spearman_p, 3)
        (0.983, 1.0, 0.083)
    """
    _check(xs)
    _check(ys)
    if len(xs) != len(ys):
        raise ValueError(f"Pairs need as many of each, got {len(xs)} and {len(ys)}.")
    if len(xs) < 3 or any(_alike(side, max(map(abs, side))) for side in (xs, ys)):
        return None
    import numpy as np
    from scipy.stats import pearsonr, rankdata, spearmanr

    linear, ranked = pearsonr(xs, ys), spearmanr(xs, ys)
    ranked_p = float(ranked.pvalue)
    if len(xs) <= _EXACT_SPEARMAN:
        a, b = (rankdata(side) - (len(xs) + 1) / 2 for side in (xs, ys))
        orders = a[np.array(list(permutations(range(len(xs)))))] @ b
        ranked_p = float(np.mean(np.abs(orders) >= abs(a @ b) - 1e-9))
    return Correlation(float(linear.statistic), float(linear.pvalue), float(ranked.statistic), ranked_p, len(xs))


def _check(values: Sequence[float]) -> None:
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"At least one value is needed and all must be finite, got {list(values)}.")


def _alike(values: Sequence[float], scale: float) -> bool:
    """Whether `values` differ no more than the rounding of numbers as large as `scale` makes them."""
    return max(values) - min(values) <= 4 * _EPSILON * scale


def _t_test(values: Sequence[float], scale: float) -> tuple[float | None, float | None]:
    """Half of the 95 % interval of the mean, and the two-sided p-value of its being 0; `None` without a spread."""
    n = len(values)
    if n < 2 or _alike(values, scale):
        return None, None
    from scipy.stats import t

    middle = math.fsum(values) / n
    # `dist` scales as it goes: squares of tiny differences would underflow.
    error = math.dist(values, [middle] * n) / math.sqrt((n - 1) * n)
    return float(t.ppf(0.975, n - 1)) * error, float(2 * t.sf(abs(middle) / error, n - 1))
