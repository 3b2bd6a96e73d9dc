"""Several workers on one port: real processes that are asked, killed, signalled and drained."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import grpc
import pytest

from bestroute.config import ConfigInvalid, Engine, Server, Settings
from bestroute.engine import cpus
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from bestroute.worker import shared
from bestroute.workers import pause_before, reserved
from tests import tiny
from tests.upstreams import Call, Chunk, Upstream, finish, text

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

CALLERS = 16
"""Each with a connection; all reach the same of two workers once in thirty thousand times."""


class Service:
    """`bestroute serve --workers 2` while it runs.

    Attributes:
        log: its lines so far.
    """

    def __init__(self, parent: "subprocess.Popen[str]") -> None:
        self.parent, self.log = parent, list[str]()
        self._reading = Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self.parent.stderr is not None
        for line in self.parent.stderr:
            self.log.append(line.rstrip())

    def logged(self, pattern: str, times: int = 1) -> Callable[[], bool]:
        """Whether so many lines, or more, say that."""
        return lambda: sum(bool(re.search(pattern, line)) for line in self.log) >= times

    @property
    def address(self) -> str:
        (ready,) = (line for line in self.log if "serves bundle" in line)
        return ready.split()[-1]

    def workers(self) -> dict[int, int]:
        """Process ids by worker number."""
        return dict(sorted(workers_of(self.parent.pid)))

    def wait_for_the_end_of_the_log(self) -> None:
        """Which all of its processes write."""
        self._reading.join(20)
        assert not self._reading.is_alive()


@contextmanager
def started(bundle: Path, *arguments: str, **environment: str) -> Iterator[Service]:
    """The processes as a shell starts them, in a process group; all are gone after the block."""
    command = ["serve", "--listen", "127.0.0.1:0", "--workers", "2", "--bundle", str(bundle)]
    with subprocess.Popen(
        [sys.executable, "-m", "bestroute", *command, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        process_group=0,
    ) as parent:
        service = Service(parent)
        try:
            yield service
        finally:
            parent.kill()
            service.wait_for_the_end_of_the_log()


@contextmanager
def serving(bundle: Path, *arguments: str, **environment: str) -> Iterator[Service]:
    """The same, ready."""
    with started(bundle, *arguments, **environment) as service:
        wait_until(service.logged("serves bundle"))
        yield service


def workers_of(parent: int) -> Iterator[tuple[int, int]]:
    """The numbers and process ids of a parent's workers, from /proc."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            of = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            command = (process / "cmdline").read_text().split("\0")
            if of == parent and "bestroute.worker" in command:
                yield int(command[command.index("bestroute.worker") + 1]), int(process.name)


