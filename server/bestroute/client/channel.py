"""The connection: which calls are repeated, and how it comes back after it broke."""

import asyncio
import json

import grpc

from bestroute.addresses import stays_here
from bestroute.client.token import Token, authorized
from bestroute.v1 import routing_pb2

SERVICE = routing_pb2.DESCRIPTOR.services_by_name["RoutingService"].full_name

_SERVICE_CONFIG = {
    # A name that resolves to many replicas uses them all, without a load balancer between.
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            # gRPC repeats a call only until the server's first message, so that Generate never
            # answers twice, and waits as long as the server asks in grpc-retry-pushback-ms. Four
            # attempts take 0.35 s at most: what one spends before falling back. CANCELLED is what a
            # server says of calls that reach it in the instant it stops.
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "0.2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"],
            },
        }
    ],
    # After five failures nothing is repeated until ten answers have paid for each of them: clients
    # must not multiply the load of a service that is down or full.
    "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
}

OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # Only what is above: nobody's DNS records decide how calls are repeated.
    ("grpc.service_config_disable_resolution", 1),
    # By default gRPC waits up to two minutes before it tries a dead address again.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A connection of its own: else all clients of an address in a process share one, and with it
    # how many calls the server lets one connection have under way.
    ("grpc.use_local_subchannel_pool", 1),
    # A peer that vanished without a word is noticed while calls are open.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)
"""Of a channel; gRPC's own clients in other languages take the same."""


def open_channel(
    address: str,
    credentials: grpc.ChannelCredentials | None = None,
    *,
    server_name: str | None = None,
    token: Token | None = None,
    token_in_the_clear: bool = False,
) -> grpc.aio.Channel:
    """Open a channel on the running event loop; it connects at the first call.

    Args:
        address: host:port, or any target that gRPC knows.
        credentials: for TLS; None connects in the clear.
        server_name: whom the server's certificate has to name; None: the host in the address.
        token: an API key or a JWT, sent with every call.
        token_in_the_clear: whether the token may leave this machine without TLS.

    Raises:
        RuntimeError: no event loop is running. Without this check gRPC would bind the channel to
            another loop than the one that its calls are awaited on, and hang.
        ValueError: everybody on the way to the address could read the token.
    """
    asyncio.get_running_loop()
    options = [*OPTIONS]
    if credentials is None:
        if token is not None and not token_in_the_clear and not stays_here(address):
            raise ValueError(
                f"a token would travel to {address} in the clear; connect by TLS (credentials), "
                "or set token_in_the_clear where nobody can listen"
            )
        channel = grpc.aio.insecure_channel(address, options)
    else:
        if server_name is not None:
            options.append(("grpc.ssl_target_name_override", server_name))
        channel = grpc.aio.secure_channel(address, credentials, options)
    return channel if token is None else authorized(channel, token)
