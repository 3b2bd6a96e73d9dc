"""The server's certificates: whoever connects gets the newest, who is connected notices nothing."""

import logging
import os
import ssl
from pathlib import Path
from typing import NamedTuple

import grpc

from bestroute.config import ConfigInvalid, Security

_log = logging.getLogger(__name__)


class _Files(NamedTuple):
    certificate: Path
    private_key: Path
    client_ca: Path | None


class _Contents(NamedTuple):
    certificate: bytes
    private_key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


def server_credentials(security: Security) -> grpc.ServerCredentials | None:
    """Credentials that follow their files; None: the server talks in the clear.

    Raises:
        ConfigInvalid: the files can't be read, or don't belong together.
    """
    if security.certificate is None or security.private_key is None:
        return None
    files = _Files(security.certificate, security.private_key, security.client_ca)
    followed = Certificates(files)

    def changed() -> grpc.ServerCertificateConfiguration | None:
        contents = followed.changed()
        return None if contents is None else _configuration(contents)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(followed.first),
        changed,  # type: ignore[arg-type]  # None says: as before
        require_client_authentication=files.client_ca is not None,
    )


def server_context(security: Security) -> ssl.SSLContext | None:
    """The same for HTTP: a context that follows its files; None: the server talks in the clear.

    Raises:
        ConfigInvalid: the files can't be read, or don't belong together.
    """
    if security.certificate is None or security.private_key is None:
        return None
    files = _Files(security.certificate, security.private_key, security.client_ca)
    followed = Certificates(files)
    latest = followed.first.context

    def connecting(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        nonlocal latest
        if (contents := followed.changed()) is not None:
            latest = contents.context
        connection.context = latest

    context = followed.first.context
    context.sni_callback = connecting  # called whether or not the client names a server
    return context


class Certificates:
    """Certificates in files.

    They are looked at when a client connects: four `stat` beside a handshake of a millisecond.

    Args:
        files: theirs.

    Attributes:
        first: what the files hold at first.

    Raises:
        ConfigInvalid: they can't be read, or don't belong together.
    """

    def __init__(self, files: _Files) -> None:
        self._files = files
        self._seen = self._state()
        self.first = _read(files)

    def changed(self) -> _Contents | None:
        """What the files hold, if that is new and good; else the last good one goes on serving."""
        state = self._state()
        if state == self._seen:
            return None
        try:
            contents = _read(self._files)
        except ConfigInvalid as error:
            # May be half of a change; the other half is another state.
            self._seen = state
            _log.warning("%s; the certificate that serves stays", error)
            return None
        if self._state() != state:  # changed as it was read: the next to connect looks again
            return None
        self._seen = state
        _log.info("serving the new certificate of %s", self._files.certificate)
        return contents

    def _state(self) -> tuple[object, ...]:
        """Differs from any earlier one, once a file has been written or replaced."""
        states: list[object] = []
        for file in self._files:
            if file is not None:
                try:
                    found = os.stat(file)
                except OSError:
                    states.append(None)
                else:
                    states.append((found.st_mtime_ns, found.st_size, found.st_ino))
        return tuple(states)


def _configuration(contents: _Contents) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(contents.private_key, contents.certificate)], root_certificates=contents.client_ca
    )


def _read(files: _Files) -> _Contents:
    """What the files hold.

    Raises:
        ConfigInvalid: one can't be read, or they don't belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        contents = _Contents(
            files.certificate.read_bytes(),
            files.private_key.read_bytes(),
            None if files.client_ca is None else files.client_ca.read_bytes(),
            context,
        )
    except OSError as error:
        raise ConfigInvalid(f"security: a file of TLS can't be read: {error}") from error
    try:
        # gRPC takes any bytes, and then refuses every client.
        context.load_cert_chain(files.certificate, files.private_key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        raise ConfigInvalid(
            f"security.certificate {files.certificate} and security.private_key "
            f"{files.private_key} are no pair in PEM without a passphrase ({error})"
        ) from error
    if contents.client_ca is not None:
        try:
            context.load_verify_locations(cadata=contents.client_ca.decode())
            context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:
            raise ConfigInvalid(
                f"security.client_ca {files.client_ca} holds no certificates in PEM ({error})"
            ) from error
    return contents


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase")  # else OpenSSL asks on the terminal
