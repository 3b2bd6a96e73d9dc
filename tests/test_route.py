"""Route, RouteStream, Score and ListArms over a real channel to a real server."""

import asyncio
import hashlib
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from bestroute import engine
from bestroute.app import serving
from bestroute.call import Call
from bestroute.config import Settings
from bestroute.errors import DeadlineExceeded
from bestroute.prompt import Prompt
from bestroute.router import open_router
from bestroute.target import Policy
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests import tiny

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub


async def test_a_decision_is_the_cheapest_arm_that_reaches_the_threshold(
    stub: "RoutingServiceAsyncStub",
) -> None:
    policy = pb.RoutingPolicy(match_threshold=0.45)
    request = pb.RouteRequest(request_id="r1", prompt="word1 word2", policy=policy, explain=True)

    response = await stub.Route(request)

    expected = tiny.probabilities(0)
    assert response.request_id == "r1"
    assert (response.arm.model, response.arm.samples) == ("small", 3)
    assert response.arm.match_probability == pytest.approx(expected[1], abs=1e-6)
    assert response.arm.estimated_cost_usd == pytest.approx(3 * (2 * 0.1 + 100 * 0.5) / 1e6)
    assert response.reference.model == "large"
    assert response.reference.match_probability == 1
    assert response.reference.estimated_cost_usd == pytest.approx((2 * 3 + 100 * 15) / 1e6)
    assert response.match_threshold == 0.45
    assert response.fallback_reason == pb.FALLBACK_REASON_UNSPECIFIED
    assert response.prompt_tokens == 2
    assert not response.truncated
    assert response.bundle_version == "tiny-1"
    assert response.timing.batch_size == 1
    assert response.timing.inference.ToNanoseconds() > 0
    assert [arm.match_probability for arm in response.arms] == pytest.approx(expected, abs=1e-6)
    assert [arm.expected_output_tokens for arm in response.arms] == [100] * 4
    assert not any(arm.HasField("expected_gain") for arm in response.arms)
    assert not response.HasField("quality_per_usd")


async def test_no_target_is_the_bundles_default(stub: "RoutingServiceAsyncStub") -> None:
    response = await stub.Route(pb.RouteRequest(prompt="word1"))

    assert response.match_threshold == 0.5
    assert len(response.arms) == 0


async def test_a_hard_prompt_goes_to_the_reference(stub: "RoutingServiceAsyncStub") -> None:
    response = await stub.Route(pb.RouteRequest(prompt="hard hard"))

    assert response.arm == response.reference
    assert response.fallback_reason == pb.FALLBACK_REASON_BELOW_THRESHOLD


async def test_limits_take_arms_out(stub: "RoutingServiceAsyncStub") -> None:
    async def routed(**policy: Any) -> tuple[str, int, int]:
        request = pb.RouteRequest(prompt="easy", policy=pb.RoutingPolicy(**policy))
        response = await stub.Route(request)
        return response.arm.model, response.arm.samples, response.fallback_reason

    fine = pb.FALLBACK_REASON_UNSPECIFIED
    assert await routed() == ("small", 1, fine)
    assert await routed(match_threshold=0.96) == ("small", 3, fine)
    assert await routed(match_threshold=0.96, max_samples=1) == ("medium", 1, fine)
    assert await routed(allowed_models=["medium"]) == ("medium", 1, fine)
    below = pb.FALLBACK_REASON_BELOW_THRESHOLD
    assert await routed(match_threshold=1.0) == ("large", 1, below)
    over = pb.FALLBACK_REASON_OVER_BUDGET
    assert await routed(match_threshold=1.0, max_cost_usd=0.0003) == ("medium", 1, over)


async def test_targets_are_read_off_the_calibration_curve(stub: "RoutingServiceAsyncStub") -> None:
    async def threshold(**target: Any) -> float:
        request = pb.RouteRequest(prompt="easy", policy=pb.RoutingPolicy(**target))
        return (await stub.Route(request)).match_threshold

    assert await threshold(max_quality_drop=0.11) == 0.2
    assert await threshold(max_quality_drop=0.05) == 0.5
    assert await threshold(max_quality_drop=0.0) == 0.8
    assert await threshold(min_cost_saving=0.6) == 0.2
    assert await threshold(min_cost_saving=0.5) == 0.5
    assert await threshold(min_cost_saving=0.0) == 0.8


async def test_a_conversation_is_one_prompt(stub: "RoutingServiceAsyncStub") -> None:
    said = [("user", "easy"), ("assistant", "hard"), ("user", "word1")]
    turns = [pb.Message(role=role, content=content) for role, content in said]
    conversation = pb.Messages(messages=turns)

    response = await stub.Route(pb.RouteRequest(messages=conversation, explain=True))

    assert response.arms[0].match_probability == pytest.approx(tiny.probabilities(0)[0], abs=1e-6)


async def test_a_long_prompt_says_that_it_was_cut(stub: "RoutingServiceAsyncStub") -> None:
    response = await stub.Route(pb.RouteRequest(prompt="easy " + "word1 " * 500 + "easy"))

    assert response.truncated
    assert response.prompt_tokens == 502
    expected = tiny.probabilities(8)[0]
    assert response.arm.match_probability == pytest.approx(expected, abs=1e-6), (
        "head and tail count"
    )


async def test_the_router_model_failing_leaves_the_reference(
    stub: "RoutingServiceAsyncStub",
) -> None:
    """The word `broken` makes the network give NaN; the neighbours in its batch are unharmed."""
    prompts = ["easy", "broken", "easy"] * 10

    responses = await asyncio.gather(*(stub.Route(pb.RouteRequest(prompt=p)) for p in prompts))

    for prompt, response in zip(prompts, responses, strict=True):
        if prompt == "broken":
            assert response.arm == response.reference
            assert response.fallback_reason == pb.FALLBACK_REASON_ROUTER_FAILED
        else:
            assert response.arm.model == "small"
            assert response.fallback_reason == pb.FALLBACK_REASON_UNSPECIFIED


