"""Traced requests as OpenTelemetry spans, sent to a collector by a thread of their own.

A request's span has its decision and how it ended; below it are the spans of its work: waiting for
a batch, the batch, calls of LLMs. No span ever has any text of a prompt or an answer.
Names follow OpenTelemetry's semantic conventions for RPC and generative AI, others begin with
`bestroute.`.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import grpc
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import SpanKind, StatusCode

from bestroute import __version__
from bestroute.best_of_n import Event, FellBack, Result
from bestroute.call import Attributes, Call
from bestroute.candidate import Candidate
from bestroute.config import Tracing
from bestroute.observe.trace_context import Parent
from bestroute.order import Routed
from bestroute.scoring import Scored
from bestroute.upstream.completion import Retried
from bestroute.v1 import routing_pb2

_SERVICE = routing_pb2.DESCRIPTOR.services_by_name["RoutingService"].full_name

_QUEUE = 4096
"""Spans that may wait to be sent; further ones take the place of the oldest."""
_DELAY = 1000
"""Milliseconds that they wait at most, to be sent together."""
_TIMEOUT = 5.0
"""Seconds after which a batch that the collector doesn't take is lost."""
_FLUSH = 3.0
"""Seconds that the end of the process waits for what is still to be sent."""

_FAULTS = frozenset(
    {
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    }
)
"""Codes by which a server says that the fault is its own, by the conventions."""


@asynccontextmanager
async def exporting(settings: Tracing) -> AsyncIterator["Spans"]:
    """Send spans to the collector while the block lasts, and what is left of them at its end.

    A collector that is away or slow holds up nobody; spans are lost, which is logged.
    """
    exporter = OTLPSpanExporter(settings.endpoint, timeout=_TIMEOUT)
    resource = Resource.create(
        {"service.name": settings.service_name, "service.version": __version__}
    )
    provider = TracerProvider(ALWAYS_ON, resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, _QUEUE, _DELAY))

    def send_the_rest() -> None:
        # Of its own accord the library waits for half a minute.
        hurry = threading.Timer(_FLUSH, exporter.shutdown)
        hurry.start()
        provider.shutdown()
        hurry.cancel()

    try:
        yield Spans(provider.get_tracer("bestroute", __version__))
    finally:
        await asyncio.to_thread(send_the_rest)


class Spans:
    """Makes the spans of requests.

    Args:
        tracer: OpenTelemetry's.
    """

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    def begin(self, method: str, call: Call, asked: Parent | None) -> "Traced":
        """Begin the span of an RPC, or of a message in an RPC that is traced itself.

        Args:
            method: its name without the service's.
            call: who asks; with the trace of the stream where this is a message of one.
            asked: the caller's span; None begins a trace, unless the call has one.
        """
        kind, context = SpanKind.SERVER, Context()
        if isinstance(call.trace, Traced):
            kind, context = SpanKind.INTERNAL, call.trace.inside
        elif asked is not None:
            context = _inside(trace.NonRecordingSpan(_context_of(asked)))
        attributes: Attributes = {
            "rpc.system.name": "grpc",
            "rpc.method": f"{_SERVICE}/{method}",
            "bestroute.caller": call.caller,
            "bestroute.priority": call.priority.name.lower(),
        }
        name = f"{_SERVICE}/{method}"
        span = self._tracer.start_span(name, context, kind, attributes)
        return Traced(self._tracer, span)


