"""A server of a few lines without batching: what many would write first.

grpc.aio with one thread that runs the network, a prompt at a time. Settings: none. More threads
would only share the cores that a run has already.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf import wrappers_pb2

from benchmarks.peers.model import Model


async def main() -> None:
    """Serve until the process is ended."""
    model, thread = Model(), ThreadPoolExecutor(1)
    loop = asyncio.get_running_loop()

    async def route(request: wrappers_pb2.StringValue, _: Any) -> wrappers_pb2.BytesValue:
        rows = await loop.run_in_executor(thread, model, [request.value])
        return wrappers_pb2.BytesValue(value=rows[0].tobytes())

    handler = grpc.unary_unary_rpc_method_handler(
        route,
        request_deserializer=wrappers_pb2.StringValue.FromString,
        response_serializer=wrappers_pb2.BytesValue.SerializeToString,
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("Router", {"Route": handler}),)
    )
    server.add_insecure_port(f"127.0.0.1:{os.environ['PEER_PORTS'].split(',')[0]}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main())
