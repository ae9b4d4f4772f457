"""Medians with quartiles, as the benchmarks print them."""

import statistics
from collections.abc import Sequence

__all__ = ["quartiles"]


def quartiles(values: Sequence[float], digits: int = 3) -> str:
    """`median (lower quartile to upper quartile)`."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
