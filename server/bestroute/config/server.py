"""The gRPC server's own settings."""

from bestroute.config.base import Count, Delay, Seconds, Section


class Server(Section):
    """The gRPC server.

    Attributes:
        listen: host:port; port 0 picks a free one, which is logged.
        workers: processes that serve there, each with an event loop, networks and memory of its
            own; other limits hold for each. The kernel spreads connections over them, not calls.
        max_prompt_bytes: largest prompt (or conversation) taken, in bytes of UTF-8.
        max_responses: most answers that one Score takes, and that one Generate may ask for itself.
        max_message_bytes: largest message read off the wire; beyond it gRPC itself refuses.
        max_metadata_bytes: largest metadata of a call, a JWT included; gRPC itself refuses more.
        max_connections: connections at once, further ones are closed; unset: as many as the process
            may have open files.
        max_connection_idle: seconds without a call after which a connection is closed; unset: none
            is.
        max_connection_age: seconds after which a connection is closed, so that clients spread over
            servers that are new, and show their certificates again; its calls get drain_timeout
            seconds to finish, and clients open another meanwhile. Unset: none is.
        max_pending: calls that may wait for the event loop to take them; beyond it gRPC ends calls
            at once, as CANCELLED. Unset, it is gRPC's own limit of about a thousand. Set it where
            callers have deadlines and the event loop can be overloaded rather than the network, as
            with the embedded router: to what it takes in a third of a deadline, say. Calls beyond
            max_streams are then refused, too, some as UNAVAILABLE, rather than made to wait.
        max_streams: calls that one connection may have under way; further ones wait at the client,
            so that a greedy one doesn't crowd out the others.
        stream_window: decisions that one RouteStream may have under way at once.
        drain_delay: seconds between health turning NOT_SERVING and refusing new calls, so that
            load balancers can notice; new calls are still answered meanwhile.
        drain_timeout: seconds that calls under way get to finish after that.
    """

    listen: str = "127.0.0.1:50051"
    workers: Count = 1
    max_prompt_bytes: Count = 128 * 1024
    max_responses: Count = 64
    max_message_bytes: Count = 16 * 1024 * 1024
    max_metadata_bytes: Count = 16 * 1024
    max_connections: Count | None = None
    max_connection_idle: Seconds | None = None
    max_connection_age: Seconds | None = None
    max_pending: Count | None = None
    max_streams: Count = 100
    stream_window: Count = 256
    drain_delay: Delay = 0.0
    drain_timeout: Delay = 30.0

    def cannot_listen(self, error: object) -> str:
        """What to say where the address can't be had."""
        return (
            f"server.listen = {self.listen!r}: can't listen there ({error}); "
            "is another server on that port? Port 0 picks a free one"
        )
