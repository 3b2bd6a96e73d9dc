"""What one connection may take, and how many there may be: options of gRPC."""

from bestroute.config import Server

_HANDSHAKE = 10.0
"""Seconds that whoever connects has to say what gRPC expects; the default is two minutes."""

_PING_INTERVAL = 10.0
"""Seconds between pings of a client without calls. Those may keep connections open through a NAT,
and gRPC's default is 5 minutes; whoever pings much more often is disconnected."""


def options(limits: Server) -> list[tuple[str, int]]:
    """The options of a server that keeps to these limits."""
    chosen = {
        "grpc.max_receive_message_length": limits.max_message_bytes,
        # From the first on gRPC refuses some calls at random, from the second on all.
        "grpc.max_metadata_size": limits.max_metadata_bytes,
        "grpc.absolute_max_metadata_size": limits.max_metadata_bytes,
        "grpc.max_concurrent_streams": limits.max_streams,
        # With it gRPC counts calls that are over by now, too, and so refuses some even of clients
        # that keep to the limit, as UNAVAILABLE: cheaply, but only for those who ask for that.
        "grpc.http.overload_protection": int(limits.max_pending is not None),
        "grpc.max_allowed_incoming_connections": limits.max_connections,
        "grpc.max_connection_idle_ms": _milliseconds(limits.max_connection_idle),
        "grpc.max_connection_age_ms": _milliseconds(limits.max_connection_age),
        "grpc.max_connection_age_grace_ms": _milliseconds(limits.drain_timeout),
        "grpc.server_handshake_timeout_ms": _milliseconds(_HANDSHAKE),
        "grpc.http2.min_recv_ping_interval_without_data_ms": _milliseconds(_PING_INTERVAL),
    }
    if limits.max_pending is not None:
        # From the first on gRPC ends some calls at random, from the second on all.
        chosen["grpc.server.max_pending_requests"] = limits.max_pending
        chosen["grpc.server.max_pending_requests_hard_limit"] = 2 * limits.max_pending
    return [(name, value) for name, value in chosen.items() if value is not None]


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
