"""Messages that no client library sends: sound requests, changed as a fault or an attacker would.

One generator for the long run (`benchmarks.fuzz`) and the short one (`tests/test_fuzz.py`). What it
gives depends on the seed alone. Changes know the wire format, so that most get past the parser's
first bytes: fields are repeated, dropped, put elsewhere, renumbered, given another wire type or a
wrong length, nested, and put together from two requests, at any depth; some bytes are then flipped,
cut off or inserted. Contents are as odd: numbers at and beyond every edge, and texts of what
normalizers and tokenizers have been seen to stumble over.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from google.protobuf.message import Message

from bestroute.prompt import ROLES
from bestroute.v1 import routing_pb2 as pb

SOUND = "sound-"
"""How the request_id of a sound request begins, and of no other."""

MOST_BYTES = 4 * 2**20
"""Of a message on a stream: gRPC ends a stream that brings a larger one than the server takes."""

_DOUBLES = (
    *(
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        2.0,
        1e-300,
        1e300,
        -1e300,
        5e-324,
        -5e-324,
        1.7976931348623157e308,
    ),
    *(math.nan, math.inf, -math.inf, math.nextafter(1, 2), math.nextafter(0, -1), 0.01, 1e-9),
)
_INTEGERS = (0, 1, 2, 3, 7, 64, 65, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
_VARINTS = (0, 1, 127, 128, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
_MODELS = ("small", "large", "claude-sonnet-4", "llama-4-scout", "", "nobody", "\x00", "😀" * 50)

ODD_TEXTS = (
    *(
        "easy",
        "hard ",
        "What is the sum of 2 and 3? ",
        "word1 ",
        " ",
        "\n",
        "\t",
        "7" * 40,
        "!?.,;" * 9,
    ),
    # What tokenizers take for something else than text.
    *("[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK] ", "<s></s>", "<|endoftext|>", "##ing", "▁", "Ġ"),
    # Control characters, of which some are whitespace to some; marks of order and of direction.
    "".join(map(chr, range(32))),
    *(
        "\x00",
        "\x0b\x0c\x1c\x1d\x1e\x1f\x85",
        "\x7f\x80\x9f",
        "\ufeff\u200b\u200d\u2060",
        "\u202e\u2066x",
    ),
    *("\u2028\u2029\u00a0\u3000", "\u0600\u06dd", "\ufff9a\ufffab\ufffb", "\U000e0041\U000e007f"),
    # What grows, shrinks or is taken apart by normalization, lower case and stripping of accents.
    *("ﷺ", "ﬃ", "İ", "ßẞ", "ΑΣ Σ", "가각힣", "ㄱㅏ", "ê̂ế", "ⅷ①㍿", "Å\u212b", "ǆ"),
    *(
        "e" + "\u0301" * 30,
        "\u0301",
        "\u0f71\u0f72\u0f74",
        "\u1100\u1161\u11a8",
        "a\u0315\u0300\u05ae\u0062",
    ),
    # No letters; beyond the basic plane; noncharacters and private use.
    *(
        "👩‍👩‍👧‍👦",
        "🏳️‍🌈",
        "👍🏿" * 7,
        "🇩🇪🇫🇷",
        "漢字仮名交じり文",
        "العربية",
        "עִבְרִית",
        "ไทย",
        "\U0001d518\U0001d52b\U0001d526",
        "𓂀",
    ),
    *("\uffff\ufffe\ufdd0", "\U0010ffff", "\ue000\U000f0000", "\ufffd"),
)
_BAD_UTF8 = (
    b"\xff",
    b"\xc0\x80",
    b"\xed\xa0\x80\xed\xbf\xbf",
    b"\xf4\x90\x80\x80",
    b"a\xe2\x82",
    b"\x80",
)


@dataclass(frozen=True, slots=True)
class Case:
    """A message to send.

    Attributes:
        method: the RPC that it goes to.
        data: its bytes.
        sound: whether it keeps the contract, so that it has to be answered.
    """

    method: str
    data: bytes
    sound: bool = False


def stream_cases(seed: int) -> Iterator[Case]:
    """Messages of RouteStream, without end; those that are sound have ids of their own."""
    source, number = random.Random(seed), 0
    while True:
        number += 1
        if source.random() < 0.1:
            request = sound_request(source, f"{SOUND}{number}")
            message = pb.RouteStreamRequest(request=request)
            yield Case("RouteStream", message.SerializeToString(), sound=True)
        else:
            yield Case("RouteStream", changed(source, "RouteStream")[:MOST_BYTES])


def unary_cases(seed: int, methods: Sequence[str] | None = None) -> Iterator[Case]:
    """Messages of the other RPCs, without end.

    Args:
        seed: another one gives other messages.
        methods: to which they go; None: to each, most to those that are cheap.
    """
    source = random.Random(seed)
    chosen = methods or ["Route"] * 6 + ["Score", "Generate", "ListArms", "Feedback"]
    while True:
        method = source.choice(chosen)
        if method == "Route" and source.random() < 0.2:
            request = sound_request(source, f"{SOUND}0")
            yield Case(method, request.SerializeToString(), sound=True)
        else:
            yield Case(method, changed(source, method))


def sound_request(source: random.Random, request_id: str) -> pb.RouteRequest:
    """A request that keeps the contract, with any text in it."""
    request = pb.RouteRequest(request_id=request_id, explain=source.random() < 0.2)
    if source.random() < 0.7:
        request.prompt = _not_blank(source)
    else:
        for _ in range(source.randint(1, 5)):
            request.messages.messages.add(role=source.choice(ROLES), content=_not_blank(source))
    if source.random() < 0.3:
        request.policy.match_threshold = source.random()
    if source.random() < 0.2:
        request.policy.max_samples = source.choice(_INTEGERS)
    if source.random() < 0.2:
        request.policy.expected_output_tokens = source.choice(_INTEGERS)
    return request


def changed(source: random.Random, method: str) -> bytes:
    """A message of an RPC after some changes, in rare cases none."""
    if source.random() < 0.03:
        return source.randbytes(source.choice((0, 1, 2, 3, 8, 50, 300)))
    data = _request(source, method).SerializeToString()
    for _ in range(source.choice((0, 0, 1, 1, 1, 2, 2, 4))):
        fields = _split(data)
        if fields and source.random() < 0.75:
            data = _joined(_restructured(source, fields, method, depth=0))
        else:
            data = _damaged(source, data)
    return data


def text(source: random.Random) -> str:
    """A text out of odd pieces: mostly short, seldom long, very seldom longer than is taken."""
    length = source.choice((0, 1, 1, 2, 3, 5, 8, 20))
    if source.random() < 0.1:
        pieces = [chr(_code_point(source)) for _ in range(length * 5)]
    else:
        pieces = source.choices(ODD_TEXTS, k=length)
    if (luck := source.random()) < 0.02:
        pieces *= source.choice((5, 20, 50))
    elif luck < 0.021:
        pieces = [source.choice(ODD_TEXTS) * source.choice((5000, 131_073))][:1]
    return "".join(pieces)


def _not_blank(source: random.Random) -> str:
    odd = text(source)
    return odd if odd.strip() and len(odd) < 10_000 else f"{odd[:10_000]}x"


def _code_point(source: random.Random) -> int:
    code = source.randrange(source.choice((0x80, 0x3000, 0x110000)))
    return 0x20 if 0xD800 <= code < 0xE000 else code


def _request(source: random.Random, method: str) -> Message:
    match method:
        case "Route":
            return _route(source)
        case "RouteStream":
            return pb.RouteStreamRequest(request=_route(source))
        case "Score":
            request = pb.ScoreRequest(request_id=text(source)[:20], prompt=text(source)[:500])
            request.responses.extend(
                text(source)[:500] for _ in range(source.choice((0, 1, 1, 2, 3, 65)))
            )
            return request
        case "Generate":
            return _generate(source)
        case "Feedback":
            return pb.FeedbackRequest(
                decision_id=text(source)[:40],
                quality=source.choice(_DOUBLES),
                source=text(source)[:200],
            )
        case _:
            return pb.ListArmsRequest()


def _route(source: random.Random) -> pb.RouteRequest:
    request = pb.RouteRequest(request_id=source.choice(("", "r", text(source)[:2000])))
    if source.random() < 0.6:
        request.prompt = text(source)
    else:
        for _ in range(source.choice((0, 1, 2, 3, 40))):
            role = source.choice((*ROLES, "robot", "", "User"))
            request.messages.messages.add(role=role, content=text(source)[:1000])
    if source.random() < 0.4:
        _fill_policy(source, request.policy)
    request.explain = source.random() < 0.2
    return request


def _fill_policy(source: random.Random, policy: pb.RoutingPolicy) -> None:
    target = source.choice((None, "match_threshold", "max_quality_drop", "min_cost_saving"))
    if target:
        setattr(policy, target, source.choice((*_DOUBLES, source.random())))
    if source.random() < 0.3:
        policy.max_cost_usd = source.choice((*_DOUBLES, source.random() / 100))
    if source.random() < 0.3:
        policy.max_samples = source.choice(_INTEGERS)
    if source.random() < 0.3:
        policy.expected_output_tokens = source.choice(_INTEGERS)
    if source.random() < 0.3:
        count = source.choice((1, 2, 2, 300))
        policy.allowed_models.extend(source.choices((*_MODELS, text(source)[:300]), k=count))


def _generate(source: random.Random) -> pb.GenerateRequest:
    request = pb.GenerateRequest(request=_route(source))
    sampling, execution = request.sampling, request.execution
    if source.random() < 0.3:
        sampling.max_output_tokens = source.choice(_INTEGERS)
    if source.random() < 0.3:
        sampling.temperature = source.choice(_DOUBLES)
    if source.random() < 0.3:
        sampling.top_p = source.choice(_DOUBLES)
    if source.random() < 0.3:
        sampling.seed = source.choice((-(2**63), -1, 0, 2**63 - 1))
    if source.random() < 0.3:
        sampling.stop.extend(text(source)[:50] for _ in range(source.choice((1, 3, 70))))
    execution.early_stop, execution.escalate = source.random() < 0.5, source.random() < 0.5
    if source.random() < 0.3:
        execution.stream_deltas = source.random() < 0.5
    if source.random() < 0.3:
        model, samples = source.choice((*_MODELS, text(source)[:300])), source.choice(_INTEGERS)
        request.arm.CopyFrom(pb.Arm(model=model, samples=samples))
    return request


Field = tuple[int, int, bytes]
"""Number, wire type, and the value's bytes without a length; of wire type -1, the whole's bytes."""

_AS_IT_IS = -1
_SIZES = {1: 8, 5: 4}


def _split(data: bytes) -> list[Field] | None:
    """The fields of a message, those inside of others left together; None if it is none."""
    fields: list[Field] = []
    at = 0
    try:
        while at < len(data):
            tag, at = _read_varint(data, at)
            kind, start = tag & 7, at
            if kind == 0:
                _, at = _read_varint(data, at)
            elif kind == 2:
                size, start = _read_varint(data, at)
                at = start + size
            else:
                at += _SIZES[kind]
            if at > len(data) or not tag >> 3:
                return None
            fields.append((tag >> 3, kind, data[start:at]))
    except (IndexError, KeyError):
        return None
    return fields


def _joined(fields: Sequence[Field]) -> bytes:
    parts: list[bytes] = []
    for number, kind, value in fields:
        if kind == _AS_IT_IS:
            parts.append(value)
            continue
        parts.append(_varint(number << 3 | kind))
        if kind == 2:
            parts.append(_varint(len(value)))
        parts.append(value)
    return b"".join(parts)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := data[at]) & 0x80:
        if shift > 56:
            raise IndexError  # none has more than ten bytes; an emoji's bytes would go on and on
        value |= (byte & 0x7F) << shift
        shift, at = shift + 7, at + 1
    return value | byte << shift, at + 1


def _varint(value: int, *, padded: int = 0) -> bytes:
    """A varint, with that many bytes that say nothing."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    if padded:
        out[-1] |= 0x80
        out += b"\x80" * (padded - 1) + b"\x00"
    return bytes(out)