async def test_concurrent_calls_share_batches(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an engine that takes its time, as a real network does."""
    run = engine._run_feeds

    def slow(session: Any, feeds: dict[str, Any]) -> list[engine.Row]:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10_000)  # as a network, without the GIL
        return run(session, feeds)

    monkeypatch.setattr(engine, "_run_feeds", slow)
    requests = [pb.RouteRequest(prompt=f"word{i} easy") for i in range(64)]

    async with serving(settings) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        responses = await asyncio.gather(*map(stub.Route, requests))

    assert max(response.timing.batch_size for response in responses) > 4


async def test_a_stream_answers_each_message_by_its_id(stub: "RoutingServiceAsyncStub") -> None:
    """Good and bad mixed: each gets its own answer, and the stream lives on."""
    stream = stub.RouteStream()
    words = {f"id{i}": "easy" if i % 2 else "hard" for i in range(40)}
    for request_id, word in words.items():
        request = pb.RouteRequest(request_id=request_id, prompt=word)
        await stream.write(pb.RouteStreamRequest(request=request))
    await stream.write(pb.RouteStreamRequest(request=pb.RouteRequest(request_id="bad")))
    bad_policy = pb.RoutingPolicy(match_threshold=2)
    bad = pb.RouteRequest(request_id="worse", prompt="easy", policy=bad_policy)
    await stream.write(pb.RouteStreamRequest(request=bad))
    await stream.done_writing()

    answers = {answer.request_id: answer async for answer in stream}

    assert set(answers) == {*words, "bad", "worse"}
    for request_id, word in words.items():
        assert answers[request_id].response.arm.model == ("small" if word == "easy" else "large")
        assert answers[request_id].response.request_id == request_id
    for request_id, field in [
        ("bad", "request.input"),
        ("worse", "request.policy.match_threshold"),
    ]:
        assert answers[request_id].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert field in answers[request_id].error.message
        assert len(answers[request_id].error.details) == 1


async def test_malformed_bytes_on_a_stream_get_an_answer_of_their_own(
    channel: grpc.aio.Channel,
) -> None:
    call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(
        "/bestroute.v1.RoutingService/RouteStream"
    )()
    bad = b"\x0a\x07\x0a\x01x\x12\x02\xff\xfe"  # request {request_id: "x", prompt: not UTF-8}
    good = pb.RouteStreamRequest(request=pb.RouteRequest(request_id="y", prompt="easy"))
    await call.write(bad)
    await call.write(good.SerializeToString())
    await call.done_writing()

    answers = {a.request_id: a for a in [pb.RouteStreamResponse.FromString(m) async for m in call]}

    assert answers["x"].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "request.prompt" in answers["x"].error.message
    assert answers["y"].response.arm.model == "small"


async def test_leaving_a_stream_leaves_the_server_well(stub: "RoutingServiceAsyncStub") -> None:
    for _ in range(5):
        stream = stub.RouteStream()
        for i in range(20):
            request = pb.RouteRequest(request_id=str(i), prompt="easy")
            await stream.write(pb.RouteStreamRequest(request=request))
        stream.cancel()

    assert (await stub.Route(pb.RouteRequest(prompt="easy"))).arm.model == "small"


async def test_answers_are_scored_in_their_order(stub: "RoutingServiceAsyncStub") -> None:
    responses = ["bad", "good good", "", "good good"]

    scored = await stub.Score(pb.ScoreRequest(request_id="s", prompt="word1", responses=responses))

    assert scored.request_id == "s"
    assert list(scored.rewards) == [-1, 2, 0, 2]
    assert scored.best == 1, "the first of equals"
    assert list(scored.truncated) == [False] * 4
    assert scored.bundle_version == "tiny-1"


async def test_a_long_prompt_does_not_cut_an_answer_away(stub: "RoutingServiceAsyncStub") -> None:
    request = pb.ScoreRequest(prompt="word1 " * 500, responses=["good " * 20, "bad " * 500])

    scored = await stub.Score(request)

    assert list(scored.truncated) == [True, True]
    assert scored.rewards[0] == 20
    assert scored.rewards[1] < -20


async def test_a_reward_that_is_not_a_number_is_an_error(stub: "RoutingServiceAsyncStub") -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.Score(pb.ScoreRequest(prompt="word1", responses=["broken"]))

    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert "nan" not in (failure.value.details() or "")


async def test_the_pool_is_listed(stub: "RoutingServiceAsyncStub") -> None:
    listed = await stub.ListArms(pb.ListArmsRequest())

    assert listed.bundle_version == "tiny-1"
    assert listed.reference_model == "large"
    assert [model.name for model in listed.models] == ["small", "medium", "large"]
    assert [(arm.model, arm.samples) for arm in listed.arms] == [
        (arm.model, arm.samples) for arm in tiny.ARMS
    ]
    assert listed.arms[1].estimated_cost_usd == pytest.approx(3 * 100 * 0.5 / 1e6)
    assert [point.match_threshold for point in listed.calibration] == [0.2, 0.5, 0.8]
    assert len(listed.trade_offs) == 0
    assert not listed.HasField("default_quality_per_usd")


async def test_an_expired_deadline_never_reaches_the_engine(settings: Settings) -> None:
    """Asked of the router itself: gRPC's own clock would end such a call before it is sent."""
    async with open_router(settings) as router:
        with pytest.raises(DeadlineExceeded):
            await router.decide(Prompt.of("easy"), Policy(), Call(time.monotonic() - 1))
