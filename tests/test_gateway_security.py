"""Who may call the gateway, over TLS and plain HTTP; workers, and the gateway alone."""

import asyncio
import json
import os
import signal
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from bestroute.app import serving
from bestroute.config import ConfigInvalid
from bestroute.guard.keys import new_key
from tests.certificates import Authority
from tests.gateways import EASY, asking, pool, said, whole, with_gateway
from tests.issuers import AUDIENCE, ISSUER, SigningKey
from tests.scrapes import text_at
from tests.upstreams import Wire

BODY = {"model": "bestroute/auto", "messages": EASY}


async def test_keys_and_tokens_are_those_of_grpc(
    tiny_bundle: Path, wire: Wire, tmp_path: Path
) -> None:
    wire.replies = [whole(said("yes"))]
    key, line = new_key("alice")
    (tmp_path / "keys.toml").write_text(line)
    signing = SigningKey("k1")
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [signing.public()]}))
    security = {
        "api_keys_file": tmp_path / "keys.toml",
        "jwks_file": tmp_path / "jwks.json",
        "issuer": ISSUER,
        "audience": AUDIENCE,
    }
    callers = {"alice": {"max_priority": "normal"}}
    settings = pool(tiny_bundle, wire.url)
    async with asking(
        settings, security=security, callers=callers, metrics={"listen": "127.0.0.1:0"}
    ) as gateway:
        nobody = await gateway.post(b"not even JSON")
        wrong = await gateway.post(BODY, authorization="Bearer br-wrong")
        alice = await gateway.post(BODY, authorization=f"Bearer {key}")
        by_header = await gateway.post(BODY, x_api_key=key)
        both = await gateway.post(BODY, x_api_key=key, authorization=f"Bearer {key}")
        token = await gateway.post(BODY, authorization=f"Bearer {signing.token()}")
        urgent = await gateway.post(BODY, x_api_key=key, bestroute_priority="high")
        low = await gateway.post(BODY, x_api_key=key, bestroute_priority="low")
        healthy = await gateway.get("/health/live")
        assert gateway.running.metrics is not None
        scraped = await asyncio.to_thread(text_at, gateway.running.metrics)

    for refused in (nobody, wrong, both):
        assert (refused.status, refused.error["code"]) == (401, "invalid_api_key")
        assert refused.headers["www-authenticate"] == "Bearer"
    statuses = [each.status for each in (alice, by_header, token, low, healthy)]
    assert statuses == [200, 200, 200, 200, 200]
    assert (urgent.status, urgent.error["code"]) == (403, "permission_denied")
    assert b"br-" not in b"".join(wire.heads), "callers' keys stay here"
    counted = [x for x in scraped.splitlines() if x.startswith("bestroute_caller_rpcs_total")]
    alices = {x.rpartition(" ")[0]: x.split()[1] for x in counted if 'caller="alice"' in x}
    assert [count for labels, count in alices.items() if 'code="OK"' in labels] == ["4.0"]


async def test_with_certificates_http_is_https_and_follows_them(
    tiny_bundle: Path, wire: Wire, tmp_path: Path
) -> None:
    wire.replies = [whole(said("yes"))]
    authority, certificate, key = Authority(), tmp_path / "cert.pem", tmp_path / "key.pem"
    first, second = authority.issue("first"), authority.issue("second")
    first.write(certificate, key)
    trusting = ssl.create_default_context(cadata=authority.certificate.decode())
    security = {"certificate": certificate, "private_key": key}
    async with asking(pool(tiny_bundle, wire.url), security=security) as gateway:
        address = gateway.running.gateway
        assert address is not None
        with pytest.raises(aiohttp.ClientError):
            await gateway.post(BODY)
        serials = [await asyncio.to_thread(_serial, address, trusting)]
        second.write(certificate, key)
        serials.append(await asyncio.to_thread(_serial, address, trusting))
        certificate.write_text("half of a file")
        serials.append(await asyncio.to_thread(_serial, address, trusting))
        url = f"https://{address}/v1/chat/completions"
        async with gateway.session.post(url, json=BODY, ssl=trusting) as response:
            assert response.status == 200

    assert serials == [first.serial, second.serial, second.serial]


async def test_clients_certificates_name_their_callers(
    tiny_bundle: Path, wire: Wire, tmp_path: Path
) -> None:
    wire.replies = [whole(said("yes"))]
    authority = Authority()
    authority.issue("server").write(tmp_path / "cert.pem", tmp_path / "key.pem")
    authority.issue("bob").write(tmp_path / "bob.pem", tmp_path / "bob.key")
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    trusting = ssl.create_default_context(cadata=authority.certificate.decode())
    security = {
        "certificate": tmp_path / "cert.pem",
        "private_key": tmp_path / "key.pem",
        "client_ca": tmp_path / "ca.pem",
    }
    callers = {"localhost": {"max_priority": "low"}}  # the first of bob's alternative names
    async with asking(pool(tiny_bundle, wire.url), security=security, callers=callers) as gateway:
        url = f"https://{gateway.running.gateway}/v1/chat/completions"
        with pytest.raises(aiohttp.ClientError):
            await gateway.session.post(url, json=BODY, ssl=trusting)
        trusting.load_cert_chain(tmp_path / "bob.pem", tmp_path / "bob.key")
        headers = {"bestroute-priority": "normal"}
        async with gateway.session.post(url, json=BODY, ssl=trusting, headers=headers) as urgent:
            assert urgent.status == 403
        async with gateway.session.post(url, json=BODY, ssl=trusting) as response:
            assert response.status == 200


