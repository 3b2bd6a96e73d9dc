"""Who waits for a run that is late, or doesn't come back; on a simulated clock."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

import pytest

from bestroute.batching.batcher import Batcher
from bestroute.batching.pace import Pace
from bestroute.call import Call, Priority
from bestroute.errors import DeadlineExceeded, EngineStalled, Overloaded
from bestroute.partition import Budget
from tests.simulated import SimulatedLoop


@pytest.fixture
def loop() -> Iterator[SimulatedLoop]:
    loop = SimulatedLoop()
    yield loop
    loop.close()


class Bench:
    """A batcher and its engine, which takes for each item as long as `takes` says.

    Attributes:
        takes: seconds by item; others take 10 ms.
        ran: batches.
    """

    def __init__(self, loop: SimulatedLoop, **options: Any) -> None:
        self.loop, self.takes, self.ran = loop, dict[str, float](), list[list[str]]()
        usual: dict[str, Any] = {
            "length": len,
            "budget": Budget(1, 100, 10.0),
            "window": 8,
            "max_queue": 10,
            "clock": loop.time,
            "seconds": lambda _: 0.01,
        }
        self.batcher = Batcher[str, str](self.run, **usual | options)

    async def run(self, batch: Sequence[str]) -> list[str]:
        self.ran.append([*batch])
        await asyncio.sleep(max(self.takes.get(item, 0.01) for item in batch))
        return [*batch]

    async def ask(self, item: str, within: float | None = None, **call: Any) -> tuple[str, float]:
        """What comes of it, and after how many seconds."""
        start = self.loop.time()
        deadline = None if within is None else start + within
        try:
            await self.batcher.submit(item, Call(deadline, **call))
            found = "done"
        except (Overloaded, EngineStalled, DeadlineExceeded) as error:
            found = type(error).__name__
        return found, round(self.loop.time() - start, 3)

    def play(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def serve() -> None:
            async with self.batcher.running():
                await work()

        self.loop.play(serve())


def test_a_stalled_run_is_given_up_on_after_a_second_and_is_well_when_it_is_back(
    loop: SimulatedLoop,
) -> None:
    bench = Bench(loop)
    bench.takes["hangs"] = 5.0

    async def work() -> None:
        hanging, waiting = (asyncio.create_task(bench.ask(item)) for item in ("hangs", "waits"))
        await asyncio.sleep(0.9)
        assert bench.batcher.fault() is None
        assert await hanging == await waiting
        assert (await hanging)[0] == "EngineStalled"
        assert 1 < (await hanging)[1] < 1.06
        assert bench.batcher.fault() == "does not come back"
        assert await bench.ask("new") == ("EngineStalled", 0)
        with pytest.raises(EngineStalled):
            bench.batcher.admit(Call())
        await asyncio.sleep(4)
        assert bench.batcher.fault() is None
        assert await bench.ask("newer") == ("done", 0.01)

    bench.play(work)
    assert bench.ran == [["hangs"], ["newer"]]
    assert (bench.batcher.counts.stalls, bench.batcher.counts.refused) == (1, 2)


def test_while_one_run_is_stalled_others_are_served_and_health_tells(loop: SimulatedLoop) -> None:
    bench = Bench(loop, in_flight=2)
    bench.takes["hangs"] = 5.0

    async def work() -> None:
        hanging = asyncio.create_task(bench.ask("hangs"))
        await asyncio.sleep(2)
        assert (await hanging)[0] == "EngineStalled"
        assert bench.batcher.fault() is not None
        assert await bench.ask("a") == await bench.ask("b") == ("done", 0.01)

    bench.play(work)


def test_a_deadline_during_a_run_that_is_overdue_leaves_time_for_another_answer(
    loop: SimulatedLoop,
) -> None:
    """So that a Route is answered without the network; in a run that isn't there is no need."""
    bench = Bench(loop, budget=Budget(4, 100, 10.0), seconds=lambda _: 0.05)
    bench.takes |= {"hangs": 0.8, "slow": 0.14}

    async def work() -> None:
        tasks = [asyncio.create_task(bench.ask("hangs", each)) for each in (0.5, 0.3)]
        await asyncio.sleep(0.2)
        tasks.append(asyncio.create_task(bench.ask("waits", 0.35)))
        found = await asyncio.gather(*tasks)
        assert [how for how, _ in found] == ["EngineStalled"] * 3
        for (_, after), within in zip(found, (0.5, 0.3, 0.35), strict=True):
            assert within - 0.03 <= after <= within - 0.02
        await asyncio.sleep(1)
        assert await bench.ask("slow", 0.1) == ("DeadlineExceeded", 0.1)

    bench.play(work)


def test_a_short_deadline_does_not_wait_for_the_next_look(loop: SimulatedLoop) -> None:
    bench = Bench(loop)
    bench.takes["hangs"] = 0.9

    async def work() -> None:
        first = asyncio.create_task(bench.ask("hangs"))
        await asyncio.sleep(0.062)
        assert await bench.ask("short", 0.03) == ("EngineStalled", 0.01)
        await first

    bench.play(work)


def test_a_run_that_never_comes_back_ends_the_block(loop: SimulatedLoop) -> None:
    bench = Bench(loop)
    bench.takes["hangs"] = 1e6

    async def work() -> None:
        assert (await bench.ask("hangs"))[0] == "EngineStalled"
        await asyncio.sleep(1e6)

    start = loop.time()
    with pytest.raises(TimeoutError, match="has not come back for 30 s"):
        bench.play(work)
    assert 30 < loop.time() - start < 31


