"""A server whose answers a test writes, for what the real one can't be made to do on demand.

It speaks real gRPC on a real port: fail twice and then answer, ask to wait, hang, send garbage.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import Message

from bestroute.client.channel import SERVICE
from bestroute.v1 import routing_pb2 as pb

Context = grpc.aio.ServicerContext[Any, Any]

ANSWER = pb.RouteResponse(arm=pb.Arm(model="small", samples=2), bundle_version="scripted")


@asynccontextmanager
async def scripted(**handlers: Callable[..., Any]) -> AsyncIterator[str]:
    """Serve handlers by the names of their rpcs; gives the address.

    Handlers are those of `grpc.aio`; they may answer with bytes, which are sent as they are.
    """
    kinds: dict[str, tuple[Callable[..., grpc.RpcMethodHandler[Any, Any]], type[Message]]] = {
        "Route": (grpc.unary_unary_rpc_method_handler, pb.RouteRequest),
        "RouteStream": (grpc.stream_stream_rpc_method_handler, pb.RouteStreamRequest),
        "Score": (grpc.unary_unary_rpc_method_handler, pb.ScoreRequest),
        "Generate": (grpc.unary_stream_rpc_method_handler, pb.GenerateRequest),
        "ListArms": (grpc.unary_unary_rpc_method_handler, pb.ListArmsRequest),
    }
    methods = {
        name: kinds[name][0](handler, kinds[name][1].FromString, _serialize)
        for name, handler in handlers.items()
    }
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def _serialize(answer: Message | bytes) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()