def connections(service: Service) -> Counter[int]:
    """How many callers' connections each worker has, by its number."""
    port = f":{int(service.address.rpartition(':')[2]):04X}"
    # gRPC listens at an IPv4 address with a socket of IPv6, where the kernel has that.
    tables = Path("/proc/net").glob("tcp*")
    rows = [row.split() for table in tables for row in table.read_text().splitlines()]
    established = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(port) and row[3] == "01"}
    return Counter(
        number
        for number, pid in service.workers().items()
        for file in Path(f"/proc/{pid}/fd").iterdir()
        if os.readlink(file) in established
    )


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "that took too long"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for doesn't."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of this module's own, to be damaged."""
    return tiny.write(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def service(bundle: Path) -> Iterator[Service]:
    with serving(bundle) as service:
        yield service


async def stubs(
    address: str, callers: AsyncExitStack, number: int = CALLERS
) -> list["RoutingServiceAsyncStub"]:
    """Stubs with a connection each."""
    # Otherwise channels to one address share a connection.
    own = [("grpc.use_local_subchannel_pool", 1)]
    made = [grpc.aio.insecure_channel(address, options=own) for _ in range(number)]
    for channel in made:
        await callers.enter_async_context(channel)
    return [routing_pb2_grpc.RoutingServiceStub(channel) for channel in made]


async def answers(address: str, number: int = CALLERS) -> list[pb.RouteResponse]:
    async with AsyncExitStack() as callers:
        calls = [
            stub.Route(pb.RouteRequest(prompt="easy"), timeout=10)
            for stub in await stubs(address, callers, number)
        ]
        return list(await asyncio.gather(*calls))


async def test_callers_are_spread_over_workers_that_answer_the_same(service: Service) -> None:
    async with AsyncExitStack() as callers:
        asked = await stubs(service.address, callers)
        calls = [stub.Route(pb.RouteRequest(prompt="easy")) for stub in asked]
        routed = list(await asyncio.gather(*calls))
        spread = connections(service)

    assert spread.keys() == {1, 2}
    assert spread.total() == CALLERS
    for answer in routed:
        answer.ClearField("timing")
    assert all(answer == routed[0] for answer in routed)
    assert routed[0].arm.model == "small"


def test_readiness_is_logged_once(service: Service) -> None:
    assert sum("serves bundle tiny tiny-1 on" in line for line in service.log) == 1


def test_only_workers_have_networks_and_the_fast_loop(service: Service) -> None:
    for pid in service.workers().values():
        assert loaded(pid) == {"onnxruntime", "uvloop"}
    assert not loaded(service.parent.pid)


def loaded(pid: int) -> set[str]:
    """Which of two libraries a process has in memory."""
    mapped = Path(f"/proc/{pid}/maps").read_text()
    return {name for name in ("onnxruntime", "uvloop") if f"/{name}/" in mapped}


@pytest.mark.parametrize("workers", [1, 2])
def test_another_server_on_the_port_is_refused(
    service: Service, tiny_bundle: Path, workers: int
) -> None:
    arguments = ["--listen", service.address, "--workers", str(workers)]
    ended = serve(*arguments, "--bundle", str(tiny_bundle))

    assert ended.returncode == 2
    assert "is another server on that port?" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_a_killed_worker_is_replaced_while_the_other_serves(service: Service) -> None:
    before = service.workers()
    os.kill(before[1], signal.SIGKILL)
    await asyncio.to_thread(wait_until, service.logged("worker 1 was killed by SIGKILL"))

    back = service.logged("worker 1 serves again")
    while not back():
        await answers(service.address, number=1)
        await asyncio.sleep(0.02)

    after = service.workers()
    assert after[1] != before[1]
    assert after[2] == before[2]
    async with AsyncExitStack() as callers:
        for stub in await stubs(service.address, callers):
            await stub.Route(pb.RouteRequest(prompt="easy"))
        assert connections(service).keys() == {1, 2}


async def test_a_worker_that_finds_no_bundle_tries_again(service: Service, bundle: Path) -> None:
    """What would end a service that starts is no reason to end one that serves."""
    manifest = bundle / "manifest.json"
    away = manifest.rename(bundle / "away.json")
    os.kill(service.workers()[2], signal.SIGKILL)
    await asyncio.to_thread(wait_until, service.logged("worker 2 could not be started .*bundle"))
    assert (await answers(service.address, number=1))[0].arm.model == "small"
    away.rename(manifest)

    await asyncio.to_thread(wait_until, service.logged("worker 2 serves again"))
    assert service.workers().keys() == {1, 2}


async def test_a_replaced_worker_serves_as_the_others_do(tiny_bundle: Path, tmp_path: Path) -> None:
    """Not by what takes effect at the next start only, which the others don't have."""
    config = tmp_path / "bestroute.toml"
    config.write_text("# nothing yet\n")
    with serving(tiny_bundle, "--config", str(config)) as service:
        config.write_text("[server]\nmax_prompt_bytes = 1\n")
        service.parent.send_signal(signal.SIGHUP)
        await asyncio.to_thread(wait_until, service.logged("server has changed, which takes"))
        await asyncio.to_thread(wait_until, service.logged("reloaded:", times=2))
        os.kill(service.workers()[1], signal.SIGKILL)
        await asyncio.to_thread(wait_until, service.logged("worker 1 serves again"))

        assert {answer.arm.model for answer in await answers(service.address)} == {"small"}


async def test_sigterm_answers_what_every_worker_has_accepted(
    tiny_bundle: Path, upstream: Upstream, tmp_path: Path
) -> None:
    """Each caller has a Generate that waits for its LLM, and asks for routes until refused."""
    told_to_finish = asyncio.Event()

    async def waits(call: Call) -> AsyncIterator[Chunk]:
        yield text("almost ")
        await told_to_finish.wait()
        yield text("done")
        yield finish()

    upstream.scripts = [waits]
    config = tmp_path / "bestroute.toml"
    config.write_text(
        f'[providers.test]\nbase_url = "{upstream.url}"\n[models.small]\nprovider = "test"\n'
    )

    async def ask_until_refused(stub: "RoutingServiceAsyncStub") -> grpc.StatusCode:
        try:
            while True:
                await stub.Route(pb.RouteRequest(prompt="easy"))
        except grpc.aio.AioRpcError as error:
            return error.code()

    async def generate(stub: "RoutingServiceAsyncStub") -> str:
        request = pb.GenerateRequest(request=pb.RouteRequest(prompt="easy"))
        return [event async for event in stub.Generate(request)][-1].result.text

    with serving(tiny_bundle, "--config", str(config)) as service:
        async with AsyncExitStack() as callers:
            asked = await stubs(service.address, callers)
            generating = [asyncio.create_task(generate(stub)) for stub in asked]
            asking = [asyncio.create_task(ask_until_refused(stub)) for stub in asked]
            await asyncio.to_thread(wait_until, lambda: upstream.under_way == CALLERS)
            spread = connections(service)
            service.parent.send_signal(signal.SIGTERM)
            codes = await asyncio.gather(*asking)
            told_to_finish.set()
            generated = await asyncio.gather(*generating)

        assert spread.keys() == {1, 2}
        assert set(codes) == {grpc.StatusCode.UNAVAILABLE}
        assert set(generated) == {"almost done"}
        assert await asyncio.to_thread(service.parent.wait, 10) == 0
        with reserved(Server(listen=service.address)):
            pass  # closed connections don't keep the next server off the port


