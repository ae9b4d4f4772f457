"""Statistics of few seeds: t-intervals, paired differences, Holm's correction, correlations, matched losses."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import TypeVar

__all__ = ["Correlation", "Estimate", "correlate", "holm", "mean", "paired_difference", "require_scipy", "value_at"]

Key = TypeVar("Key", bound=Hashable)

_EPSILON = 2.0**-52
# Up to 8 pairs all n! orders are counted (40,320). Beyond, the usual t-approximation is accurate enough.
_EXACT_SPEARMAN = 8


@dataclass(frozen=True)
class Estimate:
    """Mean of `n` values with its 95 % t-interval, `mean - half` to `mean + half`."""

    mean: float
    half: float | None  # None for a single value, or for values that are all the same
    n: int
    # Of a two-sided t-test against 0: below 0.05 if and only if the interval excludes 0. None without a test.
    p: float | None = None

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.half is None else self.mean + self.half


@dataclass(frozen=True)
class Correlation:
    """Pearson and Spearman correlation of `n` pairs, each with its two-sided p-value."""

    pearson: float
    pearson_p: float
    spearman: float
    spearman_p: float
    n: int


def mean(values: Sequence[float]) -> Estimate:
    """
    Mean of independent values with its 95 % t-interval.

    Args:
        values (`Sequence[float]`): One value per seed.

    Raises:
        ValueError: no value, or one that is not finite.

    Example:
        >>> from hf_nexus.evaluation.statistics import mean
        >>> estimate = mean([1.0, 2.0, 3.0])
        >>> estimate.mean, round(estimate.half, 3), estimate.n
        (2.0, 2.484, 3)
        >>> mean([1.0])
        Estimate(mean=1.0, half=None, n=1, p=None)
    """
    _check(values)
    half, _ = _t_test(values, max(map(abs, values)))
    return Estimate(math.fsum(values) / len(values), half, len(values))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """
    Mean of `values - baseline`, paired by position, with its 95 % t-interval and the p-value of a paired t-test.

    Pairing by seed removes what a seed does to both. If all differences are the same up to rounding, there is no
    interval and no p-value: the formula would give 0 for both, a certainty that two or three numbers do not support.

    Args:
        values (`Sequence[float]`), baseline (`Sequence[float]`): Values of the same seeds in the same order.

    Raises:
        ValueError: different lengths, no value, or one that is not finite.

    Example:
        >>> from hf_nexus.evaluation.statistics import paired_difference
        >>> found = paired_difference([2.0, 2.1, 2.3], [2.1, 2.3, 2.4])
        >>> round(found.mean, 3), round(found.half, 3), round(found.p, 3)
        (-0.133, 0.143, 0.057)
        >>> paired_difference([1.0, 2.0], [1.0, 2.0])
        Estimate(mean=0.0, half=None, n=2, p=None)
    """
    _check(values, baseline)
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    half, p = _t_test(differences, max(map(abs, (*values, *baseline))))
    return Estimate(math.fsum(differences) / len(differences), half, len(differences), p)


def holm(p_values: Mapping[Key, float | None]) -> dict[Key, float | None]:
    """
    Holm's correction for multiple comparisons. With the threshold 0.05 after it, the probability of one or more false
    positives is at most 0.05.

    Args:
        p_values (`Mapping[Key, float | None]`): p-value of each comparison. `None` was not tested and does not count.

    Returns:
        `dict[Key, float | None]`: Corrected p-values. They keep the order of the raw ones and are never below them.

    Raises:
        ValueError: a value outside 0..1.

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
    """
    Value of a metric where the training loss first reaches `x`: the metric at matched training loss.

    Args:
        xs (`Sequence[float]`): Training losses, in order of training. The first crossing from above counts.
        ys (`Sequence[float]`): Metric at the same points. A point with a value that is not finite is skipped.
        x (`float`): Loss to match.

    Returns:
        `float`, *optional*: linear interpolation between the two neighbors; `None` if the loss never falls to `x`, or
        starts below it.

    Raises:
        ValueError: different lengths.

    Example:
        >>> from hf_nexus.evaluation.statistics import value_at
        >>> value_at([4.0, 3.0, 2.0], [5.0, 4.5, 4.0], 2.5)
        4.25
        >>> value_at([4.0, 3.0, 2.0], [5.0, 4.5, 4.0], 1.0) is None
        True
    """
    if len(xs) != len(ys):
        raise ValueError(f"A curve needs one value per loss, got {len(xs)} losses and {len(ys)} values.")
    points = [(a, b) for a, b in zip(xs, ys, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if points and points[0][0] == x:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 > x >= x1:
            between = y0 + (x0 - x) / (x0 - x1) * (y1 - y0)
            return min(max(between, min(y0, y1)), max(y0, y1))  # not outside them by rounding
    return None


def correlate(xs: Sequence[float], ys: Sequence[float]) -> Correlation | None:
    """
    Pearson and Spearman correlation, with two-sided p-values.

    The p-value of Spearman is exact up to 8 pairs: the fraction of all orders with at least this correlation. The
    usual approximation gives 0 for any three pairs in order, although a third of all random triples are.

    Args:
        xs (`Sequence[float]`), ys (`Sequence[float]`): Pairs by position.

    Returns:
        [`Correlation`], *optional*: `None` for fewer than 3 pairs, or if the values of one side are all the same.

    Raises:
        ValueError: different lengths, no value, or one that is not finite.

    Example:
        >>> from hf_nexus.evaluation.statistics import correlate
        >>> found = correlate([1, 2, 3, 4], [1, 2, 3, 5])
        >>> round(found.pearson, 3), round(found.spearman, 3), round(found.spearman_p, 3)
        (0.983, 1.0, 0.083)
    """
    _check(xs, ys)
    require_scipy()
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


def require_scipy() -> None:
    """
    Check that scipy is installed.

    Raises:
        ImportError: it is not. The message has the pip command.
    """
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise ImportError("Statistics of a comparison need scipy: pip install 'hf-nexus[plots]'") from error


def _check(*sides: Sequence[float]) -> None:
    for values in sides:
        if not values or not all(map(math.isfinite, values)):
            raise ValueError(f"At least one value is needed, and all must be finite. Got {list(values)}.")
    if len({*map(len, sides)}) > 1:
        raise ValueError(f"Pairs need as many values on both sides, got {' and '.join(str(len(s)) for s in sides)}.")


def _alike(values: Sequence[float], scale: float) -> bool:
    """Whether `values` differ by no more than the rounding error of numbers of size `scale`."""
    return max(values) - min(values) <= 4 * _EPSILON * scale


def _t_test(values: Sequence[float], scale: float) -> tuple[float | None, float | None]:
    """Half the 95 % interval of the mean, and the p-value of a two-sided test against 0; `None` without a spread."""
    n = len(values)
    if n < 2 or _alike(values, scale):
        return None, None
    require_scipy()
    from scipy.stats import t

    middle = math.fsum(values) / n
    # `dist` rescales its input; squares of tiny differences would underflow.
    error = math.dist(values, [middle] * n) / math.sqrt((n - 1) * n)
    return float(t.ppf(0.975, n - 1)) * error, float(2 * t.sf(abs(middle) / error, n - 1))
