"""Settings of what the service tells about itself."""

from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from bestroute.config.base import Section


def _collector(url: str) -> str:
    """The URL, if OTLP over gRPC can be sent there.

    Raises:
        ValueError: it can't.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.port or parts.path not in ("", "/"):
        raise ValueError("must be http:// or https://, a host and a port, as in http://host:4317")
    return url


class Metrics(Section):
    """Prometheus metrics.

    Attributes:
        listen: host:port of the HTTP endpoint `/metrics`, port 0 picks a free one, which is logged;
            unset: none. Workers take that port and the next ones, one each.
    """

    listen: Annotated[str | None, Field(pattern=r"^.+:\d+$")] = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of `listen`, which is set."""
        assert self.listen is not None
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    def of_worker(self, number: int) -> Self:
        """What the worker of a number, from 1, is to listen at."""
        if self.listen is None or not self.address[1]:
            return self
        host, _, port = self.listen.rpartition(":")
        return self.model_copy(update={"listen": f"{host}:{int(port) + number - 1}"})

    def cannot_listen(self, error: object) -> str:
        """What to say where the address can't be had."""
        return (
            f"metrics.listen = {self.listen!r}: can't listen there ({error}); is another server on "
            "that port? Workers need as many ports in a row. Port 0 picks a free one"
        )


class Tracing(Section):
    """OpenTelemetry traces.

    Attributes:
        endpoint: URL of a collector that takes OTLP over gRPC, http://host:4317 or https://; unset:
            no traces.
        sample_ratio: share of the requests that are traced among those that come without a trace
            of their caller's; of the others those that their callers record.
        service_name: what the spans are said to come from.
    """

    endpoint: Annotated[str, AfterValidator(_collector)] | None = None
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 0.01
    service_name: Annotated[str, Field(min_length=1)] = "bestroute"
