"""Load reports (ORCA): how busy this process is, for balancers that weigh replicas by it.

A balancer gives each replica calls in proportion to rps / application_utilization. Were the latter
a share of time, that would be what a replica can do at most, in calls like those that it got: but
Route and Score differ a hundredfold, and whoever is busy for others would get as many calls as
before. So what is told makes the weight the room that a replica has left, 1 / (1 + waiting), where
waiting is the most of

- busy / (1 - busy), which is what waits on average where something is busy for that share of the
  time: the event loop, or the CPUs;
- the decisions under way, as where they wait for an engine;
- how late the event loop is, in `_LATE`, as where it has much to do or gets no CPU.

All are averages over seconds: a balancer that follows each moment swings from one replica to the
other and back. For the same reason the first ends at `_FULL`.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import astuple, dataclass, replace

import grpc

from bestroute.config import Settings
from bestroute.engine import cpus
from bestroute.errors import ProviderFailed
from bestroute.mesh.v1 import orca_pb2
from bestroute.status import Context
from bestroute.tasks import task_group

Trailer = tuple[tuple[str, str | bytes], ...]
"""Trailing metadata of a call."""
TRAILER = "endpoint-load-metrics-bin"
"""The key of the report in a call's trailing metadata."""
SERVICE = "xds.service.orca.v3.OpenRcaService"
"""What balancers ask that don't wait for calls to bring reports."""

_PERIOD = 0.05
"""Seconds between two reports."""
_MEMORY = 3.0
"""Seconds after which what was counts for a third."""
_FULL = 0.9
"""What counts as most of busy."""
_LATE = 0.0005
"""Seconds of waiting for the event loop that count as one call ahead: what a Route takes of it."""
_FAILING = 10.0
"""Calls that wait where all fail: what answers at once, but badly, isn't idle."""
_SCALE = 1000.0
"""The weight of a replica without anything to do; balancers take whole numbers."""

_DECIDING = frozenset(("Route", "Score"))
"""Methods whose calls wait for this server only."""
_FAILURES = frozenset(
    (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
)


@dataclass(slots=True)
class Figures:
    """Totals since the start, or what they rise by per second.

    Attributes:
        calls: and messages of streams that were answered.
        errors: those of them that the server failed.
        deciding: seconds, summed over all decisions and scores.
        late: seconds that whoever came had to wait for the event loop, summed over time.
        loop: seconds of CPU that the event loop's thread used.
        process: seconds of CPU that all threads used.
    """

    calls: float = 0
    errors: float = 0
    deciding: float = 0.0
    late: float = 0.0
    loop: float = 0.0
    process: float = 0.0


def averaged(rates: Figures, before: Figures, now: Figures, seconds: float) -> Figures:
    """Rates after some more time, in which totals rose from `before` to `now`."""
    kept = math.exp(-seconds / _MEMORY)
    risen = zip(astuple(rates), astuple(before), astuple(now), strict=True)
    return Figures(*(kept * rate + (1 - kept) * (b - a) / seconds for rate, a, b in risen))


def report(rates: Figures, processors: float, workers: int) -> orca_pb2.LoadReport:
    """What to tell a balancer.

    Args:
        rates: per second.
        processors: CPUs that this process may use.
        workers: processes like this one behind its address, each with its share of the calls.
    """
    cpu = rates.process / processors
    busy = min(max(rates.loop, cpu), _FULL)
    failing = rates.errors / rates.calls if rates.calls else 0.0
    waiting = max(busy / (1 - busy), rates.deciding, rates.late / _LATE) + _FAILING * failing
    return orca_pb2.LoadReport(
        cpu_utilization=cpu,
        application_utilization=rates.calls * (1 + waiting) / _SCALE,
        rps_fractional=rates.calls * workers,
        eps=rates.errors * workers,
    )


class Load:
    """Takes note of what ends, and has the latest report ready.

    Args:
        processors: CPUs that this process may use.
        workers: processes like this one at its address.

    Attributes:
        report: the latest, as bytes.
        trailer: the same as trailing metadata of a call.
    """

    def __init__(self, processors: float, workers: int) -> None:
        self._processors, self._workers = processors, workers
        self._totals, self._rates = Figures(), Figures()
        self._tell()

    def ended(
        self, method: str, code: grpc.StatusCode, seconds: float, error: Exception | None
    ) -> None:
        """Take note that an RPC ended; see `Telemetry.ended`."""
        self.answered(code, seconds if method in _DECIDING else 0.0, error)

    def answered(self, code: grpc.StatusCode, seconds: float, error: Exception | None) -> None:
        """Take note that a message of a stream was answered; see `Telemetry.answered`."""
        totals = self._totals
        totals.calls += 1
        totals.deciding += seconds
        if code in _FAILURES and not isinstance(error, ProviderFailed):
            totals.errors += 1

    async def follow(self) -> None:
        """Keep the report up to date for as long as this runs, on the event loop it is about."""
        before, last = self._looked(), time.monotonic()
        while True:
            await asyncio.sleep(_PERIOD)
            now = time.monotonic()
            passed = now - last
            late = max(passed - _PERIOD, 0.0)
            # Who comes while it is late waits for half of that; whoever is due now, for all.
            self._totals.late += late * (late / 2 + _PERIOD)
            looked = self._looked()
            self._rates = averaged(self._rates, before, looked, passed)
            before, last = looked, now
            self._tell()

    def _looked(self) -> Figures:
        """The totals as they are now."""
        return replace(self._totals, loop=time.thread_time(), process=time.process_time())

    def _tell(self) -> None:
        message = report(self._rates, self._processors, self._workers)
        self.report = message.SerializeToString()
        self.trailer: Trailer = ((TRAILER, self.report),)


@asynccontextmanager
async def reporting(settings: Settings) -> AsyncIterator[Load | None]:
    """Keep a report up to date while the block lasts; None where none is to be sent."""
    if not settings.mesh.load_reports:
        yield None
        return
    workers = settings.server.workers
    load = Load(cpus() / workers, workers)
    async with task_group() as tasks:
        following = tasks.create_task(load.follow())
        try:
            yield load
        finally:
            following.cancel()


def add_to(server: grpc.aio.Server, load: Load, draining: asyncio.Event) -> None:
    """Serve reports to whoever asks for them beside calls.

    Args:
        server: that isn't started yet.
        load: has the reports.
        draining: ends the streams, which would keep the server from ending.
    """

    async def stream_core_metrics(
        request: orca_pb2.LoadReportRequest, _: Context
    ) -> AsyncGenerator[bytes, None]:
        interval = request.report_interval
        pause = max(interval.seconds + interval.nanos / 1e9, _PERIOD)
        while not draining.is_set():
            yield load.report
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await draining.wait()

    handler = grpc.unary_stream_rpc_method_handler(
        stream_core_metrics, orca_pb2.LoadReportRequest.FromString, bytes
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {"StreamCoreMetrics": handler}),)
    )
