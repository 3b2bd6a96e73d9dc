"""Dynamic batching: requests that wait together run together.

`take_batch` decides what runs next, purely. `Batcher` is the loop around it. There is no timer:
an idle engine starts at once, and while it runs the next batch gathers, so waiting is never
chosen, only shared. Knows nothing of networks: it batches any items that have a length.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from bestroute.errors import DeadlineExceeded, Overloaded

In = TypeVar("In")
Out = TypeVar("Out")

LOOKAHEAD = 4
"""How many batches' worth of entries are looked at to fill one; bounds the cost of a decision."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What one batch may hold.

    Attributes:
        max_items: most items.
        max_padded_tokens: most tokens, counting every item as long as the longest. An item that is
            longer by itself runs alone.
        max_padding: largest share of those tokens that may be padding, in [0, 1].
    """

    max_items: int
    max_padded_tokens: int
    max_padding: float


@dataclass(frozen=True, slots=True)
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
        deadline: `time.monotonic()` after which its caller no longer waits; None never.
        reply: resolved exactly once; done already if the caller has left.
        since: `time.monotonic()` of the submission.
    """

    item: In
    length: int
    deadline: float | None
    reply: "asyncio.Future[Done[Out]]"
    since: float = field(default_factory=time.monotonic)


def take_batch(
    queue: deque[Pending[In, Out]], budget: Budget, now: float
) -> tuple[list[Pending[In, Out]], list[Pending[In, Out]]]:
    """Remove from the queue what runs next.

    The oldest entry always runs, so nothing starves. The others join it first come, first served,
    each if it fits into the budget: near enough in length, above all, since padding is computed
    like text. What does not fit keeps its place.

    Args:
        queue: oldest first; entries that are taken, late or abandoned are removed.
        budget: what one batch may hold.
        now: `time.monotonic()`; entries whose deadline is not after it are late.

    Returns:
        The batch, oldest first, and the late entries, which never run.
    """
    batch: list[Pending[In, Out]] = []
    late: list[Pending[In, Out]] = []
    kept: list[Pending[In, Out]] = []
    longest = total = 0
    while queue and len(batch) < budget.max_items and len(kept) < LOOKAHEAD * budget.max_items:
        entry = queue.popleft()
        if entry.reply.done():
            continue
        if entry.deadline is not None and entry.deadline <= now:
            late.append(entry)
            continue
        padded = max(longest, entry.length) * (len(batch) + 1)
        within = padded <= budget.max_padded_tokens
        dense = total + entry.length >= (1 - budget.max_padding) * padded
        if not batch or (within and dense):
            batch.append(entry)
            longest, total = max(longest, entry.length), total + entry.length
        else:
            kept.append(entry)
        if longest * (len(batch) + 1) > budget.max_padded_tokens:
            break
    queue.extendleft(reversed(kept))
    return batch, late


class Batcher(Generic[In, Out]):
    """Runs items in batches, in the order of `take_batch`.

    Every accepted item resolves exactly once: with its result, with the exception of the run it was
    part of, with `DeadlineExceeded`, or by its caller's cancellation. A failing run fails its own
    batch only.

    Args:
        run: takes a batch and gives one output per item in the same order.
        length: an item's length in tokens.
        budget: what one batch may hold.
        max_queue: items that may wait.
        in_flight: batches that may run at once.
    """

    def __init__(
        self,
        run: Callable[[Sequence[In]], Awaitable[Sequence[Out]]],
        *,
        length: Callable[[In], int],
        budget: Budget,
        max_queue: int,
        in_flight: int = 1,
    ) -> None:
        self._run, self._length, self._budget, self._max_queue = run, length, budget, max_queue
        self._slots = asyncio.Semaphore(in_flight)
        self._queue: deque[Pending[In, Out]] = deque()
        self._wake = asyncio.Event()
        self._open = False
        self._seconds_per_item = 0.0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve while the block lasts; on leaving, refuse new items and finish those queued.

        A bug in the loop cancels the block and comes out of it: it is never logged and lost.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                self._open = True
                tasks.create_task(self._serve(tasks), name="batcher")
                try:
                    yield
                finally:
                    self._open = False
                    self._wake.set()
        except BaseExceptionGroup as group:
            if len(group.exceptions) > 1:
                raise
            # The block's own error should look as if there were no group around it.
            raise group.exceptions[0] from None

    async def submit(self, item: In, *, deadline: float | None = None) -> Done[Out]:
        """Run one item; see `submit_all`."""
        return (await self.submit_all([item], deadline=deadline))[0]

    async def submit_all(
        self, items: Sequence[In], *, deadline: float | None = None
    ) -> list[Done[Out]]:
        """Queue items together and wait for all of them; they may run in different batches.

        Args:
            items: at least one; all are queued or none.
            deadline: `time.monotonic()` after which the caller no longer waits.

        Returns:
            One result per item, in order.

        Raises:
            Overloaded: the queue has no room for all of them, or serving has ended.
            DeadlineExceeded: the deadline passed before they ran.
            Exception: whatever the run raised.
        """
        if deadline is not None and deadline <= time.monotonic():
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        if not self._open or len(self._queue) + len(items) > self._max_queue:
            wait = max(0.01, len(self._queue) * self._seconds_per_item)
            raise Overloaded(f"{len(self._queue)} requests are waiting already", wait)
        loop = asyncio.get_running_loop()
        entries = [
            Pending[In, Out](item, self._length(item), deadline, loop.create_future())
            for item in items
        ]
        self._queue.extend(entries)
        self._wake.set()
        try:
            return await asyncio.gather(*(entry.reply for entry in entries))
        finally:
            for entry in entries:  # the caller left, or a sibling failed: the rest must not run
                entry.reply.cancel()

    async def _serve(self, runs: asyncio.TaskGroup) -> None:
        try:
            while self._open or self._queue:
                if not self._queue:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                # The batch is taken once it can run: until then it may still fill.
                await self._slots.acquire()
                batch, late = take_batch(self._queue, self._budget, time.monotonic())
                for entry in late:
                    entry.reply.set_exception(
                        DeadlineExceeded("the deadline passed while the request was waiting")
                    )
                if batch:
                    runs.create_task(self._run_batch(batch))
                else:
                    self._slots.release()
        finally:  # only where the loop itself is cancelled is anyone left
            for entry in self._queue:
                entry.reply.cancel()

    async def _run_batch(self, taken: list[Pending[In, Out]]) -> None:
        start = time.monotonic()
        # Whoever left between the taking and this task's first step must not run either.
        batch = [entry for entry in taken if not entry.reply.done()]
        try:
            if not batch:
                return
            outputs = await self._run([entry.item for entry in batch])
            if len(outputs) != len(batch):
                raise RuntimeError(f"the engine gave {len(outputs)} outputs for {len(batch)} items")
        except Exception as error:
            for entry in batch:
                if not entry.reply.done():
                    entry.reply.set_exception(error)
            return
        except asyncio.CancelledError:
            for entry in batch:
                entry.reply.cancel()
            raise
        finally:
            self._slots.release()
        ran = time.monotonic() - start
        self._seconds_per_item = ran / len(batch)
        for entry, value in zip(batch, outputs, strict=True):
            if not entry.reply.done():
                entry.reply.set_result(Done(value, start - entry.since, ran, len(batch)))
