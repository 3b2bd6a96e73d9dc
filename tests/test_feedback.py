"""Feedback: what is taken, what is refused, and how it tells whether predictions still hold."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bestroute.app import serving
from bestroute.bundle import read_manifest
from bestroute.call import ANYBODY
from bestroute.client import Client, SyncClient
from bestroute.config import DecisionLog, Metrics, Settings
from bestroute.errors import InvalidRequest, Overloaded
from bestroute.manifest import Histogram, MeanByBin, Training
from bestroute.order import Execution, Order
from bestroute.prompt import Prompt
from bestroute.router import Router, open_router
from bestroute.target import Policy
from bestroute.traffic import journal
from bestroute.traffic.traffic import Traffic, open_traffic
from bestroute.upstream.providers import Sampling
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests.test_decision_log import generating as generating
from tests.test_decision_log import logging_to, read
from tests.upstreams import Upstream, says

# An arm's answer is worth what its match probability says, less a quarter; the reference's 0.75.
TRAINING = Training(
    prompts=100,
    prompt_tokens=Histogram(edges=[2.0], shares=[0.5, 0.5]),
    match_probability=Histogram(edges=[0.5], shares=[0.5, 0.5]),
    reference_quality=MeanByBin(edges=[], means=[0.75]),
    arm_gain=MeanByBin(edges=[0.5], means=[-0.5, -0.25]),
)


@pytest.fixture
def settings(settings: Settings, tiny_bundle: Path, tmp_path: Path) -> Settings:
    """A server with a log, and a bundle that tells of its training data."""
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    manifest = read_manifest(bundle).model_copy(update={"training": TRAINING})
    manifest.write(bundle)
    return logging_to(tmp_path / "log", settings.model_copy(update={"bundle": bundle}))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


async def test_feedback_is_written_beside_the_decision(settings: Settings, log: Path) -> None:
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        decision = await stub.Route(pb.RouteRequest(prompt="easy"))
        for quality in (0.25, 1.0):
            await stub.Feedback(
                pb.FeedbackRequest(
                    decision_id=decision.decision_id, quality=quality, source="judge:somebody"
                )
            )
    [kept] = read(log)
    told = read(log, "feedback")
    assert [row["decision_id"] for row in told] == [kept["decision_id"]] * 2
    assert [row["quality"] for row in told] == [0.25, 1.0]
    assert told[0]["source"] == "judge:somebody"
    assert kept["time"] <= told[0]["time"] <= told[1]["time"]


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("decision_id", {"decision_id": "mine"}),
        ("decision_id", {"decision_id": ""}),
        ("quality", {"quality": 1.01}),
        ("quality", {"quality": -0.5}),
        ("quality", {"quality": float("nan")}),
        ("source", {"source": "x" * 101}),
    ],
)
async def test_what_breaks_the_contract_is_refused_with_its_field(
    settings: Settings, log: Path, field: str, wrong: dict[str, Any]
) -> None:
    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        decision = await stub.Route(pb.RouteRequest(prompt="easy"))
        fields = {"decision_id": decision.decision_id, "quality": 0.5, "source": "user", **wrong}
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Feedback(pb.FeedbackRequest(**fields))
    status = rpc_status.from_call(raised.value)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert status is not None
    violation = error_details_pb2.BadRequest()
    status.details[0].Unpack(violation)
    assert violation.field_violations[0].field == field
    assert not read(log, "feedback")


async def test_a_server_without_a_log_takes_none(
    stub: "routing_pb2_grpc.RoutingServiceAsyncStub", settings: Settings
) -> None:
    without = settings.model_copy(update={"decision_log": DecisionLog()})
    async with serving(without) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stub.Feedback(pb.FeedbackRequest(decision_id="0" * 32, quality=1))
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "decision_log.directory" in (raised.value.details() or "")


async def test_metrics_tell_of_drift_and_feedback(settings: Settings) -> None:
    settings = settings.model_copy(update={"metrics": Metrics(listen="127.0.0.1:0")})
    async with (
        serving(settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
        aiohttp.ClientSession() as http,
    ):
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        decision = await stub.Route(pb.RouteRequest(prompt="easy"))
        told = pb.FeedbackRequest(decision_id=decision.decision_id, quality=0.25, source="user")
        await stub.Feedback(told)
        text = ""
        while 'bestroute_feedback_total{source="user"} 1.0' not in text:
            await asyncio.sleep(0.05)
            async with http.get(f"http://{server.metrics}/metrics") as response:
                text = await response.text()
    for line in (
        "bestroute_drift_decisions 1.0",
        'bestroute_drift_psi{input="prompt_tokens"} ',
        'bestroute_drift_psi{input="match_probability"} ',
        'bestroute_calibration_outcomes{model="small",samples="1"} 1.0',
        'bestroute_observed_quality{model="small",samples="1"} 0.25',
        'bestroute_decision_log_rows_total{kind="decisions",result="lost"} 0.0',
    ):
        assert f"\n{line}" in text


# -- calibration -------------------------------------------------------------------------------


@asynccontextmanager
async def watched(settings: Settings) -> AsyncIterator[tuple[Router, Traffic]]:
    """What a server has inside, without the server."""
    async with open_router(settings) as router, open_traffic(settings.decision_log) as traffic:
        yield router, traffic


async def decided(router: Router, traffic: Traffic, prompt: str) -> str:
    asked, policy = Prompt.of(prompt), Policy()
    routed = await router.decide(asked, policy)
    return traffic.decided(asked, policy, routed, router.manifest, ANYBODY)


async def test_outcomes_are_compared_with_what_was_expected(settings: Settings) -> None:
    async with watched(settings) as (router, traffic):
        # easy: small x 1 is predicted to match, and expected to be worth 0.5; hard: the reference.
        for prompt, quality in (("easy", 0.5), ("easy", 0.0), ("hard hard", 0.75)):
            traffic.feedback(await decided(router, traffic, prompt), quality, "user", ANYBODY)
        again = await decided(router, traffic, "easy")
        for _ in range(3):  # a caller who tries again says nothing new
            traffic.feedback(again, 0.5, "verifier:unit", ANYBODY)
        figures = traffic.figures(router.manifest)

    assert figures.feedback == {"user": 3, "verifier": 3, "judge": 0, "other": 0}
    assert figures.calibration is not None
    assert figures.prompts is not None
    assert figures.prompts.decisions == 4
    small, large = (figures.calibration.by_arm[arm] for arm in (("small", 1), ("large", 1)))
    assert small.outcomes == 3
    assert small.expected == pytest.approx(0.5, abs=0.01)
    assert small.observed == pytest.approx(1 / 3)
    assert (large.outcomes, large.observed) == (1, 0.75)
    assert large.expected == pytest.approx(0.75, abs=0.01)
    assert figures.calibration.error == pytest.approx(0.5 / 4, abs=0.01)


async def test_another_process_learns_from_it_as_well(settings: Settings) -> None:
    """Whoever gets the feedback need not have decided: workers share a port, servers restart."""
    async with watched(settings) as (router, traffic):
        decision_id = await decided(router, traffic, "easy")
    async with watched(settings) as (router, traffic):
        traffic.figures(router.manifest)
        traffic.feedback(decision_id, 1.0, "user", ANYBODY)
        figures = traffic.figures(router.manifest)
        assert figures.calibration is not None
        assert figures.calibration.overall.outcomes == 1
        # Another bundle's decisions say nothing of this one.
        other = router.manifest.model_copy(update={"version": "tiny-2"})
        traffic.figures(other)
        traffic.feedback(await decided(router, traffic, "easy"), 1.0, "user", ANYBODY)
        of_other = traffic.figures(other).calibration
        assert of_other is not None
        assert of_other.overall.outcomes == 0


async def test_what_another_llm_answered_says_nothing_of_the_arm(
    generating: Settings, settings: Settings, upstream: Upstream
) -> None:
    """The reference is asked as well, and its answer is the one that is judged."""
    upstream.scripts = [says("bad bad bad bad bad"), says("good")]
    served = generating.model_copy(
        update={"bundle": settings.bundle, "decision_log": settings.decision_log}
    )
    async with watched(served) as (router, traffic):
        for escalate, outcomes in ((True, 0), (False, 1)):
            order = Order(
                Prompt.of("easy"), Policy(), Sampling(), Execution(escalate=escalate), None, 0.0
            )
            with traffic.generation(order) as generation:
                decision_id = ""
                async for event in router.generate(order):
                    if not decision_id:
                        decision_id = generation.decided(event, router.manifest)  # type: ignore[arg-type]
                    generation.happened(event)
            traffic.feedback(decision_id, 1.0, "user", ANYBODY)
            calibration = traffic.figures(router.manifest).calibration
            assert calibration is not None
            assert calibration.overall.outcomes == outcomes


async def test_too_much_feedback_at_once_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MOST_WAITING", 3)
    async with watched(settings) as (router, traffic):
        decision_id = await decided(router, traffic, "easy")

        def tell() -> None:
            for _ in range(10):
                traffic.feedback(decision_id, 1.0, "user", ANYBODY)

        with pytest.raises(Overloaded):
            tell()


async def test_both_clients_give_it(settings: Settings, log: Path) -> None:
    def from_a_thread(address: str, decision_id: str) -> None:
        with SyncClient(address) as client:
            client.feedback(decision_id, 0.25, source="verifier")

    async with serving(settings) as server, Client(server.address) as client:
        decision_id = (await client.route("easy")).decision_id
        await client.feedback(decision_id, 0.75)
        await asyncio.to_thread(from_a_thread, server.address, decision_id)
        with pytest.raises(InvalidRequest, match="quality"):
            await client.feedback(decision_id, 2.0)

    rows = read(log, "feedback")
    assert [(r["quality"], r["source"]) for r in rows] == [(0.75, ""), (0.25, "verifier")]
