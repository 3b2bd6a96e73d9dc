"""Fixtures: a tiny bundle, and real servers on free ports."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from bestroute.app import Running, serving
from bestroute.config import Batching, Server, Settings
from bestroute.process import new_event_loop
from bestroute.v1 import routing_pb2_grpc
from tests import tiny

# Before torch is imported: its threads only get in each other's way with networks this small.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.upstreams", "tests.doctoring"]


def pytest_asyncio_loop_factories(
    item: pytest.Item,
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop of `bestroute serve` for tests of the RPCs; for others asyncio's own."""
    served = item.path.stem in ("test_route", "test_generate")
    return {"loop": new_event_loop if served else asyncio.new_event_loop}


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="session")
def trading_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_trading(tmp_path_factory.mktemp("trading"))


@pytest.fixture
def settings(tiny_bundle: Path) -> Settings:
    """The tiny bundle on a free port of loopback."""
    return Settings(
        bundle=tiny_bundle,
        server=Server(listen="127.0.0.1:0", drain_timeout=5),
        batching=Batching(max_padded_tokens=256),
    )


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[Running]:
    """A real server with the tiny bundle."""
    async with serving(settings) as running:
        yield running


@pytest.fixture
async def channel(server: Running) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> "routing_pb2_grpc.RoutingServiceAsyncStub":
    return routing_pb2_grpc.RoutingServiceStub(channel)
