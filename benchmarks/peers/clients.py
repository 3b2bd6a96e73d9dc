"""How each peer is called: a prompt goes out, its row comes back.

All are written for little overhead in the load generator, since it may share cores with the server:
one connection for gRPC, kept-alive connections for HTTP.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf import wrappers_pb2

from bestroute.v1 import routing_pb2 as pb

Row = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Client:
    """A connection to a server.

    Attributes:
        ask: sends a prompt and waits for the answer; this is what is measured.
        row: the same, but gives the row of the network, float32 [K], or what the server shows of
            it, from its start.
    """

    ask: Callable[[str], Awaitable[object]]
    row: Callable[[str], Awaitable[Row]]


@asynccontextmanager
async def route(address: str) -> AsyncIterator[Client]:
    """Ask bestroute by Route, a call per prompt. It shows the arms' probabilities."""
    async with grpc.aio.insecure_channel(address) as channel:
        method: Any = channel.unary_unary(
            "/bestroute.v1.RoutingService/Route",
            request_serializer=pb.RouteRequest.SerializeToString,
            response_deserializer=pb.RouteResponse.FromString,
        )

        async def row(prompt: str) -> Row:
            return _probabilities(await method(pb.RouteRequest(prompt=prompt, explain=True)))

        yield Client(lambda prompt: method(pb.RouteRequest(prompt=prompt)), row)


@asynccontextmanager
async def route_stream(address: str) -> AsyncIterator[Client]:
    """Ask bestroute by RouteStream: each caller has a stream, and asks on it in turn."""
    async with grpc.aio.insecure_channel(address) as channel:
        method: Any = channel.stream_stream(
            "/bestroute.v1.RoutingService/RouteStream",
            request_serializer=pb.RouteStreamRequest.SerializeToString,
            response_deserializer=pb.RouteStreamResponse.FromString,
        )
        idle: list[Any] = []

        async def decided(request: pb.RouteRequest) -> pb.RouteResponse:
            stream = idle.pop() if idle else method()
            try:
                await stream.write(pb.RouteStreamRequest(request=request))
                answer: pb.RouteStreamResponse = await stream.read()
            except BaseException:
                stream.cancel()
                raise
            idle.append(stream)
            if answer.HasField("error"):
                raise RuntimeError(answer.error.message)
            return answer.response

        async def row(prompt: str) -> Row:
            return _probabilities(await decided(pb.RouteRequest(prompt=prompt, explain=True)))

        yield Client(lambda prompt: decided(pb.RouteRequest(prompt=prompt)), row)
        for stream in idle:
            stream.cancel()


def _probabilities(response: pb.RouteResponse) -> Row:
    return np.array([arm.match_probability for arm in response.arms], dtype=np.float32)


@asynccontextmanager
async def unary(address: str) -> AsyncIterator[Client]:
    """Ask a gRPC method of one's own: a string out, the row's bytes back."""
    async with grpc.aio.insecure_channel(address) as channel:
        method: Any = channel.unary_unary(
            "/Router/Route",
            request_serializer=wrappers_pb2.StringValue.SerializeToString,
            response_deserializer=wrappers_pb2.BytesValue.FromString,
        )

        async def row(prompt: str) -> Row:
            response = await method(wrappers_pb2.StringValue(value=prompt))
            return np.frombuffer(response.value, dtype=np.float32)

        yield Client(row, row)


@asynccontextmanager
async def inference(address: str) -> AsyncIterator[Client]:
    """Ask by the Open Inference Protocol over gRPC."""
    messages: Any = grpc.protos("benchmarks/peers/inference.proto")
    async with grpc.aio.insecure_channel(address) as channel:
        method: Any = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=messages.ModelInferRequest.SerializeToString,
            response_deserializer=messages.ModelInferResponse.FromString,
        )

        async def row(prompt: str) -> Row:
            request = messages.ModelInferRequest(model_name="router")
            tensor = request.inputs.add(name="prompt", datatype="BYTES", shape=[1, 1])
            tensor.contents.bytes_contents.append(prompt.encode())
            response = await method(request)
            if response.raw_output_contents:
                return np.frombuffer(response.raw_output_contents[0], dtype=np.float32)
            return np.array(response.outputs[0].contents.fp32_contents, dtype=np.float32)

        yield Client(row, row)


def http(path: str) -> Callable[[str], Any]:
    """Ask by POST with JSON, `{"prompt": ...}` out and `{"row": [...]}` back."""

    @asynccontextmanager
    async def connected(address: str) -> AsyncIterator[Client]:
        url = f"http://{address}{path}"
        # As many connections as calls under way, since a limit would queue them in the generator;
        # left before the server leaves them: Uvicorn does so after 5 s.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def row(prompt: str) -> Row:
                async with session.post(url, json={"prompt": prompt}) as response:
                    response.raise_for_status()
                    values: Sequence[float] = (await response.json())["row"]
                return np.array(values, dtype=np.float32)

            yield Client(row, row)

    return connected
