"""The one place that handlers report to: what was decided and answered, and what it took."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc

from bestroute.best_of_n import Event
from bestroute.call import Call
from bestroute.config import Settings
from bestroute.live import Live
from bestroute.observe.exposition import exposed
from bestroute.observe.logs import log_access
from bestroute.observe.metrics import Metrics
from bestroute.observe.tracing import Tracer, tracing
from bestroute.router import Routed
from bestroute.scoring import Scored
from bestroute.traffic.traffic import Traffic


class Telemetry:
    """Takes note of what happens; whatever it costs, every request pays.

    Args:
        metrics: what counts; None: nothing does.
        metrics_address: where that can be read.
        tracer: what traces; None: nothing does.
        access_log: whether every RPC is logged.

    Attributes:
        metrics_address: host:port of the HTTP endpoint `/metrics`; None: there is none.
    """

    def __init__(
        self,
        metrics: Metrics | None = None,
        metrics_address: str | None = None,
        tracer: Tracer | None = None,
        *,
        access_log: bool = False,
    ) -> None:
        self._metrics, self.metrics_address, self._tracer = metrics, metrics_address, tracer
        self._access_log = access_log

    def begun(self, method: str, call: Call, metadata: Iterable[Any]) -> Call:
        """Take note that an RPC began; gives its call, with its trace if it is traced."""
        if self._metrics is not None:
            self._metrics.begun(method)
        return call if self._tracer is None else self._tracer.begun(method, call, metadata)

    def ended(
        self,
        method: str,
        call: Call | None,
        code: grpc.StatusCode,
        seconds: float,
        error: Exception | None = None,
    ) -> None:
        """Take note that an RPC ended.

        Args:
            method: its name.
            call: whose it was; None if it ended before that was known.
            code: how it ended.
            seconds: from its arrival to its end.
            error: why it ended badly, if it did.
        """
        if self._metrics is not None:
            self._metrics.ended(method, call, code, seconds, error)
        if self._access_log:
            log_access(method, code.name, seconds, call.caller if call else "")
        if self._tracer is not None:
            self._tracer.ended(method, call, code, seconds)

    def message(self, method: str, call: Call) -> Call:
        """Take note that a message of a stream came; gives its call, as `begun` does."""
        return call if self._tracer is None else self._tracer.message(method, call)

    def answered(
        self,
        method: str,
        call: Call,
        code: grpc.StatusCode,
        seconds: float,
        error: Exception | None = None,
    ) -> None:
        """Take note that a message of a stream was answered; see `ended`."""
        if self._metrics is not None:
            self._metrics.answered(code, seconds, error)
        if self._tracer is not None:
            self._tracer.ended(method, call, code, seconds)

    def routed(self, routed: Routed, call: Call, version: str = "") -> None:
        """Take note of a decision by the bundle of that version."""
        if self._metrics is not None:
            self._metrics.routed(routed)
        if self._tracer is not None:
            self._tracer.routed(routed, version, call)

    def scored(self, scored: Scored, call: Call) -> None:
        """Take note of scores."""
        if self._metrics is not None:
            self._metrics.scored(scored)
        if self._tracer is not None:
            self._tracer.scored(scored, call)

    def generated(self, event: Event, routed: Routed, call: Call) -> None:
        """Take note of what happened to an answer in the making."""
        if self._metrics is not None:
            self._metrics.generated(event)
        if self._tracer is not None:
            self._tracer.generated(event, routed, call)


@asynccontextmanager
async def observing(settings: Settings, live: Live, traffic: Traffic) -> AsyncIterator[Telemetry]:
    """Take note, as configured, while the block lasts.

    Args:
        settings: what is taken note of, and where it goes.
        live: what serves.
        traffic: what watches what it is asked.

    Raises:
        ConfigInvalid: the address of the metrics can't be had, or what traces need is missing.
    """
    async with tracing(settings) as tracer:
        if settings.metrics.listen is None:
            yield Telemetry(tracer=tracer, access_log=settings.access_log)
            return
        async with exposed(settings, live, traffic) as (metrics, address):
            yield Telemetry(metrics, address, tracer, access_log=settings.access_log)
