"""What comes to a port beside gRPC: noise, HTTP/2 that breaks its rules, and clients that dawdle.

Each function holds a connection of its own and ends with it. What the server does with it is its
own affair, as long as it goes on serving everybody else.
"""

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PING, _WINDOW = 0, 1, 2, 3, 4, 6, 8
_CONTINUATION = 9
_END_STREAM, _END_HEADERS = 1, 4
_ROUTE = "/bestroute.v1.RoutingService/Route"
_LEFT = (ConnectionError, asyncio.IncompleteReadError, TimeoutError, RuntimeError)
"""The server has closed the connection, as it may; the last is how uvloop says it of a write."""

Writer = asyncio.StreamWriter


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int = -1) -> bytes:
    """An HTTP/2 frame (RFC 9113, 4.1).

    Args:
        kind: its type.
        flags: of that type.
        stream: its identifier.
        payload: what it holds.
        length: that it claims; -1: the payload's.
    """
    claimed = len(payload) if length < 0 else length
    return struct.pack(">I", claimed)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def headers(path: str = _ROUTE, **extra: str) -> bytes:
    """A header block of a gRPC call, each field as a literal that isn't indexed (RFC 7541, 6.2.2).

    Args:
        path: the method.
        extra: further fields, "_" in names for "-"; one of another name's wins.
    """
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        **{name.replace("_", "-"): value for name, value in extra.items()},
    }
    return b"".join(
        b"\x00" + _string(name.encode()) + _string(value.encode("latin-1"))
        for name, value in fields.items()
    )


def _string(value: bytes) -> bytes:
    """A string without Huffman code; lengths from 127 on as in RFC 7541, 5.1."""
    length = len(value)
    if length < 127:
        return bytes([length]) + value
    rest, encoded = length - 127, bytearray([127])
    while rest > 127:
        encoded.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*encoded, rest]) + value


