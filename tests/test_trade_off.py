"""A bundle that trades quality against money, over a real channel to a real server."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bestroute.config import Server, Settings
from bestroute.v1 import routing_pb2 as pb
from tests import tiny
from tests.upstreams import Upstream, says, served_at

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

FINE = pb.FALLBACK_REASON_UNSPECIFIED
BELOW = pb.FALLBACK_REASON_BELOW_THRESHOLD
OVER = pb.FALLBACK_REASON_OVER_BUDGET


@pytest.fixture
def settings(trading_bundle: Path, upstream: Upstream) -> Settings:
    """The trading bundle's pool without `medium`'s provider, at the scriptable upstream."""
    served = served_at(upstream.url, "small", "large")
    server = Server(listen="127.0.0.1:0", drain_timeout=5)
    return served.model_copy(update={"bundle": trading_bundle, "server": server})


async def route(stub: "RoutingServiceAsyncStub", prompt: str, **policy: Any) -> pb.RouteResponse:
    """Every arm explained."""
    request = pb.RouteRequest(prompt=prompt, policy=pb.RoutingPolicy(**policy), explain=True)
    return await stub.Route(request)


async def test_no_target_is_the_bundles_default_rate(stub: "RoutingServiceAsyncStub") -> None:
    response = await stub.Route(pb.RouteRequest(prompt="word1"))

    assert (response.arm.model, response.arm.samples) == ("medium", 1)
    assert response.quality_per_usd == 50
    assert response.match_threshold == 0
    assert response.fallback_reason == FINE
    assert response.arm.match_probability == pytest.approx(tiny.probabilities(0)[2], abs=1e-6)
    assert response.arm.HasField("expected_gain")
    assert response.arm.expected_gain == pytest.approx(0)
    assert response.arm.expected_output_tokens == pytest.approx(120)
    assert response.arm.estimated_cost_usd == pytest.approx((1 * 0.5 + 120 * 2.5) / 1e6)
    assert response.reference.HasField("expected_gain")
    assert response.reference.expected_output_tokens == pytest.approx(200)
    assert response.reference.estimated_cost_usd == pytest.approx((1 * 3 + 200 * 15) / 1e6)
    assert len(response.arms) == 0


async def test_explain_tells_what_is_predicted_of_every_arm(
    stub: "RoutingServiceAsyncStub",
) -> None:
    response = await route(stub, "better long")

    assert [arm.expected_gain for arm in response.arms] == pytest.approx(
        [gain + 0.1 for gain in tiny.GAINS], abs=1e-6
    )
    tokens = [arm.expected_output_tokens for arm in response.arms]
    assert tokens == pytest.approx([180, 180, 220, 220])
    assert response.reference.expected_output_tokens == pytest.approx(300)


async def test_targets_are_read_off_the_trade_offs(stub: "RoutingServiceAsyncStub") -> None:
    async def routed(**target: Any) -> tuple[float, str, int]:
        response = await route(stub, "word1", **target)
        return response.quality_per_usd, response.arm.model, response.arm.samples

    assert await routed(max_quality_drop=0.0) == (-20, "large", 1)
    assert await routed(max_quality_drop=0.01) == (50, "medium", 1)
    assert await routed(max_quality_drop=0.2) == (1000, "small", 1)
    assert await routed(min_cost_saving=0.2) == (0, "medium", 2)
    assert await routed(min_cost_saving=0.7) == (200, "small", 3)


async def test_a_match_threshold_is_the_papers_rule(stub: "RoutingServiceAsyncStub") -> None:
    response = await route(stub, "word1", match_threshold=0.45)

    assert (response.arm.model, response.arm.samples) == ("small", 3)
    assert response.match_threshold == 0.45
    assert not response.HasField("quality_per_usd")
    assert response.arm.expected_output_tokens == pytest.approx(80), "predicted all the same"


async def test_limits_take_arms_out(stub: "RoutingServiceAsyncStub") -> None:
    async def routed(prompt: str, **policy: Any) -> tuple[str, int, int]:
        response = await route(stub, prompt, **policy)
        return response.arm.model, response.arm.samples, response.fallback_reason

    assert await routed("word1", allowed_models=["small"]) == ("small", 3, FINE)
    assert await routed("word1", allowed_models=["small"], max_samples=1) == ("small", 1, FINE)
    assert await routed("word1", max_cost_usd=0.0002) == ("small", 3, FINE)
    assert await routed("worse worse worse") == ("large", 1, BELOW)
    assert await routed("worse worse worse", max_cost_usd=0.0002) == ("small", 3, OVER)
    assert await routed("worse worse worse", expected_output_tokens=5000) == ("small", 1, FINE)


async def test_the_router_model_failing_leaves_the_reference(
    stub: "RoutingServiceAsyncStub",
) -> None:
    response = await route(stub, "broken")

    assert response.arm == response.reference
    assert response.arm.model == "large"
    assert response.arm.expected_output_tokens == 100, "the mean"
    assert not response.arm.HasField("expected_gain")
    assert response.fallback_reason == pb.FALLBACK_REASON_ROUTER_FAILED


async def test_a_stream_trades_too(stub: "RoutingServiceAsyncStub") -> None:
    stream = stub.RouteStream()
    words = {"a": "word1", "b": "worse worse worse"}
    for request_id, prompt in words.items():
        request = pb.RouteRequest(request_id=request_id, prompt=prompt)
        await stream.write(pb.RouteStreamRequest(request=request))
    await stream.done_writing()

    answers = {answer.request_id: answer.response async for answer in stream}

    assert {name: answer.arm.model for name, answer in answers.items()} == {
        "a": "medium",
        "b": "large",
    }
    assert {answer.quality_per_usd for answer in answers.values()} == {50}


async def test_generate_trades_among_the_models_that_are_served(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    upstream.scripts = [says("bad"), says("good good"), says("good")]
    request = pb.GenerateRequest(request=pb.RouteRequest(prompt="word1"))

    events = [event async for event in stub.Generate(request)]

    decision, result = events[0].decision, events[-1].result
    assert (decision.arm.model, decision.arm.samples) == ("small", 3)
    assert decision.quality_per_usd == 50
    assert result.text == "good good"
    assert result.reference_cost_usd == pytest.approx(decision.reference.estimated_cost_usd)


async def test_the_callers_own_arm_has_no_gain(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    upstream.scripts = [says("good")]
    arm = pb.Arm(model="small", samples=1)
    request = pb.GenerateRequest(request=pb.RouteRequest(prompt="word1"), arm=arm)

    [decision, *_] = [event.decision async for event in stub.Generate(request)]

    assert not decision.arm.HasField("expected_gain")
    assert decision.arm.expected_output_tokens == 100


async def test_the_trade_offs_are_listed(stub: "RoutingServiceAsyncStub") -> None:
    listed = await stub.ListArms(pb.ListArmsRequest())

    assert [each.quality_per_usd for each in listed.trade_offs] == [-20, 0, 50, 200, 1000]
    assert listed.trade_offs[3] == pb.TradeOff(
        quality_per_usd=200, cost_saving=0.8, quality_drop=0.03, quality_drop_upper=0.04
    )
    assert listed.default_quality_per_usd == 50
    assert len(listed.calibration) == 3, "a match threshold can still be asked for"
    assert {arm.expected_output_tokens for arm in listed.arms} == {100}
    assert not any(arm.HasField("expected_gain") for arm in listed.arms)
