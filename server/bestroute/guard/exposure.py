"""What is exposed that likely shouldn't be; said once, at the start."""

import logging
import stat
from collections.abc import Iterator
from pathlib import Path

from bestroute.addresses import stays_here
from bestroute.config import Security, Settings

_log = logging.getLogger(__name__)


def warn_of_exposure(settings: Settings) -> None:
    """Log a warning for each thing that `exposures` finds."""
    for exposure in exposures(settings):
        _log.warning("%s", exposure)


def exposures(settings: Settings) -> Iterator[str]:
    """What to think over, a line each; none of it keeps the server from serving."""
    for key, file in _secret_files(settings):
        try:
            mode = file.stat().st_mode
        except OSError:
            continue  # who reads it will say so
        if mode & (stat.S_IROTH | stat.S_IWOTH):
            yield f"{key} {file} can be read by every user of this machine; chmod o= it"
    if settings.metrics.listen is not None and not stays_here(settings.metrics.listen):
        yield f"whoever can reach {settings.metrics.listen} may read the metrics"
    own = () if settings.gateway.alone else (settings.server.listen,)
    for listen in filter(None, (*own, settings.gateway.address)):
        if not stays_here(listen):
            yield from _reachable(settings.security, listen)


def _reachable(security: Security, listen: str) -> Iterator[str]:
    if security.certificate is None and security.credentials:
        yield (
            f"keys and tokens that callers send to {listen} travel in the clear; set "
            "security.certificate and private_key, or let only a proxy with TLS reach it"
        )
    elif not security.credentials and security.client_ca is None:
        yield (
            f"whoever can reach {listen} may call, and spend the money of its providers; see "
            "docs/security.md"
        )


def _secret_files(settings: Settings) -> Iterator[tuple[str, Path]]:
    if settings.security.private_key is not None:
        yield "security.private_key", settings.security.private_key
    for name, provider in settings.providers.items():
        if provider.api_key_file is not None:
            yield f"providers.{name}.api_key_file", provider.api_key_file
