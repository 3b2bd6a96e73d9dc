"""Replicas behind a real Envoy that differ: one refuses, or hangs up, or has more to do."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from bestroute.v1 import routing_pb2 as pb
from bestroute.v1.routing_pb2_grpc import RoutingServiceStub
from tests import mesh
from tests.mesh import Envoy, Replica

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

PATIENCE = 20.0
RUN = 0.01
"""Seconds that a run takes, one prompt at a time: what bounds a replica here, on any machine."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    mesh.needs_envoy()
    return tmp_path


@asynccontextmanager
async def stub_of(address: str) -> AsyncIterator["RoutingServiceAsyncStub"]:
    """A plain client, which repeats nothing itself."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield RoutingServiceStub(channel)


async def ready(envoy: Envoy, *replicas: Replica) -> None:
    await envoy.wait_until(healthy=dict.fromkeys((each.port for each in replicas), True))


async def codes(address: str, number: int, at_once: int) -> list[grpc.StatusCode]:
    """How so many Routes end."""
    places = asyncio.Semaphore(at_once)
    async with stub_of(address) as stub:

        async def ask() -> grpc.StatusCode:
            async with places:
                call = stub.Route(pb.RouteRequest(prompt="easy"), timeout=PATIENCE)
                return await call.code()

        return list(await asyncio.gather(*(ask() for _ in range(number))))


async def test_connections_that_end_all_the_time_fail_no_call(
    directory: Path, tiny_bundle: Path
) -> None:
    """Those of the caller to Envoy, and those of Envoy to the replicas."""
    with mesh.replicas(directory, tiny_bundle, "max_connection_age = 0.3\n") as pair:
        config = mesh.in_front_of([each.port for each in pair])
        connections = mesh.connections(config)
        connections["common_http_protocol_options"]["max_connection_duration"] = "0.3s"
        with mesh.envoy(directory, config) as envoy:
            await ready(envoy, *pair)
            ended = await codes(envoy.address, 20, 4)
            while envoy.stats()["upstream_cx_total"] < 10:
                ended += await codes(envoy.address, 20, 4)

    assert set(ended) == {grpc.StatusCode.OK}


LIMITED = "[callers.default]\nrequests_per_second = 5\nburst = 1\n"
"""A replica that has room for few; it says so for a fifth of a second at most."""


@pytest.fixture
def three(directory: Path, tiny_bundle: Path) -> Iterator[list[Replica]]:
    """Two that refuse nearly everything, and one that refuses nothing."""
    with mesh.replicas(directory, tiny_bundle, [LIMITED, LIMITED, ""], number=3) as three:
        yield three


async def test_what_one_replica_refuses_another_answers_and_retries_end(
    directory: Path, three: list[Replica]
) -> None:
    full, also_full, empty = three
    with ExitStack() as stack:
        some, none = (
            stack.enter_context(mesh.envoy(directory, mesh.in_front_of([full.port, other.port])))
            for other in (empty, also_full)
        )
        await ready(some, full, empty)
        await ready(none, full, also_full)
        answered = await codes(some.address, 60, 4)
        retried = some.stats()
        refused = await codes(none.address, 300, 300)
        storm = none.stats()

    assert set(answered) == {grpc.StatusCode.OK}
    assert retried["upstream_rq_retry_success"] >= 10
    assert refused.count(grpc.StatusCode.RESOURCE_EXHAUSTED) >= 200
    assert storm["upstream_rq_retry_overflow"] > 0
    assert storm["upstream_rq_retry"] < 300, "of 600, were there no budget"


def by_turns(cluster: dict[str, Any]) -> None:
    """Have a cluster give calls to all replicas by turns."""
    name = "envoy.load_balancing_policies.round_robin"
    kind = "type.googleapis.com/envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin"
    cluster["load_balancing_policy"]["policies"] = [
        {"typed_extension_config": {"name": name, "typed_config": {"@type": kind}}}
    ]


def by_stream(cluster: dict[str, Any]) -> None:
    """Have a cluster ask for load reports beside calls."""
    (policy,) = cluster["load_balancing_policy"]["policies"]
    policy["typed_extension_config"]["typed_config"] |= {
        "enable_oob_load_report": True,
        "oob_reporting_period": "0.2s",
    }


async def test_load_reports_have_the_idler_replica_get_the_calls(
    directory: Path, tiny_bundle: Path
) -> None:
    """One of two alike gets more from elsewhere than it can do."""
    config = (
        "[mesh]\nload_reports = true\n[routing]\ncache_entries = 0\n"
        "[batching]\nmax_items = 1\n[engine]\nthreads = 1\n"
    )
    slow = ("tests.stalling", str(directory / "held"), str(RUN))
    with (
        mesh.replicas(directory, tiny_bundle, config, module=slow) as (busy, idle),
        ExitStack() as stack,
    ):
        ports = [busy.port, idle.port]
        envoys = {
            name: stack.enter_context(mesh.envoy(directory, mesh.in_front_of(ports, change)))
            for name, change in {
                "reports": lambda _: None,
                "stream": by_stream,
                "turns": by_turns,
            }.items()
        }
        for envoy in envoys.values():
            await ready(envoy, busy, idle)
        stop = asyncio.Event()

        async def ask(address: str, pause: float) -> None:
            async with stub_of(address) as stub:
                while not stop.is_set():
                    await stub.Route(pb.RouteRequest(prompt="easy"), timeout=PATIENCE)
                    await asyncio.sleep(pause)

        async with asyncio.TaskGroup() as tasks:
            for envoy in envoys.values():
                tasks.create_task(ask(envoy.address, 0.02))
            for _ in range(20):
                tasks.create_task(ask(busy.address, 0))
            shares: dict[str, float] = {}
            try:
                async with asyncio.timeout(60):
                    while min(shares.get("reports", 0), shares.get("stream", 0)) < 0.65:
                        before = {name: each.answered() for name, each in envoys.items()}
                        await asyncio.sleep(1.5)
                        for name, envoy in envoys.items():
                            more = {p: n - before[name][p] for p, n in envoy.answered().items()}
                            shares[name] = more[idle.port] / max(sum(more.values()), 1)
            finally:
                stop.set()
        streamed = envoys["stream"].stats()

    assert shares["turns"] < 0.6
    assert streamed["lb_orca_oob.reports_received"] > 0
