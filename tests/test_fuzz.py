"""Hostile bytes: a short run of `benchmarks.fuzz`, and what earlier runs have found.

Besides, that the fuzzer would notice: servers that do one thing wrong each are caught at it.
"""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import garbage
from benchmarks.attack import Found, attack, load, replay, save
from benchmarks.fuzz import fuzz, health, served
from benchmarks.mutation import ODD_TEXTS, SOUND, Case, stream_cases, unary_cases
from bestroute import convert
from bestroute.app import Running, serving
from bestroute.call import ANYBODY
from bestroute.config import Server, Settings
from bestroute.errors import InvalidRequest
from bestroute.v1 import routing_pb2 as pb
from bestroute.wire import MOST_FIELDS, MOST_ID_BYTES, Malformed, decoder
from tests.test_bad_input import caller, violations

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

INVALID = grpc.StatusCode.INVALID_ARGUMENT
REQUESTS: dict[str, type[Message]] = {
    "Route": pb.RouteRequest,
    "RouteStream": pb.RouteStreamRequest,
    "Score": pb.ScoreRequest,
    "Generate": pb.GenerateRequest,
    "ListArms": pb.ListArmsRequest,
    "Feedback": pb.FeedbackRequest,
}
DECODERS = {method: decoder(message) for method, message in REQUESTS.items()}


# A server under attack


@pytest.mark.timeout(300)  # some seconds, where there is a core to run on
async def test_thousands_of_hostile_messages_harm_nobody(tmp_path: Path) -> None:
    """The long run is `python -m benchmarks.fuzz`; this is the same with fewer messages."""
    found, _, _ = await fuzz(8000, seed=20_261, directory=tmp_path)

    assert found.faults == []
    assert found.cases == 8000
    assert found.codes["RouteStream OK"] > 1000
    assert found.codes["RouteStream INVALID_ARGUMENT"] > 1000
    assert len(found.neighbours) > 10


@pytest.mark.parametrize("kind", dict.fromkeys(garbage.KINDS))
async def test_garbage_on_the_port_harms_nobody(
    server: Running, channel: grpc.aio.Channel, kind: garbage.Kind
) -> None:
    async def ask(word: str) -> bytes:
        return await caller(channel, "Route")(pb.RouteRequest(prompt=word).SerializeToString())

    async with asyncio.TaskGroup() as tasks:
        for seed in range(8):
            tasks.create_task(garbage.one(kind, server.address, random.Random(seed)))
        asked = [tasks.create_task(ask(word)) for word in ("easy", "hard hard") * 5]

    models = [pb.RouteResponse.FromString(task.result()).arm.model for task in asked]
    assert models == ["small", "large"] * 5
    assert await health(server.address) == "SERVING"


async def test_nobody_can_fill_the_log() -> None:
    """Found: a traceback for each header that is no text, and for each message that is none."""
    starting = served()
    server = await asyncio.to_thread(starting.__enter__)
    try:
        odd = garbage.headers(bestroute_priority="\xff\xfe")
        await garbage.call(server.address, odd, b"\x00\x00\x00\x00\x03\x12\x01a")
        async with grpc.aio.insecure_channel(server.address) as channel:
            check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            with pytest.raises(grpc.aio.AioRpcError):
                await check(b"\xff\xff")
    finally:
        await asyncio.to_thread(starting.__exit__, None, None, None)

    assert server.log == []


