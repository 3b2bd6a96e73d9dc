"""Dynamic batching: requests that wait together run together.

`take_batch` decides what runs next, purely. `Batcher` is the loop around it. There is no timer:
an idle engine starts at once, and while it runs the next batch gathers, so waiting is never
chosen, only shared. Knows nothing of networks: it batches any items that have a length.
"""

import asyncio
import time
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from bestroute.call import ANYBODY, Call
from bestroute.errors import DeadlineExceeded, Overloaded
from bestroute.partition import Budget, divided

In = TypeVar("In")
Out = TypeVar("Out")

_TURNS, _BUSY_TURN = 32, 5e-6
"""Most turns of the event loop that small runs are put off for, and how many seconds a turn takes
at least that had anything else to do."""
_SOON = 0.01
"""Seconds after which the refused may come back at the earliest."""
_SMOOTHING = 0.2
"""Weight of the latest run in a moving average."""


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
    """A submitted item that waits for its turn.

    Attributes:
        item: what to run.
        length: its length in tokens.
        deadline: `time.monotonic()` after which it is too late to run it; None never.
        reply: resolved exactly once; done already if the caller has left.
        since: `time.monotonic()` of the submission.
    """

    item: In
    length: int
    deadline: float | None
    reply: "asyncio.Future[Done[Out]]"
    since: float = field(default_factory=time.monotonic)


def take_batch(
    queue: deque[Pending[In, Out]], budget: Budget, window: int, now: float
) -> tuple[list[Pending[In, Out]], list[Pending[In, Out]]]:
    """Remove from the queue what runs next.

    The oldest entries are divided into batches as is cheapest, and the batch with the oldest of all
    is taken. So the oldest always runs, and nobody is overtaken by more than a window. Among equals
    in length it is first come, first served.

    Args:
        queue: oldest first; entries that are taken, late or abandoned are removed.
        budget: what one batch may hold.
        window: how many entries are looked at.
        now: `time.monotonic()`; entries whose deadline is not after it are late.

    Returns:
        The batch, oldest first, and the late entries, which never run.
    """
    live: list[Pending[In, Out]] = []
    late: list[Pending[In, Out]] = []
    while queue and len(live) < window:
        entry = queue.popleft()
        if entry.reply.done():
            continue
        if entry.deadline is not None and entry.deadline <= now:
            late.append(entry)
        else:
            live.append(entry)
    if len(live) < 2:
        return live, late
    lengths = sorted(entry.length for entry in live)
    ends = divided(lengths, budget)
    # Equals can be in two batches; the oldest is in the first of them.
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
    queue.extendleft(reversed(kept))
    return taken, late


