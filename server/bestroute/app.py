"""Puts the server together from `Settings`, runs it, and takes it down in order."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from bestroute import __version__, service
from bestroute.config import ConfigInvalid, Settings
from bestroute.router import open_router

_log = logging.getLogger(__name__)

HEALTH_NAMES = ("", "readiness", service.NAME)
"""Health names that follow readiness; `liveness` stays SERVING until the process ends."""

_REFUSING = 0.2
"""Seconds of refusing calls in words before the server stops. grpcio ends a call that reaches it
in the instant of stopping as CANCELLED, which looks like a cancellation of the caller's own."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers.

    Attributes:
        address: host:port it really listens on.
    """

    address: str


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Running]:
    """Serve while the block lasts; on leaving, drain: see `Server.drain_delay`.

    Nothing listens before the bundle is verified and warm, so a server that can be reached is
    ready.

    Raises:
        BundleInvalid: the bundle can't be served.
        ConfigInvalid: the settings don't fit the bundle, the machine or the port.
    """
    limits = settings.server
    async with open_router(settings) as router:
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limits.max_message_bytes),
                # Two servers on one port would split the traffic between them without a word.
                ("grpc.so_reuseport", 0),
                # Clients may keep idle streams open through a NAT; the default is 5 minutes.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ]
        )
        routing = service.RoutingService(router, limits)
        routing.add_to(server)
        healths = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healths, server)
        reflection.enable_server_reflection(
            (service.NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        address = _bind(server, limits.listen)
        for name in ("liveness", *HEALTH_NAMES):
            await healths.set(name, health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        _log.info(
            "bestroute %s serves bundle %s %s on %s",
            __version__,
            router.manifest.name,
            router.manifest.version,
            address,
        )
        try:
            yield Running(address)
        finally:
            for name in HEALTH_NAMES:
                await healths.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
            await asyncio.sleep(limits.drain_delay)
            routing.drain()
            await asyncio.sleep(_REFUSING)
            await server.stop(limits.drain_timeout)


def _bind(server: grpc.aio.Server, listen: str) -> str:
    host, _, _port = listen.rpartition(":")
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise ConfigInvalid(
            f"server.listen = {listen!r}: can't listen there ({error}); "
            "is another server on that port? Port 0 picks a free one"
        ) from error
    return f"{host}:{port}"


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit code; a second signal exits now."""
    logging.basicConfig(
        stream=sys.stderr,
        level=settings.log_level,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # one line per upstream call otherwise
    asyncio.run(_serve_until_signal(settings))
    return 0


async def _serve_until_signal(settings: Settings) -> None:
    with _signals() as stop:
        async with serving(settings):
            await stop.wait()
            _log.info("draining; a second signal exits now")
    _log.info("stopped")


@contextmanager
def _signals() -> Iterator[asyncio.Event]:
    """An event set by the first SIGTERM or SIGINT; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)

    def first() -> None:
        stop.set()
        for number in numbers:
            loop.remove_signal_handler(number)
            # Not left to the default: the kernel ignores it for process 1, as in a container.
            signal.signal(number, lambda number, _: os._exit(128 + number))

    for number in numbers:
        loop.add_signal_handler(number, first)
    try:
        yield stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
