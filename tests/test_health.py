"""Health as those see it who watch it."""

import asyncio
import json
import time
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bestroute.app import serving
from bestroute.config import Settings
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1.routing_pb2_grpc import RoutingServiceStub

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_all_who_watch_are_told_of_the_drain_and_hold_up_nobody(settings: Settings) -> None:
    """Also those who were there before another one left."""
    limits = settings.server.model_copy(update={"drain_delay": 0.3, "drain_timeout": 30})
    settings = settings.model_copy(update={"server": limits})
    async with AsyncExitStack() as after, serving(settings) as server:
        channel = await after.enter_async_context(grpc.aio.insecure_channel(server.address))
        stub = health_pb2_grpc.HealthStub(channel)

        def watching(name: str) -> Any:
            return aiter(stub.Watch(health_pb2.HealthCheckRequest(service=name)))

        names = ("", "readiness", "readiness", "liveness", "bestroute.v1.RoutingService", "nobody")
        leaver = stub.Watch(health_pb2.HealthCheckRequest(service="readiness"))
        watches = [watching(name) for name in names]
        first = [(await anext(watch)).status for watch in (*watches, aiter(leaver))]
        leaver.cancel()
        await asyncio.sleep(0.1)

        async def rest(watch: Any) -> list[object]:
            seen: list[object] = []
            try:
                async for answer in watch:
                    seen.append(answer.status)
            except grpc.aio.AioRpcError as error:
                seen.append(error.code())
            return seen

        told = [asyncio.create_task(rest(watch)) for watch in watches]
        after.push_async_callback(asyncio.wait, told)
        left = time.monotonic()
    took = time.monotonic() - left
    ended = [task.result() for task in told]

    gone = grpc.StatusCode.UNAVAILABLE
    assert first == [SERVING] * 5 + [UNKNOWN, SERVING]
    assert ended == [[NOT_SERVING, gone]] * 3 + [[gone], [NOT_SERVING, gone], [gone]]
    assert took < 20


async def test_clients_that_watch_health_do_not_notice_a_drain(settings: Settings) -> None:
    """Without a proxy, as gRPC's own clients balance."""
    limits = settings.server.model_copy(update={"drain_delay": 1.0, "drain_timeout": 30})
    leaving = settings.model_copy(update={"server": limits})
    config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": "readiness"},
    }
    options = [("grpc.service_config", json.dumps(config)), ("grpc.enable_retries", 0)]
    over, codes = asyncio.Event(), Counter[grpc.StatusCode]()
    async with AsyncExitStack() as stack, serving(settings) as stays:
        async with serving(leaving) as leaves:
            target = f"ipv4:{stays.address},{leaves.address}"
            channel = grpc.aio.insecure_channel(target, options=options)
            stub = RoutingServiceStub(await stack.enter_async_context(channel))

            async def ask() -> None:
                while not over.is_set():
                    codes[await stub.Route(pb.RouteRequest(prompt="easy"), timeout=20).code()] += 1
                    await asyncio.sleep(0.005)

            asking = asyncio.gather(*(ask() for _ in range(4)))
            await asyncio.sleep(0.3)
        over.set()
        await asking

    assert codes.keys() == {grpc.StatusCode.OK}
