"""The kill switch: an arm that is switched off is never run, from one moment to the next."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from bestroute import place
from bestroute.app import Running, serving
from bestroute.client import Client
from bestroute.config import ConfigInvalid, Operations, Routing, Settings
from bestroute.errors import ArmDisabled
from bestroute.live import Live
from bestroute.manifest import MANIFEST, Manifest
from bestroute.reloading import reloading
from bestroute.router import Router, open_router
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests import tiny
from tests.upstreams import Upstream, Wire, refused, says, served_at, until

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

Chosen = tuple[str, int]


def without(settings: Settings, *arms: str) -> Settings:
    return settings.model_copy(update={"operations": Operations(disabled_arms=arms)})


async def chosen(stub: "RoutingServiceAsyncStub", prompt: str = "word1") -> Chosen:
    answer = await stub.Route(pb.RouteRequest(prompt=prompt), timeout=10)
    return answer.arm.model, answer.arm.samples


async def streamed(stub: "RoutingServiceAsyncStub", prompt: str = "word1") -> Chosen:
    stream = stub.RouteStream(timeout=10)
    await stream.write(pb.RouteStreamRequest(request=pb.RouteRequest(prompt=prompt)))
    await stream.done_writing()
    answer: Any = await stream.read()
    arm = answer.response.arm
    return arm.model, arm.samples


@pytest.mark.parametrize(
    ("off", "instead"),
    [
        (["small:3"], ("medium", 1)),
        (["small"], ("medium", 1)),
        (["small", "medium:1"], ("medium", 2)),
        (["small", "medium"], ("large", 1)),
    ],
)
async def test_it_is_not_chosen_any_more_by_any_way(
    stub: "RoutingServiceAsyncStub",
    server: Running,
    settings: Settings,
    off: list[str],
    instead: Chosen,
) -> None:
    before = await chosen(stub), await streamed(stub)

    loaded = await server.live.replace(without(settings, *off))
    during = await chosen(stub), await streamed(stub)
    await server.live.replace(settings)
    after = await chosen(stub), await streamed(stub)

    assert not loaded, "nothing is loaded for it"
    assert before == after == (("small", 3), ("small", 3))
    assert during == (instead, instead)


async def test_a_policy_of_which_nothing_is_left_has_the_reference(
    stub: "RoutingServiceAsyncStub", server: Running, settings: Settings
) -> None:
    await server.live.replace(without(settings, "small"))
    policy = pb.RoutingPolicy(allowed_models=["small"])

    answer = await stub.Route(pb.RouteRequest(prompt="easy", policy=policy), timeout=10)

    assert (answer.arm.model, answer.fallback_reason) == (
        "large",
        pb.FALLBACK_REASON_BELOW_THRESHOLD,
    )


async def test_a_sticky_session_leaves_it(
    stub: "RoutingServiceAsyncStub", server: Running, settings: Settings
) -> None:
    request = pb.RouteRequest(prompt="word1", session=pb.Session(id="a", sticky=True))
    first = await stub.Route(request, timeout=10)
    await server.live.replace(without(settings, "small"))
    second = await stub.Route(request, timeout=10)

    assert (first.arm.model, second.arm.model) == ("small", "medium")
    assert second.session.reason == pb.SESSION_REASON_NOT_ALLOWED


async def test_the_pool_shows_it(
    stub: "RoutingServiceAsyncStub", server: Running, settings: Settings
) -> None:
    await server.live.replace(without(settings, "small:1", "medium"))
    pool = await stub.ListArms(pb.ListArmsRequest(), timeout=10)

    assert {(arm.model, arm.samples) for arm in pool.arms if arm.disabled} == {
        ("small", 1),
        ("medium", 1),
        ("medium", 2),
    }


class TestGenerating:
    @pytest.fixture
    def settings(self, upstream: Upstream, settings: Settings) -> Settings:
        served = served_at(upstream.url, "small", "medium", "large", max_retries=0)
        return settings.model_copy(update={"providers": served.providers, "models": served.models})

    async def test_another_one_draws(
        self,
        stub: "RoutingServiceAsyncStub",
        server: Running,
        settings: Settings,
        upstream: Upstream,
    ) -> None:
        upstream.scripts = [says("good")]
        await server.live.replace(without(settings, "small"))
        request = pb.GenerateRequest(request=pb.RouteRequest(prompt="easy"))
        events = [event async for event in stub.Generate(request, timeout=20)]

        assert events[0].decision.arm.model == "medium"
        assert events[-1].result.model == "medium"

    async def test_who_names_it_is_refused_and_told_why(
        self, server: Running, settings: Settings, stub: "RoutingServiceAsyncStub"
    ) -> None:
        await server.live.replace(without(settings, "small:3"))
        arm = pb.Arm(model="small", samples=3)
        request = pb.GenerateRequest(request=pb.RouteRequest(prompt="easy"), arm=arm)

        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            [event async for event in stub.Generate(request, timeout=20)]
        async with Client(server.address) as client:
            with pytest.raises(ArmDisabled):
                async for _ in client.generate("easy", model="small", samples=3):
                    pass

        assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert '"small:3" is switched off' in (refusal.value.details() or "")


async def test_it_is_nobodys_fallback(wire: Wire, settings: Settings) -> None:
    """Where all samples fail, the others are asked, and it is not."""
    wire.replies = [refused(400)]
    served = served_at(wire.url, "small", "medium", "large", max_retries=0)
    settings = settings.model_copy(
        update={
            "providers": served.providers,
            "models": served.models,
            "routing": Routing(fallbacks=("medium",)),
        }
    )
    asked = pb.GenerateRequest(
        request=pb.RouteRequest(prompt="easy"), arm=pb.Arm(model="small", samples=1)
    )
    async with (
        serving(without(settings, "medium")) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in stub.Generate(asked, timeout=20):
                pass
        models = [body["model"] for body in wire.bodies]

    assert models == ["small", "large"]


@pytest.mark.parametrize(
    ("arm", "complaint"),
    [
        ("smal", r'disabled_arms: the bundle has no "smal"; did you mean "small"\?'),
        ("small:4", r'no "small:4"; did you mean "small:[13]"\?'),
        ("large", r'"large" is the reference, which answers wherever nothing else may'),
        ("large:1", "is the reference"),
    ],
)
async def test_what_cannot_be_switched_off_is_said(
    settings: Settings, arm: str, complaint: str
) -> None:
    with pytest.raises(ConfigInvalid, match=complaint):
        async with serving(without(settings, arm)):
            pass
    with pytest.raises(ConfigInvalid, match=complaint):
        async with open_router(without(settings, arm)):
            pass
    live = Live()
    async with live.serving(without(settings, "medium")):
        with pytest.raises(ConfigInvalid, match=complaint):
            await live.replace(without(settings, "small", arm))

        assert live.router.rules.disabled.has("medium", 1), "the former holds"
        assert not live.router.rules.disabled.has("small", 1)


async def test_a_name_with_colons_is_a_model(tmp_path: Path) -> None:
    """As Ollama's are."""
    bundle = tiny.write(tmp_path)
    text = (bundle / MANIFEST).read_text().replace('"small"', '"small:3"')
    (bundle / MANIFEST).write_text(text)
    async with open_router(without(Settings(bundle=bundle), "small:3")) as router:
        assert router.rules.disabled.models == {"small:3"}
    async with open_router(without(Settings(bundle=bundle), "small:3:1")) as router:
        assert router.rules.disabled.arms == {("small:3", 1)}


