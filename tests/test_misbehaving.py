"""Answers that are no answers, byte by byte: each ends in a clear error, or works all the same."""

import asyncio
import gzip
import json
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bestroute.prompt import Prompt
from bestroute.upstream import chat
from bestroute.upstream.completion import Delta, Ended, Event, Retried
from bestroute.upstream.providers import Providers, Sampling
from bestroute.upstream.usage import Usage
from tests.upstreams import (
    Chunk,
    Wire,
    events,
    finish,
    refused,
    served_at,
    streamed,
    text,
    until,
    usage,
)

QUESTION = Prompt.of("What is 2 + 2?")  # four tokens, as they are estimated
CHUNKS = (text("The answer "), text("is 4."), finish(), usage(10, 5))
WELL = events(*CHUNKS)


async def drawn(url: str, **provider: Any) -> tuple[Ended, list[Event], Providers]:
    """The last word on the one candidate, and everything that happened."""
    happened: list[Event] = []
    async with Providers(served_at(url, **{"max_retries": 0, **provider})) as providers:
        async with asyncio.timeout(60):
            await providers.sample("small", QUESTION, range(1), Sampling(), happened.append)
    [end] = [event for event in happened if isinstance(event, Ended)]
    return end, happened, providers


# --- works all the same


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(streamed(WELL), id="well"),
        pytest.param(streamed(WELL.replace(b"\n", b"\r\n")), id="crlf"),
        pytest.param(streamed(WELL.replace(b"\n", b"\r")), id="cr"),
        pytest.param(streamed(b": ping\n\n", b":\n\ndata:\n\n", WELL), id="keep-alives"),
        pytest.param(streamed(b"\x00\xfe\xff rubbish\n\n" + WELL), id="garbage-between"),
        pytest.param(streamed(b"\xef\xbb\xbf" + WELL), id="byte-order-mark"),
        pytest.param(streamed(WELL.removesuffix(b"data: [DONE]\n\n")), id="no-done"),
        pytest.param(streamed(WELL, b"data: {]\n\n" * 3), id="rubbish-after-done"),
        pytest.param(streamed(*(bytes([byte]) for byte in WELL)), id="byte-by-byte"),
        pytest.param(streamed(WELL, of=b"text/plain"), id="other-type"),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", WELL], id="no-type-and-no-length"
        ),
        pytest.param(
            streamed(gzip.compress(WELL), header=b"Content-Encoding: gzip\r\n"), id="compressed"
        ),
        pytest.param(
            [
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n",
                json.dumps(
                    {
                        "choices": [
                            {
                                "index": 0,
                                "message": {"role": "assistant", "content": "The answer is 4."},
                                "finish_reason": "stop",
                            }
                        ],
                        "usage": {"prompt_tokens": 10, "completion_tokens": 5},
                    }
                ).encode(),
            ],
            id="whole-and-no-stream",
        ),
    ],
)
async def test_it_works(wire: Wire, reply: Sequence[bytes | float]) -> None:
    wire.replies = [reply]
    end, happened, _ = await drawn(wire.url)

    assert (end.text, end.finish_reason, end.error) == ("The answer is 4.", "stop", None)
    assert end.usage == Usage(10, 5)
    assert "".join(e.text for e in happened if isinstance(e, Delta)) == end.text


