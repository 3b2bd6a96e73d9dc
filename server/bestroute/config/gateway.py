"""Settings of the OpenAI-compatible HTTP API."""

from typing import Annotated

from pydantic import Field

from bestroute.config.base import Count, Seconds, Section

_ALONE = "127.0.0.1:8080"


class Gateway(Section):
    """The OpenAI-compatible HTTP API, and the web page.

    Attributes:
        listen: host:port, port 0 picks a free one, which is logged; unset: none, or where it is
            alone 127.0.0.1:8080. Workers share it.
        alone: whether HTTP is all that is served, and gRPC not; `bestroute gateway` sets it.
        page: whether `/` is a web page to try it with.
        max_body_bytes: largest body of a request.
        heartbeat: seconds after which a stream that waits for the best of several answers says
            that it is alive, again and again.
    """

    listen: Annotated[str | None, Field(pattern=r"^.+:\d+$")] = None
    alone: bool = False
    page: bool = True
    max_body_bytes: Count = 16 * 1024 * 1024
    heartbeat: Seconds = 5.0

    @property
    def address(self) -> str | None:
        """Where to listen; None: nowhere."""
        return self.listen or (_ALONE if self.alone else None)

    def cannot_listen(self, error: object) -> str:
        """What to say where the address can't be had."""
        return (
            f"gateway.listen = {self.address!r}: can't listen there ({error}); "
            "is another server on that port? Port 0 picks a free one"
        )
