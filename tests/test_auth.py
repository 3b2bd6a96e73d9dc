"""API keys and JWTs over a real channel: who is let in, under which name, and who isn't."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bestroute.app import Running, serving
from bestroute.cli import main
from bestroute.client import Client, SyncClient
from bestroute.config import ConfigInvalid, Security, Settings
from bestroute.guard import keys as api_keys
from bestroute.guard import refreshed, tokens
from bestroute.guard.keys import new_key, parse_keys
from bestroute.guard.tokens import Tokens, parse_key_set
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests.issuers import AUDIENCE, ISSUER, Issuer, SigningKey, publishing
from tests.upstreams import until

OK = grpc.StatusCode.OK
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
URGENT = ("bestroute-priority", "high")


def guarded(settings: Settings, **security: Any) -> Settings:
    """The settings with authentication; only alice may be urgent, which shows who is who."""
    return Settings.model_validate(
        {
            **settings.model_dump(),
            "security": security,
            "callers": {"default": {"max_priority": "low"}, "alice": {}},
        }
    )


@pytest.fixture
def alice() -> tuple[str, str]:
    """Her key, and the line that lets it in."""
    return new_key("alice")


@pytest.fixture
def file(tmp_path: Path, alice: tuple[str, str]) -> Path:
    file = tmp_path / "keys.toml"
    file.write_text(alice[1])
    return file


@pytest.fixture
def settings(settings: Settings, file: Path, request: pytest.FixtureRequest) -> Settings:
    return guarded(settings, api_keys_file=file)


def write(file: Path, text: str | None) -> None:
    """Replace a file's text; None: take the file away."""
    if text is None:
        file.unlink()
    else:
        file.write_text(text)


