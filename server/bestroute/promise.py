"""What a bundle's calibration curve promises: from a target to a threshold or a rate. Pure.

A bound that holds for each setting by itself doesn't hold for the best-looking of many. It does
for the one at which a walk from the strictest setting on ends, if the walk stops before the first
bound over the target (fixed-sequence testing; Learn then Test, arXiv 2110.01052). So the promise
of a point is the largest bound up to it, and holds at the confidence of one. The strictest setting
is the highest threshold, or the lowest exchange rate.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

from bestroute.errors import InvalidRequest
from bestroute.manifest import CurvePoint, TradePoint

Point = TypeVar("Point", CurvePoint, TradePoint)


class Promise(NamedTuple, Generic[Point]):
    """A quality drop that is not exceeded at 95 % confidence, and the point to run for it."""

    quality_drop: float
    point: Point


def promises(curve: Iterable[Point]) -> list[Promise[Point]]:
    """Every point with the largest bound up to it, the strictest first; drops never fall."""
    strictest_first = sorted(curve, key=lambda point: -point.strictness)
    largest = accumulate((point.quality_drop_upper for point in strictest_first), max)
    return [Promise(*pair) for pair in zip(largest, strictest_first, strict=True)]


def threshold_for(curve: Iterable[CurvePoint], quality_drop: float) -> float:
    """The lowest threshold of which at most that drop can be promised.

    1.0, which leaves every prompt to the reference and so drops nothing, if there is none.
    """
    within = _within(curve, quality_drop)
    return within[-1].match_threshold if within else 1.0


def rate_for(curve: Sequence[TradePoint], quality_drop: float) -> float:
    """The highest `quality_per_usd` of which at most that drop can be promised.

    The first point's, which leaves (next to) every prompt to the reference, if there is none.
    """
    return [curve[0], *_within(curve, quality_drop)][-1].quality_per_usd


def least_promise(curve: Iterable[Point]) -> Promise[Point] | None:
    """The smallest drop that can be promised while anything is saved; None if nothing ever is.

    Its point is the least strict with that promise. A target below it leaves the reference.
    """
    every = promises(curve)
    least = min((each.quality_drop for each in every if each.point.cost_saving > 0), default=None)
    return next((each for each in reversed(every) if each.quality_drop == least), None)


def least_loss(curve: Iterable[Point], cost_saving: float) -> Point:
    """The point of the smallest bound among those that were measured to save at least so much.

    Raises:
        InvalidRequest: none saves so much.
    """
    every = promises(curve)
    saving = [each.point for each in every if each.point.cost_saving >= cost_saving]
    if not saving:
        most = max(every, key=lambda each: each.point.cost_saving)
        raise InvalidRequest(
            "policy.min_cost_saving",
            "the most that any setting was measured to save is "
            f"{most.point.cost_saving:.3f}, with a quality drop of at most "
            f"{most.quality_drop:.3f}; ask for less, or set match_threshold",
        )
    # By the bound: of many estimates the smallest flatters.
    return min(saving, key=lambda point: (point.quality_drop_upper, -point.strictness))


def _within(curve: Iterable[Point], quality_drop: float) -> list[Point]:
    """The points that the walk passes, the strictest first."""
    return [each.point for each in promises(curve) if each.quality_drop <= quality_drop]
