"""A real gateway before upstreams of bytes, asked over HTTP by hand."""

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from bestroute.app import Running, serving
from bestroute.config import Settings
from tests.generating import POOL, configured

EASY = [{"role": "user", "content": "easy"}]
"""Is routed to one answer of small."""
WORD = [{"role": "user", "content": "word1"}]
"""Is routed to three answers of small."""


class Answer(NamedTuple):
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The error; everything that OpenAI's have is there."""
        error = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error

    @property
    def chunks(self) -> list[Any]:
        """Of a stream that has ended well."""
        *events, done, end = self.body.split(b"\n\n")
        assert (done, end) == (b"data: [DONE]", b"")
        return [json.loads(event[6:]) for event in events if event.startswith(b"data: ")]


class Asking(NamedTuple):
    """A gateway, and a session to ask it with."""

    running: Running
    session: aiohttp.ClientSession
    url: str

    async def post(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Answer:
        """Ask; an underscore in a header's name stands for a hyphen."""
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post(self.url + path, data=data, headers=named) as response:
            return await _read(response)

    async def get(self, path: str) -> Answer:
        async with self.session.get(self.url + path) as response:
            return await _read(response)


async def _read(response: aiohttp.ClientResponse) -> Answer:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Answer(response.status, headers, await response.read())


def with_gateway(settings: Settings, **more: Any) -> Settings:
    """The settings with a gateway on a free port, and other sections or their keys."""
    values = settings.model_dump()
    for section, value in {"gateway": {}, **more}.items():
        values[section] = {**values[section], **value} if isinstance(value, dict) else value
    values["gateway"].setdefault("listen", None)
    values["gateway"]["listen"] = values["gateway"]["listen"] or "127.0.0.1:0"
    return Settings.model_validate(values)


@asynccontextmanager
async def asking(settings: Settings, **more: Any) -> AsyncIterator[Asking]:
    """Serve with a gateway while the block lasts."""
    async with (
        serving(with_gateway(settings, **more)) as running,
        aiohttp.ClientSession() as session,
    ):
        assert running.gateway is not None
        yield Asking(running, session, f"http://{running.gateway}")


def pool(bundle: Path, url: str, *fallbacks: str, **provider: Any) -> Settings:
    """Settings of a server whose whole pool is at one provider."""
    return configured(bundle, url, *fallbacks, models=POOL, **provider)


def whole(body: bytes | dict[str, Any], header: bytes = b"") -> list[bytes | float]:
    """A reply in one piece."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n" + header
    return [head + b"Content-Length: %d\r\n\r\n" % len(data) + data]


def said(text: str, tokens: int = 5, **more: Any) -> dict[str, Any]:
    """A chat completion; the prompt has 10 tokens."""
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "upstream-s-own",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": tokens, "total_tokens": 10 + tokens},
        **more,
    }
