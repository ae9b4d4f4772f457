"""Statistics of few seeds: t-intervals, paired differences, power, equivalence, Holm's correction, matched losses."""

import math
from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Any, TypeVar

__all__ = [
    "ALPHA",
    "POWER",
    "Correlation",
    "Estimate",
    "correlate",
    "detectable",
    "equivalence_p",
    "highest_deviation",
    "holm",
    "import_scipy",
    "mean",
    "paired_difference",
    "pairs_needed",
    "power",
    "value_at",
]

# Of a two-sided test: the false-positive rate, and the rate at which a difference is found that counts as detectable.
ALPHA, POWER = 0.05, 0.8

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

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the values."""
        if self.half is None:
            return None
        return self.half * math.sqrt(self.n) / _t_quantile(0.975, self.n - 1)


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
    Mean of independent values, one per seed, with its 95 % t-interval.

    Example:
        >>> from hf_nexus.evaluation.statistics import mean
        >>> estimate = mean([1.0, 2.0, 3.0])
        >>> estimate.mean, round(estimate.half, 3), estimate.n
        (2.0, 2.484, 3)
        >>> mean([1.0])
        Estimate(mean=1.0, half=None, n=1, p=None)
    """
    half, _ = _t_test(values, max(map(abs, values)))
    return Estimate(math.fsum(values) / len(values), half, len(values))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """
    Mean of `values - baseline`, paired by position, with its 95 % t-interval and the p-value of a paired t-test.

    Pairing by seed removes what a seed does to both. If all differences are the same up to rounding, there is no
    interval and no p-value: the formula would give 0 for both, a certainty that two or three numbers do not support.

    Example:
        >>> from hf_nexus.evaluation.statistics import paired_difference
        >>> found = paired_difference([2.0, 2.1, 2.3], [2.1, 2.3, 2.4])
        >>> round(found.mean, 3), round(found.half, 3), round(found.p, 3)
        (-0.133, 0.143, 0.057)
        >>> paired_difference([1.0, 2.0], [1.0, 2.0])
        Estimate(mean=0.0, half=None, n=2, p=None)
    """
    differences = [a - b for a, b in zip(values, baseline, strict=True)]
    half, p = _t_test(differences, max(map(abs, (*values, *baseline))))
    return Estimate(math.fsum(differences) / len(differences), half, len(differences), p)


def power(difference: float, deviation: float, pairs: int, alpha: float = ALPHA) -> float:
    """
    Probability that a two-sided paired t-test finds a true mean difference in `pairs` differences with the standard
    deviation `deviation`, from the noncentral t-distribution.

    Example:
        >>> from hf_nexus.evaluation.statistics import power
        >>> round(power(0.5, 1.0, 34), 3), round(power(0.0, 1.0, 34), 3)
        (0.808, 0.05)
    """
    stats, shift = import_scipy().stats, abs(difference) / deviation * math.sqrt(pairs)
    border = _t_quantile(1 - alpha / 2, pairs - 1)
    other_side = float(stats.nct.cdf(-border, pairs - 1, shift))  # scipy gives NaN below about 1e-16
    return float(stats.nct.sf(border, pairs - 1, shift)) + (0.0 if math.isnan(other_side) else other_side)


def pairs_needed(difference: float, deviation: float, alpha: float = ALPHA) -> int:
    """
    Smallest number of pairs, at least 3, with a power of 80 %.

    Example:
        >>> from hf_nexus.evaluation.statistics import pairs_needed
        >>> pairs_needed(0.5, 1.0)
        34
    """
    high = 4
    while power(difference, deviation, high, alpha) < POWER:
        high *= 2
    return bisect_left(range(high), POWER, lo=3, key=lambda pairs: power(difference, deviation, pairs, alpha))


def detectable(deviation: float, pairs: int, alpha: float = ALPHA) -> float:
    """
    Smallest true difference that is found with a power of 80 %.

    Example:
        >>> from hf_nexus.evaluation.statistics import detectable
        >>> round(detectable(1.0, 34), 3)
        0.495
    """
    border = _t_quantile(1 - alpha / 2, pairs - 1)
    from scipy.optimize import brentq

    most = (2 * border + 5) / math.sqrt(pairs)  # enough for any number of pairs
    return deviation * float(brentq(lambda size: power(size, 1.0, pairs, alpha) - POWER, 0.0, most))


def highest_deviation(deviation: float, pairs: int) -> float:
    """Upper end of the one-sided 80 % interval of a standard deviation that was measured on so many pairs."""
    return deviation * math.sqrt((pairs - 1) / float(import_scipy().stats.chi2.ppf(1 - POWER, pairs - 1)))


def equivalence_p(difference: Estimate, margin: float) -> float | None:
    """
    p-value of the two one-sided t-tests (TOST) that the true difference lies within `-margin` to `margin`. `None` for
    an estimate without an interval.

    Example:
        >>> from hf_nexus.evaluation.statistics import equivalence_p, paired_difference
        >>> found = paired_difference([2.0, 2.1, 2.3, 2.2], [2.01, 2.1, 2.29, 2.2])
        >>> round(equivalence_p(found, 0.05), 4), round(equivalence_p(found, 0.01), 2)
        (0.0006, 0.05)
    """
    if difference.deviation is None:
        return None
    error = difference.deviation / math.sqrt(difference.n)
    return _t_tail((margin - abs(difference.mean)) / error, difference.n - 1)


