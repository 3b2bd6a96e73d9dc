"""The health protocol: whether a server, or a part of it, serves; once, or whenever it changes.

grpcio's own servicer forgets all who watch a name when the first of them leaves, and its watches
keep a server that stops waiting until its patience ends.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bestroute.status import Context, Draining

NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Says what it was last told."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._over = False

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve with a server that isn't started yet."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    def set(self, names: Sequence[str], status: int) -> None:
        """Say that of these names from now on."""
        self._statuses.update(dict.fromkeys(names, status))
        self._tell()

    def end_watches(self) -> None:
        """Let whoever watches know that there is nothing more to come."""
        self._over = True
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """What holds now; NOT_FOUND for a name that nobody has."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """What holds now, and what comes to hold; SERVICE_UNKNOWN for a name that nobody has."""
        told: int | None = None
        while not self._over:
            changed = self._changed
            status = self._statuses.get(request.service, _UNKNOWN)
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            await changed.wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(Draining()))
