"""A real server before upstreams of bytes, and what its Generate tells."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bestroute.app import serving
from bestroute.client import Client, Conversation
from bestroute.config import Routing, Server, Settings
from bestroute.v1 import routing_pb2 as pb
from tests.upstreams import Wire, events, finish, refused, served_at, streamed, text, usage

POOL = ("small", "medium", "large")
DOWN = refused(500, b"down")


def answers(words: str, tokens: int = 5) -> list[bytes | float]:
    """A reply, with its usage; the prompt has 10 tokens."""
    return streamed(events(text(words), finish(), usage(10, tokens)))


def by_model(wire: Wire, **replies: list[bytes | float]) -> None:
    """Let the server answer each model in its own way."""
    wire.reply = lambda request: replies[request["model"]]


def asked(wire: Wire) -> list[str]:
    """The models of all requests so far."""
    return [body["model"] for body in wire.bodies]


def configured(
    bundle: Path, url: str, *fallbacks: str, models: tuple[str, ...] = POOL, **provider: Any
) -> Settings:
    """A server's settings, with one provider for all models that by default gets no retry."""
    served = served_at(url, *models, **{"max_retries": 0, **provider})
    server = Server(listen="127.0.0.1:0", drain_timeout=5)
    routing = Routing(fallbacks=fallbacks)
    return served.model_copy(update={"bundle": bundle, "server": server, "routing": routing})


@asynccontextmanager
async def client_of(settings: Settings) -> AsyncIterator[Client]:
    """A client of a server that lasts as long as the block."""
    async with serving(settings) as running, Client(running.address) as client:
        yield client


async def told(
    client: Client, prompt: Conversation = "easy", **options: Any
) -> list[pb.GenerateResponse]:
    """All events of a Generate."""
    return [event async for event in client.generate(prompt, **options)]


async def collect(call: Any, seen: list[pb.GenerateResponse]) -> None:
    """Add the events of a call to what was seen, however it ends."""
    async for event in call:
        seen.append(event)


def kinds(found: list[pb.GenerateResponse]) -> list[str]:
    """Which events they are."""
    return [event.WhichOneof("event") or "" for event in found]
