"""The configuration is read anew when its file changes, and what can be is in force at once."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from bestroute.app import serving
from bestroute.call import Call
from bestroute.cli import main
from bestroute.config import CallerLimits, Metrics, Settings
from bestroute.errors import Overloaded, SpendLimitReached
from bestroute.guard.callers import Callers
from bestroute.reloading import watching_config
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests.scrapes import scraped
from tests.test_reload import service, until
from tests.test_workers import started

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

OFF = '[operations]\ndisabled_arms = ["small"]\n'
WATCHED = "watch_config = true\n"


def replaced(file: Path, text: str) -> None:
    """Write it as editors do: another file takes the place of the former."""
    other = file.with_name(".other")
    other.write_text(text)
    other.replace(file)


def in_place(file: Path, text: str) -> None:
    file.write_text(text)


class ConfigMap:
    """A directory as Kubernetes mounts one: the file leads to ..data, that to what is current."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._count = directory, 0
        self.file = directory / "bestroute.toml"

    def __call__(self, file: Path, text: str) -> None:
        self._count += 1
        current = self._directory / f"..{self._count}"
        current.mkdir()
        (current / file.name).write_text(text)
        other = self._directory / "..data_tmp"
        other.symlink_to(current.name)
        other.replace(self._directory / "..data")
        if not file.is_symlink():
            file.symlink_to(Path("..data") / file.name)


async def chosen(stub: "RoutingServiceAsyncStub") -> str:
    return (await stub.Route(pb.RouteRequest(prompt="word1"), timeout=10)).arm.model


@pytest.mark.parametrize("how", ["in place", "replaced", "ConfigMap"])
async def test_an_arm_is_switched_off_by_a_change_of_the_file(
    tiny_bundle: Path, tmp_path: Path, how: str
) -> None:
    """And on again; no network is loaded for it."""
    (mounted := tmp_path / "mounted").mkdir()
    file = mounted / "bestroute.toml"
    ways: dict[str, Callable[[Path, str], None]] = {"in place": in_place, "replaced": replaced}
    write = ways.get(how) or ConfigMap(mounted)
    write(file, WATCHED)
    with service(tmp_path, tiny_bundle, "--config", str(file)) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = routing_pb2_grpc.RoutingServiceStub(channel)
            before = await chosen(stub)
            write(file, WATCHED + OFF)
            began = time.monotonic()
            while await chosen(stub) == "small":
                pass
            took = time.monotonic() - began
            await until(server.logged("disabled: small"))
            write(file, WATCHED)
            await until(server.logged("reloaded: serves bundle tiny tiny-1$"))
            after = await chosen(stub)

    assert (before, after) == ("small", "small")
    assert took < 5  # a second at most on a machine with nothing else to do


