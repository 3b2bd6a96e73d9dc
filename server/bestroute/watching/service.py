"""`bestroute.v1.OperationsService`: proto in, proto out."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from math import ceil
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from bestroute.boundary import Boundary
from bestroute.call import Call
from bestroute.desk import Desk
from bestroute.errors import InvalidRequest
from bestroute.observe.history import DAY_MINUTES, MINUTE
from bestroute.status import Draining
from bestroute.v1 import operations_pb2 as pb
from bestroute.watching.status import HOUR_MINUTES, Observer, minutes
from bestroute.wire import decoder

NAME = "bestroute.v1.OperationsService"

_SHORTEST, _LONGEST = 0.1, 3600.0
_INTERVAL = 1.0


class OperationsService:
    """The handlers of the service.

    Args:
        desk: where requests are served.
        boundary: what is around every RPC.
        workers: processes that serve at the address.
    """

    def __init__(self, desk: Desk, boundary: Boundary, workers: int) -> None:
        self._desk, self._boundary, self._workers = desk, boundary, workers

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register every RPC."""
        around = self._boundary
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "WatchStatus": grpc.unary_stream_rpc_method_handler(
                around.server_stream("WatchStatus", self.watch_status),
                decoder(pb.WatchStatusRequest),
                pb.WatchStatusResponse.SerializeToString,
            ),
            "GetHistory": grpc.unary_unary_rpc_method_handler(
                around.unary("GetHistory", self.get_history),
                decoder(pb.GetHistoryRequest),
                pb.GetHistoryResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))

    async def watch_status(
        self, request: pb.WatchStatusRequest, call: Call
    ) -> AsyncGenerator[pb.WatchStatusResponse, None]:
        """Tell how things stand, again and again until the server drains."""
        interval = _INTERVAL
        if request.HasField("interval"):
            interval = _within("interval", request.interval, _SHORTEST, _LONGEST)
        observer = Observer(self._desk, self._workers)
        draining = self._boundary.draining
        while not draining.is_set():
            # A reader that is slow holds up the next look, so that nothing piles up for it.
            yield observer.look()
            with suppress(TimeoutError):
                async with asyncio.timeout(interval):
                    await draining.wait()
        raise Draining

    async def get_history(self, request: pb.GetHistoryRequest, call: Call) -> pb.GetHistoryResponse:
        """Give the last minutes one by one."""
        most = HOUR_MINUTES
        if request.HasField("span"):
            span = _within("span", request.span, 1.0, DAY_MINUTES * MINUTE)
            most = ceil(span / MINUTE)
        return pb.GetHistoryResponse(minutes=minutes(self._desk.telemetry.history, most))


def _within(field: str, given: Duration, low: float, high: float) -> float:
    """The seconds of a duration.

    Raises:
        InvalidRequest: they are too few or too many.
    """
    seconds = given.seconds + given.nanos / 1e9
    if not low <= seconds <= high:
        raise InvalidRequest(field, f"must be {low:g} to {high:g} seconds, got {seconds:g}")
    return seconds
