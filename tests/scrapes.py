"""Scrapes a server's metrics over HTTP, as Prometheus does, and reads what it gets."""

import asyncio
import urllib.request

from prometheus_client.openmetrics.parser import text_string_to_metric_families

from bestroute.app import Running

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scrape:
    """What a server says of itself at one time."""

    def __init__(self, text: str) -> None:
        self.samples: Samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
            for sample in family.samples
        }

    @property
    def names(self) -> set[str]:
        """Of all series."""
        return {name for name, _ in self.samples}

    def get(self, name: str, /, **labels: str) -> float | None:
        """The value of a series; None: there is none."""
        return self.samples.get((name, frozenset(labels.items())))

    def all(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        """The values of all series of a name, by labels."""
        return {labels: value for (n, labels), value in self.samples.items() if n == name}


def text_at(address: str, accept: str = OPEN_METRICS) -> str:
    """What is at an address for whoever accepts that; blocks."""
    request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=20) as response:
        return str(response.read().decode())


async def scraped(server: Running) -> Scrape:
    """What a server says of itself, of up to now."""
    assert server.metrics is not None
    await asyncio.sleep(0.25)  # what others count is looked at ten times a second
    return Scrape(await asyncio.to_thread(text_at, server.metrics))