async def test_what_was_switched_off_keeps_nobody_from_going_back(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To a bundle that never had it."""
    former = tiny.write(tmp_path, version="former")
    manifest = Manifest.model_validate_json((former / MANIFEST).read_text())
    arms = [arm for arm in manifest.arms if arm.samples < 3]
    live = Live()
    async with live.serving(without(settings, "small:3")):
        assert len(arms) == 3
        text = (former / MANIFEST).read_text().replace('"small"', '"tiny"')
        (former / MANIFEST).write_text(text)
        await live.replace(without(settings, "small:3").model_copy(update={"bundle": former}))

        assert live.router.manifest.version == "former"
    assert 'no bundle that serves has "small:3"' in caplog.text


async def test_it_is_in_force_while_another_bundle_is_loaded(
    settings: Settings, trading_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may take long, and may be wanted no more when it is done."""
    go_on, live, wanted = asyncio.Event(), Live(), settings

    @asynccontextmanager
    async def slow(settings: Settings) -> AsyncIterator[Router]:
        await go_on.wait()
        async with open_router(settings) as router:
            yield router

    async with live.serving(settings):
        monkeypatch.setattr(place, "open_router", slow)
        hangup = asyncio.Event()
        async with reloading(live, settings, lambda: wanted, hangup):
            wanted = settings.model_copy(update={"bundle": trading_bundle})
            hangup.set()
            await asyncio.sleep(0.3)
            wanted = without(wanted, "small")
            hangup.set()
            async with asyncio.timeout(20):
                await until(lambda: live.router.rules.disabled.has("small", 1))
            version = live.router.manifest.version
            go_on.set()
            await until(lambda: live.router.manifest.version != version)

            assert live.router.rules.disabled.has("small", 1), "and still is with the other"
            assert version == "tiny-1"


async def test_the_log_says_what_is_in_force(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    live = Live()
    with caplog.at_level(logging.INFO):
        async with live.serving(settings):
            await live.replace(without(settings, "small:3"))

    assert "reloaded: serves bundle tiny tiny-1; disabled: small:3" in caplog.text
