"""Sends hostile messages to a server and judges what comes back, while neighbours use it too.

A server passes if every message is answered once and in time, by an answer with finite numbers or
by one of the codes that the contract promises, with its details; if none that keeps the contract is
refused; and if neighbours, on connections of their own, go on getting what they got before.
"""

import asyncio
import base64
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from benchmarks import garbage
from benchmarks.mutation import MOST_BYTES, Case, stream_cases, unary_cases
from bestroute.v1 import routing_pb2 as pb

_SERVICE = "/bestroute.v1.RoutingService/"
_OK, _INVALID = "OK", "INVALID_ARGUMENT"
PROMISED = {"Feedback": {_OK, _INVALID, "UNIMPLEMENTED"}}
"""Codes that a call may end with, by RPC; of the others, OK and INVALID_ARGUMENT. A message that is
too large for the server may also end with RESOURCE_EXHAUSTED."""
_DEADLINE = 60.0
"""Seconds; a call that takes longer hangs."""
_PER_STREAM = 250
_OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]
# Larger than anything the server may send back.
_ANY_SIZE = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
Metadata = tuple[tuple[str, str | bytes], ...]
_METADATA: Sequence[Metadata] = (
    (),
    (),
    (),
    (("bestroute-priority", "low"),),
    (("bestroute-priority", "HIGH"), ("bestroute-priority", "low")),
    (("traceparent", "00-zz"), ("tracestate", "=,=;" * 50)),
    (("traceparent", "ff-" + "0" * 32 + "-" + "0" * 16 + "-01"),),
    (("authorization", "Bearer " + "x" * 3000),),
    (("authorization", ""), ("x-odd-bin", bytes(range(256)))),
    (("baggage", "a=%ff," * 200), ("x-api-key", "a b")),
)
_BAD_METADATA: Sequence[Metadata] = (
    (("bestroute-priority", "urgent"),),
    (("bestroute-priority", ""),),
    (("bestroute-priority", "x" * 3000),),
)
NEIGHBOURS = tuple(
    f"{begin} {end}"
    for begin in ("What is", "Prove that", "Write a poem about", "Translate to German:")
    for end in ("2 + 3?", "there are infinitely many primes.", "rain.", "easy", "hard " * 30)
)
"""What neighbours ask."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What a server did wrong.

    Attributes:
        what: in words.
        cases: that it was sent; if there are several, it is one of them or all together.
    """

    what: str
    cases: Sequence[Case] = ()


@dataclass
class Found:
    """What came of an attack.

    Attributes:
        codes: how many messages ended with which, by "RPC code".
        faults: of the server; none if it passes.
        neighbours: answers that neighbours got, and how long the slowest took, in seconds.
        connections: that carried garbage.
        seconds: from the first message to the last answer.
    """

    codes: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    neighbours: list[float] = field(default_factory=list)
    connections: int = 0
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        """How many messages were sent."""
        return self.codes.total()


Known = dict[str, bytes]
"""Answers to prompts, see `lasting`."""


async def attack(
    address: str,
    *,
    seed: int,
    streamed: int,
    unary: int,
    connections: int = 0,
    at_once: int = 4,
    known: Known | None = None,
) -> Found:
    """Send hostile messages, with garbage on other connections and neighbours on their own.

    Args:
        address: of a server with no limits on callers, whose models are all served.
        seed: another one gives other messages.
        streamed: messages on RouteStreams.
        unary: messages to the other RPCs.
        connections: that carry garbage.
        at_once: streams, and calls, under way together.
        known: what neighbours have to be answered; None: what they are before.
    """
    found = Found()
    if known is None:
        async with _channel(address) as channel:
            known = {prompt: await _ask(channel, prompt) for prompt in NEIGHBOURS}
    over = asyncio.Event()
    begun = time.monotonic()
    streams = islice(stream_cases(seed), streamed)
    calls = islice(zip(unary_cases(seed), _metadata(seed), strict=True), unary)
    sources = (random.Random(seed + number) for number in range(connections))

    async def stream_all() -> None:
        async with _channel(address) as channel:
            while cases := list(islice(streams, _PER_STREAM)):
                await _judge_stream(channel, cases, found)

    async def call_all() -> None:
        async with _channel(address) as channel:
            for case, metadata in calls:
                await judge_call(channel, case, found, metadata)

    async def connect_all() -> None:
        for source in sources:
            await garbage.send(address, source)
            found.connections += 1

    async with asyncio.TaskGroup() as living:
        for number in range(2):
            living.create_task(_neighbour(address, known, number, over, found))
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(at_once):
                    tasks.create_task(stream_all())
                    tasks.create_task(call_all())
                    tasks.create_task(connect_all())
        finally:
            over.set()
    found.seconds = time.monotonic() - begun
    return found