def _restructured(
    source: random.Random, fields: list[Field], method: str, depth: int
) -> list[Field]:
    """The fields with one of them changed, or one of those in it."""
    at = source.randrange(len(fields))
    number, kind, value = fields[at]
    if kind == 2 and depth < 4 and source.random() < 0.6 and (inside := _split(value)):
        changed = _joined(_restructured(source, inside, method, depth + 1))
        return [*fields[:at], (number, kind, changed), *fields[at + 1 :]]
    return source.choice(_CHANGES)(source, fields, at, method)


Change = Callable[[random.Random, list[Field], int, str], list[Field]]


def _repeat(source: random.Random, fields: list[Field], at: int, method: str) -> list[Field]:
    times = min(source.choice((2, 2, 3, 10, 300)), MOST_BYTES // (len(fields[at][2]) + 1) + 1)
    return [*fields[:at], *[fields[at]] * times, *fields[at + 1 :]]


def _drop(source: random.Random, fields: list[Field], at: int, method: str) -> list[Field]:
    return [*fields[:at], *fields[at + 1 :]]


def _shuffle(source: random.Random, fields: list[Field], at: int, method: str) -> list[Field]:
    return source.sample(fields, len(fields))


def _renumber(source: random.Random, fields: list[Field], at: int, method: str) -> list[Field]:
    _, kind, value = fields[at]
    number = source.choice((0, *range(1, 13), 18_999, 19_000, 2**29 - 1, 2**29))
    return [*fields[:at], (number, kind, value), *fields[at + 1 :]]


def _retype(source: random.Random, fields: list[Field], at: int, method: str) -> list[Field]:
    number, _kind, value = fields[at]
    return [*fields[:at], (number, source.randrange(8), value), *fields[at + 1 :]]


def _other_value(source: random.Random, fields: list[Field], at: int, method: str) -> list[Field]:
    number, kind, value = fields[at]
    match kind:
        case 0:
            value = _varint(source.choice(_VARINTS), padded=source.choice((0, 0, 1, 5, 12)))
        case 2:
            value = source.choice((b"", value * 3, source.choice(_BAD_UTF8), value + b"\xff"))
        case _:
            value = source.randbytes(len(value))
    return [*fields[:at], (number, kind, value), *fields[at + 1 :]]


def _wrong_length(source: random.Random, fields: list[Field], at: int, method: str) -> list[Field]:
    number, _kind, value = fields[at]
    length = max(0, source.choice((*_VARINTS, len(value) + 1, len(value) - 1)))
    odd = _varint(number << 3 | 2) + _varint(length, padded=source.choice((0, 0, 2))) + value
    return [*fields[:at], (0, _AS_IT_IS, odd), *fields[at + 1 :]]


def _unknown(source: random.Random, fields: list[Field], at: int, method: str) -> list[Field]:
    number = source.choice((14, 100, 2**29 - 1))
    return [*fields[:at], (number, 2, source.randbytes(source.randrange(20))), *fields[at:]]


def _groups(source: random.Random, fields: list[Field], at: int, method: str) -> list[Field]:
    """Groups in groups, of a number that may be known, closed or not."""
    number, depth = source.choice((1, 2, 3, 4, 100)), source.choice((1, 2, 99, 101, 500))
    closing = source.choice((0, depth, depth, depth + 1))
    odd = _varint(number << 3 | 3) * depth + _varint(number << 3 | 4) * closing
    return [*fields[:at], (0, _AS_IT_IS, odd), *fields[at:]]


def _nested(source: random.Random, fields: list[Field], at: int, method: str) -> list[Field]:
    number, _kind, value = fields[at]
    for _ in range(source.choice((1, 5, 120))):
        value = _joined([(number, 2, value)])
    return [*fields[:at], (0, _AS_IT_IS, value), *fields[at + 1 :]]


def _both(source: random.Random, fields: list[Field], at: int, method: str) -> list[Field]:
    """Fields of another request as well, so that of a oneof there may be two."""
    other = _split(_request(source, method).SerializeToString())
    return [*fields, *(other or ())]


_CHANGES: Sequence[Change] = (
    *(_repeat, _drop, _shuffle, _renumber, _retype, _other_value, _other_value),
    *(_wrong_length, _unknown, _groups, _nested, _both, _both),
)


def _damaged(source: random.Random, data: bytes) -> bytes:
    """The bytes with a few of them flipped, cut off, put in or repeated."""
    if not data:
        return source.randbytes(4)
    damaged, at = bytearray(data), source.randrange(len(data))
    match source.randrange(5):
        case 0:
            for _ in range(source.choice((1, 1, 3, 20))):
                damaged[source.randrange(len(data))] ^= 1 << source.randrange(8)
        case 1:
            del damaged[at:]
        case 2:
            damaged[at:at] = source.randbytes(source.choice((1, 2, 8)))
        case 3:
            damaged[at:at] = damaged[at : at + 16] * source.choice((1, 5))
        case _:
            damaged[at] = source.choice((0, 0x7F, 0x80, 0xFF))
    return bytes(damaged)
