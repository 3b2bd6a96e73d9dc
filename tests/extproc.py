"""deploy/envoy/ext_proc.yaml in a real Envoy, between real clients and upstreams that tell."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from aiohttp import web

from tests.mesh import START, address, envoy, needs_envoy

EXAMPLE = Path(__file__).parents[1] / "deploy" / "envoy" / "ext_proc.yaml"


@dataclass
class Seen:
    """A request as an upstream has got it."""

    upstream: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Places:
    """Where everybody is; the same for all tests of a module, since Envoy has to know it.

    Attributes:
        adapter: port of bestroute, where nobody listens unless a test has somebody listen.
        reference: where the reference's provider listens, and
        local: where another one does.
    """

    adapter: int
    reference: socket.socket
    local: socket.socket


@dataclass
class Upstreams:
    """Both providers.

    Attributes:
        seen: what they were asked, in that order.
        pieces: an answer as a stream of events; None: it is a JSON object.
        next: set to have the next piece sent.
        left: set when a client has left before its answer's end.
    """

    seen: list[Seen] = field(default_factory=list)
    pieces: list[str] | None = None
    next: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    left: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def serving(self, places: Places) -> AsyncIterator[None]:
        """Answer while the block lasts."""
        async with AsyncExitStack() as stack:
            for name, sock in (("reference", places.reference), ("local", places.local)):
                app = web.Application(client_max_size=64 * 1024 * 1024)
                app.router.add_route("*", "/{path:.*}", self._answering(name))
                # What Envoy keeps open of the test before is closed at once.
                runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
                await runner.setup()
                stack.push_async_callback(runner.cleanup)
                await web.SockSite(runner, sock.dup()).start()
            yield

    def _answering(self, name: str) -> Callable[[web.Request], Any]:
        async def answer(request: web.Request) -> web.StreamResponse:
            headers = {key.lower(): value for key, value in request.headers.items()}
            body = await request.read()
            self.seen.append(Seen(name, request.method, request.path_qs, headers, body))
            if self.pieces is None:
                return web.json_response({"from": name, "choices": []})
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            try:
                for piece in self.pieces:
                    await self.next.acquire()
                    await response.write(f"data: {piece}\n\n".encode())
            except (asyncio.CancelledError, ConnectionError):
                self.left.set()
                raise
            return response

        return answer

    @property
    def last(self) -> Seen:
        """The last request."""
        return self.seen[-1]


@contextmanager
def found() -> Iterator[Places]:
    """Places on loopback, which last as long as the block."""
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    with listening[0], listening[1], socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        adapter = sock.getsockname()[1]
        sock.close()
        yield Places(adapter, *listening)


def bootstrap(places: Places, **ext_proc: Any) -> dict[str, Any]:
    """The example's configuration with other places, and the models of the tiny bundle.

    Args:
        places: where everybody is.
        ext_proc: settings of the filter that are to be others.
    """
    text = EXAMPLE.read_text()
    for theirs, ours in (("gpt-4o", "large"), ("llama-3.1-8b", "small")):
        assert theirs in text
        text = text.replace(theirs, ours)
    config: dict[str, Any] = yaml.safe_load(text)
    resources = config["static_resources"]
    config["admin"]["address"]["socket_address"]["port_value"] = 0
    [listener] = resources["listeners"]
    listener["address"] = address(0)
    ports = {
        "bestroute": places.adapter,
        "reference": places.reference.getsockname()[1],
        "local": places.local.getsockname()[1],
    }
    for cluster in resources["clusters"]:
        cluster["type"] = "STATIC"
        cluster.pop("transport_socket", None)
        [endpoints] = cluster["load_assignment"]["endpoints"]
        endpoints["lb_endpoints"] = [{"endpoint": {"address": address(ports[cluster["name"]])}}]
    [chain] = listener["filter_chains"]
    [manager] = chain["filters"]
    [processing, *_] = manager["typed_config"]["http_filters"]
    processing["typed_config"].update(ext_proc)
    return config


@contextmanager
def proxied(config: dict[str, Any], directory: Path) -> Iterator[str]:
    """The URL of a running Envoy, which ends with the block."""
    needs_envoy()
    with envoy(directory, config) as running:
        host, _, port = running.address.rpartition(":")
        until = time.monotonic() + START
        while True:
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
                break
            except ConnectionRefusedError:  # it knows its port before it listens there
                assert time.monotonic() < until
                time.sleep(0.02)
        yield f"http://{running.address}"