def _metadata(seed: int) -> Iterator[Metadata]:
    source = random.Random(seed)
    while True:
        yield source.choice(_BAD_METADATA if source.random() < 0.05 else _METADATA)


async def replay(address: str, cases: Sequence[Case]) -> Found:
    """Send cases again, those of streams together and then one by one."""
    found = Found()
    async with _channel(address) as channel:
        if streamed := [case for case in cases if case.method == "RouteStream"]:
            await _judge_stream(channel, streamed, found)
        for case in cases:
            if case.method != "RouteStream":
                await judge_call(channel, case, found)
    return found


def _channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, [*_OWN_CONNECTION, *_ANY_SIZE])


async def _judge_stream(channel: grpc.aio.Channel, cases: Sequence[Case], found: Found) -> None:
    """Send cases on one stream; where that shows a fault, each again on its own to find it."""
    codes, faults = await _stream(channel, cases)
    found.codes += codes
    if not faults:
        return
    if len(cases) > 1:
        alone = [(await _stream(channel, [case]))[1] for case in cases]
        if single := [fault for each in alone for fault in each]:
            faults = single
    found.faults += faults


async def _stream(
    channel: grpc.aio.Channel, cases: Sequence[Case]
) -> tuple[Counter[str], list[Fault]]:
    """How a stream's messages ended, and what is wrong with that."""
    codes: Counter[str] = Counter()
    faults: list[Fault] = []
    sound = {_id(case): case for case in cases if case.sound}
    route: grpc.aio.StreamStreamMultiCallable[bytes, bytes]
    route = channel.stream_stream(f"{_SERVICE}RouteStream")
    call = route(iter([case.data for case in cases]), timeout=_DEADLINE)
    try:
        async for data in call:
            answer = pb.RouteStreamResponse.FromString(data)
            case = sound.pop(answer.request_id, None)
            if wrong := _wrong_answer(answer, sound=case is not None):
                faults.append(Fault(wrong, [case] if case else cases))
            code = _name(answer.error.code) if answer.HasField("error") else _OK
            codes[f"RouteStream {code}"] += 1
    except grpc.aio.AioRpcError as error:
        faults.append(Fault(f"the stream ended: {error.code().name} {error.details()}", cases))
    except DecodeError:
        faults.append(Fault("an answer is no RouteStreamResponse", cases))
    if not faults and codes.total() != len(cases):
        faults.append(Fault(f"{codes.total()} answers to {len(cases)} messages", cases))
    if not faults and sound:
        faults.append(Fault("a sound message has no answer", list(sound.values())))
    return codes, faults


def _id(case: Case) -> str:
    return pb.RouteStreamRequest.FromString(case.data).request.request_id


def _wrong_answer(answer: pb.RouteStreamResponse, *, sound: bool) -> str | None:
    match answer.WhichOneof("outcome"):
        case "response":
            return _odd_number(answer.response)
        case "error":
            status = answer.error
            if sound:
                return f"a sound message is refused: {status.message}"
            if _name(status.code) != _INVALID or not status.details:
                return f"{_name(status.code)} {status.message}"
            return None
        case _:
            return "an answer without an outcome"


def _odd_number(response: pb.RouteResponse) -> str | None:
    for arm in (response.arm, response.reference, *response.arms):
        numbers = (arm.expected_gain, arm.estimated_cost_usd, arm.expected_output_tokens)
        if not 0 <= arm.match_probability <= 1 or not all(map(math.isfinite, numbers)):
            return f"an odd number in {arm}".replace("\n", " ")
    return None if response.arm.model else "no arm"


