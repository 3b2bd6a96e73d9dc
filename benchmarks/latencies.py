"""What a load run says: arrival times, quantiles, and figures out of the times of calls. Pure."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

QUANTILES = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99}


@dataclass(frozen=True, slots=True)
class Call:
    """One call; times in seconds on one clock.

    Attributes:
        due: when it should have begun.
        begun: when it did.
        ended: when its answer was there; None if it failed or was given up.
    """

    due: float
    begun: float
    ended: float | None

    @property
    def latency(self) -> float:
        """Seconds from when it was due; infinite without an answer.

        Counted from `begun`, calls that a stall keeps from being sent would drop out of the
        figures, and with them the stall (coordinated omission).
        """
        return math.inf if self.ended is None else self.ended - self.due


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """When callers who know nothing of each other come, in seconds from the start.

    Args:
        rate: mean arrivals per second.
        seconds: none comes later.
        seed: another one gives other times.
    """
    source = random.Random(seed)
    arrivals: list[float] = []
    now = source.expovariate(rate)
    while now < seconds:
        arrivals.append(now)
        now += source.expovariate(rate)
    return arrivals


def quantile(values: Iterable[float], share: float) -> float:
    """The least value that at least `share` of all values don't exceed (nearest rank).

    Nothing is interpolated, so infinite values are taken as they come.
    """
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def figures(calls: Sequence[Call]) -> dict[str, float | int | None]:
    """Throughput and latencies of a run.

    Returns:
        `calls` made, `answered` of them, answers `per_second` from the first call's time to the
        last answer, latencies in milliseconds at `QUANTILES` of all calls (None where so many were
        not answered), and `late_ms`, the 99th percentile of how late the generator itself was.
    """
    ends = [call.ended for call in calls if call.ended is not None]
    latencies = [call.latency for call in calls]
    found = {name: quantile(latencies, share) for name, share in QUANTILES.items()}
    return {
        "calls": len(calls),
        "answered": len(ends),
        "per_second": len(ends) / (max(ends) - min(c.due for c in calls)) if ends else 0.0,
        **{name: 1e3 * value if math.isfinite(value) else None for name, value in found.items()},
        "late_ms": 1e3 * quantile((call.begun - call.due for call in calls), 0.99),
    }


def medians(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The median over repeats of every figure of a run; None counts as infinite, and is given so.

    Args:
        runs: repeats of one load on one server, as `figures` gives them, with whatever else is a
            number in each.
    """
    found: dict[str, float | None] = {}
    for name in runs[0]:
        middle = quantile((math.inf if run[name] is None else run[name] for run in runs), 0.5)
        found[name] = middle if math.isfinite(middle) else None
    return found


def milliseconds(found: Mapping[str, float | None]) -> str:
    """Median and 99th percentile, as "1.2 / 3.4"; "never" where so many were not answered."""
    both = (found["p50_ms"], found["p99_ms"])
    return " / ".join("never" if each is None else f"{each:.1f}" for each in both)
