"""The batcher: `take_batch` by properties, the loop by random schedules and named cases."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bestroute.batching import batcher as batching
from bestroute.batching.batcher import Batcher
from bestroute.batching.pending import Pending, take_batch
from bestroute.call import ANYBODY, Call
from bestroute.errors import DeadlineExceeded, Overloaded
from bestroute.fair import FairQueue
from bestroute.partition import Budget

NOW = 1000.0


@dataclass(frozen=True)
class Spec:
    """How to make an entry; `abandoned` means that its caller has left."""

    length: int
    late: bool
    abandoned: bool


specs = st.builds(Spec, st.integers(1, 300), st.booleans(), st.booleans())
budgets = st.builds(Budget, st.integers(1, 8), st.integers(1, 600), st.floats(0, 1000))
windows = st.integers(1, 70)


def entries(loop: asyncio.AbstractEventLoop, made: Sequence[Spec]) -> list[Pending[int, None]]:
    pending = []
    for index, spec in enumerate(made):
        begin_by = NOW - 1 if spec.late else None
        reply = loop.create_future()
        entry = Pending[int, None](index, spec.length, ANYBODY, begin_by, reply, NOW)
        if spec.abandoned:
            entry.reply.cancel()
        pending.append(entry)
    return pending


def queue_of(pending: Sequence[Pending[int, None]]) -> FairQueue[Pending[int, None]]:
    queue = FairQueue[Pending[int, None]]()
    for entry in pending:
        queue.push(entry)
    return queue


@given(st.lists(specs, max_size=60), budgets, windows)
def test_take_batch_keeps_its_promises(made: list[Spec], budget: Budget, window: int) -> None:
    """Within budget, oldest first, in order; nothing lost, nothing late or abandoned run."""
    loop = asyncio.new_event_loop()
    try:
        before = entries(loop, made)
    finally:
        loop.close()
    queue = queue_of(before)

    batch, late = take_batch(queue, budget, window, NOW)

    live = [e for e in before if not e.reply.done() and e.begin_by is None]
    lengths = [e.length for e in batch]
    assert len(batch) <= budget.max_items
    if len(batch) > 1:
        assert max(lengths) * len(batch) <= budget.max_padded_tokens
    assert batch[:1] == live[:1], "the oldest live entry always runs"
    assert set(batch) <= set(live[:window]), "nobody is overtaken by more than a window"
    assert [e.item for e in batch] == sorted(e.item for e in batch)
    assert all(not e.reply.done() and e.begin_by is None for e in batch)
    assert all(e.begin_by is not None and not e.reply.done() for e in late)
    left = [*queue]
    gone = [e for e in before if e not in batch and e not in late and e not in left]
    assert all(e.reply.done() for e in gone), "only abandoned entries may vanish"
    assert [e.item for e in left] == sorted(e.item for e in left), "the rest keeps its order"
    for taken in batch:
        overtaken = [e for e in live if e.item < taken.item and e not in batch]
        assert taken.length not in {e.length for e in overtaken}, (
            "equals go first come, first served"
        )


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), budgets, windows)
def test_take_batch_is_never_idle(lengths: list[int], budget: Budget, window: int) -> None:
    """A queue with live entries empties in at most as many batches as it has entries."""
    loop = asyncio.new_event_loop()
    try:
        queue = queue_of(entries(loop, [Spec(length, False, False) for length in lengths]))
    finally:
        loop.close()

    served = []
    while queue:
        batch, _ = take_batch(queue, budget, window, NOW)
        assert batch
        served += [e.item for e in batch]

    assert sorted(served) == list(range(len(lengths)))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.integers(1, 50)),
            st.tuples(st.just("submit-failing"), st.integers(1, 50)),
            st.tuples(st.just("submit-late"), st.integers(1, 50)),
            st.tuples(st.just("leave"), st.integers(0, 30)),
            st.tuples(st.just("tick"), st.integers(1, 3)),
        ),
        max_size=40,
    ),
    st.integers(1, 6),
    st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_every_accepted_item_resolves_exactly_once(
    schedule: list[tuple[str, int]], max_queue: int, in_flight: int
) -> None:
    """Under any mix of failures, departures and deadlines; those who left early never run."""
    asyncio.run(_play(schedule, max_queue, in_flight))


async def _play(schedule: list[tuple[str, int]], max_queue: int, in_flight: int) -> None:
    running = 0
    budget = Budget(3, 60, 10.0)
    ran: list[int] = []
    outcomes: dict[int, str] = {}
    left_before_running: set[int] = set()
    tasks: dict[int, asyncio.Task[None]] = {}

    async def run(batch: Sequence[tuple[int, int, bool]]) -> list[int]:
        assert len(batch) <= budget.max_items
        if len(batch) > 1:
            longest = max(length for _, length, _ in batch)
            assert longest * len(batch) <= budget.max_padded_tokens
        ran.extend(number for number, _, _ in batch)
        nonlocal running
        running += 1
        assert running <= in_flight
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        running -= 1
        if any(fails for _, _, fails in batch):
            raise ArithmeticError("engine")
        return [number * 10 for number, _, _ in batch]

    async def call(number: int, length: int, kind: str) -> None:
        deadline = time.monotonic() + 1e-4 if kind == "submit-late" else None
        try:
            done = await batcher.submit((number, length, kind == "submit-failing"), Call(deadline))
            outcome = "done"
            assert done.value == number * 10
        except ArithmeticError:
            outcome = "failed"
        except Overloaded:
            outcome = "refused"
        except DeadlineExceeded:
            outcome = "late"
        except asyncio.CancelledError:
            outcome = "left"
        assert number not in outcomes
        outcomes[number] = outcome

    batcher = Batcher[tuple[int, int, bool], int](
        run,
        length=lambda item: item[1],
        budget=budget,
        window=4,
        max_queue=max_queue,
        in_flight=in_flight,
    )
    async with batcher.running():
        for kind, value in schedule:
            if kind == "tick":
                for _ in range(value):
                    await asyncio.sleep(0)
            elif kind == "leave":
                if (task := tasks.get(value)) and not task.done():
                    if value not in ran:
                        left_before_running.add(value)
                    task.cancel()
            else:
                number = len(tasks)
                tasks[number] = asyncio.create_task(call(number, value, kind))
                await asyncio.sleep(0)  # a task cancelled before its first step never submits
        await asyncio.gather(*tasks.values())

    assert set(outcomes) == set(tasks)
    assert len(ran) == len(set(ran)), "nothing runs twice"
    refused = {n for n, outcome in outcomes.items() if outcome in ("refused", "late")}
    assert not refused & set(ran), "what was refused or late never reached the engine"
    assert not left_before_running & set(ran), "whoever left before their turn never runs"


def batcher_of(run: object, **options: object) -> Batcher[str, str]:
    return Batcher(
        run,  # type: ignore[arg-type]
        length=len,
        budget=Budget(8, 100, 10.0),
        **{"max_queue": 10, "window": 20} | options,  # type: ignore[arg-type]
    )


async def test_what_waits_together_runs_together() -> None:
    """While one batch runs the next one gathers; nobody waits for a timer."""
    sizes: list[int] = []
    started, gate = asyncio.Event(), asyncio.Event()

    async def run(batch: Sequence[str]) -> list[str]:
        sizes.append(len(batch))
        started.set()
        await gate.wait()
        return list(batch)

    batcher = batcher_of(run)
    async with batcher.running(), asyncio.TaskGroup() as calls:
        first = calls.create_task(batcher.submit("a"))
        await started.wait()
        rest = [calls.create_task(batcher.submit(word)) for word in "bcd"]
        await asyncio.sleep(0)
        gate.set()

    assert sizes == [1, 3]
    assert (await first).batch_size == 1
    assert [(await each).value for each in rest] == ["b", "c", "d"]


async def test_a_failing_batch_fails_only_itself() -> None:
    async def run(batch: Sequence[str]) -> list[str]:
        if "x" in batch:
            raise ArithmeticError("bad batch")
        return list(batch)

    batcher = batcher_of(run)
    async with batcher.running():
        with pytest.raises(ArithmeticError, match="bad batch"):
            await batcher.submit("x")

        assert (await batcher.submit("y")).value == "y"


async def test_a_wrong_number_of_outputs_is_an_error_not_a_hang() -> None:
    async def run(batch: Sequence[str]) -> list[str]:
        return []

    batcher = batcher_of(run)
    async with batcher.running():
        with pytest.raises(RuntimeError, match="0 outputs for 1 items"):
            await batcher.submit("x")


async def test_a_full_queue_refuses_before_queueing_and_says_when_to_retry() -> None:
    gate = asyncio.Event()

    async def run(batch: Sequence[str]) -> list[str]:
        await gate.wait()
        return list(batch)

    batcher = batcher_of(run, max_queue=2)
    async with batcher.running(), asyncio.TaskGroup() as calls:
        accepted = [calls.create_task(batcher.submit("a"))]
        await asyncio.sleep(0.01)
        accepted.append(calls.create_task(batcher.submit_all(["b", "c"])))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refusal:
            await batcher.submit("d")
        gate.set()

    assert refusal.value.retry_after > 0
    assert all(each.done() for each in accepted)


async def test_a_deadline_that_has_passed_is_refused_at_once() -> None:
    async def run(batch: Sequence[str]) -> list[str]:
        raise AssertionError("must not run")

    batcher = batcher_of(run)
    async with batcher.running():
        with pytest.raises(DeadlineExceeded):
            await batcher.submit("a", Call(time.monotonic() - 1))


async def test_leaving_the_block_answers_what_is_queued_and_refuses_the_rest() -> None:
    async def run(batch: Sequence[str]) -> list[str]:
        await asyncio.sleep(0.01)
        return list(batch)

    batcher = batcher_of(run)
    async with batcher.running():
        queued = asyncio.create_task(batcher.submit("a"))
        await asyncio.sleep(0)

    assert (await queued).value == "a"
    with pytest.raises(Overloaded):
        await batcher.submit("b")


async def test_cancelling_the_loop_resolves_everyone() -> None:
    """Even a hard stop leaves no caller waiting for ever."""

    async def run(batch: Sequence[str]) -> list[str]:
        await asyncio.sleep(3600)
        return list(batch)

    batcher = batcher_of(run)

    async def serve() -> None:
        async with batcher.running():
            await asyncio.sleep(3600)

    serving = asyncio.create_task(serve())
    await asyncio.sleep(0)
    calls = [asyncio.create_task(batcher.submit(word)) for word in ("a", "b" * 90)]
    await asyncio.sleep(0.01)
    serving.cancel()

    outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 1)

    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)


async def test_an_error_in_the_block_comes_out_as_it_is() -> None:
    async def run(batch: Sequence[str]) -> list[str]:
        return list(batch)

    with pytest.raises(ArithmeticError, match="mine"):
        async with batcher_of(run).running():
            raise ArithmeticError("mine")


async def test_a_bug_in_the_loop_ends_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must take the process down, not leave a server that accepts and never answers."""

    async def run(batch: Sequence[str]) -> list[str]:
        return list(batch)

    def broken(*_: object) -> None:
        raise AssertionError("bug")

    monkeypatch.setattr(batching, "take_batch", broken)
    batcher = batcher_of(run)
    with pytest.raises(AssertionError, match="bug"):
        async with batcher.running():
            await batcher.submit("a")


