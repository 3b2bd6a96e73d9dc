"""Watches what is under way: nobody waits past a deadline, nor for a run that doesn't come back."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from bestroute.batching.counts import Counts
from bestroute.batching.outcomes import Outcomes
from bestroute.batching.pending import Pending

_log = logging.getLogger(__name__)

In = TypeVar("In")
Out = TypeVar("Out")

_TICK, _SHORTEST = 0.05, 0.01
"""Seconds between two looks, and at least, where a deadline comes sooner."""
_CREDIT = 0.2
"""A look counts at most so many seconds against a run: if it comes later it was this process, or
its event loop, that stood still, and the run may have as well."""
_TO_SEND = 0.03
"""Seconds before the deadline by which a caller is told that its run is overdue, so that it can
still be given an answer without the network."""
GIVE_UP = 30.0
"""Seconds after which a stalled run won't come back."""


@dataclass(slots=True, eq=False)
class Run(Generic[In, Out]):
    """A batch under way.

    Attributes:
        batch: what runs.
        slots: how many of the batcher's places it takes.
        start: the clock when it began.
        overdue_after: seconds after which it is late.
        stalled_after: seconds after which nobody should wait for it any more.
        elapsed: seconds it has been seen to take.
        stalled: whether it takes longer than `stalled_after`.
        task: awaits its end.
    """

    batch: list[Pending[In, Out]]
    slots: int
    start: float
    overdue_after: float
    stalled_after: float
    elapsed: float = 0.0
    stalled: bool = False
    task: "asyncio.Task[None] | None" = None

    @property
    def overdue(self) -> bool:
        """Whether it is late, but may well come back."""
        return self.elapsed > self.overdue_after

    def __len__(self) -> int:
        return len(self.batch)


class Watch(Generic[In, Out]):
    """Looks at the runs under way and at those who wait, for as long as anything is under way.

    Args:
        queue: who waits.
        runs: what is under way.
        in_flight: places for runs.
        outcomes: tells those who have waited long enough.
        counts: are told of stalls.
        looked: is called after every look, with the error if it failed.
        clock: seconds; has to be the event loop's.
        name: of the network, for the log.
    """

    def __init__(
        self,
        queue: Iterable[Pending[In, Out]],
        runs: list[Run[In, Out]],
        in_flight: int,
        outcomes: Outcomes[In, Out],
        counts: Counts,
        looked: Callable[[BaseException | None], None],
        clock: Callable[[], float],
        name: str,
    ) -> None:
        self._queue, self._runs, self._in_flight = queue, runs, in_flight
        self._outcomes, self._counts = outcomes, counts
        self._looked, self._clock, self._name = looked, clock, name
        self._timer: asyncio.TimerHandle | None = None
        self._next = self._last = 0.0

    def begin(self, run: Run[In, Out]) -> None:
        """Watch a run from now on."""
        self._runs.append(run)
        if self._timer is None:
            self._last = self._clock()
            self._look_at(self._last)
        for entry in run.batch:
            self.expect(entry.call.deadline)

    def end(self, run: Run[In, Out]) -> None:
        """A run is over."""
        self._runs.remove(run)
        if run.stalled:
            seconds = self._clock() - run.start
            _log.warning("%s: the stalled run came back after %.1f s", self._name, seconds)

    def expect(self, deadline: float | None) -> None:
        """See that whoever has a deadline is looked at in time."""
        if self._timer is not None and deadline is not None and deadline < self._next:
            self._timer.cancel()
            self._look_at(min(deadline - _TO_SEND, self._next))

    @property
    def stalled(self) -> bool:
        """Whether any run is."""
        return any(run.stalled for run in self._runs)

    @property
    def stuck(self) -> bool:
        """Whether nothing can run, because what is under way doesn't come back."""
        return sum(run.slots for run in self._runs if run.stalled) >= self._in_flight

    @property
    def idle(self) -> bool:
        """Whether nothing is under way of which an end can be expected."""
        return all(run.stalled for run in self._runs)

    def close(self) -> None:
        """Look no more, and wait no more for what is stalled."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for run in self._runs:
            if run.task is not None:
                run.task.cancel()
        self._runs.clear()

    def _look_at(self, when: float) -> None:
        """Look next at that time, or as soon after as is worth it; at the latest in a tick."""
        now = self._clock()
        self._next = min(max(when, now + _SHORTEST), now + _TICK)
        self._timer = asyncio.get_running_loop().call_later(self._next - now, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._runs:
            return
        try:
            now = self._clock()
            self._see_stalls(now)
            self._look_at(self._see_deadlines(now))
        except BaseException as error:
            self._looked(error)
        else:
            self._looked(None)

    def _see_stalls(self, now: float) -> None:
        """Find runs that take too long, and tell those who wait for them.

        Raises:
            TimeoutError: one won't come back.
        """
        for run in self._runs:
            run.elapsed += min(now - max(run.start, self._last), _CREDIT)
            if not run.stalled and run.elapsed > run.stalled_after:
                run.stalled = True
                self._counts.stalls += 1
                _log.error(
                    "%s: a run of %d inputs has not come back for %.1f s",
                    self._name,
                    len(run),
                    run.elapsed,
                )
                for entry in run.batch:
                    self._outcomes.stalled(entry)
            elif run.elapsed > max(GIVE_UP, run.stalled_after):
                raise TimeoutError(
                    f"{self._name}: a run has not come back for {run.elapsed:.0f} s; only another "
                    "process can serve"
                )
        self._last = now
        if self.stuck:
            for entry in self._queue:
                self._outcomes.stalled(entry)

    def _see_deadlines(self, now: float) -> float:
        """Tell those whose deadline comes; when the next does."""
        soonest = now + _TICK
        for run in self._runs:
            for entry in run.batch:
                deadline = entry.call.deadline
                if deadline is not None:
                    soonest = min(soonest, self._see(entry, deadline, now, run.overdue))
        overdue = all(run.overdue for run in self._runs)
        for entry in self._queue:
            if entry.begin_by is not None:
                soonest = min(soonest, self._see(entry, entry.begin_by, now, overdue))
        return soonest

    def _see(self, entry: Pending[In, Out], deadline: float, now: float, overdue: bool) -> float:
        """Tell an entry if it is time to; the clock when it will be, if not."""
        if entry.reply.done():
            return now + _TICK
        if overdue and deadline - _TO_SEND <= now:
            self._outcomes.stalled(entry)
        elif deadline <= now:
            self._outcomes.late(entry)
        else:
            return deadline - _TO_SEND if deadline - _TO_SEND > now else deadline
        return now + _TICK