async def test_every_odd_text_is_routed_with_finite_numbers() -> None:
    """By the embedded bundle, whose tokenizer is BERT's."""
    texts = [piece * times for piece in ODD_TEXTS for times in (1, 2, 500) if piece.strip()]
    async with (
        serving(Settings(server=Server(listen="127.0.0.1:0"))) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        for text in texts:
            request = pb.RouteRequest(prompt=text, explain=True).SerializeToString()
            answer = pb.RouteResponse.FromString(await caller(channel, "Route")(request))
            numbers = [
                (arm.match_probability, arm.expected_gain, arm.estimated_cost_usd)
                for arm in answer.arms
            ]
            assert numbers, text
            assert all(math.isfinite(number) for row in numbers for number in row), text


# Decoding and conversion by themselves


def refused(method: str, data: bytes) -> bool:
    """Whether a message is refused, in one of the ways in which it may be."""
    decoded = DECODERS[method](data)
    if isinstance(decoded, Malformed):
        assert decoded.error.field
        assert decoded.error.description
        return True
    try:
        match decoded:
            case pb.RouteRequest():
                convert.prompt(decoded, 131_072)
                convert.policy(decoded.policy)
            case pb.RouteStreamRequest():
                convert.prompt(decoded.request, 131_072)
                convert.policy(decoded.request.policy)
            case pb.ScoreRequest():
                convert.prompt(decoded, 131_072)
                convert.answers(decoded, 64, 131_072)
            case pb.GenerateRequest():
                convert.order(decoded, Server(), 0.0, ANYBODY)
    except InvalidRequest:
        return True
    return False


def test_hostile_messages_are_refused_or_understood() -> None:
    for case in [*islice(stream_cases(3), 20_000), *islice(unary_cases(3), 10_000)]:
        assert not (refused(case.method, case.data) and case.sound)


@given(st.sampled_from(sorted(REQUESTS)), st.binary(max_size=200))
def test_any_bytes_are_refused_or_understood(method: str, data: bytes) -> None:
    refused(method, data)


def field(number: int, value: bytes) -> bytes:
    """A field of a message, as it is written."""
    size, length = len(value), b""
    while size > 0x7F:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + value


MANY = 1_000_000
CROWDED = {
    "empty turns": field(3, field(1, b"") * MANY),
    "short turns": field(3, field(1, field(1, b"user") + field(2, b"a")) * MANY),
    "empty names": field(2, b"a") + field(4, field(4, b"") * MANY),
    "names, of which the last is no text": field(4, field(4, b"") * MANY + field(4, b"\xff")),
    "what is unknown": b"\xf8\x3f\x01" * MANY,
    "groups": b"\xfb\x3f" * MANY,
}


@pytest.mark.parametrize("name", CROWDED)
def test_a_crowd_of_fields_is_refused_before_it_is_parsed(name: str) -> None:
    """Found: 16 MB of them took 437 MB, and held up the event loop for 3.6 s."""
    decoded = decoder(pb.RouteRequest)(field(1, b"mine") + CROWDED[name])

    assert isinstance(decoded, Malformed)
    assert decoded.error.field == "(message)"
    assert f"more than the {MOST_FIELDS} fields" in decoded.error.description
    assert decoded.request_id == "mine"


def test_the_limit_on_fields_is_exact() -> None:
    """A field of its own for the list, and for the prompt; long enough to be looked at."""
    prompt = field(2, b"x" * 3 * MOST_FIELDS)
    names = field(4, b"") * (MOST_FIELDS - 2)

    decoded = decoder(pb.RouteRequest)(prompt + field(4, names))
    crowded = decoder(pb.RouteRequest)(prompt + field(4, names + field(4, b"")))

    assert isinstance(decoded, pb.RouteRequest)
    assert len(decoded.policy.allowed_models) == MOST_FIELDS - 2
    assert isinstance(crowded, Malformed)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_broken_message_s_answer_bears_its_id(cut: int) -> None:
    """What follows the id is broken somewhere; on a stream its sender has to know what failed."""
    message = pb.RouteStreamRequest(request=pb.RouteRequest(request_id="mine", prompt="0123456789"))

    decoded = decoder(pb.RouteStreamRequest)(message.SerializeToString()[:-cut])

    assert isinstance(decoded, Malformed)
    assert decoded.request_id == "mine"


async def test_an_id_is_limited_and_its_head_comes_back(stub: "RoutingServiceAsyncStub") -> None:
    """Found: an id of 16 MB was kept and sent back."""
    longest, longer = "é" * (MOST_ID_BYTES // 2), "é" * (MOST_ID_BYTES // 2) + "x"
    sent = [
        pb.RouteStreamRequest(request=pb.RouteRequest(request_id=i, prompt="easy"))
        for i in (longest, longer)
    ]

    answers = [answer async for answer in stub.RouteStream(iter(sent))]

    by_outcome = {answer.WhichOneof("outcome"): answer for answer in answers}
    assert [answer.request_id for answer in answers] == [longest, longest]
    assert by_outcome["error"].error.message.startswith("request.request_id: must be at most 1024")
    assert by_outcome["response"].response.request_id == longest


def named(*names: str) -> pb.RouteRequest:
    return pb.RouteRequest(prompt="easy", policy=pb.RoutingPolicy(allowed_models=names))


def stopping(*stop: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request=pb.RouteRequest(prompt="easy"), sampling=pb.Sampling(stop=stop)
    )


def drawn_from(model: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(request=pb.RouteRequest(prompt="a"), arm=pb.Arm(model=model))


LONG = "😀" * 100_000
BY_NOBODY = pb.Messages(messages=[pb.Message(role=LONG, content="a")])
UNBOUNDED: list[tuple[str, Message, str]] = [
    ("Route", pb.RouteRequest(messages=BY_NOBODY), "messages.messages[0].role"),
    ("Route", named("small", LONG), "policy.allowed_models[1]"),
    ("Route", named(*["small"] * 257), "policy.allowed_models"),
    ("Generate", drawn_from(LONG), "arm.model"),
    ("Generate", stopping(*["a"] * 65), "sampling.stop"),
    ("Generate", stopping("a", "a" * 1025), "sampling.stop[1]"),
    ("Generate", stopping(""), "sampling.stop[0]"),
]


@pytest.mark.parametrize(("method", "request_", "named"), UNBOUNDED)
async def test_what_is_said_of_a_long_text_is_short(
    channel: grpc.aio.Channel, method: str, request_: Message, named: str
) -> None:
    """Found: 16 MB of it came back in headers, where clients read 8 KB; and held up the loop."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await caller(channel, method)(request_.SerializeToString())

    assert failure.value.code() is INVALID
    assert violations(failure.value) == [named]
    assert len(failure.value.details() or "") < 1100


@pytest.mark.parametrize("name", ["a" * 257, LONG])
def test_a_name_too_long_for_any_model_is_compared_with_none(name: str) -> None:
    """Found: to look for models of about that name took a second of the event loop."""
    for refuse in (
        lambda: convert.policy(named(name).policy),
        lambda: convert.order(drawn_from(name), Server(), 0.0, ANYBODY),
    ):
        with pytest.raises(InvalidRequest, match="no model has a name of more than 256 characters"):
            refuse()


async def test_a_long_priority_is_refused_in_short(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await caller(channel, "Route")(
            pb.RouteRequest(prompt="easy").SerializeToString(),
            metadata=(("bestroute-priority", "x" * 3000),),
        )

    assert failure.value.code() is INVALID
    assert len(failure.value.details() or "") < 1100


# The fuzzer itself


Answer = Callable[[pb.RouteRequest], pb.RouteStreamResponse | None]


@asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[str]:
    """A server that answers streams, and so neighbours, by a function; gives its address."""

    async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for data in requests:
            decoded = decoder(pb.RouteStreamRequest)(data)
            if isinstance(decoded, Malformed):
                yield refusal(decoded.request_id).SerializeToString()
            elif found := answer(decoded.request):
                yield found.SerializeToString()

    async def route(data: bytes, context: Any) -> bytes:
        found = answer(pb.RouteRequest.FromString(data))
        assert found is not None
        return found.response.SerializeToString()

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "RouteStream": grpc.stream_stream_rpc_method_handler(stream),
        "Route": grpc.unary_unary_rpc_method_handler(route),
    }
    name = "bestroute.v1.RoutingService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def decided(request: pb.RouteRequest, **arm: Any) -> pb.RouteStreamResponse:
    response = pb.RouteResponse(arm=pb.Arm(**{"model": "small", **arm}))
    return pb.RouteStreamResponse(request_id=request.request_id, response=response)


def refusal(request_id: str, code: grpc.StatusCode = INVALID) -> pb.RouteStreamResponse:
    answer = pb.RouteStreamResponse(request_id=request_id)
    answer.error.code, answer.error.message = code.value[0], "no"
    if code is INVALID:
        answer.error.details.add(type_url="type.googleapis.com/google.rpc.BadRequest")
    return answer


def is_hit(request: pb.RouteRequest) -> bool:
    """Every server below is wrong about these alone."""
    return request.request_id.startswith(SOUND) and request.request_id.endswith("7")


WRONG: dict[str, Answer] = {
    "INTERNAL": lambda r: refusal(r.request_id, grpc.StatusCode.INTERNAL),
    "a sound message is refused": lambda r: refusal(r.request_id),
    "an odd number": lambda r: decided(r, match_probability=math.nan),
    "no arm": lambda r: decided(r, model=""),
    "0 answers to 1 messages": lambda r: None,
    "an answer without an outcome": lambda r: pb.RouteStreamResponse(request_id=r.request_id),
}


async def attacked(answer: Answer) -> Found:
    async with answering(answer) as address:
        return await attack(address, seed=1, streamed=300, unary=0, at_once=1)


async def test_a_server_that_is_right_passes() -> None:
    found = await attacked(decided)

    assert found.faults == []
    assert found.cases == 300


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_server_that_is_wrong_is_caught_at_the_message(wrong: str, tmp_path: Path) -> None:
    def answer(request: pb.RouteRequest) -> pb.RouteStreamResponse | None:
        return WRONG[wrong](request) if is_hit(request) else decided(request)

    found = await attacked(answer)

    assert found.faults
    for fault in found.faults:
        assert wrong in fault.what or "a sound message is refused" in fault.what
        (case,) = fault.cases
        assert is_hit(pb.RouteStreamRequest.FromString(case.data).request)

    save(found.faults[0].cases, tmp_path / "fault.jsonl")
    assert load(tmp_path / "fault.jsonl") == found.faults[0].cases
    async with answering(answer) as address:
        assert (await replay(address, load(tmp_path / "fault.jsonl"))).faults
    async with answering(decided) as address:
        assert (await replay(address, load(tmp_path / "fault.jsonl"))).faults == []


async def test_a_neighbour_s_wrong_answer_is_a_fault() -> None:
    asked = iter(range(1000))

    def answer(request: pb.RouteRequest) -> pb.RouteStreamResponse:
        later = request.request_id == "neighbour" and next(asked) > 5
        return decided(request, samples=int(later))

    found = await attacked(answer)

    assert {"a neighbour got another answer"} <= {f.what.partition(" to ")[0] for f in found.faults}


def test_the_same_seed_gives_the_same_messages() -> None:
    assert list(islice(stream_cases(5), 500)) == list(islice(stream_cases(5), 500))
    assert list(islice(unary_cases(5), 500)) == list(islice(unary_cases(5), 500))
    assert list(islice(stream_cases(5), 50)) != list(islice(stream_cases(6), 50))


def test_cases_are_kept_as_they_are(tmp_path: Path) -> None:
    cases = [Case("Route", b"\x00\xff\n"), Case("RouteStream", b"", sound=True)]
    save(cases, tmp_path / "cases")

    assert load(tmp_path / "cases") == cases