def test_draining_waits_for_runs_but_not_for_stalled_ones(loop: SimulatedLoop) -> None:
    bench = Bench(loop, in_flight=2)
    bench.takes |= {"hangs": 1e6, "long": 0.7}
    found = []

    async def work() -> None:
        for item in ("hangs", "long", "queued"):
            asyncio.create_task(bench.ask(item)).add_done_callback(
                lambda task: found.append(task.result()[0])
            )
        await asyncio.sleep(0.1)

    start = loop.time()
    bench.play(work)
    assert found == ["done", "done", "EngineStalled"]
    assert loop.time() - start < 1.1


def test_a_process_that_stood_still_blames_no_run(loop: SimulatedLoop) -> None:
    """Stopped for 5 s and continued, it gives every answer, late as it is."""
    bench = Bench(loop)
    bench.takes["a"] = 0.5

    async def work() -> None:
        first = asyncio.create_task(bench.ask("a"))
        await asyncio.sleep(0.3)
        loop.jump(5)
        assert (await first)[0] == "done"

    bench.play(work)
    assert bench.batcher.counts.stalls == 0


def test_stalls_teach_no_patience(loop: SimulatedLoop) -> None:
    """The third is found as soon as the first."""
    bench = Bench(loop)
    bench.takes["hangs"] = 8.0

    async def work() -> None:
        for _ in range(3):
            found, after = await bench.ask("hangs")
            assert found == "EngineStalled"
            assert 1 < after < 1.06
            await asyncio.sleep(8)

    bench.play(work)


def test_what_is_too_long_depends_on_what_is_usual() -> None:
    """Runs of 20 ms are stalled after a second, those of half a second after five."""
    pace = Pace(10.0, lambda tokens: tokens / 1000)
    assert pace.stalled_after(20) == 1
    assert pace.stalled_after(500) == 5
    for _ in range(50):
        pace.learn(0.3, 1, 20)
    assert pace.stalled_after(20) == pytest.approx(3)
    assert pace.overdue_after(20) == pytest.approx(0.9)


def test_who_has_less_than_its_share_gets_room_from_who_has_more(loop: SimulatedLoop) -> None:
    bench = Bench(loop, max_queue=3)

    async def work() -> None:
        greedy = [asyncio.create_task(bench.ask(f"g{i}", caller="greedy")) for i in range(5)]
        await asyncio.sleep(0.001)
        modest = asyncio.create_task(bench.ask("m", caller="modest"))
        urgent = asyncio.create_task(bench.ask("u", caller="greedy", priority=Priority.HIGH))
        found = [(await each)[0] for each in greedy]
        assert found == ["done", "done", "Overloaded", "Overloaded", "Overloaded"]
        assert (await modest)[0] == (await urgent)[0] == "done"

    bench.play(work)
    assert bench.ran.index(["u"]) < bench.ran.index(["g1"])
    counts = bench.batcher.counts
    assert (counts.refused, counts.evicted, counts.items) == (2, 1, 4)


# health of a network that fails


def test_a_network_is_at_fault_only_if_it_fails_on_what_it_must_know(loop: SimulatedLoop) -> None:
    bench, broken = Bench(loop, probe="probe", sound=lambda out: out != "odd"), False

    async def run(batch: Sequence[str]) -> list[str]:
        if broken or batch == ["poison"]:
            raise ArithmeticError("no")
        return [*batch]

    bench.batcher._run = run

    async def fails(item: str) -> None:
        with pytest.raises(ArithmeticError):
            await bench.batcher.submit(item)

    async def work() -> None:
        nonlocal broken
        for _ in range(10):
            await fails("poison")
            await fails("odd")
            await asyncio.sleep(0.1)
            assert bench.batcher.fault() is None
        broken = True
        await fails("good")
        assert bench.batcher.fault() is None, "once is nothing"
        await asyncio.sleep(0.5)
        assert "fails: ArithmeticError('no')" in (bench.batcher.fault() or "")
        broken = False
        await asyncio.sleep(0.6)
        assert bench.batcher.fault() is None, "found well without anybody's request"

    bench.play(work)
    assert bench.batcher.counts.failed == 21


# traces


class Recorded:
    """A trace that keeps what it is told."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float, Mapping[str, Any]]] = []

    def record(
        self,
        name: str,
        start: float,
        end: float,
        attributes: Mapping[str, Any] = {},
    ) -> None:
        self.spans.append((name, start, end, attributes))


def test_a_traced_item_tells_of_its_wait_and_its_run(loop: SimulatedLoop) -> None:
    bench, trace = Bench(loop, budget=Budget(4, 100, 10.0), name="router"), Recorded()

    async def work() -> None:
        first = asyncio.create_task(bench.ask("first"))
        await asyncio.sleep(0.004)
        traced = asyncio.create_task(bench.ask("traced", trace=trace))
        await asyncio.gather(first, traced, bench.ask("beside"))

    start = loop.time()
    bench.play(work)
    (queue, queued, begun, _), (batch, began, ended, told) = trace.spans
    assert (queue, batch) == ("queue", "batch")
    assert [queued - start, begun - start, ended - start] == pytest.approx([0.004, 0.01, 0.02])
    assert began == begun
    assert told == {
        "bestroute.network": "router",
        "bestroute.batch.id": 1,
        "bestroute.batch.items": 2,
        "bestroute.batch.padded_tokens": 12,
    }
