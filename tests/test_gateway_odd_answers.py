"""What passes through the gateway where a provider answers in ways of its own."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gateways import EASY, asking, pool, said, whole
from tests.upstreams import Wire, events, finish, streamed, text, usage

_OWN = {"model": "small", "messages": EASY}
_DELTA = b"data: " + json.dumps(text("all")).encode() + b"\n\n"
_FINISH = b"data: " + json.dumps(finish()).encode() + b"\n\n"


async def test_white_space_ahead_of_an_answer_is_no_stream(tiny_bundle: Path, wire: Wire) -> None:
    """Some send empty lines until an answer in one piece is ready."""
    body = json.dumps(said("yes")).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    wire.replies = [[head, b"\n", 0.1, b"  \n", 0.1, body]]
    async with asking(pool(tiny_bundle, wire.url, max_retries=0)) as gateway:
        found = await gateway.post(_OWN)

    assert (found.status, len(wire.bodies)) == (200, 1)
    assert found.json["choices"][0]["message"]["content"] == "yes"


@pytest.mark.parametrize("junk", [b"data: bye\n\n", b'data: {"error":{"message":"late"}}\n\n'])
@pytest.mark.parametrize("apart", [False, True])
async def test_what_comes_after_an_answer_s_end_loses_nothing_of_it(
    tiny_bundle: Path, wire: Wire, junk: bytes, apart: bool
) -> None:
    wire.replies = [
        streamed(*([_DELTA, 0.1, _FINISH + junk] if apart else [_DELTA + _FINISH + junk]))
    ]
    async with asking(pool(tiny_bundle, wire.url, max_retries=0)) as gateway:
        found = await gateway.post({**_OWN, "stream": True})

    assert (found.status, found.body) == (200, _DELTA + _FINISH)
    assert len(wire.bodies) == 1


async def test_a_stream_without_an_answer_is_none(tiny_bundle: Path, wire: Wire) -> None:
    wire.replies = [streamed(events()), streamed(events(text("yes"), finish(), usage(10, 5)))]
    async with asking(pool(tiny_bundle, wire.url, max_retries=0)) as gateway:
        found = await gateway.post({**_OWN, "stream": True})

    assert found.headers["x-bestroute-reason"] == "provider_failed"
    assert b'"yes"' in found.body


async def test_a_byte_order_mark_is_none_of_the_answer_s(tiny_bundle: Path, wire: Wire) -> None:
    bom = b"\xef\xbb\xbf"
    wire.replies = [
        streamed(bom + _DELTA + _FINISH + b"data: [DONE]\n\n"),
        whole(bom + json.dumps(said("yes")).encode()),
    ]
    async with asking(pool(tiny_bundle, wire.url, max_retries=0)) as gateway:
        stream = await gateway.post({**_OWN, "stream": True})
        answer = await gateway.post(_OWN)

    assert (stream.status, answer.status, len(wire.bodies)) == (200, 200, 2)
    assert stream.body.startswith(_DELTA)


async def test_an_answer_in_one_piece_is_no_stream(tiny_bundle: Path, wire: Wire) -> None:
    """OpenAI's clients would read nothing at all out of it, and find no fault."""
    wire.replies = [whole(said("yes"))]
    async with asking(pool(tiny_bundle, wire.url, max_retries=0)) as gateway:
        found = await gateway.post({**_OWN, "stream": True})

    assert found.status == 200
    first, last = found.body.removesuffix(b"\n\n").split(b"\n\n")
    chunk = json.loads(first.removeprefix(b"data: "))
    assert chunk["object"] == "chat.completion.chunk"
    assert chunk["choices"][0]["delta"]["content"] == "yes"
    assert chunk["usage"]["bestroute"]["model"] == "small"
    assert last == b"data: [DONE]"
    assert found.headers["content-type"] == "text/event-stream"


async def test_a_stream_is_told_as_such(tiny_bundle: Path, wire: Wire) -> None:
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    wire.replies = [[head, events(text("yes"), finish(), usage(10, 5))]]
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        found = await gateway.post({**_OWN, "stream": True})

    assert found.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize(
    "more",
    [
        {"audio": {"id": "a", "data": "A" * 2_000_000, "transcript": "hi"}},
        {
            "images": [
                {"type": "image_url", "image_url": {"url": "data:;base64," + "A" * 2_000_000}}
            ]
        },
    ],
)
async def test_pictures_and_sounds_are_no_characters(
    tiny_bundle: Path, wire: Wire, more: dict[str, Any]
) -> None:
    answer = said("")
    answer["choices"][0]["message"] |= more
    wire.replies = [whole(answer)]
    async with asking(pool(tiny_bundle, wire.url, max_retries=0)) as gateway:
        found = await gateway.post(_OWN)

    assert found.status == 200


async def test_numbers_that_no_bill_has_are_none(tiny_bundle: Path, wire: Wire) -> None:
    wire.replies = [whole(said("yes", usage={"prompt_tokens": 10**400, "completion_tokens": 5}))]
    async with asking(pool(tiny_bundle, wire.url, max_retries=0)) as gateway:
        found = await gateway.post(_OWN)

    assert found.status == 200
    assert found.json["usage"]["bestroute"]["candidates"][0]["estimated"]


async def test_a_crowd_of_members_holds_nobody_up(tiny_bundle: Path, wire: Wire) -> None:
    """14 MiB of members take the event loop some 3 s to read; no request has so many."""
    crowd = b",".join(b'"k%d":0' % i for i in range(5_000))
    body = json.dumps(_OWN).encode()[:-1] + b"," + crowd + b"}"
    wire.replies = [whole(said("yes"))]
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        found = await gateway.post(body)

    assert found.status == 400


async def test_tools_of_an_answer_in_one_piece_are_numbered(tiny_bundle: Path, wire: Wire) -> None:
    answer = said("")
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    answer["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [call]}
    wire.replies = [whole(answer)]
    async with asking(pool(tiny_bundle, wire.url, max_retries=0)) as gateway:
        found = await gateway.post({**_OWN, "stream": True})

    chunk = json.loads(found.body.split(b"\n\n")[0].removeprefix(b"data: "))
    assert chunk["choices"][0]["delta"]["tool_calls"] == [{"index": 0, **call}]


async def test_a_large_body_passes_without_a_warning(tiny_bundle: Path, wire: Wire) -> None:
    """aiohttp warns of what it would have to write in one go, and warnings fail tests."""
    picture = {"type": "image_url", "image_url": {"url": "data:;base64," + "A" * (3 << 20)}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "easy"}, picture]}]
    wire.replies = [whole(said("yes"))]
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        found = await gateway.post({**_OWN, "messages": messages})

    assert found.status == 200
    assert wire.bodies[0]["messages"] == messages
