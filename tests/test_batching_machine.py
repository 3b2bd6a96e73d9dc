"""The batcher under anything that can happen to it, in any order, on a simulated clock."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bestroute.batching.batcher import Batcher
from bestroute.batching.watch import GIVE_UP
from bestroute.call import Call, Priority
from bestroute.errors import DeadlineExceeded, EngineStalled, Overloaded
from bestroute.partition import Budget
from tests.simulated import SimulatedLoop

BUDGET = Budget(4, 60, 10.0)
PROBE = -1
EPSILON = 0.011
"""Seconds after its deadline by which everyone has heard something; a busy loop adds its own."""
NOTICED = 0.06
"""Seconds between the moment that a run counts as stalled and the look that finds it so."""
HEALED = 1.1
"""Seconds after which a network that works again is known to."""


@dataclass(eq=False)
class Asked:
    """A call of one item or several.

    Attributes:
        numbers: of the items.
        lengths: of the items.
        call: as submitted.
        at: when.
        outcome: how it ended, and when; None while it hasn't.
        left: its caller has gone.
    """

    numbers: list[int]
    lengths: list[int]
    call: Call
    at: float
    task: "asyncio.Task[Any]" = field(init=False)
    outcome: tuple[str, float] | None = None
    left: bool = False


@dataclass(eq=False)
class Begun:
    """A run that the engine was given."""

    numbers: list[int]
    at: float
    stalls_at: float
    reply: "asyncio.Future[str]"


class Machine(RuleBasedStateMachine):
    """A batcher, an engine that does what the rules say, and callers."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = SimulatedLoop()
        self.calls: list[Asked] = []
        self.owner: dict[int, Asked] = {}
        self.began: list[int] = []
        self.runs: list[Begun] = []
        self.broken = self.drained = False
        self.changed = self.failed_at = self.loop.time()
        self.failed_since = False
        self.wrong: list[str] = []

    @initialize(in_flight=st.integers(1, 3), max_queue=st.integers(1, 6), window=st.integers(1, 5))
    def open(self, in_flight: int, max_queue: int, window: int) -> None:
        """Start serving."""
        self.in_flight, self.max_queue = in_flight, max_queue
        self.batcher = Batcher[int, float](
            self.run_batch,
            length=self.length,
            budget=BUDGET,
            window=window,
            max_queue=max_queue,
            in_flight=in_flight,
            sound=isfinite,
            probe=PROBE,
            clock=self.loop.time,
        )
        self.stop = asyncio.Event()
        self.serving = self.loop.create_task(self.serve())
        self.pass_time(0)

    async def serve(self) -> None:
        async with self.batcher.running():
            await self.stop.wait()

    def length(self, number: int) -> int:
        call = self.owner[number]
        return call.lengths[call.numbers.index(number)]

    async def run_batch(self, batch: Sequence[int]) -> list[float]:
        """The engine: it takes as long, and does, as the rules say."""
        if batch == [PROBE]:
            if self.broken:
                raise ArithmeticError("broken")
            return [0.0]
        now = self.loop.time()
        for number in batch:
            asked = self.owner[number]
            if asked.left:
                self.wrong.append(f"{number} ran though its caller had left")
            if asked.call.deadline is not None and asked.call.deadline <= now:
                self.wrong.append(f"{number} ran after its deadline")
            if number in self.began:
                self.wrong.append(f"{number} ran twice")
            self.wrong += [
                f"{number} overtook {other.numbers}"
                for other in self.calls
                if other.at < asked.at
                and other.outcome is None
                and not other.left
                and other.lengths == [self.length(number)]
                and other.call[1:4] == asked.call[1:4]
                and other.numbers[0] not in {*self.began, *batch}
            ]
        self.began += batch
        padded = max(map(self.length, batch)) * len(batch)
        if len(batch) > BUDGET.max_items or (len(batch) > 1 and padded > BUDGET.max_padded_tokens):
            self.wrong.append(f"{batch} is over the budget")
        stalls_at = now + self.batcher._pace.stalled_after(padded)
        run = Begun([*batch], now, stalls_at, self.loop.create_future())
        self.runs.append(run)
        if len(self.runs) > self.in_flight:
            self.wrong.append("more runs at once than there are places")
        try:
            how = await run.reply
        finally:
            self.runs.remove(run)
        if how == "raise":
            raise ArithmeticError("engine")
        outputs = [nan if how == "nan" else number * 10.0 for number in batch]
        return outputs[1:] if how == "short" else outputs

    async def ask(self, asked: Asked) -> None:
        """A caller."""
        try:
            if len(asked.numbers) == 1:
                done = [await self.batcher.submit(asked.numbers[0], asked.call)]
            else:
                done = await self.batcher.submit_all(asked.numbers, asked.call)
            if [each.value for each in done] != [number * 10.0 for number in asked.numbers]:
                self.wrong.append(f"{asked.numbers} got {[each.value for each in done]}")
            how = "done"
        except Overloaded as error:
            how = "evicted" if "others" in str(error) else "refused"
            if error.retry_after <= 0:
                self.wrong.append("told to come back at once")
        except EngineStalled:
            how = "stalled"
        except DeadlineExceeded:
            how = "late"
        except (ArithmeticError, RuntimeError):
            how = "failed"
        except asyncio.CancelledError:
            how = "left" if asked.left else "abandoned"
        if asked.outcome is not None:
            self.wrong.append(f"{asked.numbers} resolved twice")
        asked.outcome = (how, self.loop.time())

    # rules

    @precondition(lambda self: not self.serving.done())
    @rule(
        lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
        within=st.sampled_from([None, None, 0.02, 0.3, 1.5, 4.0]),
        caller=st.sampled_from("abc"),
        weight=st.sampled_from([1.0, 3.0]),
        priority=st.sampled_from(Priority),
    )
    def submit(
        self,
        lengths: list[int],
        within: float | None,
        caller: str,
        weight: float,
        priority: Priority,
    ) -> None:
        """Somebody asks."""
        now = self.loop.time()
        call = Call(None if within is None else now + within, caller, weight, priority)
        numbers = [len(self.owner) + place for place in range(len(lengths))]
        asked = Asked(numbers, lengths, call, now)
        self.owner |= dict.fromkeys(numbers, asked)
        self.calls.append(asked)
        asked.task = self.loop.create_task(self.ask(asked))
        self.loop.play(_turn())

    @rule(which=st.integers(0, 20))
    def leave(self, which: int) -> None:
        """A caller goes, at whatever stage its call is."""
        under_way = [asked for asked in self.calls if asked.outcome is None]
        if under_way:
            asked = under_way[which % len(under_way)]
            asked.left = True
            asked.task.cancel()
            self.loop.play(_turn())

    @precondition(lambda self: self.runs)
    @rule(which=st.integers(0, 3), how=st.sampled_from(["well", "well", "raise", "short", "nan"]))
    def finish(self, which: int, how: str) -> None:
        """A run comes back, late as it may be."""
        run = self.runs[which % len(self.runs)]
        if run.reply.done():
            return
        how = "raise" if self.broken else how
        run.reply.set_result(how)
        if how != "well" and not self.failed_since:
            self.failed_since, self.failed_at = True, self.loop.time()
        self.pass_time(0)

    @rule(seconds=st.sampled_from([0.001, 0.02, 0.1, 0.5, 1.2, 3.0, 12.0]))
    def pass_time(self, seconds: float) -> None:
        """Time passes."""
        self.loop.play(asyncio.sleep(seconds))

    @rule(seconds=st.sampled_from([0.5, 5.0]))
    def stand_still(self, seconds: float) -> None:
        """The process is stopped for a while; then what was due is done."""
        self.loop.jump(seconds)
        for run in self.runs:  # they may have stood still as well
            run.stalls_at += seconds
        self.changed += seconds
        self.failed_at += seconds
        self.pass_time(EPSILON)

    @rule()
    def turn(self) -> None:
        """The network breaks, or is whole again."""
        self.broken = not self.broken
        self.changed, self.failed_since = self.loop.time(), False

    @precondition(lambda self: not self.drained)
    @rule()
    def drain(self) -> None:
        """The server is told to end."""
        self.drained = True
        self.stop.set()
        self.pass_time(0)

    # what always holds

    @invariant()
    def nothing_went_wrong(self) -> None:
        """What the engine and the callers saw was right."""
        assert not self.wrong, self.wrong

    @invariant()
    def everyone_hears_in_time(self) -> None:
        """By the deadline; and soon after a run that doesn't come back is found to be stalled."""
        now = self.loop.time()
        for asked in self.calls:
            deadline = asked.call.deadline
            if asked.outcome is None:
                assert deadline is None or now <= deadline + EPSILON, asked
                stalled = self.stalled()
                assert not any(set(run.numbers) & {*asked.numbers} for run in stalled), asked
                assert len(stalled) < self.in_flight, "nothing runs, and yet somebody waits"

    @invariant()
    def health_tells_the_truth(self) -> None:
        """A run that hangs or a network that fails is told of, and that it is over, too."""
        if not hasattr(self, "serving") or self.drained or self.serving.done():
            return
        now, fault = self.loop.time(), self.batcher.fault()
        if self.stalled() or (self.broken and self.failed_since and now > self.failed_at + HEALED):
            assert fault is not None
        elif not self.broken and now > self.changed + HEALED:
            young = all(now < run.at + 1 for run in self.runs)
            assert fault is None or not young, fault

    def stalled(self) -> list[Begun]:
        """Runs that must have been found to be."""
        now = self.loop.time()
        return [run for run in self.runs if now > run.stalls_at + NOTICED]

    def teardown(self) -> None:
        """Whatever was left: it drains, and nobody is forgotten."""
        if not hasattr(self, "serving"):
            self.loop.close()
            return
        self.stop.set()
        self.pass_time(2 * GIVE_UP + 60)
        ended = self.serving.done()
        error = self.serving.exception() if ended and not self.serving.cancelled() else None
        outcomes = [asked.outcome for asked in self.calls]
        self.loop.close()
        assert ended, "it never ended"
        assert error is None or isinstance(error, TimeoutError), error
        assert None not in outcomes
        assert error or ("abandoned" not in {how for how, _ in filter(None, outcomes)})
        counts = self.batcher.counts
        assert counts.waiting == counts.running == 0 or error
        assert counts.items == sum(size * runs for size, runs in counts.sizes.items())
        assert counts.items >= len(self.began)
        self.nothing_went_wrong()


def test_whatever_happens_everyone_hears_once_and_in_time() -> None:
    """See `Machine`."""
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=150,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[*HealthCheck],
        ),
    )


async def _turn() -> None:
    for _ in range(3):
        await asyncio.sleep(0)
