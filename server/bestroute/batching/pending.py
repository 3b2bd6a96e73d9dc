"""What waits for its turn, and what of it runs next. Pure."""

import asyncio
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from typing import Generic, TypeVar

from bestroute.call import Call
from bestroute.fair import FairQueue
from bestroute.partition import Budget, divided

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(slots=True)
class Done(Generic[Out]):
    """A result and what it took.

    Attributes:
        value: what the engine gave for this item.
        queued: seconds between submission and the start of the run.
        ran: seconds of the run that the item was part of.
        batch_size: items in that run.
    """

    value: Out
    queued: float
    ran: float
    batch_size: int


@dataclass(slots=True, eq=False)
class Pending(Generic[In, Out]):
    """A submitted item that waits for its turn, or for the end of its run.

    Attributes:
        item: what to run.
        length: its length in tokens.
        call: who asks, and until when.
        begin_by: the clock after which it is too late to run it; None never.
        reply: resolved exactly once; done already if the caller has left.
        since: the clock at the submission.
    """

    item: In
    length: int
    call: Call
    begin_by: float | None
    reply: "asyncio.Future[Done[Out]]"
    since: float

    def fail(self, error: Exception) -> bool:
        """Resolve it with an error, if it isn't resolved yet; whether it wasn't."""
        if self.reply.done():
            return False
        self.reply.set_exception(error)
        return True


def take_batch(
    queue: FairQueue[Pending[In, Out]], budget: Budget, window: int, now: float
) -> tuple[list[Pending[In, Out]], list[Pending[In, Out]]]:
    """Remove from the queue what runs next.

    The first entries in fair order are divided into batches as is cheapest, and the batch with the
    very first is taken. So the first always runs, and nobody is overtaken by more than a window.
    Among equals in length it is first come, first served.

    Args:
        queue: entries that are taken, late or abandoned are removed.
        budget: what one batch may hold.
        window: how many entries are looked at.
        now: the clock; entries that had to begin by then are late.

    Returns:
        The batch, in fair order, and the late entries, which never run. No batch: nothing waits.
    """
    late: list[Pending[In, Out]] = []
    live: list[Pending[In, Out]] = []
    while not live and (seen := queue.take(window, now)):
        for entry in seen:
            too_late = entry.begin_by is not None and entry.begin_by <= now
            (late if too_late else live).append(entry)
    if len(live) < 2:
        return live, late
    lengths = sorted(entry.length for entry in live)
    ends = divided(lengths, budget)
    # Equals can be in two batches; the first is in the first of them.
    batch = bisect_right(ends, bisect_left(lengths, live[0].length))
    places = Counter(lengths[ends[batch - 1] if batch else 0 : ends[batch]])
    taken: list[Pending[In, Out]] = []
    kept: list[Pending[In, Out]] = []
    for entry in live:
        if places[entry.length]:
            places[entry.length] -= 1
            taken.append(entry)
        else:
            kept.append(entry)
    if kept:
        queue.put_back(kept)
    return taken, late
