"""The one place that handlers report to: what was decided and answered, and what it took."""

from collections import ChainMap
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc

from bestroute.best_of_n import Event
from bestroute.call import Call
from bestroute.config import Settings
from bestroute.live import Live
from bestroute.observe.exposition import exposed
from bestroute.observe.history import History
from bestroute.observe.logs import log_access
from bestroute.observe.metrics import Metrics, named
from bestroute.observe.tracing import Tracer, tracing
from bestroute.orca import Load, reporting
from bestroute.order import Routed
from bestroute.pricing import ModelPrice
from bestroute.scoring import Scored
from bestroute.traffic.traffic import Traffic


class Telemetry:
    """Takes note of what happens; whatever it costs, every request pays.

    Args:
        metrics: what counts; None: nothing does.
        metrics_address: where that can be read.
        tracer: what traces; None: nothing does.
        access_log: whether every RPC is logged.
        history: what remembers the last day; None: a new one.
        load: what balancers are told by; None: they are told nothing.

    Attributes:
        history: what was decided, spent and saved lately.
        metrics_address: host:port of the HTTP endpoint `/metrics`; None: there is none.
        load: what balancers are told by; None: they are told nothing.
    """

    def __init__(
        self,
        metrics: Metrics | None = None,
        metrics_address: str | None = None,
        tracer: Tracer | None = None,
        *,
        access_log: bool = False,
        history: History | None = None,
        load: Load | None = None,
    ) -> None:
        self._metrics, self.metrics_address, self._tracer = metrics, metrics_address, tracer
        self._access_log = access_log
        self.history, self.load = history or History(), load

    def tell_apart(self, callers: Iterable[str]) -> None:
        """Count these callers each by itself from now on; they have limits of their own."""
        if self._metrics is not None:
            self._metrics.tell_apart(callers)

    def begun(self, method: str, call: Call, metadata: Iterable[Any]) -> Call:
        """Take note that an RPC began; gives its call, with its trace if it is traced."""
        self.history.begun(method)
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
        self.history.ended(method, code, seconds, counted=call is not None)
        if self._metrics is not None:
            self._metrics.ended(method, call, code, seconds, error)
        if self.load is not None:
            self.load.ended(method, code, seconds, error)
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
        self.history.answered(method, code, seconds)
        if self._metrics is not None:
            self._metrics.answered(code, seconds, error)
        if self.load is not None:
            self.load.answered(code, seconds, error)
        if self._tracer is not None:
            self._tracer.ended(method, call, code, seconds)

    def failed(self, error: Exception) -> None:
        """Take note of an error that doesn't end an RPC or a message."""
        if self._metrics is not None:
            self._metrics.failed(error)

    def routed(self, routed: Routed, call: Call, version: str = "") -> None:
        """Take note of a decision by the bundle of that version."""
        self.history.routed(routed)
        if self._metrics is not None:
            self._metrics.routed(routed)
            self._metrics.bundles.routed(routed, version)
        if self._tracer is not None:
            self._tracer.routed(routed, version, call)

    def unanswered(self, error: Exception, version: str) -> None:
        """Take note of a request that the bundle of that version could not answer."""
        if self._metrics is not None:
            self._metrics.bundles.failed(named(error), version)

    def scored(self, scored: Scored, call: Call) -> None:
        """Take note of scores."""
        if self._metrics is not None:
            self._metrics.scored(scored)
        if self._tracer is not None:
            self._tracer.scored(scored, call)

    def generated(self, event: Event, routed: Routed, call: Call, version: str = "") -> None:
        """Take note of what happened to an answer in the making, decided by that version."""
        self.history.generated(event, routed)
        if self._metrics is not None:
            self._metrics.generated(event)
            self._metrics.bundles.generated(event, version)
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

    def prices() -> Mapping[str, ModelPrice]:
        # A canary's pool may have models that the stable bundle's lacks.
        canary = live.canary
        return ChainMap(live.router.prices, canary.prices if canary else {})

    history = History(prices)
    async with tracing(settings) as tracer, reporting(settings) as load:
        if settings.metrics.listen is None:
            yield Telemetry(
                tracer=tracer, access_log=settings.access_log, history=history, load=load
            )
            return
        async with exposed(settings, live, traffic) as (metrics, address):
            yield Telemetry(
                metrics,
                address,
                tracer,
                access_log=settings.access_log,
                history=history,
                load=load,
            )
