"""Groups of tasks."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TypeVar

EventT = TypeVar("EventT")


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup whose error, if it is only one, comes out as if there were no group around it."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None


async def emitted(
    run: Callable[[Callable[[EventT], None]], Coroutine[None, None, None]],
) -> AsyncGenerator[EventT, None]:
    """What a coroutine emits as it runs; its error comes out at the end.

    Close the generator to cancel it: when `aclose` returns, it has ended.

    Args:
        run: is given what to emit with, and awaited in a task of its own, because a generator must
            not yield inside a TaskGroup or a timeout.
    """
    events: asyncio.Queue[EventT | None] = asyncio.Queue()
    running = asyncio.create_task(run(events.put_nowait))
    running.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while (event := await events.get()) is not None:
            yield event
        await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
