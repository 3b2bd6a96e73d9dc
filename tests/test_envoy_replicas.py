"""Two replicas behind a real Envoy, as deploy/envoy/envoy.yaml has it: restarts, deaths, hangs."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import yaml  # type: ignore[import-untyped]
from aiohttp import web

from bestroute.client import Client
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1.routing_pb2_grpc import RoutingServiceStub
from tests import mesh
from tests.mesh import Envoy, Replica
from tests.upstreams import Upstream, hangs, says, until

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

GRPCURL = Path(sys.executable).parent / "grpcurl"
PATIENCE = 20.0
"""Seconds that any call may take; far more than it does."""


@pytest.fixture(scope="module")
def behind() -> Iterator[socket.socket]:
    """Where the LLM of each test listens; the same for all, as the replicas have to know it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    mesh.needs_envoy()
    return tmp_path_factory.mktemp("mesh")


@pytest.fixture(scope="module")
def held(directory: Path) -> Path:
    """While this file exists, the networks of the first replica don't come back."""
    return directory / "held"


@pytest.fixture(scope="module")
def pair(
    tiny_bundle: Path, directory: Path, held: Path, behind: socket.socket
) -> Iterator[list[Replica]]:
    llm = f"http://127.0.0.1:{behind.getsockname()[1]}/v1"
    config = (
        "[mesh]\nload_reports = true\n[routing]\ncache_entries = 0\n"
        f'[providers.test]\nbase_url = "{llm}"\n[models.small]\nprovider = "test"\n'
    )
    module = ("tests.stalling", str(held), "0")
    with mesh.replicas(directory, tiny_bundle, config, module=module) as pair:
        yield pair


@pytest.fixture(scope="module")
def envoy(directory: Path, pair: list[Replica]) -> Iterator[Envoy]:
    with mesh.envoy(directory, mesh.in_front_of([each.port for each in pair])) as envoy:
        yield envoy


@pytest.fixture
async def both(envoy: Envoy, pair: list[Replica]) -> Envoy:
    """Envoy, when it holds both for healthy."""
    await envoy.wait_until(healthy=dict.fromkeys((each.port for each in pair), True))
    return envoy


@pytest.fixture
async def llm(behind: socket.socket) -> AsyncIterator[Upstream]:
    """The LLM's API."""
    upstream = Upstream()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", upstream.complete)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.SockSite(runner, behind.dup()).start()
    yield upstream
    await runner.cleanup()


