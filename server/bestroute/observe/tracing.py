"""Which requests are traced: what their callers ask, else a share of them at random.

Every request pays for what is here, and a traced one for `spans`, where OpenTelemetry is; without
`tracing.endpoint` that is never imported.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from random import random
from typing import TYPE_CHECKING, Any, cast

import grpc

from bestroute.best_of_n import Event
from bestroute.call import Call
from bestroute.config import ConfigInvalid, Settings
from bestroute.observe.logs import belongs_to, of_trace
from bestroute.observe.trace_context import Parent, parent
from bestroute.order import Routed
from bestroute.scoring import Scored

if TYPE_CHECKING:
    from bestroute.observe.spans import Spans, Traced


@asynccontextmanager
async def tracing(settings: Settings) -> AsyncIterator["Tracer | None"]:
    """Trace while the block lasts; on leaving, wait a little until all spans have been sent.

    Gives None where there is nothing to do: no endpoint is set, and the log has no trace ids.

    Raises:
        ConfigInvalid: OpenTelemetry isn't installed.
    """
    if settings.tracing.endpoint is None:
        yield Tracer(None, 0.0) if settings.log_format == "json" else None
        return
    try:
        from bestroute.observe.spans import exporting
    except ImportError as error:
        raise ConfigInvalid(
            f"tracing.endpoint is set, but OpenTelemetry is not installed ({error}); "
            "run pip install 'bestroute[otel]', or unset it"
        ) from error
    async with exporting(settings.tracing) as spans:
        yield Tracer(spans, settings.tracing.sample_ratio)


class Tracer:
    """Decides what is traced, and has the log know of which trace a line is.

    Args:
        spans: makes spans; None: only the log is told.
        sample_ratio: share of the requests to trace among those that come without a trace; for the
            others their caller has decided.
    """

    def __init__(self, spans: "Spans | None", sample_ratio: float) -> None:
        self._spans, self._sample_ratio = spans, sample_ratio

    def begun(self, method: str, call: Call, metadata: Iterable[Any]) -> Call:
        """Begin an RPC, in the task that handles it; gives the call with its trace, if any."""
        asked = parent(metadata)
        if asked is None:
            if random() >= self._sample_ratio:
                return call
        else:
            belongs_to(asked)
            if not asked.sampled:
                return call
        return self._traced(method, call, asked)

    def ended(self, method: str, call: Call | None, code: grpc.StatusCode, seconds: float) -> None:
        """End an RPC, or a message."""
        if call is not None and call.trace is not None:
            _of(call).ended(code)

    def message(self, method: str, call: Call) -> Call:
        """Begin a message of a stream, in the task that answers it; `ended` ends it.

        It is traced like a request of its own, at `sample_ratio`, as a part of the stream's trace
        if that is traced. Of a stream whose caller doesn't record its trace, no message is.

        Args:
            method: of the stream.
            call: of the stream.
        """
        if random() < self._sample_ratio and (call.trace is not None or of_trace.get() is None):
            return self._traced(f"{method} message", call, None)
        return call if call.trace is None else call._replace(trace=None)

    def routed(self, routed: Routed, version: str, call: Call) -> None:
        """Tell of a decision by the bundle of that version."""
        if call.trace is not None:
            _of(call).routed(routed, version)

    def scored(self, scored: Scored, call: Call) -> None:
        """Tell of scores."""
        if call.trace is not None:
            _of(call).scored(scored)

    def generated(self, event: Event, routed: Routed, call: Call) -> None:
        """Tell what happened to an answer in the making."""
        if call.trace is not None:
            _of(call).generated(event)

    def _traced(self, name: str, call: Call, asked: Parent | None) -> Call:
        if self._spans is None:
            return call
        trace = self._spans.begin(name, call, asked)
        of_trace.set(trace.ids)
        return call._replace(trace=trace)


def _of(call: Call) -> "Traced":
    return cast("Traced", call.trace)  # nothing else makes one
