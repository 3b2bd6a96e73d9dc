"""When a call that failed is made again: how long to wait, and how often at most. Pure."""

from collections.abc import Mapping
from email.utils import parsedate_to_datetime

FIRST_DELAY = 0.5
"""Seconds; the longest wait before the first retry. It doubles with every further one."""

RATIO = 0.2
"""Retries per call, over time: where more fails, retrying is only more load."""
BURST = 10
"""Retries beyond that."""


def backoff(attempt: int, longest: float, random: float) -> float:
    """Seconds to wait after a failed attempt: exponential, with full jitter.

    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/

    Args:
        attempt: that failed, from 1.
        longest: seconds.
        random: uniform in [0, 1).
    """
    return random * min(longest, FIRST_DELAY * 2.0 ** min(attempt - 1, 30))


def asked_wait(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a response asks to wait; None: it doesn't, or not so that one can tell.

    Args:
        headers: of the response; `retry-after-ms`, or `Retry-After` in seconds or as a date.
        now: `time.time()`.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        at = parsedate_to_datetime(headers.get("retry-after", "")).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, at - now)


class Budget:
    """How many retries there may be: a share of all calls, and a few more."""

    def __init__(self, ratio: float = RATIO, burst: float = BURST) -> None:
        self._ratio, self._burst = ratio, burst
        self._left = burst

    def called(self) -> None:
        """Take note of a call, its retries not among them."""
        self._left = min(self._burst, self._left + self._ratio)

    def take(self) -> bool:
        """Take a retry out, if there is one."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