async def judge_call(
    channel: grpc.aio.Channel,
    case: Case,
    found: Found,
    metadata: Metadata = (),
) -> None:
    """Make a unary call, or one of Generate.

    Args:
        channel: to the server.
        case: what to send.
        found: is told.
        metadata: goes with it; for some, even a sound message is refused.
    """
    wrong: str | None = None
    try:
        if case.method == "Generate":
            stream: grpc.aio.UnaryStreamMultiCallable[bytes, bytes]
            stream = channel.unary_stream(_SERVICE + case.method)
            async for data in stream(case.data, timeout=_DEADLINE, metadata=metadata):
                pb.GenerateResponse.FromString(data)
        else:
            unary: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
            unary = channel.unary_unary(_SERVICE + case.method)
            data = await unary(case.data, timeout=_DEADLINE, metadata=metadata)
            wrong = _wrong_data(case.method, data)
        code = _OK
    except grpc.aio.AioRpcError as error:
        code = error.code().name
        if code == "RESOURCE_EXHAUSTED" and len(case.data) > MOST_BYTES:
            pass  # gRPC itself says so, without details
        elif code not in PROMISED.get(case.method, {_OK, _INVALID}):
            wrong = f"{code} {error.details()}"
        elif case.sound and metadata not in _BAD_METADATA:
            wrong = f"a sound message is refused: {error.details()}"
        elif code == _INVALID and not _has_details(error):
            wrong = "INVALID_ARGUMENT without details"
    except DecodeError:
        code, wrong = _OK, f"an answer is none of {case.method}"
    found.codes[f"{case.method} {code}"] += 1
    if wrong:
        found.faults.append(Fault(f"{case.method}: {wrong}", [case]))


def _wrong_data(method: str, data: bytes) -> str | None:
    if method == "Route":
        return _odd_number(pb.RouteResponse.FromString(data))
    if method == "Score" and not all(map(math.isfinite, pb.ScoreResponse.FromString(data).rewards)):
        return "a reward is no finite number"
    return None


def _has_details(error: grpc.aio.AioRpcError) -> bool:
    metadata = error.trailing_metadata() or ()
    details = [value for key, value in metadata if key == "grpc-status-details-bin"]
    return bool(details and status_pb2.Status.FromString(details[0]).details)


def _name(number: int) -> str:
    return next((code.name for code in grpc.StatusCode if code.value[0] == number), str(number))


def lasting(answer: pb.RouteResponse) -> bytes:
    """An answer without what differs each time that it is given."""
    for once in ("request_id", "timing", "decision_id"):
        answer.ClearField(once)
    return answer.SerializeToString(deterministic=True)


async def _ask(channel: grpc.aio.Channel, prompt: str) -> bytes:
    request = pb.RouteRequest(request_id="neighbour", prompt=prompt, explain=True)
    route: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
    route = channel.unary_unary(f"{_SERVICE}Route")
    data = await route(request.SerializeToString(), timeout=_DEADLINE)
    return lasting(pb.RouteResponse.FromString(data))


async def _neighbour(
    address: str, known: Known, number: int, over: asyncio.Event, found: Found
) -> None:
    source = random.Random(number)
    async with _channel(address) as channel:
        while not over.is_set():
            prompt = source.choice(NEIGHBOURS)
            begun = time.monotonic()
            try:
                if await _ask(channel, prompt) != known[prompt]:
                    found.faults.append(Fault(f"a neighbour got another answer to {prompt!r}"))
            except grpc.aio.AioRpcError as error:
                what = f"a neighbour got {error.code().name} {error.details()}"
                found.faults.append(Fault(what))
            found.neighbours.append(time.monotonic() - begun)
            await asyncio.sleep(0.02)


def save(cases: Sequence[Case], path: Path) -> None:
    """Write cases to a file, to be replayed: one JSON object per line."""
    lines = [
        json.dumps(
            {"method": c.method, "data": base64.b64encode(c.data).decode(), "sound": c.sound}
        )
        for c in cases
    ]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def load(path: Path) -> list[Case]:
    """Read what `save` has written."""
    return list(_loaded(path.read_text(encoding="utf-8")))


def _loaded(text: str) -> Iterator[Case]:
    for line in text.splitlines():
        case = json.loads(line)
        yield Case(case["method"], base64.b64decode(case["data"]), case["sound"])
