"""What applications call with: openai, LangChain and LiteLLM, as their manuals show, at our URL."""

import asyncio
import importlib.util
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bestroute.config import Settings
from tests.gateways import asking, pool

CLIENTS = Path(__file__).parent / "clients"
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
COST = (10 * 0.1 + 5 * 0.5) / 1e6


def answer(body: dict[str, Any]) -> dict[str, Any]:
    """The message with which an LLM that can everything answers."""
    messages = body["messages"]
    last = messages[-1]
    if last["role"] == "tool":
        return {"role": "assistant", "content": f"it is {last['content']}"}
    if body.get("response_format"):
        return {"role": "assistant", "content": '{"city": "Berlin", "sunny": true}'}
    if body.get("tools"):
        function = {"name": "get_weather", "arguments": '{"city": "Berlin"}'}
        call = {"id": "call_1", "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if isinstance(last["content"], list) and last["content"][-1]["type"] == "image_url":
        return {"role": "assistant", "content": "a picture"}
    return {"role": "assistant", "content": "good answer"}


def chunks(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The same as a stream: text word by word, arguments of tools in halves."""
    message = answer(body)
    if calls := message.get("tool_calls"):
        [call] = calls
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        begun = {**call, "index": 0, "function": {"name": name, "arguments": ""}}
        halves = (arguments[:5], arguments[5:])
        rest = [{"index": 0, "function": {"arguments": half}} for half in halves]
        deltas = [{"tool_calls": [each]} for each in (begun, *rest)]
    else:
        deltas = [{"content": word} for word in message["content"].partition(" ")]
    reason = "tool_calls" if calls else "stop"
    found = [
        {"index": 0, "delta": delta, "finish_reason": None}
        for delta in ({"role": "assistant", "content": ""}, *deltas)
    ]
    frame = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "llm"}
    choices = [[each] for each in (*found, {"index": 0, "delta": {}, "finish_reason": reason})]
    sent = [{**frame, "choices": each} for each in choices]
    if (body.get("stream_options") or {}).get("include_usage"):
        sent.append({**frame, "choices": [], "usage": USAGE})
    return sent


async def complete(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    assert request.headers.get("Authorization") is None, "the caller's key is not the provider's"
    if not body.get("stream"):
        message = answer(body)
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        frame = {"id": "c", "object": "chat.completion", "created": 1, "model": "llm"}
        return web.json_response({**frame, "choices": [choice], "usage": USAGE})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    slow = body["messages"][-1]["content"] == "word1"  # of which three answers are drawn
    for chunk in chunks(body):
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await asyncio.sleep(0.05 if slow else 0)
    await response.write(b"data: [DONE]\n\n")
    return response


@pytest.fixture
async def settings(tiny_bundle: Path) -> AsyncIterator[Settings]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    yield pool(tiny_bundle, f"http://{host}:{port}/v1")
    await runner.cleanup()


async def ran(name: str, settings: Settings) -> dict[str, Any]:
    """What one of the programs finds, in a process of its own, as libraries warn and phone home."""
    # So often that every client has to live with comments in its stream.
    async with asking(settings, gateway={"heartbeat": 0.03}) as gateway:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, str(CLIENTS / f"{name}.py"), f"{gateway.url}/v1"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={
                **os.environ,
                "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # not looked for on the net
                "LANGSMITH_TRACING": "false",
            },
        )
        try:
            out, log = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
    assert process.returncode == 0, log.decode()
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def is_told(found: dict[str, Any]) -> None:
    """Check what all three programs find."""
    assert found["whole"] == found["streamed"] == found["async"] == "good answer"
    assert found["best of three"] == "good answer"
    assert found["tool"] == ["get_weather", {"city": "Berlin"}]
    assert found["block"]["model"] == "small"
    assert found["block"]["cost_usd"] == pytest.approx(COST)


async def test_openai(settings: Settings) -> None:
    found = await ran("with_openai", settings)

    is_told(found)
    assert found["samples"] == 3
    assert found["after the tool"] == "it is sunny"
    assert found["picture"] == "a picture"
    assert found["model"] == "small"
    assert {"bestroute/auto", "small"} <= set(found["models"])
    assert found["one"] == "bestroute/auto"
    assert found["no such model"] == ["model_not_found", "model"]
    assert found["no messages"] == "invalid_request_error"


async def test_langchain(settings: Settings) -> None:
    if not importlib.util.find_spec("langchain_openai"):
        pytest.skip("langchain-openai is not installed; pip install langchain-openai")
    found = await ran("with_langchain", settings)

    is_told(found)
    assert found["tokens"] == 15
    assert found["after the tool"] == "it is sunny"
    assert found["tool streamed"] == {"city": "Berlin"}
    assert found["structured"] == {"city": "Berlin", "sunny": True}


async def test_litellm(settings: Settings) -> None:
    if not importlib.util.find_spec("litellm"):
        pytest.skip("litellm is not installed; pip install litellm")
    is_told(await ran("with_litellm", settings))