async def test_a_file_that_cannot_be_read_changes_nothing(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bestroute.toml"
    file.write_text(WATCHED + OFF)
    with service(tmp_path, tiny_bundle, "--config", str(file)) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = routing_pb2_grpc.RoutingServiceStub(channel)
            file.write_text("[operations\n")
            await until(server.logged("not reloaded, .* is not a readable TOML file"))
            broken = await chosen(stub)
            file.unlink()
            await until(server.logged("not reloaded, .* does not exist"))
            absent = await chosen(stub)
            file.write_text(WATCHED + OFF.replace("small", "smal"))
            await until(server.logged('not reloaded, .* has no "smal"; did you mean "small"'))
            misspelt = await chosen(stub)
            file.write_text(WATCHED + 'log_format = "json"\n')
            await until(server.logged("log_format has changed, which takes effect at the next"))
            await until(server.logged("reloaded: serves"))
            mended = await chosen(stub)

    assert (broken, absent, misspelt, mended) == ("medium", "medium", "medium", "small")


async def test_the_level_of_the_log_changes(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "bestroute.toml"
    file.write_text(WATCHED)
    with service(tmp_path, tiny_bundle, "--config", str(file)) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = routing_pb2_grpc.RoutingServiceStub(channel)
            file.write_text('log_level = "ERROR"\n' + WATCHED + OFF)
            while await chosen(stub) == "small":
                pass
            file.write_text("[broken")
            await until(server.logged("not reloaded"))

    assert not server.logged("reloaded: serves")()
    assert not server.logged("log_level has changed")()


async def test_all_workers_hear_of_it(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "bestroute.toml"
    file.write_text(WATCHED)
    with started(tiny_bundle, "--config", str(file)) as server:
        await until(server.logged("serves bundle .* on "))
        address = server.address
        file.write_text(WATCHED + OFF)
        await until(server.logged("disabled: small", times=2))
        models = set()
        for _ in range(8):
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(address, options) as channel:
                models.add(await chosen(routing_pb2_grpc.RoutingServiceStub(channel)))

    assert models == {"medium"}


async def test_a_change_while_the_watch_begins_is_seen(tmp_path: Path) -> None:
    """Right after the file has been read to see whether it is what was served from the start."""
    file = tmp_path / "bestroute.toml"
    file.write_text(WATCHED)
    changed = asyncio.Event()

    def load() -> Settings:
        settings = Settings.load(file)
        file.write_text(WATCHED + OFF)
        return settings

    async with watching_config(file, Settings.load(file), load, changed), asyncio.timeout(30):
        await changed.wait()


@pytest.mark.parametrize("text", ["a = " + 5000 * "[", "a = " + 5000 * "9"])
async def test_workers_outlive_a_file_that_python_cannot_read(
    tiny_bundle: Path, tmp_path: Path, text: str
) -> None:
    """Which isn't what the parser calls an error in TOML."""
    file = tmp_path / "bestroute.toml"
    file.write_text(WATCHED)
    with started(tiny_bundle, "--config", str(file)) as server:
        await until(server.logged("serves bundle .* on "))
        file.write_text(text)
        await until(server.logged("not reloaded, .* is not a readable TOML file"))
        file.write_text(WATCHED + OFF)
        await until(server.logged("disabled: small", times=2))


def test_without_a_file_there_is_nothing_to_watch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BESTROUTE_WATCH_CONFIG", "true")

    assert main(["serve"]) == 2
    assert "watch_config: there is no file to watch; start with --config" in capsys.readouterr().err


def test_limits_of_callers_change_under_load() -> None:
    """What a caller has spent so far stays spent."""
    callers = Callers({"app": CallerLimits(usd_per_day=10)})
    app = Call(None, "app")
    with callers.bill(app) as bill:
        bill.total(3.0)
    for _ in range(3):
        callers.admit(app)
    callers.limit({"app": CallerLimits(usd_per_day=2)})
    with pytest.raises(SpendLimitReached, match="2 a day"), callers.bill(app):
        pass
    callers.limit({"app": CallerLimits(requests_per_second=1e-3)})
    callers.admit(app)
    with pytest.raises(Overloaded):
        callers.admit(app)
    callers.limit({"other": CallerLimits(requests_per_second=1e-3)})
    callers.admit(app)
    callers.admit(app)
    callers.limit({"app": CallerLimits(usd_per_day=2)})
    with pytest.raises(SpendLimitReached), callers.bill(app):
        pass


async def test_a_caller_that_gets_limits_is_counted_by_itself(settings: Settings) -> None:
    settings = settings.model_copy(update={"metrics": Metrics(listen="127.0.0.1:0")})
    async with serving(settings) as running:
        running.apply(settings.model_copy(update={"callers": {"app": CallerLimits()}}))
        async with grpc.aio.insecure_channel(running.address) as channel:
            await chosen(routing_pb2_grpc.RoutingServiceStub(channel))
        found = await scraped(running)

    assert found.get("bestroute_caller_rpcs_total", caller="other", code="OK") == 1
