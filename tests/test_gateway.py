"""The OpenAI-compatible gateway, over HTTP: what passes through, what is said, what is paid."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.gateways import EASY, WORD, asking, pool, said, whole
from tests.generating import DOWN, POOL, asked, by_model
from tests.scrapes import text_at
from tests.upstreams import (
    Upstream,
    Wire,
    events,
    finish,
    hangs,
    refused,
    says,
    streamed,
    text,
    until,
    usage,
)

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
STREAMING = {"stream": True, "stream_options": {"include_usage": True}}
SMALL_COST = (10 * 0.1 + 5 * 0.5) / 1e6
LARGE_COST = (10 * 3 + 5 * 15) / 1e6


def block_of(body: bytes, untouched: bytes) -> Any:
    """Our block in an answer that is else, byte for byte, what the provider has sent."""
    start = next(i for i, (a, b) in enumerate(zip(body, untouched, strict=False)) if a != b)
    added = body[start : start + len(body) - len(untouched)]
    assert body[:start] + body[start + len(added) :] == untouched
    assert added.startswith(b',"bestroute":')
    return json.loads(added.removeprefix(b',"bestroute":'))


async def test_what_we_do_not_know_passes_untouched_either_way(
    tiny_bundle: Path, wire: Wire
) -> None:
    body = (
        b'{ "messages":[{"content":[{"type":"text","text":"easy"},{"type":"input_audio","x":1.10}],'
        b'"role":"user", "caf\\u00e9": "\xc3\xa9"} ],\t"model" : "bestroute/auto", "n":1,\n'
        b'"tools":[],"zzz":{"model":"small","deep":[1e3,null,"\\ud83d\\ude00"]} }'
    )
    answer = (
        b'{"odd": 1.10 ,"id":"x","choices":[{"message":{"role":"assistant","content":null,'
        b'"tool_calls":[{"id":"c","function":{"name":"add","arguments":"{}"}}]},"finish_reason":'
        b'"tool_calls","caf\\u00e9":"\xc3\xa9"}],\r\n"usage":{"prompt_tokens":10,'
        b'"completion_tokens":5 , "more":{"usage":{}}}, "last":[] }\n'
    )
    wire.replies = [whole(answer)]
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        found = await gateway.post(body)

    assert wire.raw == [body.replace(b'"bestroute/auto"', b'"small"')]
    assert found.status == 200
    block = block_of(found.body.replace(b"5 ,", b"5 ,"), answer)
    assert block["cost_usd"] == pytest.approx(SMALL_COST)
    assert [c["finish_reason"] for c in block["candidates"]] == ["tool_calls"]


async def test_a_stream_passes_event_by_event(tiny_bundle: Path, wire: Wire) -> None:
    """Comments, names of events and ends of lines of any kind, cut anywhere."""
    stream = (
        b": hello\n\n"
        b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\r\n\r\n'
        b"event: odd\nid: 7\n"
        b'data: {"odd":1.10,"choices":[{"index":0,"delta":{"content":"\xc3\xa9"}}]}\n\n'
        b'data:{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\r\r'
    )
    last = b'data: {"choices":[],"usage":{"prompt_tokens":10,"completion_tokens":5}}\n\n'
    sent = stream + last + b"data: [DONE]\n\n"
    pieces = [sent[i : i + 7] for i in range(0, len(sent), 7)]
    wire.replies = [streamed(*[each for p in pieces for each in (p, 0.0005)])]
    body = {"model": "small", "messages": EASY, "stream": True}
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        plain = await gateway.post(body)
        with_usage = await gateway.post({**body, "stream_options": {"include_usage": True}})

    assert plain.headers["content-type"] == "text/event-stream"
    assert plain.body == stream + b"data: [DONE]\n\n", "the caller didn't ask what was used"
    assert block_of(with_usage.body, sent)["cost_usd"] == pytest.approx(SMALL_COST)
    assert [b["stream_options"] for b in wire.bodies] == [{"include_usage": True}] * 2
    assert wire.bodies[1] == {**body, "stream_options": {"include_usage": True}}


async def test_each_delta_passes_as_it_comes(tiny_bundle: Path, upstream: Upstream) -> None:
    upstream.scripts = [hangs("one", "two")]
    body = {"model": "bestroute/auto", "messages": EASY, "stream": True}
    async with asking(pool(tiny_bundle, upstream.url)) as gateway:
        async with gateway.session.post(
            gateway.url + "/v1/chat/completions", json=body
        ) as response:
            seen = b""
            while b"two" not in seen:
                seen += await response.content.readany()
        async with asyncio.timeout(10):
            await upstream.calls[0].left.wait()


@pytest.mark.parametrize(
    "request_",
    [
        {"messages": EASY},
        {"messages": EASY, "stream": True},
        {"messages": WORD, "stream": True},
        {"messages": EASY, "tools": [TOOL]},
    ],
    ids=["whole", "streamed", "three answers", "tools"],
)
async def test_who_leaves_is_not_answered_any_more(
    tiny_bundle: Path, upstream: Upstream, request_: Any
) -> None:
    upstream.scripts = [hangs()]
    async with asking(pool(tiny_bundle, upstream.url)) as gateway:
        asking_ = asyncio.create_task(gateway.post({"model": "bestroute/auto", **request_}))
        await until(lambda: upstream.under_way == (3 if request_["messages"] is WORD else 1))
        asking_.cancel()
        async with asyncio.timeout(10):
            await until(lambda: upstream.under_way == 0)
            assert all([await call.left.wait() for call in upstream.calls])


async def test_the_best_of_three_is_told_with_all_that_it_took(
    tiny_bundle: Path, upstream: Upstream
) -> None:
    answers = [says("bad", tokens=4), says("good good", tokens=5), says("good", tokens=6)]
    upstream.scripts = answers * 2
    body = {"model": "bestroute/auto", "messages": WORD, "temperature": 0.5, "max_tokens": 9}
    async with asking(pool(tiny_bundle, upstream.url)) as gateway:
        found = await gateway.post(body)
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        stream = await gateway.post({**body, **streaming})

    completion = found.json
    [choice] = completion["choices"]
    assert choice["message"] == {"role": "assistant", "content": "good good", "refusal": None}
    assert (choice["finish_reason"], completion["model"]) == ("stop", "small")
    used = completion["usage"]
    assert (used["prompt_tokens"], used["completion_tokens"], used["total_tokens"]) == (30, 15, 45)
    block = used["bestroute"]
    assert (block["model"], block["samples"], block["bundle"]) == ("small", 3, "tiny-1")
    rewards = {c["index"]: c["reward"] for c in block["candidates"]}
    assert sorted(rewards.values()) == [-1, 1, 2]
    assert block["cost_usd"] == pytest.approx((30 * 0.1 + 15 * 0.5) / 1e6)
    assert block["cost_usd"] == pytest.approx(sum(c["cost_usd"] for c in block["candidates"]))
    assert block["saving"] == pytest.approx(1 - block["cost_usd"] / block["reference_cost_usd"])
    headers = found.headers
    assert headers["x-bestroute-model"] == "small"
    assert headers["x-bestroute-samples"] == "3"
    assert float(headers["x-bestroute-cost-usd"]) == pytest.approx(block["cost_usd"])
    assert json.loads(headers["x-bestroute-candidates"]) == block["candidates"]
    assert [c.body["temperature"] for c in upstream.calls] == [0.5] * 6
    assert [c.body["max_tokens"] for c in upstream.calls] == [9] * 6
    first, *middle, last, end = stream.chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"]["content"] for c in middle) == "good good"
    assert last["choices"][0]["finish_reason"] == "stop"
    assert (end["choices"], end["usage"]["total_tokens"]) == ([], 45)
    assert end["usage"]["bestroute"]["samples"] == 3


async def test_a_stream_that_waits_says_that_it_is_alive(
    tiny_bundle: Path, upstream: Upstream
) -> None:
    upstream.scripts = [says("good", delay=0.4)]
    body = {"model": "bestroute/auto", "messages": WORD, "stream": True}
    async with asking(pool(tiny_bundle, upstream.url), gateway={"heartbeat": 0.05}) as gateway:
        found = await gateway.post(body)

    beats = found.body.count(b": waiting for the best answer\n\n")
    assert found.body.startswith(b": waiting")
    assert 1 <= beats <= 8
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in found.chunks) == "good"
    assert found.headers["x-bestroute-samples"] == "3"


async def test_what_goes_wrong_after_that_is_told_in_the_stream(
    tiny_bundle: Path, wire: Wire
) -> None:
    wire.replies = [[0.3, *DOWN]]
    body = {"model": "bestroute/auto", "messages": WORD, "stream": True}
    async with asking(pool(tiny_bundle, wire.url), gateway={"heartbeat": 0.05}) as gateway:
        found = await gateway.post(body)

    *beats, error, end = found.body.split(b"\n\n")
    assert (found.status, end) == (200, b"")
    assert set(beats) == {b": waiting for the best answer"}
    assert json.loads(error[6:])["error"]["code"] == "provider_failed"


async def test_who_reads_slowly_keeps_no_place_at_the_provider(
    tiny_bundle: Path, upstream: Upstream
) -> None:
    upstream.scripts = [says(*["x" * 100_000] * 100), says("yes")]
    body = {"model": "small", "messages": EASY, "stream": True}
    async with asking(pool(tiny_bundle, upstream.url, max_concurrency=1)) as gateway:
        url = gateway.url + "/v1/chat/completions"
        async with gateway.session.post(url, json=body) as unread:
            found = await gateway.post(body)
            assert unread.status == 200

    assert "".join(c["choices"][0]["delta"].get("content", "") for c in found.chunks) == "yes"


@pytest.mark.parametrize(
    ("more", "headers", "passes"),
    [
        ({}, {}, False),
        ({"n": 1, "logprobs": False, "stop": None, "presence_penalty": 0}, {}, False),
        ({}, {"x_bestroute_max_samples": "1"}, True),
        ({"tools": [TOOL]}, {}, True),
        ({"tool_choice": "none"}, {}, True),
        ({"response_format": {"type": "json_object"}}, {}, True),
        ({"logprobs": True}, {}, True),
        ({"n": 2}, {}, True),
        ({"functions": []}, {}, True),
        ({"temperature": "hot"}, {}, True),
        ({"anything": None}, {}, False),
        ({"anything": 0}, {}, True),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "word1"}]}]}, {}, 0),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, {}, True),
        ({"messages": [*WORD, {"role": "tool", "tool_call_id": "1", "content": "2"}]}, {}, True),
        ({"messages": [*WORD, {"role": "assistant", "content": None}]}, {}, True),
        ({"messages": [*WORD, {"role": "poet", "content": "odd"}]}, {}, True),
        ({"messages": [{"role": "user", "content": "word1", "name": "bob"}]}, {}, True),
    ],
)
async def test_only_plain_requests_get_several_answers(
    tiny_bundle: Path, wire: Wire, more: Any, headers: Any, passes: bool
) -> None:
    def reply(request: dict[str, Any]) -> list[bytes | float]:
        stream = events(text("good"), finish(), usage(10, 5))
        return streamed(stream) if request.get("stream") else whole(said("good"))

    wire.reply = reply
    body = {"model": "bestroute/match-0.4", "messages": WORD, **more}
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        found = await gateway.post(body, **headers)

    assert found.status == 200, found.body
    assert ("stream" not in wire.bodies[0]) == bool(passes)
    if passes:
        [sent] = wire.bodies
        assert sent == {**body, "model": found.headers["x-bestroute-model"]}


@pytest.mark.parametrize(
    ("model", "headers", "chosen"),
    [
        ("bestroute/auto", {}, "small"),
        ("bestroute/match-0.999", {}, "large"),
        ("bestroute/match-99.9%", {}, "large"),
        ("bestroute/drop-0%", {}, "small"),
        ("bestroute/save-40%", {}, "small"),
        ("medium", {}, "medium"),
        ("gpt-of-yore", {"x_bestroute_target": "auto"}, "small"),
        ("medium", {"x_bestroute_target": "bestroute/match-0.999"}, "large"),
        ("bestroute/auto", {"x_bestroute_models": "medium, large"}, "medium"),
        ("bestroute/match-0.999", {"x_bestroute_max_cost_usd": "0.0001"}, "small"),
    ],
)
async def test_the_target_is_in_the_model_s_name_or_in_a_header(
    tiny_bundle: Path, wire: Wire, model: str, headers: Any, chosen: str
) -> None:
    wire.replies = [whole(said("yes"))]
    body = {"model": model, "messages": EASY, "user": "bob"}
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        found = await gateway.post(body, **headers)

    assert found.status == 200, found.body
    assert found.headers["x-bestroute-model"] == asked(wire)[0] == chosen


@pytest.mark.parametrize(
    ("body", "headers", "status", "code", "param", "words"),
    [
        (b"{", {}, 400, "invalid_value", "body", "JSON object"),
        (b"[1]", {}, 400, "invalid_value", "body", "JSON object"),
        (b'{"model":"\xff"}', {}, 400, "invalid_value", "body", "UTF-8"),
        (b'{"model":"a","model":"b"}', {}, 400, "invalid_value", "body", "second time"),
        (b'{"a":' + b"[" * 100_000, {}, 400, "invalid_value", "body", "deep"),
        (b'{"a":' + b"1" * 5000 + b"}", {}, 400, "invalid_value", "body", "long numbers"),
        ({"messages": EASY}, {}, 400, "invalid_value", "model", "bestroute/auto"),
        ({"model": 3, "messages": EASY}, {}, 400, "invalid_value", "model", "name"),
        ({"model": "smal", "messages": EASY}, {}, 404, "model_not_found", "model", '"small"'),
        ({"model": "bestroute/x", "messages": EASY}, {}, 404, "model_not_found", "model", "drop-1"),
        ({"model": "bestroute/drop-900%", "messages": EASY}, {}, 400, "invalid_value", "model", ""),
        ({"model": "small"}, {}, 400, "invalid_value", "messages", "at least one"),
        ({"model": "small", "messages": ["x"]}, {}, 400, "invalid_value", "messages[0]", "object"),
        ({"model": "small", "messages": EASY, "stream": 1}, {}, 400, "invalid_value", "stream", ""),
        ({"model": "small", "messages": EASY, "n": 10**9}, {}, 400, "invalid_value", "n", "64"),
        (
            {"model": "bestroute/auto", "messages": EASY},
            {"x_bestroute_max_samples": "-1"},
            *(400, "invalid_value", "x-bestroute-max-samples", "whole number"),
        ),
        (
            {"model": "bestroute/auto", "messages": EASY},
            {"x_bestroute_models": "small,lrage"},
            *(400, "invalid_value", "x-bestroute-models", '"large"'),
        ),
        (
            {"model": "bestroute/auto", "messages": EASY},
            {"x_bestroute_timeout": "soon"},
            *(400, "invalid_value", "x-bestroute-timeout", "number"),
        ),
        (
            {"model": "bestroute/auto", "messages": EASY},
            {"bestroute_priority": "huge"},
            *(400, "invalid_value", "bestroute-priority", "high, normal or low"),
        ),
        (
            {"model": "small", "messages": [{"role": "user", "content": "x" * 200_000}]},
            {},
            *(400, "invalid_value", "messages", "131072"),
        ),
    ],
)
async def test_errors_have_the_shape_of_openai_s(
    tiny_bundle: Path,
    wire: Wire,
    body: Any,
    headers: Any,
    status: int,
    code: str,
    param: str,
    words: str,
) -> None:
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        found = await gateway.post(body, **headers)

    assert found.headers["content-type"] == "application/json"
    error = found.error
    assert (found.status, error["code"], error["param"]) == (status, code, param)
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert not wire.bodies


async def test_where_nothing_is_it_says_what_there_is(tiny_bundle: Path, wire: Wire) -> None:
    async with asking(pool(tiny_bundle, wire.url), gateway={"max_body_bytes": 1000}) as gateway:
        embeddings = await gateway.post({}, "/v1/embeddings")
        got = await gateway.get("/v1/chat/completions")
        large = await gateway.post({"model": "small", "messages": EASY, "x": "y" * 2000})
        models = await gateway.get("/v1/models")
        one = await gateway.get("/v1/models/bestroute%2Fsave-40%25")
        other = await gateway.get("/v1/models/gpt-of-yore")
        live, ready = await gateway.get("/health/live"), await gateway.get("/health/ready")

    assert (embeddings.status, embeddings.error["code"]) == (404, "unknown_url")
    assert "POST /v1/chat/completions" in embeddings.error["message"]
    assert (got.status, large.status) == (405, 413)
    assert "gateway.max_body_bytes" in large.error["message"]
    names = [model["id"] for model in models.json["data"]]
    assert names == [f"bestroute/{each}" for each in ("auto", "drop-1%", "save-40%")] + [*POOL]
    assert one.json["id"] == "bestroute/save-40%"
    assert (other.status, other.error["code"]) == (404, "model_not_found")
    assert (live.status, ready.status) == (200, 200)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_that_is_the_caller_s_fault_passes_with_its_body(
    tiny_bundle: Path, wire: Wire, tmp_path: Path, stream: bool
) -> None:
    key = tmp_path / "key"
    key.write_text("sk-secret-of-the-provider")
    complaint = b'{"error":{"message":"bad schema; sk-secret-of-the-provider","code":"x"},"odd":1}'
    wire.replies = [refused(422, complaint, Content_Type="application/json")]
    settings = pool(tiny_bundle, wire.url, api_key_file=key, max_retries=2)
    async with asking(settings) as gateway:
        body = {"model": "bestroute/auto", "messages": EASY, "tools": [TOOL], "stream": stream}
        found = await gateway.post(body, authorization="Bearer sk-of-the-caller")

    assert found.status == 422
    assert found.body == complaint.replace(b"sk-secret-of-the-provider", b"[api key]")
    assert len(wire.bodies) == 1, "nobody else is asked, and not again"
    assert b"Bearer sk-secret-of-the-provider" in wire.heads[0]
    assert b"sk-of-the-caller" not in wire.heads[0]


async def test_a_refusal_that_is_not_falls_back_and_is_kept_from_the_caller(
    tiny_bundle: Path, wire: Wire
) -> None:
    bad_key = refused(401, b'{"error":{"message":"Incorrect API key sk-abc"}}')
    by_model(wire, small=bad_key, medium=bad_key, large=whole(said("yes")))
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        body = {"model": "bestroute/auto", "messages": EASY}
        found = await gateway.post(body)
        by_model(wire, small=bad_key, medium=bad_key, large=DOWN)
        failed = await gateway.post(body)

    assert asked(wire)[:2] == ["small", "large"]
    assert found.status == 200
    assert found.headers["x-bestroute-model"] == "large"
    assert found.headers["x-bestroute-reason"] == "provider_failed"
    block = found.json["usage"]["bestroute"]
    assert [c["model"] for c in block["candidates"]] == ["small", "large"]
    assert block["cost_usd"] == pytest.approx(LARGE_COST), "a refusal costs nothing"
    assert (failed.status, failed.error["code"]) == (502, "provider_failed")


async def test_retries_and_fallbacks_are_made_until_a_byte_has_passed(
    tiny_bundle: Path, wire: Wire
) -> None:
    role = events(text("", role="assistant")).removesuffix(b"data: [DONE]\n\n")
    overloaded = {"error": {"message": "overloaded", "code": 503}}
    broken = streamed(role, 0.05, events(overloaded))
    good = streamed(events(text("yes"), finish(), usage(10, 5)))
    by_model(wire, small=broken, medium=DOWN, large=good)
    settings = pool(tiny_bundle, wire.url, "medium", max_retries=1, max_retry_delay=0.01)
    body = {"model": "bestroute/auto", "messages": EASY, "stream": True}
    async with asking(settings) as gateway:
        found = await gateway.post(body)
        by_model(wire, small=streamed(events(text("half"))[:-14], 0.05), medium=good, large=good)
        halved = await gateway.post(body)

    assert asked(wire) == ["small", "small", "medium", "medium", "large", "small"]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in found.chunks) == "yes"
    first, second, end = halved.body.split(b"\n\n")
    assert b"half" in first
    assert json.loads(second[6:])["error"]["code"] == "provider_failed"
    assert end == b"", "and no [DONE], for it isn't"


async def test_a_model_that_is_switched_off_is_not_offered(tiny_bundle: Path, wire: Wire) -> None:
    off = {"disabled_arms": ["small"]}
    async with asking(pool(tiny_bundle, wire.url), operations=off) as gateway:
        models = await gateway.get("/v1/models")
        asked_ = await gateway.post({"model": "small", "messages": EASY})
        close = await gateway.post({"model": "smal", "messages": EASY})

    assert "small" not in [model["id"] for model in models.json["data"]]
    assert (asked_.status, asked_.error["code"]) == (403, "model_disabled")
    assert '"small"' not in close.error["message"]


@pytest.mark.parametrize("status", [400, 429])
async def test_so_does_one_of_the_best_of_several_when_nobody_else_answers(
    tiny_bundle: Path, wire: Wire, status: int
) -> None:
    said_ = b'{"error":{"message":"no"}}'
    wire.replies = [refused(status, said_, Retry_After="7")]
    async with asking(pool(tiny_bundle, wire.url, max_retries=0)) as gateway:
        found = await gateway.post({"model": "bestroute/auto", "messages": WORD})

    assert (found.status, found.body, found.headers["retry-after"]) == (status, said_, "7")
    assert len(wire.bodies) == 3 + 1


async def test_too_many_requests_are_told_as_such_when_nobody_else_answers(
    tiny_bundle: Path, wire: Wire
) -> None:
    wire.replies = [refused(429, b'{"error":{"message":"slow down"}}', Retry_After="7")]
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        found = await gateway.post({"model": "large", "messages": EASY})

    assert (found.status, found.headers["retry-after"]) == (429, "7")
    assert found.json == {"error": {"message": "slow down"}}


async def test_what_keeps_failing_is_left_alone(tiny_bundle: Path, wire: Wire) -> None:
    by_model(wire, small=DOWN, large=whole(said("yes")))
    settings = pool(tiny_bundle, wire.url, breaker_failures=2, breaker_pause=60)
    async with asking(settings) as gateway:
        answers = [await gateway.post({"model": "small", "messages": EASY}) for _ in range(4)]

    assert [each.status for each in answers] == [200] * 4
    assert asked(wire).count("small") == 2
    assert asked(wire).count("large") == 4


async def test_the_reference_answers_where_the_router_fails(tiny_bundle: Path, wire: Wire) -> None:
    wire.replies = [whole(said("yes"))]
    body = {"model": "bestroute/auto", "messages": [{"role": "user", "content": "broken"}]}
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        found = await gateway.post(body)

    assert asked(wire) == ["large"]
    assert found.headers["x-bestroute-reason"] == "router_failed"


async def test_a_picture_without_words_is_answered(tiny_bundle: Path, wire: Wire) -> None:
    wire.replies = [whole(said("a cat"))]
    message = {"role": "user", "content": [IMAGE]}
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        found = await gateway.post({"model": "bestroute/auto", "messages": [message]})

    assert found.json["choices"][0]["message"]["content"] == "a cat"
    assert wire.bodies[0]["messages"] == [message]


async def test_several_choices_of_the_caller_s_own_pass_and_are_paid(
    tiny_bundle: Path, wire: Wire
) -> None:
    choice = {"message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
    two = said("x", 40, choices=[{"index": i, **choice} for i in range(2)])
    chunks = [text("a", 0), text("b", 1), finish(1), finish(0, "length"), usage(10, 40)]
    wire.replies = [whole(two), streamed(events(*chunks))]
    body = {"model": "bestroute/auto", "messages": EASY, "n": 2}
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        found = await gateway.post(body)
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        stream = await gateway.post({**body, **streaming})

    assert [b["n"] for b in wire.bodies] == [2, 2]
    assert len(found.json["choices"]) == 2
    for block in (found.json["usage"]["bestroute"], stream.chunks[-1]["usage"]["bestroute"]):
        assert block["cost_usd"] == pytest.approx((10 * 0.1 + 40 * 0.5) / 1e6)
        assert len(block["candidates"]) == 2
    reasons = [c["finish_reason"] for c in stream.chunks[-1]["usage"]["bestroute"]["candidates"]]
    assert reasons == ["length", "stop"]


async def test_money_is_what_the_provider_says_whatever_the_texts(
    tiny_bundle: Path, wire: Wire
) -> None:
    """Tools, pictures and hidden reasoning have tokens that no text accounts for."""
    used = {"prompt_tokens": 90_000, "completion_tokens": 3}
    wire.replies = [whole(said("a" * 4000, usage=used))]
    async with asking(pool(tiny_bundle, wire.url), metrics={"listen": "127.0.0.1:0"}) as gateway:
        found = await gateway.post({"model": "small", "messages": EASY, "tools": [TOOL]})
        assert gateway.running.metrics is not None
        scraped = await asyncio.to_thread(text_at, gateway.running.metrics)

    paid = (90_000 * 0.1 + 3 * 0.5) / 1e6
    assert found.json["usage"]["bestroute"]["cost_usd"] == pytest.approx(paid)
    assert float(found.headers["x-bestroute-cost-usd"]) == pytest.approx(paid)
    [line] = [x for x in scraped.splitlines() if x.startswith("bestroute_cost_usd_total")]
    assert float(line.split()[1]) == pytest.approx(paid)
    counted = 'bestroute_rpc_duration_seconds_count{code="OK",method="ChatCompletions"} 1'
    other = 'bestroute_rpc_duration_seconds_count{method="ChatCompletions",code="OK"} 1'
    assert counted in scraped or other in scraped


async def test_nobody_can_speak_in_our_name(tiny_bundle: Path, wire: Wire) -> None:
    spoofed = b"x-bestroute-model: gold\r\nx-bestroute-cost-usd: 0\r\nSet-Cookie: a=b\r\n"
    theirs = said("yes")
    theirs["usage"]["bestroute"] = {"cost_usd": 0, "model": "gold"}
    wire.replies = [whole(theirs, spoofed + b"x-request-id: req-7\r\n")]
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        body = {"model": "bestroute/auto", "messages": EASY}
        found = await gateway.post(body, x_bestroute_model="gold", x_bestroute_cost_usd="0")

    assert found.headers["x-bestroute-model"] == "small"
    assert float(found.headers["x-bestroute-cost-usd"]) == pytest.approx(SMALL_COST)
    assert found.json["usage"]["bestroute"]["model"] == "small"
    assert found.body.count(b"bestroute") == 1
    assert "set-cookie" not in found.headers
    assert found.headers["x-request-id"] == "req-7"


async def test_a_deadline_is_kept(tiny_bundle: Path, upstream: Upstream) -> None:
    upstream.scripts = [hangs()]
    async with asking(pool(tiny_bundle, upstream.url)) as gateway:
        body = {"model": "bestroute/auto", "messages": EASY}
        passed = await gateway.post(body, x_bestroute_timeout="0.3")
        drawn = await gateway.post({**body, "messages": WORD}, x_bestroute_timeout="0.3")
        await until(lambda: upstream.under_way == 0)

    for found in (passed, drawn):
        assert (found.status, found.error["code"]) == (504, "deadline_exceeded")


async def test_sessions_are_turns_of_one_conversation(tiny_bundle: Path, wire: Wire) -> None:
    wire.replies = [whole(said("yes"))]
    async with asking(pool(tiny_bundle, wire.url)) as gateway:
        turns = []
        for _ in range(2):
            body = {"model": "bestroute/auto", "messages": EASY, "user": "bob"}
            headers = {"x_bestroute_session": "s1", "x_bestroute_sticky": "true"}
            found = await gateway.post(body, **headers)
            turns.append(found.json["usage"]["bestroute"]["turn"])

    assert [turn["number"] for turn in turns] == [1, 2]
    assert turns[1]["previous_model"] == "small"


async def test_whoever_drains_answers_what_is_under_way_and_nothing_else(
    tiny_bundle: Path, upstream: Upstream
) -> None:
    upstream.scripts = [says("slow", delay=1.2)]
    body = {"model": "bestroute/auto", "messages": EASY}
    settings = pool(tiny_bundle, upstream.url)
    async with aiohttp.ClientSession() as session:
        async with asking(settings, server={"drain_delay": 0.5}) as gateway:
            url = gateway.url
            under_way = asyncio.create_task(_status(session, url, {**body, "stream": True}))
            await until(lambda: upstream.under_way == 1)
            seen = asyncio.create_task(_until_gone(session, url, body))
        statuses, ready = await seen
        assert await under_way == 200
    assert ready == 503, "load balancers are told before anybody is refused"
    assert statuses[-1] == 503


async def _status(session: aiohttp.ClientSession, url: str, body: Any) -> int:
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        assert b"[DONE]" in await response.read()
        return response.status


async def _until_gone(
    session: aiohttp.ClientSession, url: str, body: Any
) -> tuple[list[int], int | None]:
    """Ask, wrongly, so that nothing takes long, until there is nobody; and whether it is ready."""
    statuses, ready = [], None
    wrong = {**body, "messages": []}
    try:
        while True:
            async with session.post(f"{url}/v1/chat/completions", json=wrong) as response:
                statuses.append(response.status)
            async with session.get(f"{url}/health/ready") as response:
                if statuses[-1] == 400 and response.status != 200:
                    ready = response.status
            await asyncio.sleep(0.02)
    except aiohttp.ClientError:
        return statuses, ready


@pytest.mark.parametrize(
    ("make", "status"),
    [(lambda: {"usd_per_day": 0.0}, 429), (lambda: {"requests_per_second": 0.01}, 429)],
    ids=["money", "rate"],
)
async def test_limits_of_callers_hold(
    tiny_bundle: Path, wire: Wire, make: Callable[[], Any], status: int
) -> None:
    wire.replies = [whole(said("yes"))]
    async with asking(pool(tiny_bundle, wire.url), callers={"default": make()}) as gateway:
        body = {"model": "bestroute/auto", "messages": EASY}
        answers = [await gateway.post(body) for _ in range(2)]

    found = answers[-1]
    assert found.status == status
    assert int(found.headers["retry-after"]) > 0
    money = "usd_per_day" in make()
    assert found.error["code"] == ("insufficient_quota" if money else "rate_limit_exceeded")
    assert (found.headers.get("x-should-retry") == "false") == money


async def test_cached_prompts_cost_what_they_cost(tiny_bundle: Path, wire: Wire) -> None:
    used: dict[str, Any] = {"prompt_tokens": 1000, "completion_tokens": 5}
    used["prompt_tokens_details"] = {"cached_tokens": 600}
    wire.replies = [whole(said("yes", usage=used))]
    settings = pool(tiny_bundle, wire.url)
    price = dict(input_usd_per_mtok=0.1, output_usd_per_mtok=0.5, cached_input_usd_per_mtok=0.02)
    models = {"small": {"provider": "test", "price": price}}
    async with asking(settings, models=models) as gateway:
        found = await gateway.post({"model": "small", "messages": EASY})
        wire.replies = [streamed(events(text("yes"), finish(), {"choices": [], "usage": used}))]
        stream = await gateway.post({"model": "small", "messages": EASY, **STREAMING})
        best = await gateway.post({"model": "bestroute/auto", "messages": WORD})
        best_stream = await gateway.post({"model": "bestroute/auto", "messages": WORD, **STREAMING})

    paid = (400 * 0.1 + 600 * 0.02 + 5 * 0.5) / 1e6
    assert float(found.headers["x-bestroute-cost-usd"]) == pytest.approx(paid)
    for told in (found.json["usage"], stream.chunks[-1]["usage"]):
        assert told["bestroute"]["cost_usd"] == pytest.approx(paid)
        assert told["prompt_tokens_details"] == {"cached_tokens": 600}
    for told in (best.json["usage"], best_stream.chunks[-1]["usage"]):
        assert told["bestroute"]["cost_usd"] == pytest.approx(3 * paid)
        assert told["prompt_tokens"] == 3000
        assert told["prompt_tokens_details"] == {"cached_tokens": 1800}


async def test_what_was_really_paid_is_charged(tiny_bundle: Path, wire: Wire) -> None:
    """An answer is estimated at 50.1 millionths of a dollar, and costs 3.5."""
    wire.replies = [whole(said("yes"))]
    limits = {"default": {"usd_per_day": 60e-6}}
    async with asking(pool(tiny_bundle, wire.url), callers=limits) as gateway:
        body = {"model": "bestroute/auto", "messages": EASY}
        statuses = [(await gateway.post(body)).status for _ in range(4)]

    assert statuses == [200, 200, 200, 429]
