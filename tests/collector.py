"""Where spans arrive: an OTLP receiver in the test's process, alone or behind a real collector."""

import importlib.util
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtlpSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

PATIENCE = 20.0
"""Seconds that a span may take on its way."""


@dataclass(frozen=True)
class Span:
    """A span as it arrived; ids are hexadecimal digits, times seconds since 1970."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    state: str
    service: str
    attributes: Mapping[str, Any]
    events: tuple[tuple[str, Mapping[str, Any]], ...]
    failed: bool
    said: str
    start: float
    end: float


@dataclass
class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what is sent to it.

    Attributes:
        url: where to send spans.
        spans: in the order of their arrival.
        wire: all that was said, in readable form.
    """

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    wire: str = ""
    _lock: Lock = field(default_factory=Lock)

    def Export(self, request: otlp.ExportTraceServiceRequest, context: object) -> Any:
        with self._lock:
            self.wire += str(request)
            for resource in request.resource_spans:
                service = _plain(resource.resource.attributes)["service.name"]
                for scope in resource.scope_spans:
                    self.spans += [_span(span, service) for span in scope.spans]
        return otlp.ExportTraceServiceResponse()

    def named(self, *names: str) -> list[Span]:
        return [span for span in self.spans if span.name in names]

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for spans, from a thread that nothing else needs."""
        until = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < until, [span.name for span in self.spans]
            time.sleep(0.01)


def _plain(attributes: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in attributes if isinstance(pair, KeyValue)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None


def _span(span: OtlpSpan, service: str) -> Span:
    return Span(
        name=span.name,
        kind=OtlpSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        state=span.trace_state,
        service=service,
        attributes=_plain(span.attributes),
        events=tuple((event.name, _plain(event.attributes)) for event in span.events),
        failed=span.status.code == Status.STATUS_CODE_ERROR,
        said=span.status.message,
        start=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
    )


@contextmanager
def receiving(port: int = 0) -> Iterator[Receiver]:
    """A receiver on loopback while the block lasts."""
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    receiver = Receiver()
    add = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(receiver, server)  # type: ignore[no-untyped-call]
    receiver.url = f"http://127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    server.start()
    try:
        yield receiver
    finally:
        server.stop(0).wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def collecting(directory: Path) -> Iterator[Receiver]:
    """A real collector while the block lasts, which hands on to a receiver what it gets."""
    if not (found := importlib.util.find_spec("rotel")) or not found.origin:
        pytest.skip("no OpenTelemetry collector is installed: pip install rotel")
    grpc_port, http_port = free_port(), free_port()
    with receiving() as receiver:
        command: list[str | Path] = [
            Path(found.origin).with_name("rotel-agent"),
            "start",
            *("--otlp-grpc-endpoint", f"127.0.0.1:{grpc_port}"),
            *("--otlp-http-endpoint", f"127.0.0.1:{http_port}"),
            *("--exporter", "otlp", "--otlp-exporter-endpoint", receiver.url),
            *("--batch-timeout", "20ms"),
            *("--pid-file", directory / "pid", "--log-file", directory / "log"),
        ]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as collector:
            receiver.url = f"http://127.0.0.1:{grpc_port}"
            try:
                with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
                    grpc.channel_ready_future(channel).result(PATIENCE)
                yield receiver
            finally:
                collector.terminate()
