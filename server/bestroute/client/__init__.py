"""Calls a running bestroute service; needs gRPC and nothing else of the package's libraries.

    async with Client("127.0.0.1:50051", fallback_model="gpt-4o") as client:
        decision = await client.route("What is 2 + 2?", max_quality_drop=0.01)
        print(decision.arm.model, decision.arm.samples)

`SyncClient` has the same methods without `await`. Answers are the messages of `bestroute.v1`.
The errors are those of `bestroute.errors`; what has no type there, such as a service that can't be
reached, is `grpc.aio.AioRpcError`, from both clients.

    calls       Client: one method per rpc, deadlines, fallback
    stream      RouteStream: many decisions at once on one open call
    sync        SyncClient: the same for code without an event loop
    requests    keyword arguments to request messages
    failures    status codes to errors; what to answer when the service is away
    channel     retries, reconnecting, keepalive
    token       says with every call who calls
"""

from bestroute.client.calls import Client
from bestroute.client.requests import (
    Conversation,
    GenerateOptions,
    PolicyOptions,
    RouteOptions,
)
from bestroute.client.stream import RouteStream
from bestroute.client.sync import SyncClient, SyncRouteStream
from bestroute.client.token import Token

__all__ = [
    "Client",
    "Conversation",
    "GenerateOptions",
    "PolicyOptions",
    "RouteOptions",
    "RouteStream",
    "SyncClient",
    "SyncRouteStream",
    "Token",
]
