"""What a calibration curve promises, and which threshold or rate is run for it."""

import pytest

from bestroute.manifest import CurvePoint, TradePoint
from bestroute.promise import least_loss, least_promise, promises, rate_for, threshold_for


def point(threshold: float, upper: float, saving: float = 0.1) -> CurvePoint:
    return CurvePoint(
        match_threshold=threshold, cost_saving=saving, quality_drop=0.0, quality_drop_upper=upper
    )


def rate(quality_per_usd: float, upper: float, saving: float = 0.1) -> TradePoint:
    return TradePoint(
        quality_per_usd=quality_per_usd,
        cost_saving=saving,
        quality_drop=0.0,
        quality_drop_upper=upper,
    )


TRADES = [rate(-9.0, 0.0, 0.0), rate(0.0, 0.01, 0.3), rate(2.0, 0.03), rate(5.0, 0.0, 0.9)]
CURVE = [point(0.2, 0.0, 0.9), point(0.4, 0.03), point(0.6, 0.01, 0.3), point(1.0, 0.0, 0.0)]


def test_a_promise_is_the_largest_bound_down_to_its_point() -> None:
    assert [(p.point.match_threshold, p.quality_drop) for p in promises(CURVE)] == [
        (1.0, 0.0),
        (0.6, 0.01),
        (0.4, 0.03),
        (0.2, 0.03),
    ]


@pytest.mark.parametrize(("drop", "threshold"), [(0.0, 1.0), (0.01, 0.6), (0.02, 0.6), (0.03, 0.2)])
def test_the_walk_stops_before_the_first_bound_over_the_target(
    drop: float, threshold: float
) -> None:
    assert threshold_for(CURVE, drop) == threshold


def test_what_nothing_promises_is_left_to_the_reference() -> None:
    assert threshold_for(CURVE[:2], 0.01) == 1.0


def test_the_least_promise_saves_something_and_as_much_as_it_can() -> None:
    least = least_promise(CURVE)
    assert least is not None
    assert (least.quality_drop, least.point.match_threshold) == (0.01, 0.6)
    better = [*CURVE[:2], point(0.6, -0.01, 0.3), point(0.8, -0.02), CURVE[-1]]
    least = least_promise(better)
    assert least is not None
    assert (least.quality_drop, least.point.match_threshold) == (0.0, 0.6)


def test_where_nothing_saves_there_is_no_promise() -> None:
    assert least_promise(CURVE[-1:]) is None


def test_trades_are_promised_from_the_lowest_rate_up() -> None:
    assert [(p.point.quality_per_usd, p.quality_drop) for p in promises(TRADES)] == [
        (-9.0, 0.0),
        (0.0, 0.01),
        (2.0, 0.03),
        (5.0, 0.03),
    ]


@pytest.mark.parametrize(("drop", "rate"), [(0.0, -9.0), (0.01, 0.0), (0.02, 0.0), (0.03, 5.0)])
def test_the_walk_over_trades_stops_there_too(drop: float, rate: float) -> None:
    assert rate_for(TRADES, drop) == rate


def test_where_no_trade_is_promised_the_lowest_rate_is_run() -> None:
    assert rate_for(TRADES[1:], 0.005) == 0.0


def test_the_least_promise_of_trades_saves_as_much_as_it_can() -> None:
    least = least_promise(TRADES)
    assert least is not None
    assert (least.quality_drop, least.point.quality_per_usd) == (0.01, 0.0)


def test_of_equal_bounds_the_stricter_setting_saves() -> None:
    assert least_loss(CURVE, 0.1).match_threshold == 0.2
    assert least_loss([*CURVE, point(0.9, 0.0, 0.95)], 0.5).match_threshold == 0.9
    assert least_loss(TRADES, 0.2).quality_per_usd == 5.0
    assert least_loss([*TRADES, rate(4.0, 0.0, 0.95)], 0.5).quality_per_usd == 4.0
