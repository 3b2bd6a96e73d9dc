"""The loop around `take_batch`: whatever waits when the engine is free is the next batch.

There is no timer for batches: an idle engine starts at once, and while it runs the next batch
gathers, so waiting is never chosen, only shared. Knows nothing of networks: it batches any items
that have a length.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from bestroute.batching.admission import Admission
from bestroute.batching.counts import Counts
from bestroute.batching.outcomes import Outcomes
from bestroute.batching.pace import Pace
from bestroute.batching.pending import Done, Pending, take_batch
from bestroute.batching.vitals import Vitals
from bestroute.batching.watch import Run, Watch
from bestroute.call import ANYBODY, Call
from bestroute.fair import FairQueue
from bestroute.partition import Budget
from bestroute.tasks import task_group

In = TypeVar("In")
Out = TypeVar("Out")

_TURNS, _BUSY_TURN = 32, 5e-6
"""Most turns of the event loop that small runs are put off for, and how many seconds a turn takes
at least that had anything else to do."""


class Batcher(Generic[In, Out]):
    """Runs items in batches, in the order of `take_batch`.

    Every accepted item resolves exactly once, whatever its run does: with its result, with the
    exception of the run it was part of, by its deadline with `DeadlineExceeded` or `EngineStalled`,
    with `Overloaded` if it had to make way, or by its caller's cancellation. A failing run fails
    its own batch only.

    Args:
        run: takes a batch and gives one output per item in the same order.
        length: an item's length in tokens.
        budget: what one batch may hold.
        window: how many of the first items a batch is made from.
        max_queue: items that may wait.
        in_flight: batches that may be under way at once.
        run_alone: the same as `run`, but has all of the engine: sooner back, while several at once
            get more done. It is chosen where nothing runs and little waits. None: there is none.
        run_now: the same as `run`, for batches so small that the event loop waits for them: gives
            the outputs at once, or their future if that would take longer than a moment.
        now_tokens: most padded tokens of such a batch; 0: there are none.
        seconds: what a run of so many padded tokens takes by itself. By that, and by what runs took
            lately, it is judged whether one still comes back.
        sound: whether an output is one; its item fails with an `ArithmeticError` otherwise.
        probe: an item that is known to work: tells a network that fails from items that it fails
            on. None: nobody asks.
        name: of what runs, for traces and the log.
        clock: seconds; has to be the event loop's.

    Attributes:
        counts: what has been done.
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
        run_now: Callable[[Sequence[In]], "Sequence[Out] | asyncio.Future[list[Out]]"]
        | None = None,
        now_tokens: float = 0.0,
        seconds: Callable[[int], float] = lambda _: 0.0,
        sound: Callable[[Out], bool] = lambda _: True,
        probe: In | None = None,
        name: str = "engine",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._length = run, length
        self._budget, self._window = budget, window
        self._run_alone, self._run_now, self._now_tokens = run_alone, run_now, now_tokens
        self._sound, self._clock = sound, clock
        self._in_flight, self._free = in_flight, in_flight
        self._queue = FairQueue[Pending[In, Out]]()
        self._tasks: asyncio.TaskGroup | None = None
        self._due = False
        self._turns, self._turned = 0, 0.0
        self._settled = asyncio.Event()
        runs: list[Run[In, Out]] = []
        self.counts = counts = Counts(self._queue, runs)
        self._pace = pace = Pace(budget.tokens_per_run, seconds)
        self._admission = Admission(self._queue, max_queue, in_flight, pace, counts)
        self._outcomes = Outcomes[In, Out](sound, counts, name)
        self._watch = Watch(
            self._queue, runs, in_flight, self._outcomes, counts, self._looked, clock, name
        )
        self._vitals = None if probe is None else Vitals(lambda: self._probe(probe), name)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve while the block lasts; on leaving, refuse new items and finish those queued.

        A bug in the loop cancels the block and comes out of it: it is never logged and lost. So
        does a `TimeoutError`, if a run doesn't come back for good.
        """
        try:
            async with task_group() as self._tasks:
                self._admission.open = True
                try:
                    yield
                finally:
                    self._admission.open = False
                while self._queue or not self._watch.idle:
                    self._settled.clear()
                    await self._settled.wait()
                self._watch.close()
                if self._vitals is not None:
                    self._vitals.close()
        finally:  # only where the block failed or was cancelled is anyone left
            self._watch.close()
            self._outcomes.cancel(list(self._queue))

    def fault(self) -> str | None:
        """Why items get no result now; None if they do."""
        if self._watch.stalled:
            return "does not come back"
        return self._vitals.fault if self._vitals else None

    def admit(self, call: Call, items: int = 1) -> None:
        """Refuse at once what `submit_all` would refuse, before any work is put into its items.

        Raises:
            Overloaded: see `submit_all`, as for the others.
            EngineStalled: the engine doesn't come back.
            DeadlineExceeded: the deadline has passed.
        """
        self._admission.admit(call, items, 1, self._clock(), stuck=self._stuck)

    @property
    def _stuck(self) -> bool:
        return not self._free and self._watch.stuck

    async def submit(self, item: In, call: Call = ANYBODY) -> Done[Out]:
        """Run one item; see `submit_all`."""
        (entry,) = self._queued([item], call)
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
                had to make room for others since, or serving has ended.
            EngineStalled: the engine doesn't come back, or not in time.
            DeadlineExceeded: the deadline passed before they ran.
            ArithmeticError: an output isn't sound.
            Exception: whatever the run raised.
        """
        entries = self._queued(items, call)
        try:
            return await asyncio.gather(*(entry.reply for entry in entries))
        finally:
            for entry in entries:  # the caller left, or a sibling failed: the rest must not run
                entry.reply.cancel()

    def _queued(self, items: Sequence[In], call: Call) -> list[Pending[In, Out]]:
        now, lengths = self._clock(), [self._length(item) for item in items]
        begin_by = self._admission.admit(call, len(items), max(lengths), now, stuck=self._stuck)
        loop = asyncio.get_running_loop()
        entries: list[Pending[In, Out]] = [
            Pending(item, length, call, begin_by, loop.create_future(), now)
            for item, length in zip(items, lengths, strict=True)
        ]
        for entry in entries:
            self._queue.push(entry)
        self._watch.expect(call.deadline)
        self._schedule()
        return entries

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
        try:
            self._start()
        except BaseException as error:
            self._raise(error)
        else:
            self._schedule()
            self._settled.set()

    def _gathering(self) -> bool:
        """Whether the event loop should first do what else it has to, since more will arrive.

        Only where it would wait for the run: that would hold up just this. Nobody waits for a loop
        that is idle.
        """
        if not self._now_tokens or len(self._queue) >= self._window or self._turns == _TURNS:
            return False
        last, self._turned = self._turned, time.perf_counter()
        self._turns += 1
        return self._turns == 1 or self._turned - last > _BUSY_TURN

    def _start(self) -> None:
        """Run the next batch, and wait for it if it is small; else as a task."""
        start = self._clock()
        batch, late = take_batch(self._queue, self._budget, self._window, start)
        for entry in late:
            self._outcomes.late(entry)
        if not batch:
            return
        padded = max(entry.length for entry in batch) * len(batch)
        self._outcomes.began(batch, padded)
        run, slots, begun = self._run, 1, None
        if self._run_now is not None and padded <= self._now_tokens:
            try:
                outputs = self._run_now([entry.item for entry in batch])
                if not asyncio.isfuture(outputs):
                    self._succeed(batch, outputs, padded, start)
                    return
            except Exception as error:
                self._fail(batch, error)
                return
            begun = outputs
        # What is left would keep one of the others waiting, or none.
        elif (
            self._run_alone is not None
            and self._free == self._in_flight
            and len(self._queue) < self._in_flight - 1
        ):
            run, slots = self._run_alone, self._free
        pace = self._pace
        under_way = Run(batch, slots, start, pace.overdue_after(padded), pace.stalled_after(padded))
        self._free -= slots
        assert self._tasks is not None
        under_way.task = self._tasks.create_task(self._finish(under_way, padded, run, begun))
        self._watch.begin(under_way)

    async def _finish(
        self,
        under_way: Run[In, Out],
        padded: int,
        run: Callable[[Sequence[In]], Awaitable[Sequence[Out]]],
        begun: "asyncio.Future[list[Out]] | None",
    ) -> None:
        batch = under_way.batch
        if begun is None:
            # Whoever left between the taking and this task's first step must not run either.
            batch = [entry for entry in batch if not entry.reply.done()]
        try:
            if batch:
                outputs = await (begun or run([entry.item for entry in batch]))
                self._succeed(batch, outputs, padded, under_way.start, stalled=under_way.stalled)
        except Exception as error:
            self._fail(batch, error)
        except asyncio.CancelledError as error:
            if under_way.task is not None and under_way.task.cancelling():
                # Serving has failed as a whole, or ends without this run; nothing more may run.
                self._outcomes.cancel(batch)
                raise
            self._fail(batch, RuntimeError(f"the run raised {error!r}"))
        self._watch.end(under_way)
        self._free += under_way.slots
        self._schedule()
        self._settled.set()

    def _succeed(
        self,
        batch: Sequence[Pending[In, Out]],
        outputs: Sequence[Out],
        padded: int,
        start: float,
        *,
        stalled: bool = False,
    ) -> None:
        end = self._clock()
        self._outcomes.trace(batch, padded, start, end)
        if not stalled:  # else the next would have to take as long before it counts as one
            self._pace.learn(end - start, len(batch), padded)
        self._outcomes.succeed(batch, outputs, start, end)
        if self._vitals is not None:
            self._vitals.succeeded()

    def _fail(self, batch: Sequence[Pending[In, Out]], error: Exception) -> None:
        self.counts.failed += 1
        self._outcomes.fail(batch, error)
        if self._vitals is not None and self._tasks is not None:
            self._vitals.failed(self._tasks)

    async def _probe(self, item: In) -> None:
        """Run an item past the queue.

        Raises:
            Exception: whatever the run raises; or the output isn't sound, or there isn't one.
        """
        (output,) = await self._run([item])
        if not self._sound(output):
            raise ArithmeticError(f"the network gave {output}")

    def _looked(self, error: BaseException | None) -> None:
        if error is not None:
            self._raise(error)
        self._settled.set()

    def _raise(self, error: BaseException) -> None:
        """Let an error out of `running`.

        Raised in a callback it would be logged and forgotten: a server that never answers again.
        """
        assert self._tasks is not None
        self._tasks.create_task(_raised(error))


async def _raised(error: BaseException) -> None:
    raise error
