"""`bestroute doctor` and services that can't be reached, or aren't well."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web
from cryptography import x509
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from bestroute import __version__
from bestroute.app import Running, serving
from bestroute.cli.doctor import reach
from bestroute.cli.doctor.service import told
from bestroute.client import Client
from bestroute.client.channel import SERVICE
from bestroute.config import Operations, Security, Settings
from bestroute.v1 import operations_pb2 as pb
from bestroute.v1 import routing_pb2
from tests.certificates import Authority
from tests.doctoring import NOBODY, Doctor
from tests.generating import DOWN, by_model, configured
from tests.upstreams import Wire


async def test_all_is_well(doctor: Doctor, server: Running) -> None:
    done = await doctor("--address", server.address)

    assert done.code == 0
    assert done.levels("WARN") == done.levels("FAIL") == []
    done.line("ok", f"{server.address} answers")
    done.line("ok", "bundle tiny-1: 4 arms of 3 models, reference large")
    done.line("ok", "is installed, and no other ONNX Runtime")
    done.line("ok", "files open")


async def test_levels_are_in_the_json(doctor: Doctor, server: Running) -> None:
    well = json.loads((await doctor("--json", "--address", server.address)).out)
    lost = json.loads((await doctor("--json", "--address", NOBODY)).out)

    assert {check["level"] for check in well["checks"]} == {"ok"}
    assert lost["checks"][0] == {
        "passed": False,
        "level": "fail",
        "finding": lost["checks"][0]["finding"],
    }
    assert (well["well"], lost["well"]) == (True, False)


# how the address is written


@pytest.mark.parametrize(
    ("address", "instead"),
    [
        ("http://127.0.0.1:50051", "write 127.0.0.1:50051, without http://"),
        ("https://router", "write router:50051, without https:// and add --tls"),
        ("grpc://router:1/x", "write router:1, without grpc://"),
        ("router", "router has no port, as in router:50051"),
        ("dns:///router", "has no port"),
        ("10.0.0.1", "10.0.0.1 has no port"),
        ("::1", "::1 has no port"),
    ],
)
async def test_addresses_are_corrected(doctor: Doctor, address: str, instead: str) -> None:
    done = await doctor("--quiet", "--address", address)

    assert done.code == 1
    assert instead in done.line("FAIL", "--address")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:1", "[::1]:1", "dns:///name:1", "ipv4:127.0.0.1:1", "unix:/tmp/x", "a.b:1"],
)
def test_good_addresses_are_taken(address: str) -> None:
    assert reach.unusable(address) is None


# proxies


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
async def test_a_proxy_that_captures_the_call_is_named(server: Running, variable: str) -> None:
    """In a process of its own, since gRPC reads the environment by itself."""
    there = ("doctor", "--quiet", "--address", server.address)
    proxy = f"http://{NOBODY}"

    captured = await asyncio.to_thread(command, *there, **{variable: proxy})
    excepted = await asyncio.to_thread(
        command, *there, **{variable: proxy, "no_proxy": "example.org,127.0.0.1"}
    )
    ignored = await asyncio.to_thread(command, *there, **{variable.upper(): proxy})

    assert captured.returncode == 1
    assert (
        f"WARN  {variable} is set, so gRPC calls {server.address} through that" in captured.stderr
    )
    assert "set no_proxy=127.0.0.1" in captured.stderr
    assert (excepted.returncode, excepted.stderr) == (0, "")
    assert (ignored.returncode, ignored.stderr) == (0, "")


def test_exceptions_may_be_networks() -> None:
    proxy = {"http_proxy": "http://proxy:1"}

    assert reach.captured("10.1.2.3:1", {**proxy, "no_proxy": "10.0.0.0/8"}) is None
    assert reach.captured("10.1.2.3:1", {**proxy, "no_proxy": "11.0.0.0/8"}) is not None
    assert reach.captured("unix:/tmp/x", proxy) is None


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    proxies = ("grpc_proxy", "https_proxy", "http_proxy", "no_proxy", "no_grpc_proxy")
    kept = {k: v for k, v in os.environ.items() if k.lower() not in proxies}
    return subprocess.run(
        [sys.executable, "-m", "bestroute", *arguments],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


# TLS, and what else may be there


@asynccontextmanager
async def with_tls(
    settings: Settings, directory: Path, name: str = "localhost", *, mutual: bool = False
) -> AsyncIterator[tuple[str, str]]:
    """A server with TLS: its address, and the file of who signed its certificate."""
    authority = Authority()
    (ca := directory / "ca.pem").write_bytes(authority.certificate)
    files = directory / "tls.crt", directory / "tls.key"
    names = () if name == "localhost" else (x509.DNSName(name),)
    authority.issue(name, *names).write(*files)
    security = Security(
        certificate=files[0], private_key=files[1], client_ca=ca if mutual else None
    )
    async with serving(settings.model_copy(update={"security": security})) as running:
        yield running.address, str(ca)


async def test_plaintext_to_tls_is_told_apart(
    doctor: Doctor, settings: Settings, tmp_path: Path
) -> None:
    async with with_tls(settings, tmp_path) as (address, ca):
        plain = await doctor("--quiet", "--address", address)
        right = await doctor("--quiet", "--address", address, "--tls-ca", ca)

    assert plain.code == 1
    assert "add --tls, or --tls-ca FILE" in plain.line("FAIL", "speaks TLS, but was called in the")
    assert (right.code, right.err) == (0, "")


async def test_tls_to_plaintext_is_told_apart(
    doctor: Doctor, server: Running, tmp_path: Path
) -> None:
    (ca := tmp_path / "ca.pem").write_bytes(Authority().certificate)

    done = await doctor("--quiet", "--address", server.address, "--tls-ca", ca)

    assert done.code == 1
    assert "leave --tls, --tls-ca and --tls-cert away" in done.line("FAIL", "doesn't speak TLS")


async def test_an_unknown_authority_is_named(
    doctor: Doctor, settings: Settings, tmp_path: Path
) -> None:
    (other := tmp_path / "other.pem").write_bytes(Authority("another").certificate)
    async with with_tls(settings, tmp_path) as (address, _):
        done = await doctor("--quiet", "--address", address, "--tls-ca", other)

    assert "name who signed it with --tls-ca" in done.line("FAIL", "certificate that can't be tru")


async def test_a_certificate_for_another_is_named(
    doctor: Doctor, settings: Settings, tmp_path: Path
) -> None:
    async with with_tls(settings, tmp_path, "router.example") as (address, ca):
        wrong = await doctor("--quiet", "--address", address, "--tls-ca", ca)
        there = ("--quiet", "--address", address, "--tls-ca", ca)
        right = await doctor(*there, "--tls-server-name", "router.example")

    assert "--tls-server-name" in wrong.line("FAIL", 'it is not for "127.0.0.1"')
    assert (right.code, right.err) == (0, "")


async def test_a_server_that_wants_certificates_is_named(
    doctor: Doctor, settings: Settings, tmp_path: Path
) -> None:
    async with with_tls(settings, tmp_path, mutual=True) as (address, ca):
        done = await doctor("--quiet", "--address", address, "--tls-ca", ca)

    assert "--tls-cert and --tls-key" in done.line("FAIL", "mutual TLS")


async def test_a_web_server_is_told_apart(doctor: Doctor) -> None:
    runner = web.AppRunner(web.Application())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    address = "{}:{}".format(*runner.addresses[0][:2])

    done = await doctor("--quiet", "--address", address)
    await runner.cleanup()

    assert done.code == 1
    assert "is it the gateway" in done.line("FAIL", "is a server of HTTP/1, not of gRPC")


async def test_another_grpc_service_is_told_apart(doctor: Doctor) -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    done = await doctor("--quiet", "--address", f"127.0.0.1:{port}")
    await server.stop(None)

    done.line("FAIL", "is not a bestroute service")


async def test_unknown_names_are_told(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver is not asked for real, since there may be none."""

    def unknown(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    done = await doctor("--quiet", "--timeout", "1", "--address", "router.invalid:50051")

    done.line("FAIL", 'the name "router.invalid" is not known here')


async def test_who_accepts_and_says_nothing_is_no_service(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        done = await doctor("--quiet", "--timeout", "0.5", "--address", address)

    assert done.code == 1
    assert "within 0.5 s" in done.levels("FAIL")[0] or "can't be reached" in done.err


# services that aren't well


async def test_an_older_service_is_named(doctor: Doctor) -> None:
    """It has all but OperationsService."""

    async def list_arms(request: object, context: object) -> bytes:
        return routing_pb2.ListArmsResponse(bundle_version="old").SerializeToString()

    server = grpc.aio.server()
    handlers: dict[str, Any] = {"ListArms": grpc.unary_unary_rpc_method_handler(list_arms)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    healths = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    for name in ("", "liveness", "readiness", SERVICE):
        await healths.set(name, health_pb2.HealthCheckResponse.SERVING)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    done = await doctor("--address", f"127.0.0.1:{port}")
    await server.stop(None)

    assert done.code == 0
    done.line("WARN", "the service is older than this command")


async def test_what_operators_have_set_is_a_warning(doctor: Doctor, settings: Settings) -> None:
    operations = Operations(shadow=True, disabled_arms=("medium",))
    async with serving(settings.model_copy(update={"operations": operations})) as running:
        done = await doctor("--address", running.address)
        quiet = await doctor("--quiet", "--address", running.address)

    assert done.code == 0
    done.line("WARN", "[operations] shadow is set")
    done.line("WARN", "medium will not be chosen")
    assert quiet.err == "", "the container's health check asks for less"


async def test_broken_upstreams_are_a_warning(
    doctor: Doctor, tiny_bundle: Path, wire: Wire
) -> None:
    by_model(wire, small=DOWN, medium=DOWN, large=DOWN)
    settings = configured(tiny_bundle, wire.url, breaker_failures=1)
    async with serving(settings) as running, Client(running.address, timeout=10) as client:
        with pytest.raises(Exception, match="500"):
            _ = [event async for event in client.generate("easy")]
        done = await doctor("--address", running.address)

    assert done.code == 0
    done.line("WARN", "provider test: small fails (2 of 2 calls to it failed)")


def status(**fields: object) -> pb.WatchStatusResponse:
    made = pb.WatchStatusResponse(process=pb.Process(version=__version__), serving=True)
    made.time.CopyFrom(Timestamp(seconds=1_000_000))
    made.MergeFrom(pb.WatchStatusResponse(**fields))  # type: ignore[arg-type]
    return made


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (status(process=pb.Process(version="9.9.9")), "the service is bestroute 9.9.9"),
        (status(time=Timestamp(seconds=1_000_100)), "100 s ahead of this machine's"),
        (status(time=Timestamp(seconds=999_900)), "100 s behind this machine's"),
        (status(fault="the router network fails"), "it can't answer: the router network fails"),
        (
            status(bundles=[pb.Bundle(name="b", version="2", role=pb.Bundle.ROLE_CANARY)]),
            "the canary b 2 gets no requests",
        ),
    ],
)
def test_what_a_service_says_of_itself(said: pb.WatchStatusResponse, words: str) -> None:
    """What no server here can be brought to say."""
    [finding] = told(said, 1_000_000.0)

    assert words in finding.text
    assert list(told(status(), 1_000_000.0)) == []


async def test_a_draining_service_is_told_to_wait_for(doctor: Doctor) -> None:
    server = grpc.aio.server()
    healths = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    await healths.set("liveness", health_pb2.HealthCheckResponse.SERVING)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    done = await doctor("--quiet", "--address", f"127.0.0.1:{port}")
    await server.stop(None)

    done.line("FAIL", "starting or shutting down")


def test_a_quiet_doctor_is_quick() -> None:
    """It runs every few seconds in a container; of what is heavy it loads nothing."""
    heavy = {"numpy", "onnxruntime", "aiohttp", "pydantic", "tokenizers", "rich"}
    code = f"""
import sys
from bestroute.cli import main
main(["doctor", "--quiet", "--address", "{NOBODY}"])
print(*{heavy} & set(sys.modules))
"""
    begun = time.monotonic()

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []
    assert time.monotonic() - begun < 20
