"""Bad input gets INVALID_ARGUMENT with the field's name; everybody else is unharmed."""

import asyncio
import math
import random
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bestroute.config import Settings
from bestroute.v1 import routing_pb2 as pb

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub


SERVICE = "/bestroute.v1.RoutingService/"


def policy(**fields: Any) -> pb.RouteRequest:
    return pb.RouteRequest(prompt="easy", policy=pb.RoutingPolicy(**fields))


def turns(*turns: tuple[str, str]) -> pb.Messages:
    return pb.Messages(messages=[pb.Message(role=role, content=text) for role, text in turns])


ROUTE: list[tuple[str, Message | bytes, str]] = [
    ("no input", pb.RouteRequest(), "input"),
    ("empty prompt", pb.RouteRequest(prompt=""), "prompt"),
    ("blank prompt", pb.RouteRequest(prompt=" \n\t"), "prompt"),
    ("no messages", pb.RouteRequest(messages=pb.Messages()), "messages.messages"),
    (
        "empty message",
        pb.RouteRequest(messages=turns(("user", "easy"), ("user", ""))),
        "messages.messages[1].content",
    ),
    (
        "unknown role",
        pb.RouteRequest(messages=turns(("robot", "easy"))),
        "messages.messages[0].role",
    ),
    ("unknown model", policy(allowed_models=["small", "smal"]), "policy.allowed_models[1]"),
    ("threshold above 1", policy(match_threshold=1.01), "policy.match_threshold"),
    ("threshold below 0", policy(match_threshold=-0.01), "policy.match_threshold"),
    ("threshold NaN", policy(match_threshold=math.nan), "policy.match_threshold"),
    ("threshold infinite", policy(match_threshold=math.inf), "policy.match_threshold"),
    ("drop above 1", policy(max_quality_drop=1.01), "policy.max_quality_drop"),
    ("drop NaN", policy(max_quality_drop=math.nan), "policy.max_quality_drop"),
    ("saving below 0", policy(min_cost_saving=-0.5), "policy.min_cost_saving"),
    ("saving NaN", policy(min_cost_saving=math.nan), "policy.min_cost_saving"),
    ("saving never measured", policy(min_cost_saving=0.95), "policy.min_cost_saving"),
    ("negative cost", policy(max_cost_usd=-1.0), "policy.max_cost_usd"),
    ("cost NaN", policy(max_cost_usd=math.nan), "policy.max_cost_usd"),
    ("cost below every arm", policy(max_cost_usd=1e-12), "policy.max_cost_usd"),
    ("prompt too long", pb.RouteRequest(prompt="easy " * 40_000), "prompt"),
    (
        "conversation too long",
        pb.RouteRequest(messages=turns(*[("user", "easy " * 4_000)] * 10)),
        "messages",
    ),
    ("invalid UTF-8 in the prompt", b"\x12\x02\xff\xfe", "prompt"),
    ("invalid UTF-8 in the id", b"\x0a\x01\xff\x12\x01a", "request_id"),
    (
        "invalid UTF-8 deep inside",
        b"\x12\x01a\x22\x06\x22\x01a\x22\x01\xff",
        "policy.allowed_models[1]",
    ),
    (
        "two targets",
        b"\x12\x01a\x22\x12\x09" + struct.pack("<d", 0.0) + b"\x11" + struct.pack("<d", 0.5),
        "policy.target",
    ),
    ("two inputs", b"\x12\x04easy\x1a\x0c\x0a\x0a\x0a\x04user\x12\x02hi", "input"),
    ("no protobuf at all", b"\xff\xff\xff\xff", "(message)"),
]
SCORE: list[tuple[str, Message | bytes, str]] = [
    ("no input", pb.ScoreRequest(responses=["good"]), "input"),
    ("empty prompt", pb.ScoreRequest(prompt="", responses=["good"]), "prompt"),
    ("no responses", pb.ScoreRequest(prompt="easy"), "responses"),
    ("too many responses", pb.ScoreRequest(prompt="easy", responses=["a"] * 65), "responses"),
    (
        "response too long",
        pb.ScoreRequest(prompt="easy", responses=["a", "good " * 40_000]),
        "responses[1]",
    ),
    ("invalid UTF-8 in a response", b"\x12\x01a\x22\x01a\x22\x01\xff", "responses[1]"),
]
CASES = [("Route", *case) for case in ROUTE] + [("Score", *case) for case in SCORE]