@asynccontextmanager
async def stub_of(address: str) -> AsyncIterator["RoutingServiceAsyncStub"]:
    """A plain client, which repeats nothing itself."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield RoutingServiceStub(channel)


class Callers:
    """Callers of every kind, who ask one thing after the other until they are told to stop.

    Attributes:
        ended: calls by method and how they ended.
    """

    def __init__(self, envoy: Envoy, each: int = 3) -> None:
        self._envoy, self._each, self._stop = envoy, each, asyncio.Event()
        self.ended: Counter[tuple[str, str]] = Counter()

    @asynccontextmanager
    async def asking(self, *methods: str) -> AsyncIterator["Callers"]:
        """Ask while the block lasts, and until each has its last answer."""
        async with asyncio.TaskGroup() as tasks:
            for method in methods:
                for _ in range(self._each):
                    tasks.create_task(getattr(self, f"_{method}")())
            try:
                yield self
            finally:
                self._stop.set()

    @property
    def failed(self) -> dict[tuple[str, str], int]:
        return {key: count for key, count in self.ended.items() if key[1] != "OK"}

    async def until_more(self, number: int) -> None:
        """Wait until so many more calls have ended."""
        enough = self.ended.total() + number
        await until(lambda: self.ended.total() >= enough)

    async def _again(self, method: str, ask: Any) -> None:
        while not self._stop.is_set():
            try:
                await ask()
                self.ended[method, "OK"] += 1
            except grpc.aio.AioRpcError as error:
                self.ended[method, f"{error.code().name}: {error.details()}"] += 1
            except Exception as error:
                self.ended[method, repr(error)] += 1
            await asyncio.sleep(0.005)

    async def _route(self) -> None:
        async with stub_of(self._envoy.address) as stub:
            request = pb.RouteRequest(prompt="easy")
            await self._again("route", lambda: stub.Route(request, timeout=PATIENCE))

    async def _score(self) -> None:
        async with stub_of(self._envoy.address) as stub:
            request = pb.ScoreRequest(prompt="easy", responses=["good", "bad"])
            await self._again("score", lambda: stub.Score(request, timeout=PATIENCE))

    async def _generate(self) -> None:
        async with stub_of(self._envoy.address) as stub:
            request = pb.GenerateRequest(request=pb.RouteRequest(prompt="easy"))

            async def ask() -> None:
                call = stub.Generate(request, timeout=PATIENCE)
                assert [event async for event in call][-1].result.text == "a slow answer"

            await self._again("generate", ask)

    async def _stream(self) -> None:
        async with Client(self._envoy.address, timeout=PATIENCE) as client, client.stream() as each:
            await self._again("stream", lambda: each.route("easy"))


def slowly(seconds: float) -> Any:
    return says("a ", "slow ", "answer", delay=seconds / 3)


@pytest.mark.parametrize("variant", ["as it is", "reports on a stream", "sessions"])
def test_the_deployed_configuration_is_one_of_envoys(variant: str, tmp_path: Path) -> None:
    mesh.needs_envoy()
    text, file = mesh.DEPLOYED.read_text(), tmp_path / "envoy.yaml"
    if variant == "reports on a stream":
        text, changed = re.subn(r"# ((?:enable_)?oob_\w+: )", r"\1", text)
        assert changed == 2
    elif variant == "sessions":
        text = json.dumps(sticky(text))
    file.write_text(text)

    checked = mesh.validated(file)

    assert checked.returncode == 0, checked.stderr


def sticky(text: str) -> Any:
    """The configuration with the load balancing policy that is commented out."""
    config = yaml.safe_load(text)
    commented = text[text.index("# load_balancing_policy:") :].partition("\n\n")[0]
    policy = yaml.safe_load(re.sub(r"(?m)^ {6}#? ?", "", f"      {commented}"))
    config["static_resources"]["clusters"][0] |= policy
    return config


async def test_calls_of_one_connection_are_spread_over_both(
    both: Envoy, pair: list[Replica]
) -> None:
    before = both.answered()
    async with stub_of(both.address) as stub:
        for _ in range(100):
            await stub.Route(pb.RouteRequest(prompt="easy"), timeout=PATIENCE)
    after = both.answered()

    shares = [after[each.port] - before[each.port] for each in pair]
    assert min(shares) >= 20, shares


@pytest.mark.skipif(not GRPCURL.exists(), reason="grpcurl is not installed")
async def test_reflection_health_and_load_reports_come_through(both: Envoy) -> None:
    async def grpcurl(*arguments: str) -> str:
        made = await asyncio.create_subprocess_exec(
            GRPCURL, "-plaintext", *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, _ = await made.communicate()
        return output.decode()

    listed = await grpcurl(both.address, "list")
    check = "grpc.health.v1.Health/Check"
    for name in ("", "readiness", "liveness", "bestroute.v1.RoutingService"):
        said = await grpcurl("-d", f'{{"service": "{name}"}}', both.address, check)
        assert "SERVING" in said, name
    unknown = await grpcurl("-d", '{"service": "nobody"}', both.address, check)
    route = "bestroute.v1.RoutingService/Route"
    routed = await grpcurl("-v", "-d", '{"prompt": "easy"}', both.address, route)
    refused = await grpcurl("-v", "-d", "{}", both.address, route)

    assert {"bestroute.v1.RoutingService", "grpc.health.v1.Health"} <= set(listed.split())
    assert "NotFound" in unknown
    assert '"model": "small"' in routed
    assert "endpoint-load-metrics-bin" in routed
    assert "InvalidArgument" in refused
    assert "endpoint-load-metrics-bin" in refused, "whatever the answer"


async def test_a_rolling_restart_of_both_fails_no_call(
    both: Envoy, pair: list[Replica], llm: Upstream
) -> None:
    # The first answers take longer than the replicas take calls, and so does their drain.
    llm.scripts = [*[slowly(3 * mesh.NOTICED)] * 3, slowly(0.3)]
    callers = Callers(both)
    async with callers.asking("route", "score", "stream", "generate"):
        for replica in pair:
            await callers.until_more(100)
            assert await asyncio.to_thread(replica.drain) == 0
            await both.wait_until(healthy={replica.port: False})
            await callers.until_more(50)
            await asyncio.to_thread(replica.start)
            await both.wait_until(healthy={replica.port: True})
        given = both.answered()
        await callers.until_more(200)

    assert callers.failed == {}
    assert {method for method, _ in callers.ended} == {"route", "score", "stream", "generate"}
    assert all(both.answered()[port] > given[port] for port in given), "both serve again"
    for replica in pair:
        assert sum("stopped" in line for line in replica.log) == 1
        assert not any("Traceback" in line for line in replica.log)


async def test_a_killed_replica_costs_no_route_and_comes_back(
    both: Envoy, pair: list[Replica]
) -> None:
    killed, other = pair
    callers = Callers(both, each=8)
    async with callers.asking("route", "score"):
        await callers.until_more(50)
        await asyncio.to_thread(killed.kill)
        await both.wait_until(healthy={killed.port: False, other.port: True})
        await callers.until_more(100)
        await asyncio.to_thread(killed.start)
        await both.wait_until(healthy={killed.port: True})
        before = both.answered()[killed.port]
        await callers.until_more(100)

    assert callers.failed == {}
    assert both.answered()[killed.port] > before


async def test_a_replica_whose_engine_hangs_is_left_alone_until_it_is_well(
    both: Envoy, pair: list[Replica], held: Path
) -> None:
    """Both would hang; the other one isn't asked meanwhile."""
    hung, other = pair
    async with stub_of(hung.address) as direct:
        await asyncio.to_thread(held.touch)
        stuck = asyncio.ensure_future(
            direct.Route(pb.RouteRequest(prompt="easy"), timeout=PATIENCE)
        )
        await both.wait_until(healthy={hung.port: False, other.port: True})
        assert any("not serving" in line for line in hung.log)
        await asyncio.to_thread(held.unlink)
        await both.wait_until(healthy={hung.port: True})
        with suppress(grpc.aio.AioRpcError):
            await stuck
    async with stub_of(both.address) as stub:
        for _ in range(20):
            await stub.Route(pb.RouteRequest(prompt="easy"), timeout=PATIENCE)