async def code_of(address: str, *metadata: tuple[str, str]) -> grpc.StatusCode:
    """How a Route with that metadata ends."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        call = stub.Route(pb.RouteRequest(prompt="easy"), metadata=metadata, timeout=30)
        return await call.code()


async def is_alice(address: str, token: str) -> bool:
    """Whether a token lets in, as alice."""
    code = await code_of(address, ("authorization", f"Bearer {token}"), URGENT)
    assert code in (grpc.StatusCode.OK, UNAUTHENTICATED), code
    return code is grpc.StatusCode.OK


async def test_a_key_lets_in_under_its_name(server: Running, alice: tuple[str, str]) -> None:
    key, line = alice
    assert key not in line
    assert await code_of(server.address, ("authorization", f"Bearer {key}"), URGENT) == OK
    assert await code_of(server.address, ("authorization", f"bearer {key}"), URGENT) == OK
    assert await code_of(server.address, ("x-api-key", key), URGENT) == OK


@pytest.mark.parametrize(
    "shown",
    [
        [],
        [("authorization", "Bearer")],
        [("authorization", "Bearer wrong")],
        [("authorization", "Bearer sha256:{digest}")],
        [("authorization", "Bearer {digest}")],
        [("authorization", "Basic {key}")],
        [("authorization", "{key}")],
        [("authorization", "Bearer {key}x")],
        [("x-api-key", "Bearer {key}")],
        [("authorization", "Bearer {key}"), ("authorization", "Bearer wrong")],
        [("authorization", "Bearer {key}"), ("x-api-key", "{key}")],
        [("authorization", "Bearer a.b.c")],
    ],
)
async def test_whoever_shows_no_good_key_gets_no_further(
    server: Running, alice: tuple[str, str], shown: list[tuple[str, str]]
) -> None:
    digest = alice[1].partition("sha256:")[2].rstrip('"')
    metadata = [(name, value.format(key=alice[0], digest=digest)) for name, value in shown]
    assert await code_of(server.address, *metadata) is UNAUTHENTICATED


async def test_every_rpc_asks_for_a_key_and_says_what_to_send(
    channel: grpc.aio.Channel,
) -> None:
    stub = routing_pb2_grpc.RoutingServiceStub(channel)
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    refused = [
        stub.Route(pb.RouteRequest(prompt="easy")),
        stub.Score(pb.ScoreRequest(prompt="easy", responses=["a"])),
        stub.ListArms(pb.ListArmsRequest()),
        stub.Generate(pb.GenerateRequest(request=pb.RouteRequest(prompt="easy"))),
        stub.RouteStream(iter([pb.RouteStreamRequest()])),
        stub.Feedback(pb.FeedbackRequest()),
        reflection.ServerReflectionInfo(asked),
    ]
    for call in refused:
        if await call.code() is grpc.StatusCode.UNIMPLEMENTED:
            continue  # not every server keeps a decision log
        assert await call.code() is UNAUTHENTICATED
        assert "an API key" in await call.details()
        assert (await call.trailing_metadata())["www-authenticate"] == "Bearer"
    health = health_pb2_grpc.HealthStub(channel)
    serving = await health.Check(health_pb2.HealthCheckRequest(service="readiness"))
    assert serving.status == health_pb2.HealthCheckResponse.SERVING


async def test_strangers_messages_are_not_parsed(channel: grpc.aio.Channel) -> None:
    route: Any = channel.unary_unary("/bestroute.v1.RoutingService/Route")
    assert await route(b"\xff\xff\xff nonsense").code() is UNAUTHENTICATED


async def test_keys_come_and_go_with_their_file(
    settings: Settings,
    file: Path,
    alice: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(api_keys, "_EVERY", 0.02)
    key, line = new_key("alice")
    async with serving(settings) as server:
        async with Client(server.address, token=alice[0]) as former, former.stream() as stream:
            await stream.route("easy")
            write(file, line)
            while not await is_alice(server.address, key):  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0.02)
            assert not await is_alice(server.address, alice[0]), "it was taken out"
            # Who is on a stream stays: a call is let in once, as it begins.
            assert (await stream.route("hard")).arm.model

        with caplog.at_level(logging.WARNING):
            write(file, "alice = 'in the clear: hunter2'")
            await until(lambda: bool(caplog.records))
            write(file, None)
            await until(lambda: len(caplog.records) >= 2)
        assert await is_alice(server.address, key), "the last good keys stay"
        assert "hunter2" not in caplog.text
    assert len(caplog.records) == 2, "each fault is told once"


@pytest.mark.parametrize(
    "text",
    [
        "",
        'a = "hunter2"',
        "a = 1",
        'a = ["sha256:"]',
        "[a]\nb = 1",
        "hunter2",
        "\xff",
        'a = "md5:1"',
    ],
)
def test_a_file_of_keys_that_holds_something_else_is_not_repeated(text: str) -> None:
    with pytest.raises(ConfigInvalid) as error:
        parse_keys(text.encode("latin-1"))
    assert "hunter2" not in str(error.value)


def test_a_caller_may_have_two_keys_and_no_two_callers_the_same() -> None:
    (_, one), (_, two) = new_key("a"), new_key("a")
    both = f"a = [{one.partition(' = ')[2]}, {two.partition(' = ')[2]}]"
    assert set(parse_keys(both.encode()).values()) == {"a"}
    assert len(parse_keys(both.encode())) == 2
    with pytest.raises(ConfigInvalid, match="the same key"):
        parse_keys(f"{one}\nb{one[1:]}".encode())


async def test_a_server_does_not_start_without_its_keys(settings: Settings, file: Path) -> None:
    write(file, "nonsense")
    with pytest.raises(ConfigInvalid, match=r"api_keys_file .*keys\.toml: must be TOML"):
        async with serving(settings):
            pass
    write(file, None)
    with pytest.raises(ConfigInvalid, match="api_keys_file"):
        async with serving(settings):
            pass


# The client and the command line.


async def test_both_clients_send_a_token_with_every_call(
    server: Running, alice: tuple[str, str]
) -> None:
    async with Client(server.address, token=lambda: alice[0]) as client:
        assert (await client.route("easy")).arm.model
        assert await client.check()
        assert (await client.score("easy", ["good", "bad"])).best == 0
        async with client.stream() as stream:
            assert (await stream.route("easy")).arm.model

    def ask() -> int:
        with SyncClient(server.address, token=alice[0]) as client:
            return len(client.list_arms().arms)

    assert await asyncio.to_thread(ask)


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("127.0.0.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("unix:/run/router.sock", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
        ("router:1", False),
        ("10.0.0.1:1", False),
        ("dns:///router.internal:1", False),
        ("localhost.evil.test:1", False),
        ("127.0.0.1.evil.test:1", False),
        ("[2001:db8::1]:1", False),
    ],
)
async def test_a_token_does_not_leave_this_machine_in_the_clear(address: str, here: bool) -> None:
    if here:
        await Client(address, token="t").close()
    else:
        with pytest.raises(ValueError, match="in the clear"):
            Client(address, token="t")
        with pytest.raises(ValueError, match="in the clear"):
            await asyncio.to_thread(SyncClient, address, token="t")
    await Client(address, token="t", token_in_the_clear=True).close()
    await Client(address, token="t", credentials=grpc.ssl_channel_credentials()).close()


async def test_the_command_line_sends_a_token(
    server: Running,
    alice: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    held = tmp_path / "token"
    held.write_text(alice[0] + "\n")
    there = ["--address", server.address]

    async def code(*arguments: str) -> int:
        return await asyncio.to_thread(main, [*arguments, *there])

    assert await code("route", "easy") == 1
    assert "--token-file" in capsys.readouterr().err
    assert await code("route", "easy", "--token-file", str(held)) == 0
    assert await code("doctor", "--quiet", "--token-file", str(held)) == 0
    assert await code("doctor", "--quiet") == 1
    monkeypatch.setenv("BESTROUTE_TOKEN", alice[0])
    assert await code("score", "easy", "good") == 0
    held.write_text("")
    assert await code("route", "easy", "--token-file", str(held)) == 2
    assert await code("route", "easy", "--token-file", str(tmp_path / "none")) == 2
    elsewhere = ["route", "easy", "--address", "router.test:1"]
    assert await asyncio.to_thread(main, elsewhere) == 2
    shown = capsys.readouterr()
    assert alice[0] not in shown.out + shown.err


def test_a_new_key_is_printed_once_and_its_digest_lets_it_in(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["key", "billing"]) == 0
    shown = capsys.readouterr()
    key = shown.out.strip()
    assert len(key) > 40
    assert key not in shown.err
    [(digest, name)] = parse_keys(shown.err.encode()).items()
    assert (digest, name) == (hashlib.sha256(key.encode()).digest(), "billing")
    assert main(["key", "not a name"]) == 2


# JWTs.


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with publishing() as issuer:
        yield issuer


@pytest.fixture
def signer() -> SigningKey:
    return SigningKey("one")


@pytest.fixture
async def by_jwt(
    settings: Settings, issuer: Issuer, signer: SigningKey
) -> AsyncIterator[Callable[[str], Any]]:
    """Says of a token whether it lets in as alice."""
    issuer.keys = [signer.public()]
    configured = guarded(settings, jwks_url=issuer.url, issuer=ISSUER, audience=AUDIENCE)
    async with serving(configured) as server:

        async def ask(token: str) -> bool:
            return await is_alice(server.address, token)

        yield ask


def forged(header: dict[str, Any], claims: dict[str, Any], secret: bytes | None) -> str:
    """A token as an attacker makes it, whatever a library may refuse to sign."""

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    signed = f"{part(json.dumps(header).encode())}.{part(json.dumps(claims).encode())}"
    mac = b"" if secret is None else hmac.digest(secret, signed.encode(), "sha256")
    return f"{signed}.{part(mac)}"


async def test_a_good_token_lets_in_and_all_others_do_not(
    by_jwt: Callable[[str], Any], signer: SigningKey, issuer: Issuer
) -> None:
    now = time.time()
    claims = {"sub": "alice", "iss": ISSUER, "aud": AUDIENCE, "exp": now + 600}
    good = signer.token()
    body, _, signature = good.rpartition(".")
    assert await by_jwt(good)
    assert await by_jwt(good), "when it is remembered"
    assert await by_jwt(signer.token(aud=["other", AUDIENCE]))
    assert await by_jwt(signer.token(exp=now - 5)), "clocks differ a little"
    bad = {
        "expired": signer.token(exp=now - 60),
        "without an end": signer.token(exp=None),
        "not yet": signer.token(nbf=now + 120),
        "for others": signer.token(aud="other"),
        "for nobody": signer.token(aud=None),
        "by others": signer.token(iss="https://evil.test/"),
        "by nobody": signer.token(iss=None),
        "of nobody": signer.token(None),
        "of an empty name": signer.token(""),
        "of a long name": signer.token("a" * 300),
        "none": forged({"alg": "none", "kid": "one"}, claims, None),
        "None": forged({"alg": "None", "kid": "one"}, claims, None),
        "no alg": forged({"kid": "one"}, claims, None),
        "public key as secret": forged({"alg": "HS256", "kid": "one"}, claims, signer.pem()),
        "empty secret": forged({"alg": "HS256", "kid": "one"}, claims, b""),
        "brings its own key": forged(
            {"alg": "ES256", "kid": "one", "jwk": SigningKey("one").public()}, claims, b""
        ),
        "another's key": SigningKey("one").token(),
        "no kid, another's key": SigningKey(None).token(),
        "another algorithm": SigningKey("one", "RS256").token(),
        "cut": good[:-4],
        "changed": f"{body}.{signature[::-1]}",
        "garbage": "a.b.c",
        "nothing": "..",
        "deep": forged({"alg": "ES256", "kid": "one"}, {}, b"").replace(".", ".W", 1) + "W" * 4000,
        "kid is no text": forged({"alg": "ES256", "kid": ["one"]}, claims, b""),
    }
    let_in = [fault for fault, token in bad.items() if await by_jwt(token)]
    assert let_in == []
    assert issuer.asked == 1, "no stranger's token has the server ask the issuer again and again"


async def test_an_unknown_key_has_the_issuer_asked_and_a_withdrawn_one_vouches_no_more(
    settings: Settings, issuer: Issuer, signer: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_URL_AT_MOST_EVERY", 0.0)
    issuer.keys = [signer.public()]
    configured = guarded(settings, jwks_url=issuer.url, issuer=ISSUER, audience=AUDIENCE)
    async with serving(configured) as server:
        old, second = signer.token(), SigningKey("two")
        assert await is_alice(server.address, old)
        issuer.keys = [signer.public(), second.public()]
        assert await is_alice(server.address, second.token())
        assert await is_alice(server.address, old)

        third = SigningKey("three")
        issuer.keys = [second.public(), third.public()]
        assert await is_alice(server.address, third.token())
        assert not await is_alice(server.address, old), "its key was withdrawn"

        fourth = SigningKey("four")
        issuer.elsewhere = [fourth.public()]
        for away in (500, 302):
            issuer.status = away
            assert not await is_alice(server.address, fourth.token())
            assert await is_alice(server.address, third.token(jti="new"))


async def test_many_unknown_keys_are_one_question(
    settings: Settings, issuer: Issuer, signer: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_URL_AT_MOST_EVERY", 0.0)
    issuer.keys = [signer.public()]
    security = Security(jwks_url=issuer.url, issuer=ISSUER, audience=AUDIENCE)
    known = Tokens(security)
    await known.keys.start()
    following = asyncio.create_task(known.keys.follow())
    strangers = [SigningKey(f"kid{i}").token() for i in range(20)]
    assert await asyncio.gather(*map(known.caller, strangers)) == [None] * 20
    assert (asked := issuer.asked) <= 3
    weak = forged({"alg": "HS256", "kid": "new"}, {}, b"")
    assert await known.caller(weak) is None
    assert issuer.asked == asked, "no key of the issuer's could be meant"
    following.cancel()


async def test_a_file_of_keys_does_as_well(
    settings: Settings, signer: SigningKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_FILE_EVERY", 0.02)
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps({"keys": [signer.public()]}))
    configured = guarded(settings, jwks_file=file, issuer=ISSUER, audience=AUDIENCE)
    async with serving(configured) as server:
        assert await is_alice(server.address, signer.token())
        second = SigningKey("two")
        file.write_text(json.dumps({"keys": [second.public()]}))
        assert await is_alice(server.address, second.token())
        assert not await is_alice(server.address, signer.token())


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
def test_keys_are_for_one_algorithm(algorithm: str) -> None:
    key = SigningKey("k", algorithm)
    kept = parse_key_set(json.dumps({"keys": [key.public()]}).encode(), ["RS256", algorithm])
    assert ("k", algorithm) in kept
    assert {name for _, name in kept} <= {algorithm, "RS256"}
    unfit = [key.public(use="enc"), key.public(alg="HS256"), {"kty": "oct", "k": "c2VjcmV0"}]
    with pytest.raises(ConfigInvalid, match="has no key for"):
        parse_key_set(json.dumps({"keys": unfit}).encode(), [algorithm])


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"keys": 1}', b'{"keys": [1]}', b"[" * 99999]
)
def test_what_is_no_key_set_is_refused(text: bytes) -> None:
    with pytest.raises(ConfigInvalid, match="is no JSON Web Key Set"):
        parse_key_set(text, ["ES256"])


async def test_a_server_does_not_start_without_its_issuer(
    settings: Settings, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer.status = 404
    configured = guarded(settings, jwks_url=issuer.url, issuer=ISSUER, audience=AUDIENCE)
    with pytest.raises(ConfigInvalid, match=r"jwks_url .* answered 404"):
        async with serving(configured):
            pass
    monkeypatch.setitem(sys.modules, "jwt", None)
    with pytest.raises(ConfigInvalid, match=r"bestroute\[jwt\]"):
        async with serving(configured):
            pass


@pytest.mark.parametrize(
    ("security", "complaint"),
    [
        ({"jwks_url": "https://i.test/"}, "set issuer and audience"),
        ({"jwks_url": "http://i.test/", "issuer": "i", "audience": "a"}, "must be https"),
        ({"jwks_url": "https://i.test/", "jwks_file": "f"}, "not both"),
        ({"algorithms": ["HS256"]}, "algorithms"),
        ({"algorithms": ["none"]}, "algorithms"),
        ({"algorithms": []}, "algorithms"),
        ({"certificate": "c"}, "both certificate and private_key"),
        ({"client_ca": "c"}, "client_ca needs"),
        ({"caller_metadata": "authorization"}, "means nothing else"),
        ({"caller_metadata": "x-bin"}, "means nothing else"),
        ({"caller_metadata": "X Caller"}, "caller_metadata"),
    ],
)
def test_settings_that_are_not_safe_are_refused(security: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigInvalid, match=complaint):
        Settings.load(flags={"security": security})


async def test_a_source_that_hangs_holds_up_nobody_who_is_known(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch, signer: SigningKey
) -> None:
    hanging = asyncio.Event()
    texts = [json.dumps({"keys": [signer.public()]}).encode()]

    async def read() -> bytes:
        if texts:
            return texts.pop()
        await hanging.wait()
        raise OSError("away")

    source = refreshed.Refreshed(
        "test", read, lambda text: parse_key_set(text, ["ES256"]), every=600
    )
    await source.start()
    following = asyncio.create_task(source.follow())
    monkeypatch.setattr(tokens, "_public_keys", lambda _: source)
    known = Tokens(Security(jwks_file=Path("x"), issuer=ISSUER, audience=AUDIENCE))
    stranger = asyncio.create_task(known.caller(SigningKey("two").token()))
    await asyncio.sleep(0.01)
    assert await known.caller(signer.token()) == "alice"
    stranger.cancel()
    another = asyncio.create_task(known.caller(SigningKey("three").token()))
    await asyncio.sleep(0.01)
    hanging.set()
    assert await another is None
    assert await known.caller(signer.token(jti="later")) == "alice"
    following.cancel()