@asynccontextmanager
async def _connection(address: str, *, greet: bool = True) -> AsyncIterator[Writer]:
    """A connection whose answers are read and thrown away; with a preface and empty settings."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))

    async def discard() -> None:
        with suppress(*_LEFT):
            while await reader.read(65_536):
                pass

    discarding = asyncio.create_task(discard())
    try:
        if greet:
            writer.write(PREFACE + frame(_SETTINGS, 0, 0))
        with suppress(*_LEFT):
            yield writer
            await writer.drain()
            await asyncio.wait([discarding], timeout=0.05)
    finally:
        discarding.cancel()
        writer.transport.abort()


async def noise(address: str, source: random.Random) -> None:
    """No HTTP/2 at all, or only almost."""
    async with _connection(address, greet=False) as writer:
        writer.write(
            source.choice(
                (
                    source.randbytes(source.choice((1, 24, 5000))),
                    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + source.randbytes(200),  # TLS
                    PREFACE[: source.randrange(len(PREFACE))],
                    PREFACE.replace(b"2.0", b"3.0"),
                    PREFACE + source.randbytes(300),
                    b"",
                )
            )
        )


async def odd_frames(address: str, source: random.Random) -> None:
    """Frames of any type, flags and length in any order."""
    async with _connection(address) as writer:
        for _ in range(source.randint(1, 20)):
            payload = source.choice((b"", source.randbytes(source.randrange(64)), headers()))
            length = source.choice((-1, -1, -1, 0, len(payload) + 1, 2**24 - 1))
            stream = source.choice((0, 1, 1, 3, 2, 2**31 - 1))
            writer.write(
                frame(source.randrange(12), source.randrange(256), stream, payload, length)
            )
            await writer.drain()


async def odd_headers(address: str, source: random.Random) -> None:
    """Calls whose headers are too large, wrong, contradictory or not those of gRPC."""
    odd = source.choice(
        (
            headers(content_type="text/html"),
            headers(content_type=""),
            headers(te="gzip"),
            headers(path=""),
            headers(path="/" * 5000),
            headers(path="/bestroute.v1.RoutingService/\x00"),
            headers(x="y" * 100_000)[:16_000],
            headers(x="y" * 15_000),
            headers(grpc_timeout="99999999999999999999H"),
            headers(grpc_timeout="-1S"),
            headers(grpc_encoding="gzip"),
            headers(grpc_encoding="nonsense"),
            headers(bestroute_priority="\xff\xfe"),
            headers(**{":method": "BREW"}),
            headers(**{"Upper": "case", "with space": "x"}),
            b"\x82\x86\x84\xbf\xff\xff\xff\xff\x0f",  # indexes beyond every table
            b"\x3f\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a dynamic table of any size
        )
    )
    await call(address, odd, b"\x00\x00\x00\x00\x03\x12\x01a")


async def call(address: str, block: bytes, body: bytes) -> None:
    """A call of any headers and any bytes."""
    async with _connection(address) as writer:
        writer.write(frame(_HEADERS, _END_HEADERS, 1, block))
        writer.write(frame(_DATA, _END_STREAM, 1, body))


async def odd_messages(address: str, source: random.Random) -> None:
    """Sound headers and then messages cut short, of a claimed length, or compressed noise."""
    body = source.choice(
        (
            b"",
            b"\x00",
            b"\x00\x00\x00\x00\xff\x12",
            b"\x00\xff\xff\xff\xff",
            b"\x01\x00\x00\x00\x04abcd",
            b"\xff\x00\x00\x00\x01a",
            b"\x00\x00\x00\x00\x03\x12\x01a" * 3,
        )
    )
    encoding = source.choice(("identity", "gzip", "deflate"))
    end = source.choice((0, _END_STREAM))
    async with _connection(address) as writer:
        writer.write(frame(_HEADERS, _END_HEADERS, 1, headers(grpc_encoding=encoding)))
        writer.write(frame(_DATA, end, 1, body))


async def rapid_reset(address: str, source: random.Random) -> None:
    """Many calls, each reset as soon as it has begun (CVE-2023-44487)."""
    async with _connection(address) as writer:
        block, reset = headers(), struct.pack(">I", 8)
        for stream in range(1, 2 * source.choice((50, 300)), 2):
            writer.write(frame(_HEADERS, _END_HEADERS, stream, block))
            writer.write(frame(_RST_STREAM, 0, stream, reset))
            if stream % 64 == 1:
                await writer.drain()


async def endless_headers(address: str, source: random.Random) -> None:
    """A header block that goes on and on (CVE-2024-27316)."""
    async with _connection(address) as writer:
        writer.write(frame(_HEADERS, 0, 1, headers()))
        more = b"\x00" + _string(b"x") + _string(b"y" * 4000)
        for _ in range(source.choice((10, 100))):
            writer.write(frame(_CONTINUATION, 0, 1, more))
            await writer.drain()


async def floods(address: str, source: random.Random) -> None:
    """Many frames that want an answer, or change a setting."""
    async with _connection(address) as writer:
        one = source.choice(
            (
                frame(_PING, 0, 0, bytes(8)),
                frame(
                    _SETTINGS, 0, 0, struct.pack(">HI", 4, source.choice((0, 2**31 - 1, 2**32 - 1)))
                ),
                frame(_PRIORITY, 0, 1, bytes(5)),
                frame(_WINDOW, 0, 0, struct.pack(">I", 2**31 - 1)),
            )
        )
        for _ in range(20):
            writer.write(one * 20)
            await writer.drain()


async def half_open(address: str, source: random.Random) -> None:
    """A call that never ends, by a client that doesn't read or has gone without a word."""
    async with _connection(address) as writer:
        writer.write(frame(_SETTINGS, 0, 0, struct.pack(">HI", 4, 0)))  # may be sent nothing
        writer.write(frame(_HEADERS, _END_HEADERS, 1, headers()))
        writer.write(
            frame(_DATA, source.choice((0, _END_STREAM)), 1, b"\x00\x00\x00\x00\x03\x12\x01a")
        )
        if source.random() < 0.5:
            writer.write_eof()
        await asyncio.sleep(source.random() / 2)


async def slow(address: str, source: random.Random) -> None:
    """A client that sends byte by byte."""
    async with _connection(address, greet=False) as writer:
        said = PREFACE + frame(_SETTINGS, 0, 0) + frame(_HEADERS, _END_HEADERS, 1, headers())
        for byte in said[: source.randrange(30, 60)]:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.01)


Kind = Callable[[str, random.Random], Awaitable[None]]
KINDS: Sequence[Kind] = (
    *(noise, odd_frames, odd_frames, odd_headers, odd_headers, odd_messages),
    *(rapid_reset, endless_headers, floods, half_open, slow),
)


async def one(kind: Kind, address: str, source: random.Random) -> None:
    """A connection of a kind; the server may close it at any point."""
    with suppress(*_LEFT):
        await kind(address, source)


async def send(address: str, source: random.Random) -> None:
    """A connection of any kind."""
    await one(source.choice(KINDS), address, source)
