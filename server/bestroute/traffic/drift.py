"""How far traffic is from what a bundle was trained on: prompts, and what comes of them. Pure.

The population stability index compares shares of bins (e.g. Yurdakul, Naranjo, "Statistical
properties of the population stability index", Journal of Risk Model Validation 2020): by custom
below 0.1 nothing has changed, above 0.25 a lot. The expected calibration error is that of Naeini,
Cooper, Hauskrecht (AAAI 2015), the score Brier's (1950).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BINS = 5
"""Of expected qualities. Few, because chance alone makes an error that grows with their number:
of 500 outcomes about 0.04 where they are right or wrong, of 200 in ten bins 0.09."""


def stability_index(counts: npt.ArrayLike, shares: npt.ArrayLike) -> float:
    """The population stability index, sum of (a - e) ln(a / e).

    Half a case is added to every bin, so that an empty one is no infinity. Without any change the
    index of n cases in K bins is about (K - 1) / n.

    Args:
        counts: [K], cases now.
        shares: [K], shares then, with sum 1.
    """
    cases, before = np.asarray(counts, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    bins = len(cases)
    now = (cases + 0.5) / (cases.sum() + 0.5 * bins)
    then = (before + 1e-3 / bins) / (1 + 1e-3)  # a bin that was empty then is no infinity either
    return float(((now - then) * np.log(now / then)).sum())


def counts_in(values: npt.ArrayLike, edges: npt.ArrayLike) -> Floats:
    """How many of the values are in each of the K bins that K - 1 rising edges make; float64 [K].

    A value on an edge is in the upper of the two bins.
    """
    edges = np.asarray(edges, dtype=np.float64)
    bins = np.searchsorted(edges, np.asarray(values, dtype=np.float64), side="right")
    return np.bincount(bins, minlength=len(edges) + 1).astype(np.float64)


class Window:
    """Sums of vectors over the last while, as a ring of buckets.

    Args:
        seconds: how long the while is.
        width: of the vectors.
        buckets: how many, so that the while is exact to `seconds / buckets`.
    """

    def __init__(self, seconds: float, width: int, buckets: int = 12) -> None:
        self._length = seconds / buckets
        self._sums = np.zeros((buckets, width))
        self._latest = 0

    def now(self, time: float) -> Floats:
        """The bucket of the present, float64 [width], to add to.

        Args:
            time: seconds on a clock that never goes back.
        """
        number, buckets = int(time / self._length), len(self._sums)
        for passed in range(max(self._latest + 1, number - buckets + 1), number + 1):
            self._sums[passed % buckets] = 0
        self._latest = max(self._latest, number)
        bucket: Floats = self._sums[self._latest % buckets]
        return bucket

    def sum(self, time: float) -> Floats:
        """Of all that was added in the last while, float64 [width]."""
        self.now(time)
        total: Floats = self._sums.sum(axis=0)
        return total


class Calibration(NamedTuple):
    """What was expected of answers and what came of them.

    Attributes:
        outcomes: how many answers.
        expected: mean expected quality.
        observed: mean quality.
        brier: mean squared difference of the two.
    """

    outcomes: int
    expected: float
    observed: float
    brier: float


class CalibrationWindow:
    """Expected and observed qualities of the last while, by arm.

    Args:
        seconds: how long the while is.
        arms: how many.
    """

    def __init__(self, seconds: float, arms: int) -> None:
        self._arms = arms
        # Per arm: outcomes, expected, observed, squared difference; per bin: outcomes, difference.
        self._window = Window(seconds, 4 * arms + 2 * BINS, buckets=24)

    def add(self, time: float, arm: int, expected: float, observed: float) -> None:
        """Take in an outcome; `time` as in `Window`, qualities in [0, 1]."""
        gap = observed - expected
        bucket = self._window.now(time)
        bucket[4 * arm : 4 * arm + 4] += (1.0, expected, observed, gap * gap)
        bin_ = 4 * self._arms + 2 * min(int(expected * BINS), BINS - 1)
        bucket[bin_ : bin_ + 2] += (1.0, gap)

    def by_arm(self, time: float) -> list[Calibration]:
        """Of every arm; means of nothing are 0."""
        rows = self._window.sum(time)[: 4 * self._arms].reshape(-1, 4)
        return [_calibration(row.tolist()) for row in rows]

    def overall(self, time: float) -> Calibration:
        """Of all arms together."""
        rows = self._window.sum(time)[: 4 * self._arms].reshape(-1, 4)
        return _calibration(rows.sum(axis=0).tolist())

    def error(self, time: float) -> float:
        """The expected calibration error over `BINS` bins of equal width; 0 of no outcomes."""
        bins = self._window.sum(time)[4 * self._arms :].reshape(-1, 2)
        return float(np.abs(bins[:, 1]).sum() / max(1.0, bins[:, 0].sum()))


def _calibration(sums: Sequence[float]) -> Calibration:
    outcomes, expected, observed, squares = sums
    of = outcomes or 1.0
    return Calibration(int(outcomes), expected / of, observed / of, squares / of)
