"""Which servers are compared, and how each is called."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from benchmarks.peers import clients
from benchmarks.peers.clients import Client


@dataclass(frozen=True)
class Peer:
    """One row of the comparison.

    Attributes:
        name: on the command line and in the JSON.
        title: in tables, with the protocol.
        server: its module in this package.
        connect: opens a client to an address.
    """

    name: str
    title: str
    server: str
    connect: Callable[[str], AbstractAsyncContextManager[Client]]


PEERS = {
    peer.name: peer
    for peer in (
        Peer("bestroute", "bestroute, Route", "bestroute", clients.route),
        Peer("bestroute-stream", "bestroute, RouteStream", "bestroute", clients.route_stream),
        Peer("plain", "plain grpc.aio, no batching", "plain", clients.unary),
        Peer("triton", "Triton, gRPC", "triton", clients.inference),
        Peer("mlserver", "MLServer, gRPC", "mlserver", clients.inference),
        Peer("rayserve", "Ray Serve, HTTP", "rayserve", clients.http("/")),
        Peer("mosec", "Mosec, HTTP", "mosec", clients.http("/inference")),
        Peer("litserve", "LitServe, HTTP", "litserve", clients.http("/predict")),
    )
}
