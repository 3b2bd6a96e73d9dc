"""`POST /v1/chat/completions`: from the request to the last byte of its answer."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from bestroute.best_of_n import Result
from bestroute.call import Call
from bestroute.config import Settings
from bestroute.desk import Decided, Desk
from bestroute.gateway.answer import Account
from bestroute.gateway.boundary import Reply
from bestroute.gateway.models import known
from bestroute.gateway.request import Wanted, wanted
from bestroute.order import Execution, Order
from bestroute.pass_through import Event
from bestroute.tasks import task_group
from bestroute.upstream.relay import Opened, Piece

_ALIVE = b": waiting for the best answer\n\n"
"""A comment, which readers of server-sent events skip."""


class Chat:
    """Answers chat completions.

    Args:
        desk: where requests are served.
        settings: what a request may hold, and how often streams say that they are alive.
    """

    def __init__(self, desk: Desk, settings: Settings) -> None:
        self._desk, self._limits = desk, settings.server
        self._heartbeat = settings.gateway.heartbeat

    async def complete(self, reply: Reply, call: Call) -> web.StreamResponse:
        """Answer one request."""
        started = time.monotonic()
        asked = wanted(await reply.body(), reply.headers, self._limits)
        if asked.model is not None:
            known(self._desk.live.router, asked.model)
        order = Order(
            asked.prompt,
            asked.policy,
            asked.sampling,
            Execution(escalate=asked.escalate),
            None if asked.model is None else (asked.model, 1),
            started,
            call,
            asked.session,
            asked.own,
        )
        async with aclosing(self._desk.generate(order)) as events:
            decided = await anext(events)
            assert isinstance(decided, Decided), "the decision comes first"
            account = Account(decided)
            if not asked.stream:
                return await _whole(events, account, reply)
            if decided.routed.decision.arm.samples == 1 and not asked.escalate:
                return await _streamed(events, account, asked, reply)
            async with task_group() as tasks:
                beating = tasks.create_task(self._beat(account, reply))
                try:
                    return await _streamed(events, account, asked, reply)
                finally:
                    beating.cancel()

    async def _beat(self, account: Account, reply: Reply) -> None:
        """Say from time to time that the stream is alive, until there is more to say."""
        await asyncio.sleep(self._heartbeat)
        while not account.settled:
            await reply.begin(account.headers())
            await reply.write(_ALIVE)
            await asyncio.sleep(self._heartbeat)


Events = AsyncGenerator[Decided | Event, None]


async def _whole(events: Events, account: Account, reply: Reply) -> web.StreamResponse:
    """An answer in one piece."""
    passed, content_type, result = bytearray(), "", None
    async for event in events:
        assert not isinstance(event, Decided), "there is one decision"
        account.happened(event)
        match event:
            case Opened():
                content_type = event.content_type
            case Piece():
                passed += account.passed(event, usage=True)
            case Result():
                result = event
    assert result is not None, "without an answer there is an error"
    if content_type:
        headers = {**account.final_headers(), "Content-Type": content_type}
        return web.Response(body=bytes(passed), headers=headers)
    return reply.json(account.completion(result), account.final_headers())


async def _streamed(
    events: Events, account: Account, asked: Wanted, reply: Reply
) -> web.StreamResponse:
    """An answer as it comes; the best of several once it is known."""
    passes = False
    async for event in events:
        assert not isinstance(event, Decided), "there is one decision"
        account.happened(event)
        match event:
            case Opened():
                passes = True
                await reply.begin(account.headers(), event.content_type)
            case Piece():
                if data := account.passed(event, usage=asked.usage):
                    await reply.write(data)
            case Result() if not passes:
                await reply.begin(account.headers())
                await reply.write(b"".join(account.chunks(event, usage=asked.usage)))
    return await reply.end()
