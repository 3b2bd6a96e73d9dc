"""Serves what was counted, for Prometheus to scrape: HTTP on a thread of its own.

It answers even when the event loop doesn't, and says so: `bestroute_event_loop_blocked_seconds`.
"""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from threading import Lock

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from bestroute import config
from bestroute.config import ConfigInvalid, Settings
from bestroute.live import Live
from bestroute.observe import families
from bestroute.observe.metrics import Metrics
from bestroute.observe.snapshots import Snapshots
from bestroute.tasks import task_group
from bestroute.traffic.traffic import Traffic

_log = logging.getLogger(__name__)

_PERIOD = 0.1
"""Seconds between two looks at what others count, and at how late the event loop is."""
_TURN = 0.0005
"""Seconds that a scrape keeps the event loop waiting at a time; Python's default is ten times as
long. A scrape takes some milliseconds in all."""


@asynccontextmanager
async def exposed(
    settings: Settings, live: Live, traffic: Traffic
) -> AsyncIterator[tuple[Metrics, str]]:
    """Count, and serve the counts at `metrics.listen`, while the block lasts.

    Args:
        settings: its `metrics.listen` is set.
        live: what serves.
        traffic: what watches what it is asked.

    Returns:
        What counts, and the host:port where the counts really are.

    Raises:
        ConfigInvalid: the address can't be had.
    """
    named = frozenset(settings.callers) - {"default"}
    metrics = Metrics(named, lambda: live.prices)
    provider_of = {name: model.provider for name, model in settings.models.items()}
    collector = _Collector(metrics, Snapshots(live, traffic), provider_of)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    ProcessCollector(registry=registry)
    async with _served(settings.metrics, registry) as address, task_group() as tasks:
        looking = tasks.create_task(collector.look())
        _log.info("metrics at http://%s/metrics", address)
        try:
            yield metrics, address
        finally:
            looking.cancel()


@asynccontextmanager
async def _served(where: config.Metrics, registry: CollectorRegistry) -> AsyncIterator[str]:
    """Serve a registry while the block lasts; gives the host:port where."""
    host, port = where.address
    try:
        # On a thread, for it asks for the host's name, and its end waits for a poll.
        server, thread = await asyncio.to_thread(start_http_server, port, host, registry)
    except (OSError, OverflowError) as error:
        raise ConfigInvalid(where.cannot_listen(error)) from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    try:
        yield f"[{host}]:{server.server_port}" if ":" in host else f"{host}:{server.server_port}"
    finally:
        await asyncio.to_thread(stop)


class _Collector(Collector):
    """Gives a registry what there is at a scrape."""

    def __init__(
        self, metrics: Metrics, snapshots: Snapshots, provider_of: Mapping[str, str]
    ) -> None:
        self._metrics, self._snapshots, self._provider_of = metrics, snapshots, provider_of
        self._due = time.monotonic()
        self._tasks = 0
        self._scraping = Lock()

    async def look(self) -> None:
        """Look at what others count, and how late the event loop is, for as long as this runs."""
        while True:
            self._snapshots.take()
            self._tasks = len(asyncio.all_tasks())
            self._due = time.monotonic() + _PERIOD
            await asyncio.sleep(_PERIOD)
            self._metrics.lag.observe(max(0.0, time.monotonic() - self._due))

    def collect(self) -> Iterator[Metric]:
        """Every family, written out by whoever asks before the next is made."""
        with self._scraping:
            former = sys.getswitchinterval()
            sys.setswitchinterval(_TURN)
            try:
                yield from families.noted(self._metrics, self._provider_of)
                yield from self._snapshots.families()
                yield families.gauges(
                    "bestroute_event_loop_tasks",
                    "Tasks on the event loop: calls under way, and a few more.",
                    (),
                    {(): self._tasks},
                )
                blocked = max(0.0, time.monotonic() - self._due)
                yield families.gauges(
                    "bestroute_event_loop_blocked_seconds",
                    "For how long the event loop should have run something and has not.",
                    (),
                    {(): blocked},
                )
            finally:
                sys.setswitchinterval(former)
