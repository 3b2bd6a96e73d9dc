"""What being watched costs: the account."""

import pytest

from benchmarks.telemetry import MODES, compared, settings_of


def test_every_turn_is_compared_with_its_own_round() -> None:
    """The machine was twice as fast in the first round as in the others."""

    def run(rate: float) -> dict[str, float]:
        return {"per_cpu_second": rate, "per_second": rate / 2, "p50_ms": 1.0, "p99_ms": 2.0}

    rounds = [(2000.0, 1980.0, 1940.0), (1000.0, 990.0, 980.0), (1000.0, 1000.0, 970.0)]
    found = compared([dict(zip(MODES, map(run, rates), strict=True)) for rates in rounds])

    assert found["off"]["ratio"] == 1
    assert found["metrics"]["ratio"] == pytest.approx(0.99)
    assert found["all"]["ratio"] == pytest.approx(0.97)
    assert found["all"]["ratio_per_second"] == pytest.approx(0.97)
    low, high = found["all"]["ratio_quartiles"]
    assert low <= found["all"]["ratio"] <= high


def test_off_is_watched_by_nobody_and_all_by_everyone() -> None:
    off, metrics, everything = (settings_of(mode, "127.0.0.1:1", "127.0.0.1:2") for mode in MODES)

    assert (off.metrics.listen, off.tracing.endpoint, off.log_format) == (None, None, "text")
    assert (metrics.metrics.listen, metrics.tracing.endpoint) == ("127.0.0.1:1", None)
    assert everything.metrics.listen == "127.0.0.1:1"
    assert everything.tracing.endpoint == "http://127.0.0.1:2"
    assert everything.log_format == "json"
