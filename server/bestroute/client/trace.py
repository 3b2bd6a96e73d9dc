"""The calling application's trace goes on in the service, if the application uses OpenTelemetry.

Nothing is imported for that: an application that has no traces pays for a look into `sys.modules`.
"""

import asyncio
import sys
from typing import TYPE_CHECKING

import grpc

from bestroute import __version__
from bestroute.client.channel import SERVICE

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Metadata = tuple[tuple[str, str], ...]


class Outgoing:
    """A call of the service as a span of the trace that is current where it is made.

    Args:
        method: its name.

    Attributes:
        metadata: what the call carries so that the service's spans belong to it; None: nothing.
    """

    __slots__ = ("_span", "metadata")

    def __init__(self, method: str) -> None:
        self._span: Span | None = None
        self.metadata: Metadata | None = None
        if "opentelemetry.trace" in sys.modules:
            self._begin(f"{SERVICE}/{method}")

    def __enter__(self) -> Metadata | None:
        return self.metadata

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """The call has ended: with an error of gRPC's, well, or because whoever made it left."""
        if self._span is None:
            return
        code = _code(error)
        self._span.set_attribute("rpc.response.status_code", code)
        if code not in ("OK", "CANCELLED"):
            from opentelemetry.trace import StatusCode

            self._span.set_attribute("error.type", code)
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def _begin(self, name: str) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._span = trace.get_tracer("bestroute.client", __version__).start_span(
            name,
            kind=trace.SpanKind.CLIENT,
            attributes={"rpc.system.name": "grpc", "rpc.method": name},
        )
        carried: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carried, trace.set_span_in_context(self._span))
        self.metadata = tuple(carried.items())


def _code(error: BaseException | None) -> str:
    if error is None:
        return "OK"
    if isinstance(error, grpc.aio.AioRpcError):
        return str(error.code().name)
    left = isinstance(error, asyncio.CancelledError | GeneratorExit)
    return "CANCELLED" if left else "UNKNOWN"
