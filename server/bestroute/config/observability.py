"""Settings of what the service tells about itself."""

from bestroute.config.base import Section


class Metrics(Section):
    """Prometheus metrics.

    Attributes:
        listen: host:port of the HTTP endpoint `/metrics`; unset: none. Workers take that port and
            the next ones, one each.
    """

    listen: str | None = None


class Tracing(Section):
    """OpenTelemetry traces."""