def _serial(address: str, trusting: ssl.SSLContext) -> int:
    """The serial number of the certificate that whoever connects now is shown."""
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 10) as connection,
        trusting.wrap_socket(connection, server_hostname=host) as secured,
    ):
        shown = secured.getpeercert()
    assert shown is not None
    return int(str(shown["serialNumber"]), 16)


async def test_a_taken_port_is_told(tiny_bundle: Path, wire: Wire) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigInvalid, match=r"gateway\.listen"):
            async with asking(pool(tiny_bundle, wire.url), gateway={"listen": listen}):
                pass


@pytest.mark.parametrize("workers", [1, 2])
async def test_alone_it_serves_http_and_ends_in_order(
    tiny_bundle: Path, wire: Wire, tmp_path: Path, unused_tcp_port: int, workers: int
) -> None:
    """`bestroute gateway` as a process; two workers share its port."""
    wire.replies = [whole(said("yes"))]
    config = tmp_path / "bestroute.toml"
    models = "".join(f'[models.{name}]\nprovider = "p"\n' for name in ("small", "medium", "large"))
    config.write_text(f'bundle = "{tiny_bundle}"\n[providers.p]\nbase_url = "{wire.url}"\n{models}')
    listen = f"127.0.0.1:{unused_tcp_port}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bestroute", "gateway", "--config", str(config)),
        *("--listen", listen, "--workers", str(workers)),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    try:
        log = b""
        while b"serves bundle" not in log:
            line = await process.stderr.readline()
            assert line, log.decode()
            log += line
        assert f"on {listen}".encode() in log
        statuses = [await _asked_anew(f"http://{listen}") for _ in range(8)]
        async with grpc.aio.insecure_channel(listen) as channel:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await channel.channel_ready()
        process.send_signal(signal.SIGTERM)
        log += await process.stderr.read()
        assert await process.wait() == 0, log.decode()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert statuses == [200] * 8
    assert b"Traceback" not in log, log.decode()
    assert log.count(b"OpenAI-compatible API at") == workers


async def _asked_anew(url: str) -> int:
    """The status of an answer over a connection of its own."""
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/chat/completions", json=BODY) as response,
    ):
        return response.status


async def test_bytes_that_are_no_http_harm_nobody(
    tiny_bundle: Path, wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    wire.replies = [whole(said("yes"))]
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        address = gateway.running.gateway
        assert address is not None
        for junk in (
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n{",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ):
            await _send(address, junk)
        assert (await gateway.post(BODY)).status == 200
    assert not [r for r in caplog.records if r.levelname == "ERROR" and "bestroute" in r.name]


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"x-bestroute-target: \xff", "must be like one of"),
        (b"x-bestroute-models: \xff", "there is no model"),
        (b"bestroute-priority: \xff", "must be high, normal or low"),
        (b"Content-Encoding: gzip", "gzip"),
    ],
)
async def test_what_can_t_be_decoded_is_the_caller_s_fault(
    tiny_bundle: Path, wire: Wire, caplog: pytest.LogCaptureFixture, head: bytes, words: str
) -> None:
    body = json.dumps(BODY).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n%b\r\n\r\n"
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        host, _, port = str(gateway.running.gateway).rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request % (len(body), head) + body)
        answer = await reader.readuntil(b"}}")
        writer.close()

    status, _, _ = answer.partition(b"\r\n")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert (status, error["code"]) == (b"HTTP/1.1 400 Bad Request", "invalid_value")
    assert words in error["message"]
    assert not [r for r in caplog.records if r.levelname == "ERROR" and "bestroute" in r.name]


async def _send(address: str, junk: bytes) -> None:
    host, _, port = address.rpartition(":")
    _reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(junk)
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()


async def test_nothing_listens_unless_it_is_set(tiny_bundle: Path, wire: Wire) -> None:
    async with serving(pool(tiny_bundle, wire.url)) as running:
        assert running.gateway is None


def test_settings_with_a_gateway_survive_the_way_to_a_worker(tiny_bundle: Path) -> None:
    settings: Any = with_gateway(pool(tiny_bundle, "http://127.0.0.1:1/v1"))

    assert type(settings).model_validate_json(settings.model_dump_json()) == settings
