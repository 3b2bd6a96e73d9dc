"""A second bundle with a share of the traffic: compared, promoted and withdrawn under load."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import numpy.typing as npt
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bestroute import engine
from bestroute.app import Running, serving
from bestroute.batching import watch
from bestroute.call import Call
from bestroute.config import Canary, ConfigInvalid, Metrics, Operations, Routing, Settings
from bestroute.live import Live
from bestroute.manifest import MANIFEST, GoldenReward, Manifest
from bestroute.session import Session
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests import tiny
from tests.scrapes import scraped
from tests.upstreams import Upstream, says, served_at, until

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

STABLE, CANARY = "tiny-1", "tiny-2"
GOLDEN = GoldenReward(prompt="word1", response="good good", reward=9.0)
Rows = list[npt.NDArray[np.float32]]


@pytest.fixture(scope="session")
def canary_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the tiny bundle, with other numbers."""
    return tiny.write(tmp_path_factory.mktemp("canary"), version=CANARY, shift=1.0)


@pytest.fixture
def with_canary(settings: Settings, canary_bundle: Path) -> Settings:
    return given(settings, canary_bundle, 0.25)


def given(settings: Settings, bundle: Path | None, share: float = 0.25) -> Settings:
    canary = Canary(bundle=bundle, share=share)
    return settings.model_copy(update={"canary": canary})