async def test_small_batches_run_at_once_and_large_ones_elsewhere() -> None:
    """Whoever arrives in the same turn of the event loop shares the run; failures stay apart."""
    ran: list[tuple[str, int]] = []

    def run_now(batch: Sequence[str]) -> list[str]:
        ran.append(("now", len(batch)))
        if "x" in batch:
            raise ArithmeticError("bad batch")
        return list(batch)

    async def run(batch: Sequence[str]) -> list[str]:
        ran.append(("later", len(batch)))
        return list(batch)

    batcher = batcher_of(run, run_now=run_now, now_tokens=6)
    async with batcher.running():
        values = await asyncio.gather(*map(batcher.submit, ["aa", "bb", "cc"]))
        long = await batcher.submit("d" * 7)
        with pytest.raises(ArithmeticError, match="bad batch"):
            await batcher.submit("x")
        last = await batcher.submit("e")

    assert ran == [("now", 3), ("later", 1), ("now", 1), ("now", 1)]
    assert [done.value for done in values] == ["aa", "bb", "cc"]
    assert (long.value, last.value) == ("d" * 7, "e")


async def test_a_tight_deadline_is_no_reason_to_refuse_where_runs_are_fast() -> None:
    """Callers of the embedded router may well allow only some milliseconds."""
    gate = asyncio.Event()
    gate.set()

    async def run(batch: Sequence[str]) -> list[str]:
        await gate.wait()
        return list(batch)

    batcher = batcher_of(run)
    async with batcher.running():
        for _ in range(3):
            await batcher.submit("a")
        gate.clear()
        calls = [asyncio.create_task(batcher.submit(letter)) for letter in "bc"]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        tight = asyncio.create_task(batcher.submit("d", Call(time.monotonic() + 0.008)))
        await asyncio.sleep(0)

        assert not tight.done()
        gate.set()
        await asyncio.gather(*calls)
        await asyncio.wait([tight])


