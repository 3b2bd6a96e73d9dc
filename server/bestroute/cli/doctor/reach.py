"""Why a service can't be reached: what its address, a proxy or TLS has to do with it.

Only asked where it can't, or where the address alone tells; needs nothing that isn't small.
"""

import argparse
import os
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path

from bestroute.cli.doctor.findings import Finding, fail, warn

_TIMEOUT = 2.0
_PORT = 50051
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")
"""What gRPC reads, the first that is set, in small letters only."""


def unusable(address: str) -> Finding | None:
    """What is wrong with how an address is written."""
    if found := re.match(r"(https?|grpcs?|tcp|tls)://([^/]*)", address):
        scheme, rest = found.groups()
        tls = " and add --tls" if scheme in ("https", "grpcs", "tls") else ""
        return fail(
            f"--address {address}: an address is host:port; write {rest or 'host'}"
            f"{'' if _has_port(rest) else f':{_PORT}'}, without {scheme}://{tls}"
        )
    if not re.match(r"(unix|unix-abstract|vsock|xds|passthrough):", address):
        rest = re.sub(r"^(dns|ipv4|ipv6):", "", address).rpartition("/")[2]
        if not _has_port(rest):
            return fail(f"--address {address} has no port, as in {address}:{_PORT}")
    return None


def captured(address: str, environment: Mapping[str, str] = os.environ) -> Finding | None:  # noqa: TID251
    """A proxy in the environment that gRPC would send calls to an address through."""
    name = next((name for name in _PROXIES if environment.get(name)), None)
    host, _ = host_and_port(address)
    if name is None or host is None or _excepted(host, environment):
        return None
    excepted = environment.get("no_proxy", "")
    value = f"{excepted},{host}" if excepted else host
    return warn(
        f"{name} is set, so gRPC calls {address} through that proxy, even on this machine; "
        f"if that isn't meant, set no_proxy={value} (in small letters)"
    )


def why(args: argparse.Namespace) -> Iterator[Finding]:
    """What is found at the address by other means than gRPC."""
    host, port = host_and_port(args.address)
    if host is None or port is None:
        return
    tls = bool(args.tls or args.tls_ca or args.tls_cert)
    try:
        with socket.create_connection((host, port), _TIMEOUT):
            pass
    except ConnectionRefusedError:
        return  # gRPC has said so
    except socket.gaierror as error:
        yield fail(f'the name "{host}" is not known here ({error.strerror}); see --address')
        return
    except TimeoutError:
        yield fail(
            f"{args.address} doesn't even accept a connection: is there a firewall, or a "
            "NetworkPolicy, between, or is it another machine's address?"
        )
        return
    except OSError as error:
        yield fail(f"{args.address}: {error.strerror or error}")
        return
    speaks_tls = _shakes_hands(host, port)
    if not tls and speaks_tls:
        yield fail(
            f"{args.address} speaks TLS, but was called in the clear; add --tls, or --tls-ca FILE "
            "where its certificate is signed by an authority of your own"
        )
    elif not tls and _speaks_http(host, port):
        yield fail(
            f"{args.address} is a server of HTTP/1, not of gRPC; is it the gateway, or the "
            "metrics? gRPC is at server.listen, 50051 by default"
        )
    elif tls and not speaks_tls:
        yield fail(f"{args.address} doesn't speak TLS; leave --tls, --tls-ca and --tls-cert away")
    elif tls:
        yield from _untrusted(host, port, args)


def host_and_port(address: str) -> tuple[str | None, int | None]:
    """Of a target of gRPC's; None where it has none."""
    if re.match(r"(unix|unix-abstract|vsock|xds|passthrough):", address):
        return None, None
    rest = re.sub(r"^(dns|ipv4|ipv6):", "", address).rpartition("/")[2]
    host, _, port = rest.rpartition(":")
    return host.strip("[]") or None, int(port) if port.isdecimal() else None


def _has_port(rest: str) -> bool:
    host, _, port = rest.rpartition(":")
    return bool(host) and port.isdecimal() and not (host.count(":") and not host.endswith("]"))


def _excepted(host: str, environment: Mapping[str, str]) -> bool:
    """Whether a host is among those that gRPC calls without a proxy, by its end or its network."""
    for name in _EXCEPTIONS:
        if environment.get(name):
            entries = [entry.strip() for entry in environment[name].split(",")]
            return any(host.endswith(entry) or _within(host, entry) for entry in entries if entry)
    return False


def _within(host: str, network: str) -> bool:
    try:
        return ip_address(host) in ip_network(network, strict=False)
    except ValueError:
        return False


def _shakes_hands(host: str, port: int) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), _TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except OSError:
        return False


def _speaks_http(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), _TIMEOUT) as plain:
            plain.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            return plain.recv(7) == b"HTTP/1."
    except OSError:
        return False


def _untrusted(host: str, port: int, args: argparse.Namespace) -> Iterator[Finding]:
    """Why the certificate that is shown is not trusted."""
    name = args.tls_server_name or host
    ca: Path | None = args.tls_ca
    try:
        context = ssl.create_default_context(cafile=None if ca is None else str(ca))
        with (
            socket.create_connection((host, port), _TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=name),
        ):
            pass
    except ssl.SSLCertVerificationError as error:
        said = error.verify_message
        if "mismatch" in said:
            remedy = f'it is not for "{name}"; name one that it has with --tls-server-name'
        elif "expired" in said or "not yet valid" in said:
            remedy = f"{said}; renew it, or set the clock right"
        else:
            remedy = f"{said}; name who signed it with --tls-ca"
        yield fail(f"{args.address} shows a certificate that can't be trusted: {remedy}")
    except OSError as error:
        yield fail(f"{args.address} or --tls-ca: {error}")
    else:
        if args.tls_cert is None:
            yield fail(
                f"{args.address} can be trusted, but ends the connection; where it wants a "
                "certificate of its clients' (mutual TLS), show one: --tls-cert and --tls-key"
            )
