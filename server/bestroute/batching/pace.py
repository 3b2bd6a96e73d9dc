"""How long runs take, by what they took lately; and how long is too long. Pure."""

from collections.abc import Callable

_SMOOTHING = 0.2
"""Weight of the latest run in a moving average."""
_OVERDUE, _STALLED, _AT_LEAST = 3.0, 10.0, 1.0
"""A run is overdue after this many times what it should take, and stalled after that many, which
are at least so many seconds: below them a busy machine looks the same."""


class Pace:
    """Moving averages over runs; all zero before the first.

    Args:
        tokens_per_run: what starting a run costs, in tokens that could be computed meanwhile.
        seconds: what a run of so many padded tokens takes on an idle machine, as measured before.

    Attributes:
        per_item: seconds per item of a run.
        per_run: seconds per run.
    """

    def __init__(
        self, tokens_per_run: float, seconds: Callable[[int], float] = lambda _: 0.0
    ) -> None:
        self._tokens_per_run, self._seconds = tokens_per_run, seconds
        self.per_item = self.per_run = self._per_token = 0.0

    def learn(self, ran: float, items: int, padded_tokens: int) -> None:
        """Take a run into account that took `ran` seconds."""
        self.per_item = _smoothed(self.per_item, ran / items)
        self.per_run = _smoothed(self.per_run, ran)
        self._per_token = _smoothed(self._per_token, ran / (self._tokens_per_run + padded_tokens))

    def lasts(self, length: int) -> float:
        """Seconds until an item of that many tokens is back, if it runs at once."""
        return max(self.per_run, self._per_token * (self._tokens_per_run + length))

    def overdue_after(self, padded_tokens: int) -> float:
        """Seconds after which a run is late, but may well come back."""
        return _OVERDUE * self._expected(padded_tokens)

    def stalled_after(self, padded_tokens: int) -> float:
        """Seconds after which nobody should wait for a run any more."""
        return max(_AT_LEAST, _STALLED * self._expected(padded_tokens))

    def _expected(self, padded_tokens: int) -> float:
        lately = self._per_token * (self._tokens_per_run + padded_tokens)
        return max(lately, self._seconds(padded_tokens))


def _smoothed(average: float, latest: float) -> float:
    return average + _SMOOTHING * (latest - average) if average else latest