class Batcher(Generic[In, Out]):
    """Runs items in batches, in the order of `take_batch`.

    Every accepted item resolves exactly once: with its result, with the exception of the run it was
    part of, with `DeadlineExceeded`, or by its caller's cancellation. A failing run fails its own
    batch only.

    Args:
        run: takes a batch and gives one output per item in the same order.
        length: an item's length in tokens.
        budget: what one batch may hold.
        window: how many of the oldest items a batch is made from.
        max_queue: items that may wait.
        in_flight: batches that may be under way at once.
        run_alone: the same as `run`, but has all of the engine: sooner back, while several at once
            get more done. It is chosen where nothing runs and little waits. None: there is none.
        run_now: the same as `run`, but blocking, for batches so small that handing them to a thread
            takes longer than running them.
        now_tokens: most padded tokens of such a batch; 0: there are none.
    """

    def __init__(
        self,
        run: Callable[[Sequence[In]], Awaitable[Sequence[Out]]],
        *,
        length: Callable[[In], int],
        budget: Budget,
        window: int,
        max_queue: int,
        in_flight: int = 1,
        run_alone: Callable[[Sequence[In]], Awaitable[Sequence[Out]]] | None = None,
        run_now: Callable[[Sequence[In]], Sequence[Out]] | None = None,
        now_tokens: float = 0.0,
    ) -> None:
        self._run, self._length, self._max_queue = run, length, max_queue
        self._budget, self._window = budget, window
        self._run_alone, self._run_now, self._now_tokens = run_alone, run_now, now_tokens
        self._in_flight, self._free = in_flight, in_flight
        self._queue: deque[Pending[In, Out]] = deque()
        self._runs: asyncio.TaskGroup | None = None
        self._open = self._due = False
        self._turns, self._turned = 0, 0.0
        self._settled = asyncio.Event()
        self._seconds_per_item = self._seconds_per_run = self._seconds_per_token = 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve while the block lasts; on leaving, refuse new items and finish those queued.

        A bug in the loop cancels the block and comes out of it: it is never logged and lost.
        """
        try:
            async with asyncio.TaskGroup() as self._runs:
                self._open = True
                try:
                    yield
                finally:
                    self._open = False
                while self._queue or self._free < self._in_flight:
                    self._settled.clear()
                    await self._settled.wait()
        except BaseExceptionGroup as group:
            if len(group.exceptions) > 1:
                raise
            # The block's own error should look as if there were no group around it.
            raise group.exceptions[0] from None
        finally:  # only where the block failed or was cancelled is anyone left
            for entry in self._queue:
                entry.reply.cancel()

    async def submit(self, item: In, call: Call = ANYBODY) -> Done[Out]:
        """Run one item; see `submit_all`."""
        (entry,) = self._queued([item], call.deadline)
        return await entry.reply

    async def submit_all(self, items: Sequence[In], call: Call = ANYBODY) -> list[Done[Out]]:
        """Queue items together and wait for all of them; they may run in different batches.

        Args:
            items: at least one; all are queued or none.
            call: who asks, and until when.

        Returns:
            One result per item, in order.

        Raises:
            Overloaded: the queue has no room for all of them, or is too long for the deadline, or
                serving has ended.
            DeadlineExceeded: the deadline passed before they ran.
            Exception: whatever the run raised.
        """
        entries = self._queued(items, call.deadline)
        try:
            return await asyncio.gather(*(entry.reply for entry in entries))
        finally:
            for entry in entries:  # the caller left, or a sibling failed: the rest must not run
                entry.reply.cancel()

    def _queued(self, items: Sequence[In], deadline: float | None) -> list[Pending[In, Out]]:
        now, lengths = time.monotonic(), [self._length(item) for item in items]
        if deadline is not None and deadline <= now:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        waiting = len(self._queue)
        if not self._open or waiting + len(items) > self._max_queue:
            wait = max(_SOON, self._wait())
            raise Overloaded(f"{waiting} requests are waiting already", wait)
        if deadline is not None and waiting:
            # The engine is spent only on what can still be in time when its run ends.
            alone = self._seconds_per_token * (self._budget.tokens_per_run + max(lengths))
            begin_by = deadline - max(alone, self._seconds_per_run)
            if now + (wait := self._wait()) > begin_by:
                raise Overloaded(
                    f"{waiting} requests are waiting already, which takes longer than this one's "
                    f"deadline of {deadline - now:.3f} s",
                    max(_SOON, wait),
                )
            deadline = begin_by
        loop = asyncio.get_running_loop()
        entries = [
            Pending(item, length, deadline, loop.create_future(), now)
            for item, length in zip(items, lengths, strict=True)
        ]
        self._queue.extend(entries)
        self._schedule()
        return entries

    def _wait(self) -> float:
        """About how many seconds what is queued will take."""
        return len(self._queue) * self._seconds_per_item / self._in_flight

    def _schedule(self) -> None:
        """See that something runs next: after whatever else has arrived by now is queued, too."""
        if not self._due and self._free and self._queue:
            self._due = True
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        if self._gathering():
            asyncio.get_running_loop().call_soon(self._next)
            return
        self._due, self._turns = False, 0
        assert self._runs is not None
        try:
            self._start(self._runs)
        except BaseException as error:
            # Raised here it would be logged and forgotten: a server that never answers again.
            self._runs.create_task(_raised(error))
        else:
            self._schedule()
            self._settled.set()

    def _gathering(self) -> bool:
        """Whether the event loop should first do what else it has to, since more will arrive.

        Only where what waits would be run on the loop itself: it would hold up just that. Nobody
        waits for a loop that is idle.
        """
        if not self._now_tokens or len(self._queue) >= self._window or self._turns == _TURNS:
            return False
        last, self._turned = self._turned, time.perf_counter()
        self._turns += 1
        return self._turns == 1 or self._turned - last > _BUSY_TURN

    def _start(self, runs: asyncio.TaskGroup) -> None:
        """Run the next batch: at once, or as a task."""
        batch, late = take_batch(self._queue, self._budget, self._window, time.monotonic())
        for entry in late:
            entry.reply.set_exception(
                DeadlineExceeded("the deadline can't be met any more, after waiting for a batch")
            )
        if not batch:
            return
        padded = max(entry.length for entry in batch) * len(batch)
        if self._run_now is None or padded > self._now_tokens:
            idle = self._free == self._in_flight
            # What is left would keep one of the others waiting, or none.
            if self._run_alone and idle and len(self._queue) < self._in_flight - 1:
                self._free = 0
                runs.create_task(self._run_batch(batch, self._run_alone, self._in_flight))
            else:
                self._free -= 1
                runs.create_task(self._run_batch(batch, self._run, 1))
            return
        start = time.monotonic()
        try:
            self._resolve(batch, self._run_now([entry.item for entry in batch]), start)
        except Exception as error:
            _fail(batch, error)

    async def _run_batch(
        self,
        taken: list[Pending[In, Out]],
        run: Callable[[Sequence[In]], Awaitable[Sequence[Out]]],
        slots: int,
    ) -> None:
        start = time.monotonic()
        # Whoever left between the taking and this task's first step must not run either.
        batch = [entry for entry in taken if not entry.reply.done()]
        try:
            if batch:
                self._resolve(batch, await run([entry.item for entry in batch]), start)
        except Exception as error:
            _fail(batch, error)
        except asyncio.CancelledError:  # serving has failed as a whole; nothing more may run
            for entry in batch:
                entry.reply.cancel()
            raise
        self._free += slots
        self._schedule()
        self._settled.set()

    def _resolve(
        self, batch: Sequence[Pending[In, Out]], outputs: Sequence[Out], start: float
    ) -> None:
        """Give each entry its output.

        Raises:
            RuntimeError: there are more or fewer.
        """
        if len(outputs) != len(batch):
            raise RuntimeError(f"the engine gave {len(outputs)} outputs for {len(batch)} items")
        ran, size = time.monotonic() - start, len(batch)
        self._seconds_per_item = _smoothed(self._seconds_per_item, ran / size)
        self._seconds_per_run = _smoothed(self._seconds_per_run, ran)
        tokens = self._budget.tokens_per_run + size * max(entry.length for entry in batch)
        self._seconds_per_token = _smoothed(self._seconds_per_token, ran / tokens)
        for entry, value in zip(batch, outputs, strict=True):
            if not entry.reply.done():
                entry.reply.set_result(Done(value, start - entry.since, ran, size))


def _smoothed(average: float, latest: float) -> float:
    return average + _SMOOTHING * (latest - average) if average else latest


def _fail(batch: Sequence[Pending[In, Out]], error: Exception) -> None:
    for entry in batch:
        if not entry.reply.done():
            entry.reply.set_exception(error)


async def _raised(error: BaseException) -> None:
    raise error
