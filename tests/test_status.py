"""How errors end calls: also those whose callers have left meanwhile."""

import asyncio
import logging
from contextlib import suppress
from types import SimpleNamespace

import grpc
import pytest

from bestroute.errors import InvalidRequest
from bestroute.status import abort, status_of
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests.scripted import Context, scripted


async def test_a_call_whose_caller_has_left_is_ended_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """gRPC can't send it anything any more, and would log each with a traceback."""
    arrived = asyncio.Event()
    ended: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
    report = SimpleNamespace(code=None, error=None, trailer=())

    async def route(_: pb.RouteRequest, context: Context) -> pb.RouteResponse:
        arrived.set()
        with suppress(asyncio.CancelledError):  # as if the error had come in this very moment
            await asyncio.sleep(60)
        try:
            await abort(context, InvalidRequest("prompt", "must not be empty"), report)
        except BaseException as error:
            ended.set_result(error)
            raise

    async with (
        scripted(Route=route) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        call = routing_pb2_grpc.RoutingServiceStub(channel).Route(pb.RouteRequest())
        await asyncio.wait_for(arrived.wait(), 30)
        call.cancel()
        error = await asyncio.wait_for(ended, 30)

    assert isinstance(error, asyncio.CancelledError)
    assert report.code is grpc.StatusCode.INVALID_ARGUMENT  # what it would have been told
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("repeated", ["\ud800", 600 * "\ud800"])
def test_what_no_message_can_hold_is_replaced(repeated: str) -> None:
    """JSON can hold half a character, and errors repeat what they complain of."""
    status = status_of(InvalidRequest("model", f'must not be "{repeated}"'))

    assert status.message.startswith('model: must not be "?')