def test_workers_do_not_outlive_a_killed_parent(tiny_bundle: Path) -> None:
    with serving(tiny_bundle) as service:
        pids = list(service.workers().values())
        service.parent.kill()

        wait_until(lambda: not any(alive(pid) for pid in pids))

    assert service.logged("draining", times=2)()


def test_a_second_signal_ends_all_now_and_one_to_each_process_is_no_second(
    tiny_bundle: Path,
) -> None:
    """With a drain that would take a minute. Ctrl-C is for a group, an init system signals all."""
    with serving(tiny_bundle, BESTROUTE_SERVER__DRAIN_DELAY="60") as service:
        pids = list(service.workers().values())
        os.killpg(service.parent.pid, signal.SIGINT)
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        wait_until(service.logged("worker . .* draining", times=2))
        with pytest.raises(subprocess.TimeoutExpired):
            service.parent.wait(0.5)
        assert all(alive(pid) for pid in pids)
        os.killpg(service.parent.pid, signal.SIGINT)

        assert service.parent.wait(5) == 128 + signal.SIGINT
        wait_until(lambda: not any(alive(pid) for pid in pids))


def test_ctrl_c_while_workers_start_ends_them_in_order(tiny_bundle: Path) -> None:
    with started(tiny_bundle) as service:
        wait_until(lambda: len(service.workers()) == 2)
        os.killpg(service.parent.pid, signal.SIGINT)

        assert service.parent.wait(20) == 0
    assert not service.logged("Traceback")()


def test_sigterm_while_a_worker_is_replaced_ends_its_successor(tiny_bundle: Path) -> None:
    with serving(tiny_bundle) as service:
        os.kill(service.workers()[1], signal.SIGKILL)
        wait_until(lambda: service.workers().keys() == {2})
        wait_until(lambda: service.workers().keys() == {1, 2})
        service.parent.send_signal(signal.SIGTERM)

        assert service.parent.wait(20) == 0


def test_a_worker_that_ends_before_all_are_ready_ends_all(tiny_bundle: Path) -> None:
    with started(tiny_bundle) as service:
        wait_until(lambda: len(service.workers()) == 2)
        pids = service.workers()
        os.kill(pids[2], signal.SIGKILL)

        assert service.parent.wait(10) == 1
        assert not alive(pids[1])
        service.wait_for_the_end_of_the_log()
        assert service.log == ["bestroute: worker 2 was killed by SIGKILL before it was ready"]


def test_a_bundle_that_cannot_be_served_is_complained_of_once() -> None:
    ended = serve("--workers", "2", "--listen", "127.0.0.1:0", "--bundle", "/nowhere")

    assert ended.returncode == 2
    assert ended.stderr.count("a bundle is a directory made by `bestroute-export`") == 1
    assert "Traceback" not in ended.stderr


def serve(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "bestroute", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_address_is_refused_that_somebody_has_or_nobody_can() -> None:
    """Somebody may be workers that don't listen yet, or a stranger that would share its port."""

    def refused(listen: str) -> bool:
        with (
            pytest.raises(ConfigInvalid, match="can't listen there"),
            reserved(Server(listen=listen)),
        ):
            pass
        return True

    with reserved(Server(listen="127.0.0.1:0")) as address:
        assert refused(address)
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as stranger:
        assert refused(f"127.0.0.1:{stranger.getsockname()[1]}")
    assert refused("192.0.2.1:0"), "an address for documentation"


def test_workers_share_the_cpus_unless_told() -> None:
    def threads(workers: int, threads: int | None = None) -> int | None:
        server, engine = Server(workers=workers), Engine(threads=threads)
        return shared(Settings(server=server, engine=engine)).engine.threads

    assert threads(1) == cpus()
    assert threads(cpus()) == 1
    assert threads(1000) == 1
    assert threads(1000, threads=3) == 3


def test_pauses_double_until_a_worker_lives_long() -> None:
    pauses = [0.0]
    for lived in (5.0, 0.1, 1.0, 59.0, 2.0, 2.0, 2.0, 60.0, 2.0):
        pauses.append(pause_before(lived, pauses[-1]))

    assert pauses[1:] == [1, 2, 4, 8, 16, 30, 30, 1, 2]
