"""The server's certificate: can it be used, until when, and for whom."""

import re
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

from bestroute.addresses import is_loopback
from bestroute.cli.doctor.findings import Finding, fail, ok, warn
from bestroute.config import ConfigInvalid, Settings
from bestroute.guard.tls import server_credentials

_SOON = 14 * 86_400
_EVERYWHERE = ("0.0.0.0", "[::]", "::")


def checks(settings: Settings, name: str | None) -> Iterator[Finding]:
    """The certificate of the configuration, if it has one.

    Args:
        settings: the configuration.
        name: whom clients expect; None: the host that it listens at.
    """
    security = settings.security
    if security.certificate is None or security.private_key is None:
        return
    try:
        server_credentials(security)
        certificate = shown(security.certificate, security.private_key)
    except ConfigInvalid as error:
        yield fail(str(error))
        return
    except ssl.SSLCertVerificationError as error:
        yield fail(
            f"security.certificate {security.certificate} is refused by every client: "
            f"{error.verify_message}; renew it, it is read again without a restart"
        )
        return
    left = ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()
    until = f"until {certificate['notAfter']}"
    if left < _SOON:
        yield warn(
            f"security.certificate {security.certificate} is good {until} only; renew it, it is "
            "read again without a restart"
        )
    else:
        yield ok(f"security.certificate is good {until}")
    yield named(security.certificate, security.private_key, name or _host(settings))


def named(certificate: Path, private_key: Path, name: str) -> Finding:
    """Whether clients who expect a name will take the certificate."""
    try:
        found = shown(certificate, private_key, name)
    except ssl.SSLCertVerificationError:
        names = _names(shown(certificate, private_key))
        if not names:
            return fail(
                f"security.certificate {certificate} names nobody (no subjectAltName), so that "
                "every client refuses it; issue one that does"
            )
        return warn(
            f'security.certificate {certificate} is for {names}, not for "{name}"; clients have '
            "to call it by one of its names, or say --tls-server-name"
        )
    return ok(f'security.certificate is for {_names(found)}, so for "{name}"')


def shown(certificate: Path, private_key: Path, name: str | None = None) -> dict[str, object]:
    """What a client is shown, as `ssl.SSLSocket.getpeercert` gives it, by a handshake in memory.

    Args:
        certificate: PEM file, the server's own first.
        private_key: PEM file.
        name: whom the client expects; None: anybody.

    Raises:
        ssl.SSLCertVerificationError: the client refuses it, though it trusts who signed it.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, private_key)
    own = re.search("-----BEGIN CERT.*?-----END CERTIFICATE-----", certificate.read_text(), re.S)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = name is not None
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cadata=own[0] if own else "")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(ends)
    while waiting:
        for end in list(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
    return dict(ends[0].getpeercert() or {})


def _names(certificate: dict[str, object]) -> str:
    names = certificate.get("subjectAltName", ())
    assert isinstance(names, tuple)
    return ", ".join(value for _, value in names)


def _host(settings: Settings) -> str:
    host = settings.server.listen.rpartition(":")[0]
    if host in _EVERYWHERE:
        return socket.gethostname()
    return "localhost" if is_loopback(host) and not host[0].isdigit() else host.strip("[]")
