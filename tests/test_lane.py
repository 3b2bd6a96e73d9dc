"""The lane: one result per piece of work, whoever of loop and thread is first."""

import asyncio
import random
import threading
import time
from collections.abc import Callable

import pytest

from bestroute.lane import Lane


def work(number: int, seconds: float) -> Callable[[], int]:
    def run() -> int:
        time.sleep(seconds)
        if number % 5 == 0:
            raise ArithmeticError(str(number))
        return number

    return run


async def outcome(lane: Lane[int], number: int, seconds: float, patience: float) -> int | str:
    try:
        given = lane.run_soon(work(number, seconds), patience)
        return await given if isinstance(given, asyncio.Future) else given
    except ArithmeticError as error:
        return str(error)


async def test_results_arrive_once_however_close_loop_and_thread_are() -> None:
    """Work that takes about as long as the loop waits, again and again, on the same lane."""
    freed: list[Lane[int]] = []
    lane, luck = Lane[int]("lane", freed.append), random.Random(3)
    for number in range(400):
        found = await outcome(lane, number, luck.random() * 0.002, 0.001)

        assert found == (str(number) if number % 5 == 0 else number)
        assert len(freed) == number + 1
    lane.end()


async def test_work_that_is_over_in_the_instant_of_leaving_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The instant made long enough to be hit: between the loop's giving up and its saying so."""
    lane, release = Lane[int]("lane", lambda _: None), threading.Event()
    promised = lane._promised

    def promise_late() -> "asyncio.Future[int]":
        release.set()
        while not lane._first.locked():
            time.sleep(0.001)
        return promised()

    monkeypatch.setattr(lane, "_promised", promise_late)

    def work_until_released() -> int:
        release.wait(10)
        return 3

    assert lane.run_soon(work_until_released, 0.001) == 3
    assert lane.run_soon(lambda: 4, 5) == 4
    lane.end()


async def test_the_loop_is_held_up_no_longer_than_it_allows() -> None:
    """And whatever comes back after its caller has left is dropped, not given to the next."""
    free = asyncio.Event()
    lane, release = Lane[int]("lane", lambda _: free.set()), threading.Event()

    def hang() -> int:
        release.wait(10)
        raise ArithmeticError("late")

    start = time.monotonic()
    given = lane.run_soon(hang, 0.01)
    assert time.monotonic() - start < 5
    assert isinstance(given, asyncio.Future)
    given.cancel()
    release.set()
    await free.wait()

    assert await lane.run(lambda: 7) == 7
    assert lane.run_soon(lambda: 8, 5) == 8
    lane.end()


@pytest.mark.parametrize("error", [StopIteration(), asyncio.CancelledError(), SystemExit(3)])
async def test_errors_that_would_end_something_else_end_only_the_work(error: BaseException) -> None:
    def fails() -> int:
        raise error

    lane = Lane[int]("lane", lambda _: None)
    with pytest.raises(RuntimeError, match=type(error).__name__):
        await lane.run(fails)
    with pytest.raises(RuntimeError, match=type(error).__name__):
        lane.run_soon(fails, 5)
    lane.end()


async def test_threads_end_when_they_are_told_to() -> None:
    lane = Lane[int]("a-lane-to-end", lambda _: None)
    assert await lane.run(lambda: 1) == 1
    (thread,) = (each for each in threading.enumerate() if each.name == "a-lane-to-end")
    assert thread.daemon, "or a hung one would keep the process from ending"

    lane.end()
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()