async def test_small_runs_wait_for_a_busy_loop_but_not_for_an_idle_one() -> None:
    """Who arrives while the loop does other things shares the run; each turn has 50 us of them."""
    sizes: list[int] = []

    def run_now(batch: Sequence[str]) -> list[str]:
        sizes.append(len(batch))
        return list(batch)

    async def run(batch: Sequence[str]) -> list[str]:
        raise AssertionError("must not run")

    async def busy(turns: int) -> None:
        for _ in range(turns):
            end = time.perf_counter() + 50e-6
            while time.perf_counter() < end:
                pass
            await asyncio.sleep(0)

    async def later(turns: int, word: str) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        await batcher.submit(word)

    batcher = batcher_of(run, run_now=run_now, now_tokens=100)
    async with batcher.running():
        await asyncio.gather(busy(20), later(0, "a"), later(5, "b"), later(10, "c"))
        assert sizes == [3]
        for word in "de":
            await batcher.submit(word)
            await asyncio.sleep(0.001)

    assert sizes == [3, 1, 1]


async def test_a_queue_too_long_for_a_deadline_refuses_at_once() -> None:
    """Better than to let the caller wait for nothing; who has time, or no deadline, may queue."""
    gate = asyncio.Event()
    gate.set()

    async def run(batch: Sequence[str]) -> list[str]:
        await asyncio.sleep(0.05)
        await gate.wait()
        return list(batch)

    batcher = batcher_of(run)
    async with batcher.running(), asyncio.TaskGroup() as calls:
        await batcher.submit("a" * 100)  # from here on it is known how long an item takes
        gate.clear()
        for letter in "bcde":  # one runs, three wait
            calls.create_task(batcher.submit(letter * 100))
            await asyncio.sleep(0.001)

        with pytest.raises(
            Overloaded, match=r"3 requests .* longer than this one's deadline"
        ) as no:
            await batcher.submit("f", Call(time.monotonic() + 0.06))
        assert no.value.retry_after > 0.1
        patient = calls.create_task(batcher.submit("g", Call(time.monotonic() + 60)))
        await asyncio.sleep(0.001)
        gate.set()

    assert (await patient).value == "g"
