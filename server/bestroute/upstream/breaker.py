"""A circuit breaker: what keeps failing is left alone for a while, then tried by one call. Pure.

    closed ----- failures in a row, or half of the last calls failed ----> open
    open ------- after a pause ------------------------------------------> half open
    half open -- one call at a time; it fails ---------------------------> open
    half open -- it succeeds --------------------------------------------> closed

After Nygard, "Release It!", chapter 5.
"""

from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

WINDOW = 20
"""Calls that the share of failures is taken of, once there are so many."""
SHARE = 0.5


class State(StrEnum):
    """Whether calls go through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Admission(NamedTuple):
    """A call that goes through; it has to be told how it ended."""

    epoch: int


class Breaker:
    """Decides whether calls go through, by how those before have ended.

    Args:
        failures: so many in a row open it; None: nothing does.
        pause: seconds that it stays open.
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, failures: int | None, pause: float, clock: Callable[[], float]) -> None:
        self._failures, self._pause, self._clock = failures, pause, clock
        self._in_a_row = 0
        self._window: deque[bool] = deque(maxlen=WINDOW)  # whether each has failed
        self._open_until: float | None = None
        self._probing = False
        self._epoch = 0

    @property
    def state(self) -> State:
        """What it is now."""
        if self._open_until is None:
            return State.CLOSED
        return State.OPEN if self.wait > 0 else State.HALF_OPEN

    @property
    def wait(self) -> float:
        """Seconds until the next call may be tried, as far as time goes; 0: now."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - self._clock())

    @property
    def admits(self) -> bool:
        """Whether a call would go through."""
        state = self.state
        return state is State.CLOSED or (state is State.HALF_OPEN and not self._probing)

    def admit(self) -> Admission | None:
        """Let a call through, or not."""
        if not self.admits:
            return None
        self._probing = self._open_until is not None
        return Admission(self._epoch)

    def ended(self, admission: Admission, *, failed: bool | None, wait: float = 0.0) -> None:
        """Take note of how a call ended; one let through before the last change tells nothing.

        Args:
            admission: the call.
            failed: None: that is not known, say since its caller left.
            wait: seconds that the provider asks to be left alone for; at least so long will it be,
                if this opens the breaker.
        """
        if admission.epoch != self._epoch:
            return
        if self._probing:
            self._probing = False
            if failed is not None:
                self._change(open_for=max(self._pause, wait) if failed else None)
            return
        if failed is None or self._failures is None:
            return
        self._window.append(failed)
        self._in_a_row = self._in_a_row + 1 if failed else 0
        often = len(self._window) == WINDOW and sum(self._window) >= SHARE * WINDOW
        if self._in_a_row >= self._failures or (failed and often):
            self._change(open_for=max(self._pause, wait))

    def _change(self, open_for: float | None) -> None:
        self._open_until = None if open_for is None else self._clock() + open_for
        self._epoch += 1
        self._in_a_row = 0
        self._window.clear()
