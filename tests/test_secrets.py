"""What must not be told, is told to nobody: a real server at DEBUG, through every kind of failure.

The servers here are processes, so that all they write is seen, whoever writes it.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from aiohttp import web

from bestroute.cli import main
from bestroute.config import ConfigInvalid, Settings
from bestroute.guard.exposure import exposures
from bestroute.guard.keys import new_key
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests.certificates import Authority
from tests.issuers import AUDIENCE, ISSUER, SigningKey

PROVIDER_KEY = "sk-topsecretprovider0123456789"
FILE_KEY = "sk-topsecretfile0123456789"
PROMPT, ANSWER = "wombatprompt", "quokkaanswer"


class Provider:
    """An LLM's API that says all it knows, in each way of failing in turn."""

    def __init__(self) -> None:
        self.behaviour = "answers"
        self.calls = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.calls += 1
        headers = dict(request.headers)
        said = f"{await request.text()} {headers}"
        match self.behaviour:
            case "refuses":
                return web.json_response({"error": {"message": said}}, status=401)
            case "complains":
                return web.json_response({"error": {"message": said, "code": said}}, status=400)
            case "fails":
                return web.Response(text=said, status=500)
            case "is no JSON":
                return web.Response(text=f"<html>{said}")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        piece = {"choices": [{"index": 0, "delta": {"content": f"{ANSWER} broken"}}]}
        await response.write(f"data: {json.dumps(piece)}\n\n".encode())
        match self.behaviour:
            case "sends garbage":
                await response.write(f"data: {{{said}\n\n".encode())
            case "reports an error":
                error = {"error": {"message": said, "type": said}}
                await response.write(f"data: {json.dumps(error)}\n\n".encode())
            case "is cut":
                assert request.transport is not None
                request.transport.abort()
                return response
            case _:
                end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
                await response.write(f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n".encode())
        return response


BEHAVIOURS = (
    "answers",
    "refuses",
    "complains",
    "fails",
    "is no JSON",
    "sends garbage",
    "reports an error",
    "is cut",
)


@pytest.fixture
async def provider() -> AsyncIterator[tuple[Provider, str]]:
    provider = Provider()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", provider.complete)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    yield provider, f"http://{host}:{port}/v1"
    await runner.cleanup()


class Running:
    """A server that is a process.

    Attributes:
        address: where it listens.
        metrics: where its metrics are.
        told: all it has written.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process, self.told, self.address, self.metrics = process, "", "", ""
        self._ready = asyncio.Event()

    async def read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.told += line.decode()
            if found := re.search(r"serves bundle .* on (\S+:\d+)", line.decode()):
                self.address = found[1]
                self._ready.set()
            if found := re.search(r"metrics at (http\S+/metrics)", line.decode()):
                self.metrics = found[1]
        self._ready.set()

    async def ready(self) -> None:
        await self._ready.wait()
        assert self.address, self.told


@asynccontextmanager
async def process(config: Path, form: str) -> AsyncIterator[Running]:
    environment = {
        **os.environ,
        "PROVIDER_KEY": PROVIDER_KEY,
        "BESTROUTE_LOG_LEVEL": "DEBUG",
        "BESTROUTE_LOG_FORMAT": form,
        "PYTHONASYNCIODEBUG": "1",  # which logs tasks and what they wait for
    }
    started = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", "-m", "bestroute", "serve"),
        *("--config", str(config), "--listen", "127.0.0.1:0"),
        stdout=subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    running = Running(started)
    reading = asyncio.create_task(running.read())
    try:
        await running.ready()
        yield running
    finally:
        with suppress(ProcessLookupError):
            started.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(started.wait(), 60)
        except TimeoutError:
            started.kill()
        await reading


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, str]:
    """Everything secret, by what it is."""
    authority = Authority()
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    issued = authority.issue("server")
    issued.write(tmp_path / "server.pem", tmp_path / "server.key")
    key, line = new_key("alice")
    (tmp_path / "keys.toml").write_text(line)
    signer = SigningKey("one")
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [signer.public()]}))
    (tmp_path / "provider.key").write_text(FILE_KEY)
    return {
        "key of the provider": PROVIDER_KEY,
        "key of the other provider": FILE_KEY,
        "key of the caller": key,
        "token": signer.token("alice"),
        "signature of the token": signer.token("alice").rpartition(".")[2],
        "expired token": signer.token("alice", exp=1),
        "private key": issued.key.decode().splitlines()[1],
    }


@pytest.fixture
def config(
    tmp_path: Path, tiny_bundle: Path, provider: tuple[Provider, str], secrets: dict[str, str]
) -> Path:
    file = tmp_path / "bestroute.toml"
    file.write_text(
        f"""
bundle = "{tiny_bundle}"
[security]
certificate = "{tmp_path}/server.pem"
private_key = "{tmp_path}/server.key"
api_keys_file = "{tmp_path}/keys.toml"
jwks_file = "{tmp_path}/jwks.json"
issuer = "{ISSUER}"
audience = "{AUDIENCE}"
[metrics]
listen = "127.0.0.1:0"
[callers.alice]
requests_per_second = 100000
[providers.one]
base_url = "{provider[1]}"
api_key_env = "PROVIDER_KEY"
max_retries = 1
breaker_failures = 1000
[providers.other]
base_url = "{provider[1]}"
api_key_file = "{tmp_path}/provider.key"
max_retries = 0
breaker_failures = 1000
[models.small]
provider = "one"
[models.medium]
provider = "other"
"""
    )
    return file


async def provoke(
    running: Running, provider: Provider, secrets: dict[str, str], ca: bytes
) -> list[str]:
    """Every failure there is; gives what callers were told."""
    credentials = grpc.ssl_channel_credentials(ca)
    known = (("authorization", f"Bearer {secrets['key of the caller']}"),)
    by_token = (("authorization", f"Bearer {secrets['token']}"),)
    told: list[str] = []

    async def note(call: Any) -> None:
        try:
            told.append(str(await call))
        except grpc.aio.AioRpcError as error:
            told.append(f"{error.code()} {error.details()} {error.trailing_metadata()}")

    async def generated(call: Any) -> None:
        try:
            async for event in call:
                told.append(str(event))
        except grpc.aio.AioRpcError as error:
            told.append(f"{error.code()} {error.details()} {error.trailing_metadata()}")

    async with grpc.aio.secure_channel(running.address, credentials) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        for metadata in (known, by_token):
            await note(stub.Route(pb.RouteRequest(prompt=PROMPT), metadata=metadata))
        for shown in (
            secrets["expired token"],
            secrets["token"] + "x",
            secrets["key of the caller"] + "x",
            PROVIDER_KEY,
        ):
            bad = (("authorization", f"Bearer {shown}"),)
            await note(stub.Route(pb.RouteRequest(prompt=PROMPT), metadata=bad))
        asked_for: Any = channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/X")
        await note(asked_for(b""))
        reflection: Any = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        await note(reflection(iter([b""])).code())
        raw: Any = channel.unary_unary("/bestroute.v1.RoutingService/Route")
        for message in (
            PROMPT.encode(),
            b"\x12\x80\x01" + PROMPT.encode(),
            b"\x12\x0d" + PROMPT.encode() + b"\xff",
        ):
            await note(raw(message, metadata=known))
        # The router fails on it, and so does the reward model.
        await note(stub.Route(pb.RouteRequest(prompt=f"{PROMPT} broken"), metadata=known))
        scores = pb.ScoreRequest(prompt=PROMPT, responses=[f"{ANSWER} broken"])
        await note(stub.Score(scores, metadata=known))
        long = pb.RouteRequest(prompt=PROMPT * 100_000)
        await note(stub.Route(long, metadata=known))
        stream = stub.RouteStream(metadata=known)
        for text in ("broken", ""):
            request = pb.RouteRequest(prompt=text and f"{PROMPT} {text}", request_id="1")
            await stream.write(pb.RouteStreamRequest(request=request))
            await stream.read()
        stream.cancel()
        for behaviour in BEHAVIOURS:
            provider.behaviour = behaviour
            for model, samples in (("small", 1), ("medium", 2)):
                arm = pb.Arm(model=model, samples=samples)
                request = pb.RouteRequest(prompt=PROMPT)
                execution = pb.Execution(early_stop=True)
                asked = pb.GenerateRequest(request=request, arm=arm, execution=execution)
                await generated(stub.Generate(asked, metadata=known, timeout=60))
        provider.behaviour = "answers"
        leaving = stub.Generate(asked, metadata=known)
        await leaving.read()
        leaving.cancel()
    async with grpc.aio.insecure_channel(running.address) as in_the_clear:
        stub = routing_pb2_grpc.RoutingServiceStub(in_the_clear)
        await note(stub.Route(pb.RouteRequest(prompt=PROMPT), metadata=known))
    return told


def authority_of(config: Path) -> bytes:
    return (config.parent / "ca.pem").read_bytes()


@pytest.mark.parametrize("form", ["text", "json"])
async def test_neither_secrets_nor_prompts_nor_answers_are_ever_logged(
    config: Path, provider: tuple[Provider, str], secrets: dict[str, str], form: str
) -> None:
    async with process(config, form) as running:
        told = await provoke(running, provider[0], secrets, authority_of(config))
        running.process.send_signal(signal.SIGHUP)
        async with aiohttp.ClientSession() as session, session.get(running.metrics) as response:
            metrics = await response.text()
    assert provider[0].calls > 2 * len(BEHAVIOURS)
    assert any(ANSWER in text for text in told), "answers did come"
    assert "DEBUG" in running.told, "nothing was left out"
    assert "UNAUTHENTICATED" in metrics, "who was refused is counted"
    for place, text in (("log", running.told), ("metrics", metrics), ("errors", "\n".join(told))):
        found = [kind for kind, secret in secrets.items() if secret in text]
        assert found == [], f"in the {place}"
    for place, text in (("log", running.told), ("metrics", metrics)):
        lines = [line for line in text.splitlines() if PROMPT in line or ANSWER in line]
        assert lines == [], f"in the {place}"


def test_settings_do_not_show_secrets(
    config: Path, secrets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROVIDER_KEY", PROVIDER_KEY)
    settings = Settings.load(config)
    keys = [provider.api_key() for provider in settings.providers.values()]
    shown = f"{settings!r} {settings} {settings.model_dump_json()} {keys!r} {keys}"
    assert [kind for kind, secret in secrets.items() if secret in shown] == []


@pytest.mark.parametrize(
    "wrong",
    [
        f'[providers.one]\nbase_url = "http://h/v1"\napi_key = "{PROVIDER_KEY}"',
        f'[providers.one]\nbase_url = "http://h/v1"\napi_key_env = "{PROVIDER_KEY}"',
        f'[providers.one]\nbase_url = "http://user:{PROVIDER_KEY}@h/v1"',
        '[providers.one]\nbase_url = "http://h/v1"\napi_key_env = "K"\n'
        f'api_key_file = "{PROVIDER_KEY}"',
        f'[security]\ntoken = "{PROVIDER_KEY}"',
        f'[security]\napi_keys_file = 1\nx = "{PROVIDER_KEY}"',
    ],
)
def test_a_secret_in_the_wrong_place_is_not_repeated(
    wrong: str, tmp_path: Path, tiny_bundle: Path
) -> None:
    file = tmp_path / "bestroute.toml"
    served = '[models.small]\nprovider = "one"\n' if "providers" in wrong else ""
    file.write_text(f'bundle = "{tiny_bundle}"\n{served}{wrong}\n')
    try:
        settings = Settings.load(file)
        [provider] = settings.providers.values()
        provider.api_key()
        raise AssertionError("this can't be used")
    except ConfigInvalid as invalid:
        shown = "".join(traceback.format_exception(invalid))
    assert PROVIDER_KEY not in shown


def test_help_shows_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BESTROUTE_TOKEN", PROVIDER_KEY)
    for command in ("route", "serve", "doctor", "generate"):
        with suppress(SystemExit):
            main([command, "--help"])
    shown = capsys.readouterr().out
    assert "--token-file" in shown
    assert PROVIDER_KEY not in shown


def test_what_is_exposed_is_warned_of(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "provider.key").chmod(0o600)
    settings = Settings.load(config)
    assert list(exposures(settings)) == []
    for name in ("provider.key", "server.key"):
        (tmp_path / name).chmod(0o604)
        [warning] = exposures(settings)
        assert name in warning
        (tmp_path / name).chmod(0o600)

    everywhere = {"server": {"listen": "0.0.0.0:50051"}}
    assert list(exposures(Settings.load(config, everywhere))) == []
    [warning] = exposures(Settings.load(None, everywhere))
    assert "whoever can reach 0.0.0.0:50051 may call" in warning
    keys = {"security": {"api_keys_file": tmp_path / "keys.toml"}}
    [warning] = exposures(Settings.load(None, {**everywhere, **keys}))
    assert "travel in the clear" in warning
