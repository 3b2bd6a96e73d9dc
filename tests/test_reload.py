"""Bundles and settings change under load: no call fails, none is answered by a mixture."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import grpc
import pytest

from bestroute.app import serving
from bestroute.config import Provider, Server, Settings
from bestroute.errors import BundleInvalid
from bestroute.live import Live
from bestroute.reloading import fingerprint, unchangeable
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests import tiny
from tests.upstreams import Call, Chunk, Upstream, finish, text

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

ARMS = {"tiny-1": ("small", 3), "trading-1": ("medium", 1)}
"""What each bundle decides about "word1", by its version."""


class Service:
    """`bestroute serve` with a bundle that is a link, which can be made to lead elsewhere."""

    def __init__(self, process: "subprocess.Popen[str]", link: Path) -> None:
        self.process, self._link = process, link
        self.log: list[str] = []
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())

    def lead_to(self, bundle: Path) -> None:
        """Let the link lead to another bundle from now on."""
        other = self._link.with_name("other")
        other.symlink_to(bundle)
        other.replace(self._link)

    def hang_up(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def logged(self, pattern: str, times: int = 1) -> Callable[[], bool]:
        """Whether so many lines, or more, say that."""
        return lambda: sum(bool(re.search(pattern, line)) for line in self.log) >= times

    @property
    def address(self) -> str:
        (ready,) = (line for line in self.log if "serves bundle" in line and " on " in line)
        return ready.split()[-1]


@contextmanager
def service(
    directory: Path, bundle: Path, *arguments: str, **environment: str
) -> Iterator[Service]:
    link = directory / "bundle"
    link.symlink_to(bundle)
    command = ["serve", "--listen", "127.0.0.1:0", "--bundle", str(link), *arguments]
    with subprocess.Popen(
        [sys.executable, "-m", "bestroute", *command],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        try:
            started = Service(process, link)
            wait_until(started.logged("serves bundle .* on "))
            yield started
        finally:
            process.terminate()
            process.wait(20)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "that took too long"
        time.sleep(0.02)


async def until(condition: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, condition)


async def decisions(
    stub: "RoutingServiceAsyncStub", done: asyncio.Event
) -> list[tuple[str, tuple[str, int]]]:
    """Version and arm of every answer, one after the other until it is done; all are answered."""
    found = []
    while not done.is_set():
        answer = await stub.Route(pb.RouteRequest(prompt="word1"), timeout=10)
        found.append((answer.bundle_version, (answer.arm.model, answer.arm.samples)))
    return found


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_hangup_changes_the_bundle_under_load(
    tiny_bundle: Path, trading_bundle: Path, tmp_path: Path, workers: int
) -> None:
    """There and back, with callers who never stop asking."""
    flags = ("--workers", str(workers))
    with service(tmp_path, tiny_bundle, *flags) as server:
        async with asyncio.TaskGroup() as callers:
            done = asyncio.Event()
            asking = []
            channels = [
                grpc.aio.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
                for _ in range(4)
            ]
            for channel in channels:
                stub = routing_pb2_grpc.RoutingServiceStub(channel)
                await stub.Route(pb.RouteRequest(prompt="word1"), timeout=10)
                asking.append(callers.create_task(decisions(stub, done)))
            for times, bundle in ((1, trading_bundle), (2, tiny_bundle)):
                server.lead_to(bundle)
                server.hang_up()
                await until(server.logged("reloaded", times * workers))
                await asyncio.sleep(0.5)
            done.set()
        for channel in channels:
            await channel.close()

    for found in (task.result() for task in asking):
        versions = [version for version, _ in found]
        assert set(found) == set(ARMS.items()), "each answer is one bundle's, and both answered"
        assert versions[-1] == "tiny-1"
        assert sum(a != b for a, b in pairwise(versions)) == 2


async def test_a_bundle_that_cannot_be_served_leaves_the_former_serving(
    tiny_bundle: Path, trading_bundle: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(trading_bundle, broken)
    network = broken / "router.onnx"
    network.write_bytes(network.read_bytes()[:-1])
    with service(tmp_path, tiny_bundle) as server:
        server.lead_to(broken)
        server.hang_up()
        await until(server.logged("not reloaded, the former goes on: .*router.onnx"))
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = routing_pb2_grpc.RoutingServiceStub(channel)
            still = await stub.Route(pb.RouteRequest(prompt="word1"), timeout=10)
            server.lead_to(trading_bundle)
            server.hang_up()
            await until(server.logged("reloaded: serves bundle"))
            then = await stub.Route(pb.RouteRequest(prompt="word1"), timeout=10)

    assert (still.bundle_version, then.bundle_version) == ("tiny-1", "trading-1")


async def test_a_watched_bundle_is_loaded_when_its_files_have_changed(
    tiny_bundle: Path, trading_bundle: Path, tmp_path: Path
) -> None:
    """File by file, as a copy does it: what is half there is not served."""
    watched = tmp_path / "watched"
    shutil.copytree(tiny_bundle, watched)
    files = sorted(os.listdir(trading_bundle))
    with service(tmp_path, watched, BESTROUTE_WATCH_BUNDLE="true") as server:
        for file in files:
            shutil.copyfile(trading_bundle / file, watched / file)
            await asyncio.sleep(0.6)  # so that some look finds it half done
        await until(server.logged("reloaded: serves bundle tiny trading-1"))

    assert not server.logged("not reloaded")()


async def test_settings_are_read_anew(tiny_bundle: Path, tmp_path: Path) -> None:
    """What can't be changed while it runs is named; what can holds from then on."""
    config = tmp_path / "bestroute.toml"
    config.write_text("[server]\nstream_window = 5\n")
    with service(tmp_path, tiny_bundle, "--config", str(config)) as server:
        config.write_text(
            '[server]\nstream_window = 7\n[providers.test]\nbase_url = "http://127.0.0.1:9/v1"\n'
            '[models.small]\nprovider = "test"\n'
            "price = {input_usd_per_mtok = 7, output_usd_per_mtok = 8}\n"
        )
        server.hang_up()
        await until(server.logged("reloaded: serves"))
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = routing_pb2_grpc.RoutingServiceStub(channel)
            pool = await stub.ListArms(pb.ListArmsRequest(), timeout=10)
        config.write_text("[server\n")
        server.hang_up()
        await until(server.logged("not reloaded, .* is not a readable TOML file"))

    assert server.logged("server has changed, which takes effect at the next start")()
    assert [m.input_usd_per_mtok for m in pool.models if m.name == "small"] == [7]


