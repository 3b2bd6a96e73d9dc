"""`bestroute top`: what the service decides, saves and waits for, as it happens."""

import argparse
import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc

from bestroute.cli.arguments import add_connection, add_json, described, seconds
from bestroute.cli.remote import Unusable, advice, channel
from bestroute.cli.terminal import complain, console, print_json
from bestroute.v1 import operations_pb2 as pb
from bestroute.v1.operations_pb2_grpc import OperationsServiceStub

if TYPE_CHECKING:
    from rich.console import Console

    from bestroute.cli.arguments import Commands
    from bestroute.cli.frame import View
    from bestroute.v1.operations_pb2_grpc import OperationsServiceAsyncStub

_PLAIN_WIDTH = 100
"""Columns where no terminal sets a width."""
_HISTORY_EVERY = 10.0
_LAST = 50
_PAUSE = 1.0
"""Seconds between two tries to reach a server that went away."""
_AWAY = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
"""What a server may be over in a moment."""


def add(commands: "Commands") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "top",
        help="watch what the service decides, saves and waits for",
        **described(
            "Watch the service: decisions, savings, arms, queues, upstreams, the last decisions. "
            "On a terminal it fills the screen until Ctrl-C, and goes on when the service comes "
            "back from a restart; elsewhere it prints one frame. Of several workers it shows the "
            "one that the connection came to, and says so.",
            "bestroute top",
            "bestroute top --once",
            "bestroute top --json --interval 5 | jq .decisions_per_second",
        ),
    )
    parser.add_argument("--once", action="store_true", help="print one frame and exit")
    parser.add_argument(
        "--interval",
        metavar="SECONDS",
        type=seconds,
        default=1.0,
        help="between two looks, 0.1 to 3600 (default: %(default)g)",
    )
    add_connection(parser, timeout=10)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Watch until interrupted."""
    out = console(sys.stdout)
    once = args.once or not (args.json or out.is_terminal)
    try:
        if args.json:
            asyncio.run(_print_lines(args, once=once))
        elif once:
            asyncio.run(_print_once(args, out))
        else:
            asyncio.run(_draw(args, out))
    except KeyboardInterrupt:
        return 0  # the way to leave
    except Unusable as error:
        return complain(str(error), code=2)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return complain(error.details() or "", code=2)
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            older = "older than `bestroute top`: update it, or see --address"
            return complain(f"what answers at {args.address} is no bestroute, or {older}", code=1)
        return complain(advice(error, args), code=1)
    return 0


async def _print_lines(args: argparse.Namespace, *, once: bool) -> None:
    async with _watching(args) as watch:
        async for status in watch.statuses():
            if watch.lost:
                complain(watch.lost, code=1)
            else:
                print_json(status)
                if once:
                    return


async def _print_once(args: argparse.Namespace, out: "Console") -> None:
    async with _watching(args) as watch:
        async for _ in watch.statuses():
            from bestroute.cli.frame import frame

            width = out.width if out.is_terminal else _PLAIN_WIDTH
            out.print(frame(watch.view(), width, None))
            return


async def _draw(args: argparse.Namespace, out: "Console") -> None:
    from rich.live import Live

    from bestroute.cli.frame import frame

    async with _watching(args) as watch:
        statuses = watch.statuses()
        await anext(statuses)  # before the screen is taken: who can't connect is told below it
        with Live(console=out, screen=True, auto_refresh=False) as live:
            while True:
                live.update(frame(watch.view(), out.width, out.height), refresh=True)
                await anext(statuses)


@asynccontextmanager
async def _watching(args: argparse.Namespace) -> "AsyncIterator[_Watch]":
    connection = channel(args)
    try:
        yield _Watch(OperationsServiceStub(connection), args)
    finally:
        await connection.close()


class _Watch:
    """Follows a server, over its restarts.

    Attributes:
        lost: why the server can't be seen; empty: it can.
    """

    def __init__(self, stub: "OperationsServiceAsyncStub", args: argparse.Namespace) -> None:
        self._stub, self._args = stub, args
        self.lost = ""
        self._status = pb.WatchStatusResponse()
        self._minutes: list[pb.Period] = []
        self._fetched = -_HISTORY_EVERY
        self._decisions = deque[pb.PastDecision](maxlen=_LAST)

    def view(self) -> "View":
        """What is known."""
        from bestroute.cli.frame import View

        return View(
            self._args.address, self._status, self._minutes, list(self._decisions), self.lost
        )

    async def statuses(self) -> AsyncIterator[pb.WatchStatusResponse]:
        """Every status as it comes; the last one once more whenever the server is lost.

        Raises:
            grpc.aio.AioRpcError: there was no first one, or the server won't give any.
        """
        away_since = 0.0
        while True:
            try:
                async for status in self._followed():
                    self.lost, away_since = "", 0.0
                    yield status
                why = "the stream has ended"
            except grpc.aio.AioRpcError as error:
                if error.code() not in _AWAY or not self._status.HasField("time"):
                    raise
                why = error.details() or error.code().name
            away_since = away_since or time.monotonic()
            away = time.monotonic() - away_since
            self.lost = f"{self._args.address} is away for {away:.0f} s ({why}); trying again"
            self._fetched = -_HISTORY_EVERY
            yield self._status
            await asyncio.sleep(_PAUSE)

    async def _followed(self) -> AsyncIterator[pb.WatchStatusResponse]:
        request = pb.WatchStatusRequest()
        request.interval.FromNanoseconds(round(self._args.interval * 1e9))
        call = self._stub.WatchStatus(request)
        try:
            while True:
                async with asyncio.timeout(self._args.timeout + self._args.interval):
                    status = await call.read()
                if not isinstance(status, pb.WatchStatusResponse):
                    return
                await self._take(status)
                yield status
        except TimeoutError:
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.DEADLINE_EXCEEDED, details="it says nothing any more"
            ) from None
        finally:
            call.cancel()

    async def _take(self, status: pb.WatchStatusResponse) -> None:
        if status.process.pid != self._status.process.pid:
            self._decisions.clear()
        self._status = status
        self._decisions.extend(status.decisions)
        if not self._args.json and time.monotonic() - self._fetched > _HISTORY_EVERY:
            history = await self._stub.GetHistory(
                pb.GetHistoryRequest(), timeout=self._args.timeout
            )
            self._minutes, self._fetched = list(history.minutes), time.monotonic()
