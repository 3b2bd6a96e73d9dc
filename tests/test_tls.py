"""TLS and mTLS over real connections: who is let in, and certificates that change under load."""

import asyncio
import logging
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from bestroute.app import Running, serving
from bestroute.cli import main
from bestroute.client import Client
from bestroute.config import ConfigInvalid, Settings
from bestroute.errors import DeadlineExceeded
from bestroute.guard.callers import certified
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests.certificates import Authority, Issued
from tests.test_server import process

URGENT = (("bestroute-priority", "high"),)


@dataclass
class Files:
    """What a server with TLS reads."""

    certificate: Path
    private_key: Path

    def write(self, issued: Issued) -> None:
        issued.write(self.certificate, self.private_key)


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> Files:
    files = Files(tmp_path / "server.pem", tmp_path / "server.key")
    files.write(authority.issue("first"))
    return files


def secured(settings: Settings, files: Files, **more: Any) -> Settings:
    """The settings with TLS; callers may be urgent only if they have limits of their own."""
    return Settings.model_validate(
        {
            **settings.model_dump(),
            "security": {
                "certificate": files.certificate,
                "private_key": files.private_key,
                **more,
            },
            "callers": {
                "default": {"max_priority": "low"},
                "billing": {},
                "spiffe://test/router": {},
            },
        }
    )


@pytest.fixture
async def server(settings: Settings, files: Files) -> AsyncIterator[Running]:
    plain = secured(settings, files).model_copy(update={"callers": {}})
    async with serving(plain) as running:
        yield running


def trusting(authority: Authority, client: Issued | None = None) -> grpc.ChannelCredentials:
    if client is None:
        return grpc.ssl_channel_credentials(authority.certificate)
    return grpc.ssl_channel_credentials(authority.certificate, client.key, client.certificate)


