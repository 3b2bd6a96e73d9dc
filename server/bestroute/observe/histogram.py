"""Histograms that cost a request next to nothing: plain lists, written by one thread only."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

_RENARD_5 = (1.0, 1.6, 2.5, 4.0, 6.3)
"""Preferred numbers of ISO 3: five steps per decade, so that a quantile is off by 26 % at most."""


class Histogram:
    """How often values were how large; written by one thread, read by any.

    Args:
        bounds: inclusive upper ends of the buckets, rising; a last bucket takes what is larger.

    Attributes:
        sum: of all values.
    """

    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts = bounds, [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """Each bucket's upper end, and how many values were at most that large."""
        # A copy, so that what is counted meanwhile doesn't come between a bucket and the next.
        counts = self._counts.copy()
        return zip((*self._bounds, float("inf")), accumulate(counts), strict=True)


def renard(first: float, last: float) -> tuple[float, ...]:
    """Bounds in steps of about 1.6, round in each decade.

    Args:
        first: the lowest, a power of ten.
        last: none is above this.
    """
    bounds: list[float] = []
    decade = first
    while decade <= last:
        bounds += [float(f"{decade * step:.2g}") for step in _RENARD_5]
        decade *= 10
    return tuple(bound for bound in bounds if bound <= last * 1.001)
