"""A synthetic LLM with an OpenAI-compatible API, which keeps to a timetable and says what it did.

    python -m benchmarks.upstream [--relay URL]

It prints its base URL as one line and runs until its standard input ends. Every call is noted: when
it came, when each piece was written, when the last byte was, when the client left instead. Times
are those of `time.perf_counter`, one clock for all processes of a machine on Linux. With `--relay`
another server answers, and what passes through is noted the same way.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
from aiohttp import web


@dataclass(frozen=True)
class Timetable:
    """What the upstream says, and when.

    Attributes:
        first: seconds from a call's arrival to its first piece.
        every: seconds from one piece to the next.
        answers: pieces of each; a call with seed s gets answer s modulo their number.
    """

    first: float
    every: float
    answers: Sequence[Sequence[str]]


@dataclass
class Call:
    """A call as the upstream saw it; times as `time.perf_counter`.

    Attributes:
        seed: that the call was made with.
        begun: when it came.
        written: when each piece was about to be written.
        ended: when the last byte was written; None: never.
        left: when the client was seen to have left before that; None: it did not.
    """

    seed: int
    begun: float
    written: list[float] = field(default_factory=list)
    ended: float | None = None
    left: float | None = None


@dataclass(frozen=True, slots=True)
class Waste:
    """Pieces of a prompt's answers.

    Attributes:
        needed: were written by the time that no more were.
        written: in all.
        late: after that time, of each answer that was cut.
        stopped: seconds from that time until each client was seen to have left.
    """

    needed: int
    written: int
    late: list[int]
    stopped: list[float]


def waste(calls: Sequence[Call], enough: float) -> Waste:
    """What was written of a prompt's answers before and after no more was needed.

    Args:
        calls: of the upstream, one per answer.
        enough: the time from which no more was needed.
    """
    late = [sum(moment > enough for moment in call.written) for call in calls]
    written = sum(len(call.written) for call in calls)
    cut = [(count, call.left) for count, call in zip(late, calls, strict=True)]
    return Waste(
        needed=written - sum(late),
        written=written,
        late=[count for count, left in cut if left is not None],
        stopped=[left - enough for _, left in cut if left is not None],
    )


class Upstream:
    """The handlers.

    Args:
        session: for relaying.
        relay: base URL of the server that answers; None: answers by the timetable.
    """

    def __init__(self, session: aiohttp.ClientSession, relay: str | None) -> None:
        self._session, self._relay = session, relay
        self._timetable = Timetable(0.0, 0.0, [["no timetable"]])
        self._calls: list[Call] = []
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def follow(self, request: web.Request) -> web.Response:
        """Take a new timetable."""
        self._timetable = Timetable(**await request.json())
        return web.Response()

    async def calls(self, request: web.Request) -> web.Response:
        """Hand over the calls since the last time, once none is under way."""
        await self._idle.wait()
        calls, self._calls = self._calls, []
        return web.json_response([asdict(call) for call in calls])

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answer a call."""
        begun = time.perf_counter()
        body = await request.json()
        call = Call(body["seed"], begun)
        self._calls.append(call)
        self._under_way += 1
        self._idle.clear()
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            pieces = self._relayed(body) if self._relay else _timed(self._timetable, call)
            async for piece in pieces:
                call.written.append(time.perf_counter())
                await response.write(piece)
            await response.write_eof()
            call.ended = time.perf_counter()
        except (asyncio.CancelledError, ConnectionError):
            call.left = time.perf_counter()
            raise
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()
        return response

    async def _relayed(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        url = f"{self._relay}/chat/completions"
        async with self._session.post(url, json=body, raise_for_status=True) as response:
            async for data in response.content.iter_any():
                yield data


async def _timed(timetable: Timetable, call: Call) -> AsyncIterator[bytes]:
    """The stream of an answer, piece by piece; with the last piece all that follows it."""
    answer = timetable.answers[call.seed % len(timetable.answers)]
    for position, text in enumerate(answer):
        due = call.begun + timetable.first + position * timetable.every
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        piece = _event({"choices": [_choice({"content": text})]})
        if position == len(answer) - 1:
            usage = {"prompt_tokens": 100, "completion_tokens": len(answer)}
            piece += _event({"choices": [_choice({}, "stop")]})
            piece += _event({"choices": [], "usage": usage}) + b"data: [DONE]\n\n"
        yield piece


def _choice(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}


def _event(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


class Control:
    """Tells an upstream in another process what to say, and asks it what it did.

    Args:
        session: to talk to it with.
        url: its base URL.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url

    async def follow(self, timetable: Timetable) -> None:
        """Have it answer by a timetable from now on."""
        url = f"{self._url}/timetable"
        async with self._session.put(url, json=asdict(timetable), raise_for_status=True):
            pass

    async def calls(self) -> dict[int, Call]:
        """The calls since the last time by seed, once none is under way any more."""
        async with self._session.get(f"{self._url}/calls", raise_for_status=True) as response:
            calls = [Call(**each) for each in await response.json()]
        return {call.seed: call for call in calls}


@asynccontextmanager
async def controlling(url: str) -> AsyncIterator[Control]:
    """A connection to an upstream by its base URL."""
    async with aiohttp.ClientSession() as session:
        yield Control(session, url)


@contextmanager
def started(*arguments: str) -> Iterator[str]:
    """Run Python with arguments; gives the one line that the program prints, its base URL.

    Args:
        arguments: of a program that runs until its standard input ends.
    """
    with subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if not (line := process.stdout.readline()):
                raise SystemExit(f"{' '.join(arguments)} ended before it was ready")
            yield line.strip()
        finally:
            process.stdin.close()


async def _serve(relay: str | None) -> None:
    async with aiohttp.ClientSession() as session:
        upstream = Upstream(session, relay)
        app = web.Application()
        app.router.add_post("/v1/chat/completions", upstream.complete)
        app.router.add_put("/v1/timetable", upstream.follow)
        app.router.add_get("/v1/calls", upstream.calls)
        # Handlers are cancelled when their client leaves; that is how a call learns of it.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        try:
            # As many connections may come at once as there are answers under way.
            site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
            await site.start()
            host, port = runner.addresses[0][:2]
            print(f"http://{host}:{port}/v1", flush=True)
            await asyncio.to_thread(sys.stdin.read)
        finally:
            await runner.cleanup()


def main() -> None:
    """Serve until the standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--relay", metavar="URL", help="base URL of the server that answers")
    asyncio.run(_serve(parser.parse_args().relay))


if __name__ == "__main__":
    main()