def caller(
    channel: grpc.aio.Channel, method: str
) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
    """Calls a method with bytes that no client library would send."""
    return channel.unary_unary(SERVICE + method)


def raw(request: Message | bytes) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()


def violations(error: grpc.aio.AioRpcError) -> list[str]:
    """The fields that the error's BadRequest details name."""
    status = rpc_status.from_call(error)
    assert status is not None
    assert len(status.details) == 1
    details = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(details)
    assert all(violation.description for violation in details.field_violations)
    return [violation.field for violation in details.field_violations]


@pytest.mark.parametrize(
    ("method", "name", "request_", "field"), CASES, ids=[f"{c[0]}: {c[1]}" for c in CASES]
)
async def test_bad_input_is_named(
    channel: grpc.aio.Channel, method: str, name: str, request_: Message | bytes, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await caller(channel, method)(raw(request_))

    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations(failure.value) == [field]


@pytest.mark.parametrize("size", [131_072, 131_073])
async def test_the_prompt_limit_is_exact(
    stub: "RoutingServiceAsyncStub", settings: Settings, size: int
) -> None:
    assert settings.server.max_prompt_bytes == 131_072
    request = pb.RouteRequest(prompt="a" * size)

    if size <= settings.server.max_prompt_bytes:
        assert (await stub.Route(request)).arm.model
    else:
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Route(request)


async def test_unknown_fields_are_no_error(channel: grpc.aio.Channel) -> None:
    """A newer client may send what this server doesn't know."""
    newer = pb.RouteRequest(prompt="easy").SerializeToString() + b"\xf8\x3f\x01"

    answer = pb.RouteResponse.FromString(await caller(channel, "Route")(newer))

    assert answer.arm.model == "small"


async def test_500_hostile_requests_harm_no_good_one(channel: grpc.aio.Channel) -> None:
    """One channel; every hostile request is refused, every good one among them answered right."""
    source = random.Random(7)
    hostile = _hostile(source)
    route = caller(channel, "Route")

    async def attack() -> grpc.StatusCode:
        method, request = next(hostile)
        try:
            await caller(channel, method)(request)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    async def ask(word: str) -> tuple[str, str]:
        request = pb.RouteRequest(prompt=word).SerializeToString()
        return word, pb.RouteResponse.FromString(await route(request)).arm.model

    good: list[tuple[str, str]] = []
    codes: list[grpc.StatusCode] = []
    for _ in range(50):
        async with asyncio.TaskGroup() as tasks:
            attacks = [tasks.create_task(attack()) for _ in range(10)]
            asks = [tasks.create_task(ask(source.choice(["easy", "hard"]))) for _ in range(4)]
        codes += [task.result() for task in attacks]
        good += [task.result() for task in asks]

    assert len(codes) == 500
    assert set(codes) <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OK}
    assert codes.count(grpc.StatusCode.INVALID_ARGUMENT) > 400
    assert len(good) == 200
    assert all(model == ("small" if word == "easy" else "large") for word, model in good)


def _hostile(source: random.Random) -> Iterator[tuple[str, bytes]]:
    """Every bad case above, and good messages with some of their bytes changed or cut off."""
    good = pb.RouteRequest(
        request_id="r", prompt="easy hard", policy=pb.RoutingPolicy(match_threshold=0.5)
    ).SerializeToString()
    while True:
        method, _, request, _ = source.choice(CASES)
        yield method, raw(request)
        if source.random() < 0.2:
            damaged = bytearray(good)
            for _ in range(3):
                damaged[source.randrange(len(damaged))] = source.randrange(256)
            yield "Route", bytes(damaged[: source.randrange(1, len(damaged))])
