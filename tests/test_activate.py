"""`bestroute bundle activate` and `rollback`: links change in one step, and a server follows."""

import asyncio
import os
import shutil
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from threading import Event, Thread

import grpc
import pytest

from bestroute import place
from bestroute.bundle import Bundle
from bestroute.cli import main
from bestroute.config import Settings
from bestroute.errors import BundleInvalid
from bestroute.links import point, previous_of
from bestroute.live import Live
from bestroute.router import Router, open_router
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests.test_reload import service, until


@pytest.fixture
def link(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def run(*arguments: object) -> int:
    return main(["bundle", *map(str, arguments)])


def test_there_and_back_and_there_again(
    link: Path, tiny_bundle: Path, trading_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = [run("activate", tiny_bundle, "--link", link)]
    codes.append(run("activate", trading_bundle, "--link", link))
    first = link.resolve()
    codes.append(run("rollback", "--link", link))
    second = link.resolve()
    codes.append(run("rollback", "--link", link))

    assert codes == [0, 0, 0, 0]
    assert (first, second, link.resolve()) == (trading_bundle, tiny_bundle, trading_bundle)
    assert previous_of(link).resolve() == tiny_bundle
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(": tiny tiny-1")
    assert said[1].endswith(f": tiny trading-1; before it led to {tiny_bundle}")
    assert sorted(os.listdir(link.parent)) == ["bundle", "bundle.previous"]


def test_to_activate_what_is_active_forgets_nothing(
    link: Path, tiny_bundle: Path, trading_bundle: Path
) -> None:
    for bundle in (tiny_bundle, trading_bundle, trading_bundle):
        assert run("activate", bundle, "--link", link) == 0

    assert previous_of(link).resolve() == tiny_bundle


def test_a_bundle_that_cannot_be_served_is_not_activated(
    link: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("activate", tiny_bundle, "--link", link)
    bad = tmp_path / "bad"
    shutil.copytree(tiny_bundle, bad)
    (bad / "router.onnx").write_bytes(b"")

    assert run("activate", bad, "--link", link) == 1
    assert link.resolve() == tiny_bundle
    assert not previous_of(link).exists()
    assert "router.onnx has SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["directory", "file"])
def test_what_is_no_link_is_left_alone(
    link: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    link.mkdir() if what == "directory" else link.write_text("mine")

    assert run("activate", tiny_bundle, "--link", link) == 1
    assert run("rollback", "--link", link) == 1
    assert not link.is_symlink()
    assert "is no symbolic link" in capsys.readouterr().err


def test_a_link_that_leads_to_itself_is_mended(link: Path, tiny_bundle: Path) -> None:
    link.symlink_to(link.name)

    assert run("activate", link, "--link", link) == 1
    assert run("activate", tiny_bundle, "--link", link) == 0
    assert link.resolve() == tiny_bundle
    assert run("rollback", "--link", link) == 1  # there is nothing worth going back to


def test_a_rollback_without_a_way_back_says_so(
    link: Path, tiny_bundle: Path, trading_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("rollback", "--link", link) == 1
    assert "nothing to go back to" in capsys.readouterr().err
    run("activate", tiny_bundle, "--link", link)
    previous_of(link).symlink_to(tiny_bundle)
    assert run("rollback", "--link", link) == 1
    assert "nothing else is remembered" in capsys.readouterr().err
    previous_of(link).unlink()
    previous_of(link).symlink_to(trading_bundle / "gone")
    assert run("rollback", "--link", link) == 1
    assert "can't be read" in capsys.readouterr().err
    assert link.resolve() == tiny_bundle


def test_whoever_follows_the_link_always_finds_a_bundle(
    link: Path, tiny_bundle: Path, trading_bundle: Path
) -> None:
    point(link, tiny_bundle)
    over, missing = Event(), list[Exception]()

    def follow() -> None:
        while not over.is_set():
            try:
                Bundle.load(link.resolve())
            except BundleInvalid as error:
                missing.append(error)

    following = Thread(target=follow)
    following.start()
    for _ in range(300):
        point(link, trading_bundle)
        point(link, tiny_bundle)
    over.set()
    following.join()

    assert missing == []


async def test_a_server_that_watches_serves_what_is_activated(
    tiny_bundle: Path, trading_bundle: Path, tmp_path: Path
) -> None:
    with service(tmp_path, tiny_bundle, BESTROUTE_WATCH_BUNDLE="true") as server:
        link = tmp_path / "bundle"
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = routing_pb2_grpc.RoutingServiceStub(channel)
            versions = []
            commands: list[list[object]] = [["activate", trading_bundle], ["rollback"]]
            for times, command in enumerate(commands, start=1):
                await asyncio.to_thread(run, *command, "--link", link)
                await until(server.logged("reloaded: serves", times))
                answer = await stub.Route(pb.RouteRequest(prompt="word1"), timeout=10)
                versions.append(answer.bundle_version)

    assert versions == ["trading-1", "tiny-1"]


async def test_what_is_swapped_while_it_is_loaded_is_never_mixed(
    link: Path, tiny_bundle: Path, trading_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link is followed once: manifest and networks are of one bundle."""
    point(link, tiny_bundle)

    def swapped(settings: Settings) -> AbstractAsyncContextManager[Router]:
        point(link, trading_bundle)
        return open_router(settings)

    monkeypatch.setattr(place, "open_router", swapped)
    live = Live()
    async with live.serving(Settings(bundle=link)):
        assert live.router.manifest.version == "tiny-1"


async def test_a_directory_that_changes_while_it_is_loaded_is_not_served(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its digests may have been checked before, and its networks read after the change."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)

    def changed(settings: Settings) -> AbstractAsyncContextManager[Router]:
        shutil.copy(bundle / "reward.onnx", tmp_path / "same")
        (tmp_path / "same").replace(bundle / "reward.onnx")
        return open_router(settings)

    monkeypatch.setattr(place, "open_router", changed)
    with pytest.raises(BundleInvalid, match="was changed while it was loaded"):
        async with Live().serving(Settings(bundle=bundle)):
            pass
