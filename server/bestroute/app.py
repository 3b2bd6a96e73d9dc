"""Puts the server together from `Settings`, runs it, and takes it down in order."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from bestroute import service
from bestroute.boundary import Boundary
from bestroute.config import ConfigInvalid, Server, Settings
from bestroute.desk import Desk
from bestroute.guard import connections
from bestroute.guard.authentication import authenticating
from bestroute.guard.callers import Callers
from bestroute.guard.exposure import warn_of_exposure
from bestroute.guard.tls import server_credentials
from bestroute.live import Live
from bestroute.observe.logs import log_to_stderr
from bestroute.observe.telemetry import observing
from bestroute.process import (
    first_signal,
    log_ready,
    new_event_loop,
    on_hangup,
    spare_what_is_loaded,
)
from bestroute.reloading import reloading
from bestroute.tasks import task_group
from bestroute.traffic.traffic import open_traffic

_log = logging.getLogger(__name__)

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
HEALTH_NAMES = ("", "readiness", service.NAME)
"""Health names that follow readiness; `liveness` stays SERVING until the process ends."""

_REFUSING = 0.2
"""Seconds of refusing calls in words before the server stops. grpcio ends a call that reaches it
in the instant of stopping as CANCELLED, which looks like a cancellation of the caller's own."""


_LOOK = 0.1
"""Seconds between two looks at whether the router can answer."""


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers.

    Attributes:
        address: host:port it really listens on.
        live: the router that serves, which another may replace.
        metrics: host:port of the HTTP endpoint `/metrics`; None: there is none.
    """

    address: str
    live: Live
    metrics: str | None = None

    @property
    def bundle(self) -> str:
        """Name and version of what it serves."""
        manifest = self.live.router.manifest
        return f"{manifest.name} {manifest.version}"


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
    live = Live()
    credentials = server_credentials(settings.security)
    warn_of_exposure(settings)

    def refused(method: str) -> None:
        telemetry.ended(method.rpartition("/")[2], None, grpc.StatusCode.UNAUTHENTICATED, 0.0)

    async with (
        authenticating(settings.security, refused) as interceptors,
        live.serving(settings),
        open_traffic(settings.decision_log) as traffic,
        observing(settings, live, traffic) as telemetry,
    ):
        server = grpc.aio.server(
            interceptors=interceptors,
            options=[
                *connections.options(limits),
                # Two servers on one port would split the traffic between them without a word, which
                # is what workers are to do. That they are alone there `workers` sees to.
                ("grpc.so_reuseport", int(limits.workers > 1)),
            ],
        )
        callers = Callers(settings.callers, settings.security)
        boundary = Boundary(callers, telemetry)
        desk = Desk(live, callers, telemetry, traffic)
        service.RoutingService(desk, limits, boundary).add_to(server)
        healths = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(healths, server)
        reflection.enable_server_reflection(
            (service.NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        address = _bind(server, limits, credentials)
        await healths.set("liveness", SERVING)
        await _set_health(healths, SERVING)
        await server.start()
        async with task_group() as tasks:
            following = tasks.create_task(_follow(live, healths))
            try:
                yield Running(address, live, telemetry.metrics_address)
            finally:
                following.cancel()
                await _set_health(healths, NOT_SERVING)
                await asyncio.sleep(limits.drain_delay)
                boundary.draining.set()
                await asyncio.sleep(_REFUSING)
                await server.stop(limits.drain_timeout)


async def _follow(live: Live, healths: health.aio.HealthServicer) -> None:
    """Have health say whether requests can be answered, for as long as this runs."""
    known: str | None = None
    while True:
        await asyncio.sleep(_LOOK)
        fault = live.router.fault()
        if fault == known:
            continue
        if fault is None:
            _log.info("serving again")
        else:
            _log.error("not serving: %s", fault)
        known = fault
        await _set_health(healths, SERVING if fault is None else NOT_SERVING)


async def _set_health(healths: health.aio.HealthServicer, status: int) -> None:
    for name in HEALTH_NAMES:
        await healths.set(name, status)


def _bind(
    server: grpc.aio.Server, limits: Server, credentials: grpc.ServerCredentials | None
) -> str:
    host, _, _port = limits.listen.rpartition(":")
    try:
        if credentials is None:
            port = server.add_insecure_port(limits.listen)
        else:
            port = server.add_secure_port(limits.listen, credentials)
    except RuntimeError as error:
        raise ConfigInvalid(limits.cannot_listen(error)) from error
    return f"{host}:{port}"


def run(load: Callable[[], Settings]) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit code; a second signal exits now.

    Args:
        load: reads the settings, now and at each SIGHUP.
    """
    settings = load()
    log_to_stderr(settings.log_level, settings.log_format)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve_until_signal(settings, load))
    return 0


async def _serve_until_signal(settings: Settings, load: Callable[[], Settings]) -> None:
    with first_signal() as stop, on_hangup() as hangup:
        async with serving(settings) as running:
            spare_what_is_loaded()
            log_ready(running.bundle, running.address)
            async with reloading(running.live, settings, load, hangup):
                await stop.wait()
            _log.info("draining; a second signal exits now")
    _log.info("stopped")
