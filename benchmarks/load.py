"""Load on a server: callers who wait for their answers, or arrivals that wait for nobody.

In a closed loop a slow server slows its callers down, and so never meets more than their number.
An open loop has arrivals come when they would anyway: a server that takes fewer falls behind, and
its latencies, counted from the time each call was due, show it.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence

from benchmarks.latencies import Call

Ask = Callable[[str], Awaitable[object]]
"""Sends a prompt and waits for its answer; raises where there is none."""

GRACE = 10.0
"""Seconds after the end of a run in which answers still count."""


async def closed_loop(
    ask: Ask, prompts: Sequence[str], callers: int, seconds: float, grace: float = GRACE
) -> list[Call]:
    """Have callers ask one prompt after another.

    Args:
        ask: what they call.
        prompts: taken in turn, over and over.
        callers: calls under way at once.
        seconds: no call begins later.
        grace: further seconds after which calls without an answer are given up.
    """
    calls: list[Call] = []
    todo = itertools.cycle(prompts)
    end = time.perf_counter() + seconds

    async def caller() -> None:
        while (begun := time.perf_counter()) < end:
            calls.append(await _made(ask, next(todo), begun))

    await _finish([asyncio.create_task(caller()) for _ in range(callers)], seconds + grace)
    return calls


async def open_loop(
    ask: Ask, prompts: Sequence[str], arrivals: Sequence[float], grace: float = GRACE
) -> list[Call]:
    """Make a call at each time of arrival, however many are under way.

    Args:
        ask: what is called.
        prompts: taken in turn, over and over.
        arrivals: seconds from the start, rising.
        grace: seconds after the last after which calls without an answer are given up.

    Raises:
        ValueError: nobody arrives.
    """
    if not arrivals:
        raise ValueError("nobody arrives: the time is too short for the rate")
    calls: list[Call] = []
    tasks: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    start = time.perf_counter()

    async def one(prompt: str, due: float) -> None:
        calls.append(await _made(ask, prompt, due))

    def launch(prompt: str, due: float) -> None:
        tasks.append(loop.create_task(one(prompt, due)))

    def pace() -> None:
        for prompt, arrival in zip(itertools.cycle(prompts), arrivals, strict=False):
            time.sleep(max(0.0, start + arrival - time.perf_counter()))
            loop.call_soon_threadsafe(launch, prompt, start + arrival)

    # A thread's sleep ends on time; the event loop's timers have the resolution of epoll, 1 ms.
    await asyncio.to_thread(pace)
    await _finish(tasks, grace)
    return calls


async def _made(ask: Ask, prompt: str, due: float) -> Call:
    begun = time.perf_counter()
    try:
        await ask(prompt)
    except Exception:  # whatever a peer's client raises when the server refuses
        return Call(due, begun, None)
    except asyncio.CancelledError:
        return Call(due, begun, None)
    return Call(due, begun, time.perf_counter())


async def _finish(tasks: Sequence["asyncio.Task[None]"], within: float) -> None:
    """Wait for all tasks, and give up those that take longer."""
    _, late = await asyncio.wait(tasks, timeout=within)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
