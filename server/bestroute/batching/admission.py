"""Who may wait: whoever there is room and time for."""

from typing import Any

from bestroute.batching.counts import Counts
from bestroute.batching.outcomes import engine_stalled
from bestroute.batching.pace import Pace
from bestroute.batching.pending import Pending
from bestroute.call import Call
from bestroute.errors import DeadlineExceeded, Overloaded
from bestroute.fair import FairQueue

_SOON = 0.01
"""Seconds after which the refused may come back at the earliest."""


class Admission:
    """Lets items into a queue, and others out of it to make room.

    Args:
        queue: where they wait.
        max_queue: most that may.
        in_flight: batches that may be under way at once.
        pace: how long runs take.
        counts: are told who is turned away.

    Attributes:
        open: whether anyone is let in.
    """

    def __init__(
        self,
        queue: FairQueue[Pending[Any, Any]],
        max_queue: int,
        in_flight: int,
        pace: Pace,
        counts: Counts,
    ) -> None:
        self._queue, self._max_queue, self._in_flight = queue, max_queue, in_flight
        self._pace, self._counts = pace, counts
        self.open = False

    def admit(
        self, call: Call, items: int, longest: int, now: float, *, stuck: bool
    ) -> float | None:
        """Make sure that there is room for items, and time.

        Args:
            call: who asks, and until when.
            items: how many.
            longest: tokens of the longest.
            now: the clock.
            stuck: whether the engine doesn't come back.

        Returns:
            The clock by when they have to begin; None: whenever.

        Raises:
            Overloaded: there isn't.
            EngineStalled: the engine doesn't come back.
            DeadlineExceeded: the deadline has passed.
        """
        deadline, waiting = call.deadline, len(self._queue)
        if deadline is not None and deadline <= now:
            self._counts.refused += items
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        if stuck:
            self._counts.refused += items
            raise engine_stalled()
        begin_by = deadline
        if deadline is not None and waiting:
            # The engine is spent only on what can still be in time when its run ends.
            begin_by = deadline - self._pace.lasts(longest)
            if now + self._wait(call) > begin_by:
                raise self._overloaded(
                    call,
                    items,
                    f"{self._queue.ahead(call)} requests are waiting already, which takes longer "
                    f"than this one's deadline of {deadline - now:.3f} s",
                )
        # Last, so that nobody makes way for one that is refused.
        full = waiting + items > self._max_queue
        if not self.open or (full and not self._made_room(call, items)):
            raise self._overloaded(call, items, f"{waiting} requests are waiting already")
        return begin_by

    def _made_room(self, call: Call, items: int) -> bool:
        """Whether others have made way for the items."""
        queue = self._queue
        while items <= self._max_queue < len(queue) + items:
            evicted = queue.evict(call, items)
            if evicted is None:
                break
            others = "the server is full, and others have had less than their share of it"
            if evicted.fail(Overloaded(others, self._retry_after(evicted.call))):
                self._counts.evicted += 1
        return len(queue) + items <= self._max_queue

    def _overloaded(self, call: Call, items: int, why: str) -> Overloaded:
        self._counts.refused += items
        return Overloaded(why, self._retry_after(call))

    def _wait(self, call: Call) -> float:
        """About how many seconds what goes before the call's next item will take."""
        return self._queue.ahead(call) * self._pace.per_item / self._in_flight

    def _retry_after(self, call: Call) -> float:
        return max(_SOON, self._wait(call))