async def test_frozen_replicas_are_left_alone_until_they_go_on(
    both: Envoy, pair: list[Replica]
) -> None:
    """With one of them, calls go to the other; with both, they fail at once."""
    frozen, other = pair
    async with stub_of(both.address) as stub:
        try:
            frozen.signal(signal.SIGSTOP)
            await both.wait_until(healthy={frozen.port: False, other.port: True})
            for _ in range(20):
                await stub.Route(pb.RouteRequest(prompt="easy"), timeout=PATIENCE)
            other.signal(signal.SIGSTOP)
            await both.wait_until(healthy={frozen.port: False, other.port: False})
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await stub.Route(pb.RouteRequest(prompt="easy"), timeout=PATIENCE)
        finally:
            for replica in pair:
                replica.signal(signal.SIGCONT)
        await both.wait_until(healthy={frozen.port: True, other.port: True})
        await stub.Route(pb.RouteRequest(prompt="easy"), timeout=PATIENCE)

    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "no healthy upstream" in (failure.value.details() or "")


async def test_the_deadline_reaches_the_server(both: Envoy, llm: Upstream) -> None:
    """Only who knows it gives the answer that is complete, shortly before it passes."""
    llm.scripts = [says("done"), hangs("never")]
    request = pb.GenerateRequest(
        arm=pb.Arm(model="small", samples=2), request=pb.RouteRequest(prompt="easy")
    )
    async with stub_of(both.address) as stub:
        events = [event async for event in stub.Generate(request, timeout=1.5)]
    async with stub_of(both.address) as stub:
        llm.scripts = [hangs("never")]
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async for _ in stub.Generate(request, timeout=0.3):
                pass

    assert events[-1].result.text == "done"
    await until(lambda: llm.under_way == 0)
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_sessions_stay_with_a_replica(
    directory: Path, pair: list[Replica], both: Envoy
) -> None:
    policy = sticky(mesh.DEPLOYED.read_text())["static_resources"]["clusters"][0]

    def change(cluster: dict[str, Any]) -> None:
        cluster["load_balancing_policy"] = policy["load_balancing_policy"]

    config = mesh.in_front_of([each.port for each in pair], change)
    with mesh.envoy(directory, config) as envoy:
        await envoy.wait_until(healthy=dict.fromkeys((each.port for each in pair), True))
        used = set()
        async with stub_of(envoy.address) as stub:
            for session in range(12):
                before = envoy.answered()
                for _ in range(5):
                    await stub.Route(
                        pb.RouteRequest(prompt="easy"),
                        metadata=[("x-bestroute-session", f"session-{session}")],
                        timeout=PATIENCE,
                    )
                after = envoy.answered()
                (to,) = (port for port in after if after[port] > before[port])
                assert after[to] == before[to] + 5
                used.add(to)

    assert used == {each.port for each in pair}


async def test_a_caller_who_leaves_is_noticed_by_the_llm(both: Envoy, llm: Upstream) -> None:
    llm.scripts = [hangs("I think")]
    request = pb.GenerateRequest(request=pb.RouteRequest(prompt="easy"))
    async with stub_of(both.address) as stub:
        call = stub.Generate(request, timeout=PATIENCE)
        await until(lambda: llm.under_way == 1)
        call.cancel()
        await asyncio.wait_for(llm.calls[0].left.wait(), PATIENCE)