async def test_an_answer_in_the_making_ends_with_the_bundle_that_began_it(
    tiny_bundle: Path, trading_bundle: Path, upstream: Upstream
) -> None:
    go_on = asyncio.Event()

    async def waits(_: Call) -> AsyncIterator[Chunk]:
        yield text("almost ")
        await go_on.wait()
        yield text("done")
        yield finish()

    upstream.scripts = [waits]
    first = Settings(
        bundle=tiny_bundle,
        server=Server(listen="127.0.0.1:0"),
        providers={"test": Provider(base_url=upstream.url)},
        models={"small": {"provider": "test"}},
    )
    async with (
        serving(first) as running,
        grpc.aio.insecure_channel(running.address) as channel,
        asyncio.TaskGroup() as tasks,
    ):
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        request = pb.RouteRequest(prompt="easy")
        events = aiter(stub.Generate(pb.GenerateRequest(request=request), timeout=60))
        decision = await anext(events)
        assert (await anext(events)).delta.text == "almost "
        replacing = tasks.create_task(
            running.live.replace(first.model_copy(update={"bundle": trading_bundle}))
        )
        while (await stub.Route(request, timeout=10)).bundle_version == "tiny-1":
            pass
        assert not replacing.done(), "the former is still needed"
        go_on.set()
        rest = [event async for event in events]
        await asyncio.wait_for(replacing, 10)

    assert decision.decision.bundle_version == "tiny-1"
    assert rest[-1].result.text == "almost done"


async def test_a_replacement_that_is_given_up_leaves_nothing_behind(
    tiny_bundle: Path, trading_bundle: Path
) -> None:
    live = Live()
    settings = Settings(bundle=tiny_bundle)
    async with live.serving(settings):
        for pause in (0.0, 0.01, 0.1):
            replacing = asyncio.create_task(
                live.replace(settings.model_copy(update={"bundle": trading_bundle}))
            )
            await asyncio.sleep(pause)
            replacing.cancel()
            await asyncio.gather(replacing, return_exceptions=True)
        with pytest.raises(BundleInvalid):
            await live.replace(settings.model_copy(update={"bundle": tiny_bundle / "none"}))
        with live.using() as router:
            assert router.manifest.version == live.router.manifest.version

    assert live.failed == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_hangup_kills_neither_who_starts_nor_who_ends(
    tiny_bundle: Path, tmp_path: Path, workers: str
) -> None:
    with service(tmp_path, tiny_bundle, "--workers", workers) as server:
        server.process.terminate()
        while server.process.poll() is None:
            server.hang_up()
            time.sleep(0.001)
        assert server.process.returncode == 0

    script = (
        "import os, signal; from bestroute.cli import serve; from bestroute.cli import main;"
        "from bestroute.config import Settings; read = Settings.load.__func__;"
        "Settings.load = classmethod("
        "lambda *a: (os.kill(os.getpid(), signal.SIGHUP), read(*a))[1]);"
        f"main(['serve', '--bundle', '/nowhere', '--workers', '{workers}'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "can't be read" in done.stderr
    assert done.returncode >= 0


def test_only_settings_of_the_process_cannot_be_changed() -> None:
    former = Settings()

    assert unchangeable(former, Settings(bundle=Path("other"), models={})) == []
    assert unchangeable(former, Settings(log_format="json", server=Server(workers=2))) == [
        "log_format",
        "server",
    ]


def test_a_fingerprint_sees_each_change(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    seen = {fingerprint(tmp_path)}
    (tmp_path / "manifest.json").touch()
    seen.add(fingerprint(tmp_path))
    (tmp_path / "router.onnx").write_bytes(b"")
    seen.add(fingerprint(tmp_path))
    (tmp_path / "more").touch()
    seen.add(fingerprint(tmp_path))

    assert len(seen) == 4
    assert fingerprint(tmp_path / "none") == ()