class Traced:
    """The trace of a request, a `call.Trace`.

    Args:
        tracer: OpenTelemetry's.
        span: the request's, which has begun.

    Attributes:
        inside: where spans of its work belong.
    """

    __slots__ = ("_clock", "_span", "_tracer", "inside")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer, self._span, self.inside = tracer, span, _inside(span)
        self._clock = time.time_ns() - time.monotonic_ns()

    @property
    def ids(self) -> tuple[str, str]:
        """Of the trace and of the request's span, as hexadecimal digits."""
        context = self._span.get_span_context()
        return trace.format_trace_id(context.trace_id), trace.format_span_id(context.span_id)

    def start(self, name: str, attributes: Attributes = {}) -> "Work":  # noqa: B006 - never written
        """Begin a piece of work for which another service is called."""
        return Work(self._tracer.start_span(name, self.inside, SpanKind.CLIENT, attributes))

    def record(
        self,
        name: str,
        start: float,
        end: float,
        attributes: Attributes = {},  # noqa: B006 - never written
    ) -> None:
        """Tell of a piece of work that is over; times are `time.monotonic()`."""
        span = self._tracer.start_span(
            name, self.inside, attributes=attributes, start_time=self._wall(start)
        )
        span.end(self._wall(end))

    def routed(self, routed: Routed, version: str) -> None:
        """Tell of the decision."""
        decision = routed.decision
        arm, reference = decision.arm, decision.reference
        self._span.set_attributes(
            {
                "bestroute.bundle.version": version,
                "bestroute.arm.model": arm.model,
                "bestroute.arm.samples": arm.samples,
                "bestroute.arm.match_probability": arm.match_probability,
                "bestroute.reference.model": reference.model,
                "bestroute.fallback": decision.fallback.name if decision.fallback else "",
                "bestroute.estimated_cost_usd": arm.estimated_cost_usd,
                "bestroute.estimated_saving_usd": (
                    reference.estimated_cost_usd - arm.estimated_cost_usd
                ),
                "bestroute.prompt_tokens": routed.prompt_tokens,
                "bestroute.truncated": routed.truncated,
            }
        )
        if (turn := routed.turn) is not None:
            self._span.set_attributes(
                {
                    "bestroute.session.turn": turn.number,
                    "bestroute.session.previous_model": turn.previous_model or "",
                    "bestroute.session.changed": turn.changed,
                    "bestroute.session.reason": turn.reason.name,
                    "bestroute.session.cached_tokens": turn.cached_tokens,
                }
            )

    def scored(self, scored: Scored) -> None:
        """Tell of the rewards."""
        self._span.set_attributes(
            {"bestroute.rewards": scored.rewards, "bestroute.best": scored.best}
        )

    def generated(self, event: Event) -> None:
        """Tell of a candidate that ended, of what was done about a failure, or of the answer."""
        match event:
            case Retried():
                self._span.add_event(
                    "retry",
                    {
                        "gen_ai.request.model": event.model,
                        "bestroute.attempt": event.attempt,
                        "bestroute.delay_s": event.delay,
                    },
                )
            case FellBack():
                self._span.add_event(
                    "fallback",
                    {
                        "bestroute.failed_model": event.failed_model,
                        "gen_ai.request.model": event.model,
                    },
                )
            case Candidate():
                attributes: dict[str, str | int | float | tuple[str]] = {
                    "bestroute.candidate": event.index,
                    "gen_ai.request.model": event.model,
                    "gen_ai.response.finish_reasons": (event.finish_reason,),
                    "gen_ai.usage.input_tokens": event.usage.input_tokens,
                    "gen_ai.usage.output_tokens": event.usage.output_tokens,
                }
                if event.reward is not None:
                    attributes["bestroute.reward"] = event.reward
                self._span.add_event("candidate", attributes)
            case Result():
                self._span.set_attributes(
                    {
                        "bestroute.candidate": event.candidate,
                        "gen_ai.response.model": event.model,
                        "gen_ai.usage.input_tokens": event.usage.input_tokens,
                        "gen_ai.usage.output_tokens": event.usage.output_tokens,
                        "bestroute.cost_usd": event.cost_usd,
                        "bestroute.candidates_cancelled": event.candidates_cancelled,
                        "bestroute.time_to_first_token_s": event.time_to_first_token,
                        "bestroute.escalated": event.escalated,
                    }
                )

    def ended(self, code: grpc.StatusCode) -> None:
        """The request has ended, with this code."""
        self._span.set_attribute("rpc.response.status_code", code.name)
        if code is not grpc.StatusCode.OK:
            self._span.set_attribute("error.type", code.name)
        if code in _FAULTS:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()

    def _wall(self, monotonic: float) -> int:
        """Nanoseconds since 1970 at a point of `time.monotonic()`."""
        return int(monotonic * 1e9) + self._clock


class Work:
    """A piece of work under way, a `call.Span`.

    Args:
        span: which has begun.
    """

    __slots__ = ("_span",)

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def headers(self) -> Mapping[str, str]:
        """What the request to the other service carries, as W3C Trace Context."""
        context = self._span.get_span_context()
        trace_id, span_id = context.trace_id, context.span_id
        headers = {"traceparent": f"00-{trace_id:032x}-{span_id:016x}-{context.trace_flags:02x}"}
        if context.trace_state:
            headers["tracestate"] = context.trace_state.to_header()
        return headers

    def end(self, attributes: Attributes = {}, error: str | None = None) -> None:  # noqa: B006
        """The work has ended; with an error, badly.

        The error's words are not told: they may quote the prompt.
        """
        self._span.set_attributes(dict(attributes))
        if error is not None:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


def _inside(span: trace.Span) -> Context:
    return trace.set_span_in_context(span, Context())


def _context_of(parent: Parent) -> trace.SpanContext:
    return trace.SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED),
        trace_state=trace.TraceState.from_header([parent.state]),
    )