async def test_usage_that_never_comes_is_not_waited_for(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_LAST_WORDS", 0.1)
    wire.replies = [streamed(events(*CHUNKS[:3]).removesuffix(b"data: [DONE]\n\n"), 60.0)]
    end, _, providers = await drawn(wire.url)

    assert (end.text, end.error) == ("The answer is 4.", None)
    assert end.usage == Usage(4, 4, estimated=True)
    assert not providers.counts()["test"].failures


async def test_half_a_surrogate_pair_becomes_a_replacement_character(wire: Wire) -> None:
    chunk = rb'{"choices": [{"index": 0, "delta": {"content": "a\ud83d \ud83d\ude00"}}]}'
    wire.replies = [streamed(events(chunk, finish()))]
    end, _, _ = await drawn(wire.url)

    assert end.text == "a\N{REPLACEMENT CHARACTER} \N{GRINNING FACE}"
    end.text.encode()


# --- a clear error


def ends(*chunks: Chunk | bytes) -> list[bytes | float]:
    return streamed(events(*chunks))


def repeated(*pieces: bytes | float) -> list[bytes | float]:
    return [*pieces] * 1000


PAGE = b"<!DOCTYPE html><html><body>Welcome</body></html>"


@pytest.mark.parametrize(
    ("reply", "reason", "words", "cost"),
    [
        pytest.param(
            ends(text("a"), b'{"choices": [{'), "malformed", "a chunk that is no JSON", 5, id="half"
        ),
        pytest.param(ends(b"[" * 50_000), "malformed", "a chunk that is no JSON", 4, id="deep"),
        pytest.param(ends(b"\xff\xfe\xff"), "malformed", "a chunk that is no JSON", 4, id="utf-8"),
        pytest.param(ends(b"null"), "malformed", "a chunk that is no object", 4, id="null"),
        pytest.param(ends(b"[1]"), "malformed", "a chunk that is no object", 4, id="list"),
        pytest.param(
            ends({"choices": "none"}), "malformed", "choices that are no list", 4, id="choices"
        ),
        pytest.param(
            ends({"choices": ["4"]}), "malformed", "a choice that is no object", 4, id="choice"
        ),
        pytest.param(
            ends(text("4"), b"x" * (1 << 20)), "malformed", "an event of more than", 5, id="huge"
        ),
        pytest.param(ends(text("4")), "incomplete", "ended without a finish_reason", 5, id="done"),
        pytest.param(streamed(), "incomplete", "ended without a finish_reason", 4, id="nothing"),
        pytest.param(streamed(PAGE), "malformed", "a web page instead of an answer", 0, id="page"),
        pytest.param(
            ends({"error": {"message": "busy", "code": 503}}), "server_error", "503 busy", 0, id="e"
        ),
        pytest.param(ends({"error": "busy"}), "server_error", "busy", 0, id="error-as-text"),
        pytest.param(
            ends({"object": "error", "message": "too long", "code": 400}),
            "rejected",
            "400 too long",
            0,
            id="error-object",
        ),
        pytest.param(
            streamed(b'event: error\ndata: {"message": "busy"}\n\n'),
            "server_error",
            "busy",
            0,
            id="error-event",
        ),
        pytest.param(
            ends(text("4"), {"error": {"message": "gone"}}), "server_error", "gone", 5, id="late"
        ),
        pytest.param(
            ends(text("4"), {"error": True}),
            "server_error",
            "an error without a message",
            5,
            id="silent-error",
        ),
        pytest.param(
            ends(text("4"), finish(reason="error")), "server_error", "gave up", 5, id="finish-error"
        ),
        pytest.param(
            [b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + events(text("4"))[:-14]],
            "lost",
            "payload is not completed",
            5,
            id="disconnect",
        ),
        pytest.param([b"220 mail.example ESMTP\r\n"], "malformed", "no HTTP", 0, id="no-http"),
        pytest.param([], "lost", "disconnected", 0, id="hangs-up"),
        pytest.param(
            streamed(b"no gzip at all", header=b"Content-Encoding: gzip\r\n"),
            "lost",
            "decode",
            4,
            id="no-gzip",
        ),
        pytest.param(
            refused(500, b"out of memory"), "server_error", "500 out of memory", 0, id="5"
        ),
        pytest.param(refused(503, PAGE), "server_error", "503 Because", 0, id="503-page"),
        pytest.param(refused(429), "rate_limited", "429 Because", 0, id="429"),
        pytest.param(
            refused(400, b'{"detail": "no such field"}'), "rejected", "400 no such field", 0, id="4"
        ),
        pytest.param(refused(422, b"[" * 50_000), "rejected", "422 [[[", 0, id="deep-error"),
        pytest.param(refused(204), "rejected", "204 Because", 0, id="204"),
        pytest.param(
            refused(307, Location="http://elsewhere.example/v1"),
            "rejected",
            "it is at http://elsewhere.example/v1 now; set base_url",
            0,
            id="moved",
        ),
    ],
)
async def test_it_fails_clearly_and_costs_what_was_streamed(
    wire: Wire, reply: Sequence[bytes | float], reason: str, words: str, cost: int
) -> None:
    wire.replies = [reply]
    end, _, providers = await drawn(wire.url)

    assert end.finish_reason == "error"
    assert words in str(end.error)
    assert str(end.error).startswith("test: ")
    assert len(str(end.error)) < 600
    assert end.usage.input_tokens + end.usage.output_tokens == cost
    assert end.usage.estimated is (cost > 0)
    [counts] = providers.counts().values()
    assert counts.failures == {reason: 1}
    assert (counts.calls, counts.in_flight) == (1, 0)
    assert counts.input_tokens + counts.output_tokens == cost


@pytest.mark.parametrize(
    ("pieces", "limits", "words"),
    [
        pytest.param([60.0], {"read_timeout": 0.2}, "silence for 0.2 s", id="no-headers"),
        pytest.param(
            streamed(events(text("4"))[:-14], 60.0),
            {"read_timeout": 0.2},
            "silence for 0.2 s",
            id="stalls",
        ),
        pytest.param(
            streamed(*repeated(b": ping\n\n", 0.05)),
            {"first_token_timeout": 0.3},
            "no text within 0.3 s",
            id="slow-first-token",
        ),
        pytest.param(
            streamed(*repeated(events(text("4"))[:-14], 0.05)),
            {"max_answer_seconds": 0.4},
            "not done within 0.4 s",
            id="never-ends",
        ),
    ],
)
async def test_patience_ends(
    wire: Wire, pieces: list[bytes | float], limits: dict[str, float], words: str
) -> None:
    wire.replies = [pieces]
    begun = time.monotonic()
    end, _, providers = await drawn(wire.url, **limits)

    assert str(end.error) == f"test: {words}"
    assert time.monotonic() - begun < 20
    assert providers.counts()["test"].failures == {"timeout": 1}
    await until(lambda: wire.connections == 0)


async def test_reasoning_and_text_count_as_first_tokens(wire: Wire) -> None:
    """What came in time may then take as long as it likes."""
    thought = text("", reasoning_content="Hm.")
    wire.replies = [streamed(events(thought)[:-14], 0.8, WELL)]
    end, _, _ = await drawn(wire.url, first_token_timeout=0.5)

    assert (end.text, end.error) == ("The answer is 4.", None)


async def test_an_answer_that_never_stops_is_cut(wire: Wire) -> None:
    wire.replies = [streamed(*[events(text("x" * 100))[:-14]] * 1000)]
    end, happened, providers = await drawn(wire.url, max_answer_characters=1050)

    assert str(end.error) == "test: an answer of more than 1050 characters"
    assert end.text == "x" * 1000
    assert sum(len(e.text) for e in happened if isinstance(e, Delta)) == 1000
    assert providers.counts()["test"].failures == {"too_long": 1}


async def test_an_error_page_that_never_ends_is_not_read_to_its_end(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = b"HTTP/1.1 500 Because\r\nConnection: close\r\n\r\n"
    endless: list[bytes | float] = [head, *repeated(b"x" * 60_000, 0.05)]
    stalled: list[bytes | float] = [head, b"broken", 60.0]
    for pieces, wait in ((endless, 60.0), (stalled, 0.2)):
        monkeypatch.setattr(chat, "_ERROR_WAIT", wait)
        wire.replies = [pieces]
        begun = time.monotonic()
        end, _, _ = await drawn(wire.url)
        assert time.monotonic() - begun < 20
        assert "500 " in str(end.error)
        assert len(str(end.error)) < 600
        await until(lambda: wire.connections == 0)


async def test_a_key_is_told_neither_to_callers_nor_to_another_host(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "sk-secret\n")
    wire.replies = [refused(302, b"sk-secret", Location=f"{wire.url}/?key=sk-secret")]
    end, _, _ = await drawn(wire.url, api_key_env="KEY")

    assert b"Bearer sk-secret\r\n" in wire.heads[0]
    assert len(wire.heads) == 1
    assert "sk-secret" not in str(end.error)


async def test_a_host_that_does_not_take_the_connection_is_unreachable() -> None:
    """Its queue is full, so that the kernel lets whoever connects wait."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as waiting:
        for _ in range(4):
            other = waiting.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        end, _, providers = await drawn(url, connect_timeout=0.3)

    assert "Connection timeout to host" in str(end.error)
    assert providers.counts()["test"].failures == {"unreachable": 1}
    assert end.usage == Usage()


# --- made again


WAIT = 0.01


@pytest.mark.parametrize(
    ("reply", "spent"),
    [
        pytest.param(refused(408), Usage(), id="408"),
        pytest.param(refused(409), Usage(), id="409"),
        pytest.param(refused(429), Usage(), id="429-without-retry-after"),
        pytest.param(refused(429, retry_after="0.01"), Usage(), id="429-with-retry-after"),
        pytest.param(refused(429, retry_after_ms="10"), Usage(), id="429-with-milliseconds"),
        pytest.param(refused(503, retry_after=formatdate(1.0)), Usage(), id="503-with-a-date"),
        pytest.param(refused(500), Usage(), id="500"),
        pytest.param([], Usage(), id="hangs-up"),
        pytest.param(ends({"error": {"message": "b", "code": 502}}), Usage(), id="in-the-stream"),
        pytest.param(streamed(b": hello\n\n"), Usage(4, 0, True), id="broken-before-any-text"),
    ],
)
async def test_a_call_is_made_again_before_any_text(
    wire: Wire, reply: Sequence[bytes | float], spent: Usage
) -> None:
    wire.replies = [reply, reply, streamed(WELL)]
    end, happened, providers = await drawn(wire.url, max_retries=2, max_retry_delay=WAIT)

    retries = [event for event in happened if isinstance(event, Retried)]
    assert happened[:2] == retries, "before everything else"
    assert [(r.candidates, r.model, r.attempt) for r in retries] == [
        ((0,), "small", i) for i in (1, 2)
    ]
    assert all(0 <= r.delay <= 1.1 * WAIT and str(r.cause).startswith("test: ") for r in retries)
    assert (end.text, end.error) == ("The answer is 4.", None)
    assert end.usage == spent + spent + Usage(10, 5)
    counts = providers.counts()["test"]
    assert (counts.calls, counts.retries, counts.failures.total()) == (3, 2, 2)


@pytest.mark.parametrize(
    "reply",
    [
        *(pytest.param(refused(status), id=str(status)) for status in (400, 401, 403, 404, 422)),
        pytest.param(refused(429, retry_after="30"), id="asks-for-more-than-we-wait"),
        pytest.param(streamed(events(text("4"))[:-14]), id="broken-after-text"),
        pytest.param(
            streamed(events(text("", reasoning="Hm."))[:-14]), id="broken-after-reasoning"
        ),
        pytest.param(ends(b"{"), id="malformed"),
        pytest.param(ends({"error": {"message": "no", "code": 400}}), id="rejected-in-the-stream"),
    ],
)
async def test_other_calls_are_not_made_again(wire: Wire, reply: Sequence[bytes | float]) -> None:
    wire.replies = [reply]
    end, happened, _ = await drawn(wire.url, max_retries=2)

    assert end.error is not None
    assert not any(isinstance(event, Retried) for event in happened)
    assert len(wire.heads) == 1


# --- anything at all


def changed(data: st.DataObject, stream: bytes) -> bytes:
    """A stream with some of its bytes cut, doubled, replaced, or moved."""
    for _ in range(data.draw(st.integers(1, 4))):
        a, b = sorted(data.draw(st.integers(0, len(stream))) for _ in range(2))
        part = stream[a:b]
        other = data.draw(
            st.sampled_from([b"", part * 2, part[::-1]])
            | st.binary(max_size=20)
            | _JSON.map(lambda value: json.dumps(value).encode())
        )
        stream = stream[:a] + other + stream[b:]
    return stream


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def odd(data: st.DataObject, chunks: Sequence[Chunk]) -> bytes:
    """A stream in which fields have values of other types."""

    def rot(value: Any) -> Any:
        if data.draw(st.integers(0, 9)) == 0:
            return data.draw(_JSON)
        if isinstance(value, dict):
            return {key: rot(inner) for key, inner in value.items()}
        return [rot(inner) for inner in value] if isinstance(value, list) else value

    return events(*(rot(chunk) for chunk in chunks))


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data(), typed=st.booleans())
async def test_whatever_comes_ends_and_leaves_nothing_behind(
    wire: Wire, data: st.DataObject, typed: bool
) -> None:
    body = odd(data, CHUNKS) if typed else changed(data, WELL)
    cut = data.draw(st.integers(0, len(body)))
    wire.heads.clear()
    wire.replies = [streamed(body[:cut], body[cut:])]
    end, happened, providers = await drawn(wire.url)

    assert happened[-1] is end
    assert (end.error is None) is (end.finish_reason not in ("error", "cancelled"))
    if end.error is None:
        assert end.text.strip()
    end.text.encode()
    end.finish_reason.encode()
    str(end.error).encode()
    assert "".join(e.text for e in happened if isinstance(e, Delta)) == end.text
    assert end.usage.input_tokens >= 0
    assert end.usage.output_tokens >= 0
    counts = providers.counts()["test"]
    assert (counts.calls, counts.in_flight) == (1, 0)
    await until(lambda: wire.connections == 0)