@asynccontextmanager
async def served(settings: Settings) -> AsyncIterator["tuple[Running, RoutingServiceAsyncStub]"]:
    async with (
        serving(settings) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        yield running, routing_pb2_grpc.RoutingServiceStub(channel)


async def versions(stub: "RoutingServiceAsyncStub", count: int) -> Counter[str]:
    answers = [
        await stub.Route(pb.RouteRequest(prompt=f"word{n % 100}"), timeout=20) for n in range(count)
    ]
    return Counter(answer.bundle_version for answer in answers)


async def test_its_share_is_kept_and_its_numbers_are_its_own(with_canary: Settings) -> None:
    async with served(with_canary) as (_, stub):
        found = await versions(stub, 400)
        expected = {
            STABLE: tiny.probabilities(0.0)[1],
            CANARY: tiny.probabilities(1.0)[0],
        }
        for _ in range(20):
            answer = await stub.Route(pb.RouteRequest(prompt="word1"), timeout=20)
            probability = answer.arm.match_probability
            assert probability == pytest.approx(expected[answer.bundle_version], abs=1e-4)
        scored = [
            await stub.Score(pb.ScoreRequest(prompt="word1", responses=["good"]), timeout=20)
            for _ in range(20)
        ]

    assert found[CANARY] == pytest.approx(100, abs=4)
    rewards = {(each.bundle_version, round(each.rewards[0], 3)) for each in scored}
    assert rewards == {(STABLE, 1.0), (CANARY, 2.0)}


async def test_a_share_is_kept_against_any_rhythm(
    with_canary: Settings, canary_bundle: Path
) -> None:
    """Of every 20th request as of all: a caller that alternates must not get one bundle only."""
    live = Live()
    async with live.serving(given(with_canary, canary_bundle, 0.05)):
        chosen = []
        for _ in range(20_000):
            with live.using() as router:
                chosen.append(router is live.canary)

    assert sum(chosen) == pytest.approx(1000, abs=5)
    for start in range(20):
        assert 0.02 < np.mean(chosen[start::20]) < 0.08


async def test_a_session_stays_with_its_bundle(with_canary: Settings, canary_bundle: Path) -> None:
    """Whatever connection it comes by; and more of them change only as the share does."""
    live = Live()
    sessions = [Session(f"session {number}") for number in range(400)]

    def chosen(port: int) -> list[bool]:
        found = []
        for session in sessions:
            with live.using(Call(None, f"ipv4:192.0.2.1:{port}"), session) as router:
                found.append(router is live.canary)
        return found

    async with live.serving(with_canary):
        first, again = chosen(1000), chosen(2000)
        loaded = await live.replace(given(with_canary, canary_bundle, 0.5))
        more = chosen(1000)
        with live.using(Call(None, "ipv4:192.0.2.2:1"), sessions[0]):
            pass

    assert first == again
    assert sum(first) == pytest.approx(100, abs=40)
    assert sum(more) == pytest.approx(200, abs=50)
    assert all(now for before, now in zip(first, more, strict=True) if before)
    assert not loaded


async def test_turns_of_a_session_are_answered_by_one_bundle(with_canary: Settings) -> None:
    """Over the wire."""
    async with served(with_canary) as (_, stub):
        found: dict[int, set[str]] = {}
        for number in range(24):
            session = pb.Session(id=f"session {number}")
            for turn in range(3):
                request = pb.RouteRequest(prompt=f"word{turn}", session=session)
                answer = await stub.Route(request, timeout=20)
                found.setdefault(number, set()).add(answer.bundle_version)

    assert all(len(each) == 1 for each in found.values())
    assert {STABLE, CANARY} == set.union(*found.values())


async def test_share_promotion_and_withdrawal_load_nothing_and_fail_nobody(
    settings: Settings, tiny_bundle: Path, canary_bundle: Path
) -> None:
    wrong = list[str]()
    expected = {STABLE: tiny.probabilities(0.0), CANARY: tiny.probabilities(1.0)}

    async with served(settings) as (running, stub), asyncio.TaskGroup() as callers:
        done = asyncio.Event()

        async def ask() -> None:
            while not done.is_set():
                answer = await stub.Route(pb.RouteRequest(prompt="word1", explain=True), timeout=20)
                given = [arm.match_probability for arm in answer.arms]
                if given != pytest.approx(expected[answer.bundle_version], abs=1e-4):
                    wrong.append(answer.bundle_version)

        asking = [callers.create_task(ask()) for _ in range(4)]
        live, loaded = running.live, []

        async def becomes(wanted: Settings) -> None:
            loaded.append(await live.replace(wanted))
            await asyncio.sleep(0.1)

        await becomes(given(settings, canary_bundle, 0.1))
        canary = live.canary
        await becomes(given(settings, canary_bundle, 0.9))
        promoted = settings.model_copy(update={"bundle": canary_bundle})
        await becomes(promoted)
        assert live.router is canary
        after = await versions(stub, 20)
        await becomes(given(promoted, tiny_bundle, 0.5))
        await becomes(promoted)
        withdrawn = await versions(stub, 20)
        done.set()
        await asyncio.gather(*asking)

    assert loaded == [True, False, False, True, False]
    assert after == withdrawn == {CANARY: 20}
    assert wrong == []


@pytest.mark.parametrize("how", ["absent", "damaged", "of another engine"])
async def test_one_that_cannot_be_served_costs_the_bundle_nothing(
    settings: Settings,
    tmp_path: Path,
    canary_bundle: Path,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    """Neither at the start nor later; and it is tried again at the next reload."""
    bad = tmp_path / "bad"
    if how != "absent":
        bad.mkdir()
        tiny.write(bad, version=CANARY)
    if how == "damaged":
        (bad / "router.onnx").write_bytes(b"")
    if how == "of another engine":
        manifest = Manifest.model_validate_json((bad / MANIFEST).read_text())
        golden = manifest.golden.model_copy(update={"reward": [GOLDEN]})
        manifest.model_copy(update={"golden": golden}).write(bad)
    settings = settings.model_copy(update={"metrics": Metrics(listen="127.0.0.1:0")})
    async with served(given(settings, bad)) as (running, stub):
        at_start = await versions(stub, 20)
        found = await scraped(running)
        await running.live.replace(given(settings, canary_bundle, 0.5))
        well = await versions(stub, 20)
        then = await scraped(running)
        await running.live.replace(given(settings, bad))
        later = await versions(stub, 20)

    assert at_start == later == {STABLE: 20}
    assert set(well) == {STABLE, CANARY}
    assert caplog.text.count("the canary can't be served") == 2
    assert found.get("bestroute_canary_serving") == 0
    assert then.get("bestroute_canary_serving") == 1
    assert then.get("bestroute_canary_share") == 0.5
    canary = {"role": "canary", "name": "tiny", "version": CANARY}
    assert then.get("bestroute_bundle_info", **canary) == 1
    assert found.get("bestroute_bundle_info", **canary) is None


class Faults:
    """Has the engine of any but the sessions that are known hang."""

    def __init__(self) -> None:
        self.known = set[int]()
        self.learning, self.hanging, self.over = True, False, Event()

    def run_feeds(self, run: Callable[..., Rows]) -> Callable[..., Rows]:
        def faulty(session: Any, feeds: Mapping[str, npt.NDArray[np.int64]]) -> Rows:
            if self.learning:
                self.known.add(id(session))
            elif self.hanging and id(session) not in self.known:
                self.over.wait(60)
            return run(session, feeds)

        return faulty


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    faults = Faults()
    monkeypatch.setattr(engine, "_run_feeds", faults.run_feeds(engine._run_feeds))
    return faults


@pytest.fixture
def unremembered(settings: Settings) -> Settings:
    """Every prompt is run."""
    return settings.model_copy(update={"routing": Routing(cache_entries=0)})


async def test_when_it_hangs_its_traffic_returns(
    unremembered: Settings, canary_bundle: Path, faults: Faults
) -> None:
    async with AsyncExitStack() as stack:
        running, stub = await stack.enter_async_context(served(unremembered))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(running.address))
        await versions(stub, 1)
        faults.learning = False
        await running.live.replace(given(unremembered, canary_bundle, 0.5))
        before = await versions(stub, 20)
        faults.hanging = True
        answers = await asyncio.gather(
            *(stub.Route(pb.RouteRequest(prompt="word1"), timeout=20) for _ in range(8))
        )
        during = await versions(stub, 20)
        check = health_pb2.HealthCheckRequest(service="readiness")
        health = await health_pb2_grpc.HealthStub(channel).Check(check)
        faults.hanging = False
        faults.over.set()
        async with asyncio.timeout(20):
            await until(lambda: running.live.canary_serves is True)
        after = await versions(stub, 20)

    assert set(before) == set(after) == {STABLE, CANARY}
    assert {answer.bundle_version for answer in answers} == {STABLE, CANARY}
    for answer in answers:  # those of the canary's wait until the stall is seen
        failed = answer.fallback_reason == pb.FALLBACK_REASON_ROUTER_FAILED
        assert failed == (answer.bundle_version == CANARY)
    assert during == {STABLE: 20}
    assert health.status == health_pb2.HealthCheckResponse.SERVING


async def test_when_it_never_comes_back_the_bundle_serves_on(
    unremembered: Settings,
    canary_bundle: Path,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where the bundle's own engine does that, the process ends."""
    monkeypatch.setattr(watch, "GIVE_UP", 0.5)
    async with served(unremembered) as (running, stub):
        await versions(stub, 1)
        faults.learning = False
        await running.live.replace(given(unremembered, canary_bundle, 0.5))
        faults.hanging = True
        await versions(stub, 4)
        async with asyncio.timeout(20):
            await until(lambda: "the canary has broken" in caplog.text)
        after = await versions(stub, 20)
        faults.hanging = False
        faults.over.set()
        await running.live.replace(given(unremembered, canary_bundle, 0.5))
        again = await versions(stub, 20)

    assert after == {STABLE: 20}
    assert set(again) == {STABLE, CANARY}, "a reload opens it anew"


class TestPools:
    """Bundles of other models: the configured ones are each one's that has them in its pool."""

    @pytest.fixture
    def settings(self, settings: Settings, upstream: Upstream) -> Settings:
        upstream.scripts = [says("good")]
        served = served_at(upstream.url, "small", "large", max_retries=0)
        return settings.model_copy(update={"providers": served.providers, "models": served.models})

    @pytest.fixture
    def other(self, tmp_path: Path) -> Path:
        """A canary with "mini" in place of "small"."""
        bundle = tiny.write(tmp_path, version=CANARY)
        text = (bundle / MANIFEST).read_text()
        (bundle / MANIFEST).write_text(text.replace('"small"', '"mini"'))
        return bundle

    async def test_each_generates_with_its_own(
        self, settings: Settings, upstream: Upstream, other: Path
    ) -> None:
        both = served_at(upstream.url, "small", "mini", "large", max_retries=0)
        wanted = given(settings, other, 0.5).model_copy(update={"models": both.models})
        async with served(wanted) as (_, stub):
            request = pb.GenerateRequest(request=pb.RouteRequest(prompt="easy"))
            decisions = []
            for _ in range(10):
                decision, *_rest = [event async for event in stub.Generate(request, timeout=20)]
                decisions.append(decision.decision)

        found = {(each.bundle_version, each.arm.model) for each in decisions}
        assert found == {(STABLE, "small"), (CANARY, "mini")}

    async def test_a_model_that_none_has_is_named(self, settings: Settings, other: Path) -> None:
        models = {**settings.models, "smal": settings.models["small"]}
        wanted = given(settings, other).model_copy(update={"models": models})
        live = Live()
        async with live.serving(settings):
            with pytest.raises(ConfigInvalid, match=r'"smal".*nor in the canary; did you mean "sm'):
                await live.replace(wanted)

            assert live.canary is None

    async def test_an_arm_that_one_has_may_be_switched_off(
        self, settings: Settings, other: Path
    ) -> None:
        off = Operations(disabled_arms=("mini", "small:3"))
        live = Live()
        async with live.serving(given(settings, other).model_copy(update={"operations": off})):
            assert live.canary is not None
            assert live.canary.rules.disabled.models == {"mini"}
            assert live.router.rules.disabled.arms == {("small", 3)}


async def test_they_are_compared(
    with_canary: Settings, upstream: Upstream, canary_bundle: Path
) -> None:
    upstream.scripts = [says("good", tokens=10)]
    models = served_at(upstream.url, "small", "medium", "large", max_retries=0)
    wanted = given(with_canary, canary_bundle, 0.5).model_copy(
        update={
            "metrics": Metrics(listen="127.0.0.1:0"),
            "providers": models.providers,
            "models": models.models,
        }
    )
    answers: Sequence[pb.RouteResponse]
    async with served(wanted) as (running, stub):
        answers = [
            await stub.Route(pb.RouteRequest(prompt=prompt), timeout=20)
            for prompt in ("word1", "hard", "word2", "word3") * 5
        ]
        cost = dict.fromkeys((STABLE, CANARY), 0.0)
        for _ in range(6):
            request = pb.GenerateRequest(request=pb.RouteRequest(prompt="word1"))
            events = [event async for event in stub.Generate(request, timeout=20)]
            answers.append(events[0].decision)
            cost[events[0].decision.bundle_version] += events[-1].result.cost_usd
        broke = pb.RouteRequest(prompt="hard", policy=pb.RoutingPolicy(max_cost_usd=1e-12))
        for _ in range(6):
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Route(broke, timeout=20)
        found = await scraped(running)

    for version in (STABLE, CANARY):
        own = [answer for answer in answers if answer.bundle_version == version]
        below = sum(a.fallback_reason == pb.FALLBACK_REASON_BELOW_THRESHOLD for a in own)
        decided = "bestroute_bundle_decisions_total"
        assert found.get(decided, bundle=version, fallback="none") == len(own) - below
        assert (found.get(decided, bundle=version, fallback="below_threshold") or 0) == below
        for name, part in (("estimated", "arm"), ("reference", "reference")):
            usd = sum(getattr(answer, part).estimated_cost_usd for answer in own)
            name = f"bestroute_bundle_{name}_cost_usd_total"
            assert found.get(name, bundle=version) == pytest.approx(usd, rel=1e-5)
        probability = sum(answer.arm.match_probability for answer in own)
        name = "bestroute_bundle_match_probability"
        assert found.get(f"{name}_count", bundle=version) == len(own)
        assert found.get(f"{name}_sum", bundle=version) == pytest.approx(probability, rel=1e-5)
        spent = found.get("bestroute_bundle_cost_usd_total", bundle=version)
        assert spent == pytest.approx(cost[version], rel=1e-5)
    errors = found.all("bestroute_bundle_errors_total")
    assert sum(errors.values()) == 6
    assert {frozenset({("bundle", v), ("error", "InvalidRequest")}) for v in cost} == {*errors}
    answered = found.all("bestroute_bundle_generate_duration_seconds_count")
    assert sum(answered.values()) == 6
    rewards = found.all("bestroute_bundle_reward_sum")
    assert rewards[frozenset({("bundle", STABLE)})] > 0