def holm(p_values: Mapping[Key, float | None]) -> dict[Key, float | None]:
    """
    Holm's correction for multiple comparisons. With the threshold 0.05 after it, the probability of one or more false
    positives is at most 0.05. A comparison with `None` was not tested. It counts like one with a p-value of 1, because
    the others must not look better while it is missing.

    Example:
        >>> from hf_nexus.evaluation.statistics import holm
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None})
        {'a': 0.04, 'b': 0.09, 'c': 0.09, 'd': None}
    """
    tested = [(p, key) for key, p in p_values.items() if p is not None]
    corrected: dict[Key, float | None] = dict.fromkeys(p_values)
    largest = 0.0
    for rank, (p, key) in enumerate(sorted(tested, key=lambda pair: pair[0])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        corrected[key] = largest
    return corrected


def value_at(xs: Sequence[float], ys: Sequence[float], x: float) -> tuple[float, float] | None:
    """
    Value of a metric where the training loss first reaches `x`: the metric at matched training loss.

    The error bound is that of linear interpolation, with the curvature through the next point on either side, the
    larger one. It holds if the curvature between the neighbors is not larger than on both sides. Without a next point,
    it is the difference between the neighbors, which holds if the curve does not turn between them.

    `xs` are training losses in order of training. The first crossing from above counts. `ys` are the metric at the
    same points. A point with a value that is not finite is skipped. Returns the linear interpolation between the two
    neighbors and the bound of its error, or `None` if the loss never falls to `x`, or starts below it.

    Example:
        >>> from hf_nexus.evaluation.statistics import value_at
        >>> value_at([4.0, 3.0, 2.0], [5.0, 4.5, 4.0], 2.5)
        (4.25, 0.0)
        >>> value_at([4.0, 3.0, 2.0], [5.0, 4.5, 4.0], 1.0) is None
        True
    """
    points = [(a, b) for a, b in zip(xs, ys, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if points and points[0][0] == x:
        return points[0][1], 0.0
    for i, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        if x0 > x >= x1:
            slope = (y1 - y0) / (x1 - x0)
            between = min(max(y0 + (x - x0) * slope, min(y0, y1)), max(y0, y1))  # not outside them by rounding
            third = (*points[max(i - 1, 0) : i], *points[i + 2 : i + 3])
            curvatures = [abs((b - y1) / (a - x1) - slope) / abs(a - x0) for a, b in third if a not in (x0, x1)]
            bound = abs((x - x0) * (x - x1)) * max(curvatures) if curvatures else abs(y1 - y0)
            return between, bound if x > x1 else 0.0
    return None


def correlate(xs: Sequence[float], ys: Sequence[float]) -> Correlation | None:
    """
    Pearson and Spearman correlation, with two-sided p-values; `None` for fewer than 3 pairs, or if the values of one
    side are all the same.

    The p-value of Spearman is exact up to 8 pairs: the fraction of all orders with at least this correlation. The
    usual approximation gives 0 for any three pairs in order, although a third of all random triples are.

    Example:
        >>> from hf_nexus.evaluation.statistics import correlate
        >>> found = correlate([1, 2, 3, 4], [1, 2, 3, 5])
        >>> round(found.pearson, 3), round(found.spearman, 3), round(found.spearman_p, 3)
        (0.983, 1.0, 0.083)
    """
    if len(xs) < 3 or any(_alike(side, max(map(abs, side))) for side in (xs, ys)):
        return None
    import numpy as np

    stats = import_scipy().stats
    linear, ranked = stats.pearsonr(xs, ys), stats.spearmanr(xs, ys)
    ranked_p = float(ranked.pvalue)
    if len(xs) <= _EXACT_SPEARMAN:
        a, b = (stats.rankdata(side) - (len(xs) + 1) / 2 for side in (xs, ys))
        orders = a[np.array(list(permutations(range(len(xs)))))] @ b
        ranked_p = float(np.mean(np.abs(orders) >= abs(a @ b) - 1e-9))
    return Correlation(float(linear.statistic), float(linear.pvalue), float(ranked.statistic), ranked_p, len(xs))


def import_scipy() -> Any:
    """The package `scipy`, which takes a second to import. It is not among the required packages."""
    try:
        import scipy.special
        import scipy.stats
    except ImportError as error:
        raise ImportError("Statistics of a comparison need scipy: pip install matplotlib scipy") from error
    return scipy


def _alike(values: Sequence[float], scale: float) -> bool:
    """Whether `values` differ by no more than the rounding error of numbers of size `scale`."""
    return max(values) - min(values) <= 4 * _EPSILON * scale


def _t_test(values: Sequence[float], scale: float) -> tuple[float | None, float | None]:
    """Half the 95 % interval of the mean, and the p-value of a two-sided test against 0; `None` without a spread."""
    n = len(values)
    if n < 2 or _alike(values, scale):
        return None, None
    middle = math.fsum(values) / n
    # `dist` rescales its input; squares of tiny differences would underflow.
    error = math.dist(values, [middle] * n) / math.sqrt((n - 1) * n)
    return _t_quantile(0.975, n - 1) * error, 2 * _t_tail(abs(middle) / error, n - 1)


def _t_quantile(p: float, freedom: int) -> float:
    """Quantile of Student's t-distribution, which `scipy.stats.t` computes in 50 times the time."""
    return float(import_scipy().special.stdtrit(freedom, p))


def _t_tail(t: float, freedom: int) -> float:
    """Probability that a variable with Student's t-distribution is above `t`."""
    return float(import_scipy().special.stdtr(freedom, -t))
