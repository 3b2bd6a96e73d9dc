"""Puts the server together from `Settings`, runs it, and takes it down in order."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_reflection.v1alpha import reflection

from bestroute import health, orca, service
from bestroute.boundary import Boundary
from bestroute.config import ConfigInvalid, Server, Settings
from bestroute.desk import Desk
from bestroute.gateway.app import Gateway
from bestroute.guard import connections
from bestroute.guard.authentication import authenticating
from bestroute.guard.callers import Callers
from bestroute.guard.exposure import warn_of_exposure
from bestroute.guard.tls import server_credentials
from bestroute.health import NOT_SERVING, SERVING, Health
from bestroute.live import Live
from bestroute.observe.logs import log_to_stderr, set_level
from bestroute.observe.telemetry import observing
from bestroute.process import (
    first_signal,
    log_ready,
    new_event_loop,
    on_hangup,
    spare_what_is_loaded,
)
from bestroute.processing.processor import ExternalProcessor
from bestroute.reloading import reloading, watching_config
from bestroute.sessions import Sessions
from bestroute.tasks import task_group
from bestroute.traffic.traffic import open_traffic
from bestroute.watching import service as watching

_log = logging.getLogger(__name__)

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
        address: host:port it really listens on; the gateway's where that is alone.
        live: the router that serves, which another may replace.
        metrics: host:port of the HTTP endpoint `/metrics`; None: there is none.
        apply: brings into force what can be changed of other settings than a router's.
        gateway: host:port of the OpenAI-compatible HTTP API; None: there is none.
    """

    address: str
    live: Live
    metrics: str | None = None
    apply: Callable[[Settings], None] = lambda _: None
    gateway: str | None = None

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
    alone = settings.gateway.alone
    credentials = server_credentials(settings.security)
    warn_of_exposure(settings)

    def apply(changed: Settings) -> None:
        callers.limit(changed.callers)
        telemetry.tell_apart(changed.callers)
        sessions.change(changed.sessions)
        set_level(changed.log_level)

    def refused(method: str) -> None:
        telemetry.ended(method.rpartition("/")[2], None, grpc.StatusCode.UNAUTHENTICATED, 0.0)

    async with (
        authenticating(settings.security, refused) as authentication,
        live.serving(settings),
        open_traffic(settings.decision_log) as traffic,
        observing(settings, live, traffic) as telemetry,
    ):
        server = grpc.aio.server(
            interceptors=[authentication] if authentication else [],
            options=[
                *connections.options(limits),
                # Two servers on one port would split the traffic between them without a word, which
                # is what workers are to do. That they are alone there `workers` sees to.
                ("grpc.so_reuseport", int(limits.workers > 1)),
            ],
        )
        callers = Callers(settings.callers, settings.security)
        sessions = Sessions(settings.sessions)
        boundary = Boundary(callers, telemetry)
        if telemetry.load is not None:
            orca.add_to(server, telemetry.load, boundary.draining)
        desk = Desk(live, callers, telemetry, traffic, sessions)
        service.RoutingService(desk, limits, boundary).add_to(server)
        if settings.mesh.external_processing:
            ExternalProcessor(desk, settings, boundary).add_to(server)
        watching.OperationsService(desk, boundary, limits.workers).add_to(server)
        healths = Health()
        healths.add_to(server)
        reflection.enable_server_reflection(
            (service.NAME, watching.NAME, health.NAME, reflection.SERVICE_NAME), server
        )
        healths.set(["liveness"], SERVING)
        healths.set(HEALTH_NAMES, SERVING)
        gateway = Gateway(settings, desk, authentication, boundary.draining)
        address = "" if alone else _bind(server, limits, credentials)
        if settings.gateway.address is not None:
            await gateway.start()
        if not alone:
            await server.start()
        async with task_group() as tasks:
            following = tasks.create_task(_follow(live, healths))
            try:
                yield Running(
                    address or gateway.address,
                    live,
                    telemetry.metrics_address,
                    apply,
                    gateway.address or None,
                )
            finally:
                following.cancel()
                gateway.leaving = True
                healths.set(HEALTH_NAMES, NOT_SERVING)
                await asyncio.sleep(limits.drain_delay)
                boundary.draining.set()
                healths.end_watches()
                await asyncio.sleep(_REFUSING)
                await asyncio.gather(server.stop(limits.drain_timeout), gateway.stop())


async def _follow(live: Live, healths: Health) -> None:
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
        healths.set(HEALTH_NAMES, SERVING if fault is None else NOT_SERVING)


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


def run(load: Callable[[], Settings], file: Path | None = None) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit code; a second signal exits now.

    Args:
        load: reads the settings, now, at each SIGHUP, and where `watch_config` asks for it.
        file: that they are read from; None: there is none.
    """
    settings = load()
    log_to_stderr(settings.log_level, settings.log_format)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve_until_signal(settings, load, file))
    return 0


async def _serve_until_signal(
    settings: Settings, load: Callable[[], Settings], file: Path | None
) -> None:
    with first_signal() as stop, on_hangup() as hangup:
        spare_what_is_loaded()
        async with serving(settings) as running:
            log_ready(running.bundle, running.address)
            async with (
                reloading(running.live, settings, load, hangup, running.apply),
                watching_config(file, settings, load, hangup),
            ):
                await stop.wait()
            _log.info("draining; a second signal exits now")
    _log.info("stopped")
