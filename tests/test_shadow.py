"""Shadow mode: everything is decided and counted, and the reference answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pyarrow
import pytest
from pyarrow import parquet

from bestroute.app import Running, serving
from bestroute.config import DecisionLog, Metrics, Operations, Routing, Settings
from bestroute.traffic.schema import ADDED, DECISION
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from bestroute_export.traffic import graded_rows, summarize
from tests.scrapes import scraped
from tests.upstreams import Upstream, Wire, refused, says, served_at

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

SHADOW = pb.FALLBACK_REASON_SHADOW


@pytest.fixture
def settings(settings: Settings, upstream: Upstream, tmp_path: Path) -> Settings:
    served = served_at(upstream.url, "small", "medium", "large", max_retries=0)
    upstream.scripts = [says("good", tokens=10)]
    return settings.model_copy(
        update={
            "providers": served.providers,
            "models": served.models,
            "routing": Routing(fallbacks=("medium",)),
            "operations": Operations(shadow=True),
            "metrics": Metrics(listen="127.0.0.1:0"),
            "decision_log": DecisionLog(directory=tmp_path, prompts="keep", answers="keep"),
        }
    )


def lit(settings: Settings) -> Settings:
    """The same out of shadow mode."""
    return settings.model_copy(update={"operations": Operations()})


async def routed(stub: "RoutingServiceAsyncStub", **request: Any) -> pb.RouteResponse:
    return await stub.Route(pb.RouteRequest(**request), timeout=10)


async def one_of(stream: Any) -> pb.RouteResponse:
    response: pb.RouteResponse = (await stream.read()).response
    return response


async def test_the_reference_answers_and_what_would_have_is_told(
    stub: "RoutingServiceAsyncStub", server: Running, settings: Settings
) -> None:
    stream = stub.RouteStream(timeout=10)
    await stream.write(pb.RouteStreamRequest(request=pb.RouteRequest(prompt="word1")))
    await stream.done_writing()
    during = [await routed(stub, prompt="word1"), await one_of(stream)]
    hard = await routed(stub, prompt="hard")
    loaded = await server.live.replace(lit(settings))
    after = await routed(stub, prompt="word1")

    assert not loaded
    for each in during:
        assert each.arm == each.reference
        assert each.fallback_reason == SHADOW
        assert each.shadow_arm == after.arm
    assert (hard.arm.model, hard.shadow_arm.model) == ("large", "large")
    assert after.fallback_reason == pb.FALLBACK_REASON_UNSPECIFIED
    assert not after.HasField("shadow_arm")


async def test_it_is_the_reference_that_draws(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    request = pb.GenerateRequest(request=pb.RouteRequest(prompt="word1"))
    events = [event async for event in stub.Generate(request, timeout=20)]

    decision, result = events[0].decision, events[-1].result
    assert (decision.arm.model, decision.arm.samples) == ("large", 1)
    assert (decision.shadow_arm.model, decision.shadow_arm.samples) == ("small", 3)
    assert result.model == "large"
    assert [call.body["model"] for call in upstream.calls] == ["large"]


async def test_an_arm_of_the_callers_own_is_run(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    arm = pb.Arm(model="small", samples=1)
    request = pb.GenerateRequest(request=pb.RouteRequest(prompt="word1"), arm=arm)
    events = [event async for event in stub.Generate(request, timeout=20)]

    assert events[-1].result.model == "small"
    assert events[0].decision.fallback_reason == pb.FALLBACK_REASON_UNSPECIFIED
    assert not events[0].decision.HasField("shadow_arm")


async def test_nobody_stands_in_for_the_reference(wire: Wire, settings: Settings) -> None:
    """As nobody would if there were no routing."""
    wire.replies = [refused(400)]
    providers = served_at(wire.url, max_retries=0).providers
    async with (
        serving(settings.model_copy(update={"providers": providers})) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        request = pb.GenerateRequest(request=pb.RouteRequest(prompt="easy"))
        with pytest.raises(grpc.aio.AioRpcError):
            [event async for event in stub.Generate(request, timeout=20)]

    assert [body["model"] for body in wire.bodies] == ["large"]


async def test_a_session_is_followed_as_it_would_have_been(
    stub: "RoutingServiceAsyncStub",
) -> None:
    """Else all of its turns but the first would stay with the reference, and save nothing."""
    session = pb.Session(id="a", sticky=True)
    first = await routed(stub, prompt="word1", session=session)
    request = pb.GenerateRequest(request=pb.RouteRequest(prompt="word1 word2", session=session))
    decision, *_ = [event async for event in stub.Generate(request, timeout=20)]
    second = decision.decision
    third = await routed(stub, prompt="word1 word2 word3", session=session)

    assert {each.arm.model for each in (first, second, third)} == {"large"}
    assert [each.shadow_arm.model for each in (first, second, third)] == ["small"] * 3
    assert third.session.previous_model == "small"
    assert third.session.reason == pb.SESSION_REASON_STICKY


async def test_savings_are_counted(stub: "RoutingServiceAsyncStub", server: Running) -> None:
    answers = [await routed(stub, prompt=f"{word} word1") for word in ("easy", "word2", "hard")]

    found = await scraped(server)

    saved = sum(a.reference.estimated_cost_usd - a.shadow_arm.estimated_cost_usd for a in answers)
    assert saved > 0
    assert found.get("bestroute_shadow_saving_usd_total") == pytest.approx(saved, rel=1e-5)
    assert found.get("bestroute_shadow_mode") == 1
    decided = "bestroute_shadow_decisions_total"
    assert found.get(decided, model="small", samples="1") == 1
    assert found.get(decided, model="large", samples="1") == 1
    spent = found.all("bestroute_shadow_cost_usd_total").values()
    expected = sum(answer.shadow_arm.estimated_cost_usd for answer in answers)
    assert sum(spent) == pytest.approx(expected, rel=1e-5)
    assert found.get("bestroute_decisions_total", model="large", samples="1", fallback="shadow")


async def test_the_decision_log_tells_what_would_have_been_run(
    settings: Settings, tmp_path: Path
) -> None:
    async with (
        serving(settings) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        answer = await routed(stub, prompt="word1")
        request = pb.GenerateRequest(request=pb.RouteRequest(prompt="word2"))
        [event async for event in stub.Generate(request, timeout=20)]
        await running.live.replace(lit(settings))
        await routed(stub, prompt="word3")

    [file] = tmp_path.glob("decisions-*.parquet")  # noqa: ASYNC240
    shadowed, generated, plain = parquet.read_table(file).to_pylist()
    assert (shadowed["model"], shadowed["fallback"]) == ("large", "SHADOW")
    assert (shadowed["shadow_model"], shadowed["shadow_samples"]) == ("small", 3)
    assert shadowed["shadow_cost_usd"] == pytest.approx(answer.shadow_arm.estimated_cost_usd)
    assert (generated["shadow_model"], generated["candidates"][0]["model"]) == ("small", "large")
    assert (plain["shadow_model"], plain["shadow_cost_usd"]) == (None, None)
    assert summarize(tmp_path).decisions == 3
    assert any("large" in row["responses"] for row in graded_rows(tmp_path, graded_only=False))


async def test_a_log_from_before_there_was_a_shadow_mode_is_still_read(
    tmp_path: Path,
) -> None:
    older = [field for field in DECISION if field.name not in ADDED]
    row = dict.fromkeys((field.name for field in older), None)
    row |= {"decision_id": "a", "prompt": "word1", "prompt_digest": "b", "bundle_version": "0"}
    (tmp_path / "log").mkdir()
    table = pyarrow.Table.from_pylist([row], pyarrow.schema(older))
    parquet.write_table(table, tmp_path / "log" / "decisions-1.parquet")

    assert summarize(tmp_path / "log").decisions == 1