async def serial(address: str) -> int:
    """Of the certificate that a new connection is shown."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, port = address.split(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return x509.load_der_x509_certificate(shown).serial_number


async def test_whoever_trusts_the_authority_is_served(
    server: Running, authority: Authority
) -> None:
    async with Client(server.address, credentials=trusting(authority)) as client:
        assert (await client.route("easy")).arm.model
        assert await client.check("readiness")


@pytest.mark.parametrize("credentials", [None, trusting(Authority("another"))])
async def test_nobody_is_served_in_the_clear_or_by_another_name(
    server: Running, credentials: grpc.ChannelCredentials | None
) -> None:
    async with Client(server.address, credentials=credentials) as client:
        with pytest.raises((grpc.aio.AioRpcError, DeadlineExceeded)):
            await client.list_arms()


async def test_certificates_change_without_a_dropped_connection(
    server: Running, authority: Authority, files: Files
) -> None:
    async with (
        Client(server.address, credentials=trusting(authority)) as client,
        client.stream() as stream,
    ):
        await stream.route("easy")
        before = await serial(server.address)
        calls = asyncio.gather(*(client.route(f"word{i} easy") for i in range(50)))
        second = authority.issue("second")
        files.write(second)

        assert await serial(server.address) == second.serial != before
        assert len(await calls) == 50
        # On connections from before.
        assert (await stream.route("easy")).arm.model
        assert (await client.route("easy")).arm.model
    async with Client(server.address, credentials=trusting(authority)) as later:
        assert (await later.route("easy")).arm.model


async def test_a_whole_new_authority_can_take_over(
    server: Running, authority: Authority, files: Files
) -> None:
    another = Authority("another")
    async with Client(server.address, credentials=trusting(authority)) as former:
        await former.route("easy")
        files.write(another.issue("second"))
        async with Client(server.address, credentials=trusting(another)) as later:
            assert (await later.route("easy")).arm.model
        assert (await former.route("easy")).arm.model


@pytest.mark.parametrize("fault", ["garbage", "half", "missing", "strange key", "empty"])
async def test_a_bad_new_file_leaves_the_old_certificate_serving(
    server: Running,
    authority: Authority,
    files: Files,
    fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    old = await serial(server.address)
    new = authority.issue("second")
    match fault:
        case "garbage":
            files.certificate.write_bytes(b"-----BEGIN CERTIFICATE-----\nnonsense\n")
        case "half":
            files.certificate.write_bytes(new.certificate[:200])
        case "missing":
            files.private_key.unlink()
        case "strange key":  # the first half of a change
            files.private_key.write_bytes(new.key)
        case "empty":
            files.certificate.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert await serial(server.address) == old
    [complaint] = [r.message for r in caplog.records if r.name == "bestroute.guard.tls"]
    assert "stays" in complaint

    files.write(new)
    assert await serial(server.address) == new.serial


@pytest.mark.parametrize("fault", ["missing", "mismatched", "passphrase", "authority"])
async def test_a_server_does_not_start_with_bad_files(
    settings: Settings, files: Files, authority: Authority, tmp_path: Path, fault: str
) -> None:
    more: dict[str, Any] = {}
    match fault:
        case "missing":
            files.certificate.unlink()
        case "mismatched":
            files.private_key.write_bytes(authority.issue("another").key)
        case "passphrase":
            files.write(authority.issue("first", passphrase=b"secret"))
        case "authority":
            more["client_ca"] = tmp_path / "ca.pem"
            more["client_ca"].write_bytes(b"nothing")
    with pytest.raises(ConfigInvalid, match=r"client_ca" if more else r"server\.(pem|key)"):
        async with serving(secured(settings, files, **more)):
            pass


async def asked_urgently(address: str, credentials: grpc.ChannelCredentials) -> None:
    async with grpc.aio.secure_channel(address, credentials) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        await stub.Route(pb.RouteRequest(prompt="easy"), metadata=URGENT, timeout=20)


async def test_mutual_tls_lets_in_who_the_authority_signed_by_the_name_it_signed(
    settings: Settings, files: Files, authority: Authority, tmp_path: Path
) -> None:
    clients = Authority("clients")
    ca = tmp_path / "clients.pem"
    ca.write_bytes(clients.certificate)
    async with serving(secured(settings, files, client_ca=ca)) as server:
        billing = trusting(authority, clients.issue("x", x509.DNSName("billing")))
        spiffe = x509.UniformResourceIdentifier("spiffe://test/router")
        await asked_urgently(server.address, billing)
        await asked_urgently(server.address, trusting(authority, clients.issue("x", spiffe)))

        other = trusting(authority, clients.issue("other"))
        with pytest.raises(grpc.aio.AioRpcError) as known:
            await asked_urgently(server.address, other)
        assert known.value.code() is grpc.StatusCode.PERMISSION_DENIED
        async with Client(server.address, credentials=other) as client:
            assert (await client.route("easy")).arm.model == "small"

        for stranger in (None, Authority("stranger").issue("x", x509.DNSName("billing"))):
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await asked_urgently(server.address, trusting(authority, stranger))
            assert unknown.value.code() is grpc.StatusCode.UNAVAILABLE

        # The authority of clients follows its file as well.
        ca.write_bytes(Authority("clients").certificate)
        with pytest.raises(grpc.aio.AioRpcError):
            await asked_urgently(server.address, billing)


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({}, None),
        ({"x509_common_name": [b"cn"]}, "cn"),
        ({"x509_common_name": [b"cn"], "x509_subject_alternative_name": [b"a", b"b"]}, "a"),
        (
            {"x509_subject_alternative_name": [b"a"], "peer_spiffe_id": [b"spiffe://x"]},
            "spiffe://x",
        ),
    ],
)
def test_the_name_in_a_certificate(found: dict[str, list[bytes]], name: str | None) -> None:
    assert certified(found) == name


async def test_the_command_line_reaches_a_server_with_mutual_tls(
    settings: Settings,
    files: Files,
    authority: Authority,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.certificate)
    authority.issue("me").write(tmp_path / "me.pem", tmp_path / "me.key")
    files.write(authority.issue("router", x509.DNSName("router.internal")))
    shown = ["--tls-cert", str(tmp_path / "me.pem"), "--tls-key", str(tmp_path / "me.key")]
    async with serving(secured(settings, files, client_ca=ca)) as server:
        there = ["--address", server.address, "--tls-ca", str(ca)]
        there += ["--tls-server-name", "router.internal"]
        assert await asyncio.to_thread(main, ["doctor", "--quiet", *there, *shown]) == 0
        assert await asyncio.to_thread(main, ["route", "easy", *there, *shown]) == 0
        assert await asyncio.to_thread(main, ["doctor", "--quiet", *there]) == 1
        assert await asyncio.to_thread(main, ["route", "easy", *there, *shown[:2]]) == 2
        assert await asyncio.to_thread(main, ["route", "easy", "--address", server.address]) == 1
    told = capsys.readouterr().err
    assert "--tls-cert and --tls-key go together" in told
    assert "--tls" in told.splitlines()[-1]


async def test_a_caller_over_its_priority_is_told(
    settings: Settings, files: Files, authority: Authority
) -> None:
    async with serving(secured(settings, files)) as server:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asked_urgently(server.address, trusting(authority))
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "low at most, not high" in str(error.value.details())


async def test_workers_follow_their_certificates_too(
    tiny_bundle: Path, files: Files, authority: Authority
) -> None:
    environment = {
        "BESTROUTE_BUNDLE": str(tiny_bundle),
        "BESTROUTE_SECURITY__CERTIFICATE": str(files.certificate),
        "BESTROUTE_SECURITY__PRIVATE_KEY": str(files.private_key),
    }
    with process("--workers", "2", **environment) as (_, address):
        new = authority.issue("second")
        files.write(new)
        for _ in range(6):  # which worker a connection gets is the kernel's choice
            assert await serial(address) == new.serial
        async with Client(address, credentials=trusting(authority)) as client:
            assert (await client.route("easy")).arm.model


@pytest.mark.skipif(os.name == "nt", reason="permissions are those of POSIX")
async def test_a_private_key_that_all_can_read_is_warned_of(
    settings: Settings, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    files.private_key.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        async with serving(secured(settings, files)):
            pass
    assert any("can be read by every user" in record.message for record in caplog.records)
