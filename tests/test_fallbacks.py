"""Who answers when an LLM doesn't: over a real channel, and what the caller is told of it."""

from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bestroute import best_of_n
from bestroute.app import serving
from bestroute.client import Client
from bestroute.config import ConfigInvalid
from bestroute.errors import ProviderFailed
from bestroute.router import open_router
from bestroute.v1 import routing_pb2 as pb
from tests import tiny
from tests.generating import (
    DOWN,
    POOL,
    answers,
    asked,
    by_model,
    client_of,
    collect,
    configured,
    kinds,
    told,
)
from tests.upstreams import Wire, events, finish, refused, streamed, text, usage


async def test_fallbacks_follow_their_order_and_end_at_the_reference(
    tiny_bundle: Path, wire: Wire
) -> None:
    broken = streamed(events(text("no good at all"))[:-14])
    by_model(wire, small=broken, medium=DOWN, large=answers("yes"))
    async with client_of(configured(tiny_bundle, wire.url, "medium")) as client:
        found = await told(client)

    assert asked(wire) == ["small", "medium", "large"]
    assert kinds(found) == [
        "decision",
        "delta",
        "candidate",
        "fallback",
        "candidate",
        "fallback",
        "delta",
        "candidate",
        "result",
    ]
    first, second = (event.fallback for event in found if event.HasField("fallback"))
    assert (first.failed_model, first.model, first.samples) == ("small", "medium", 1)
    assert (second.failed_model, second.model) == ("medium", "large")
    assert second.cause.code == grpc.StatusCode.UNAVAILABLE.value[0]
    assert second.cause.message == "test: 500 down"
    result = found[-1].result
    assert (result.candidate, result.model, result.text) == (2, "large", "yes")
    owed = (1 * 0.1 + 4 * 0.5) + (10 * 3 + 5 * 15)  # "easy" and 14 characters; the reference
    assert result.cost_usd == pytest.approx(owed / 1e6, rel=1e-12)
    assert result.usage.estimated


async def test_the_reference_is_asked_though_no_fallback_is_named(
    tiny_bundle: Path, wire: Wire
) -> None:
    by_model(wire, small=DOWN, large=answers("yes"))
    async with client_of(configured(tiny_bundle, wire.url)) as client:
        found = await told(client)

    assert (asked(wire), found[-1].result.model) == (["small", "large"], "large")


async def test_a_request_s_own_arm_falls_back_once_all_its_samples_have_failed(
    tiny_bundle: Path, wire: Wire
) -> None:
    by_model(wire, small=DOWN, medium=answers("yes"))
    async with client_of(configured(tiny_bundle, wire.url, "small", "medium")) as client:
        found = await told(client, model="small", samples=3)

    assert asked(wire) == ["small", "small", "small", "medium"], "none a second time"
    assert found[-1].result.candidate == 3
    candidates = [event.candidate for event in found if event.HasField("candidate")]
    assert sorted(c.index for c in candidates) == [0, 1, 2, 3]


async def test_one_complete_sample_is_enough(tiny_bundle: Path, wire: Wire) -> None:
    replies = iter([DOWN, answers("yes"), DOWN])
    wire.reply = lambda request: next(replies)
    async with client_of(configured(tiny_bundle, wire.url, "medium")) as client:
        found = await told(client, "word1", model="small", samples=3)

    assert (asked(wire), found[-1].result.text) == (["small"] * 3, "yes")
    assert "fallback" not in kinds(found)


async def test_an_empty_answer_falls_back_and_a_refusal_does_not(
    tiny_bundle: Path, wire: Wire
) -> None:
    refusal = {"choices": [{"index": 0, "delta": {"refusal": "I won't."}}]}
    empty = streamed(events(finish(reason="content_filter"), usage(10, 3)))
    async with client_of(configured(tiny_bundle, wire.url)) as client:
        by_model(wire, small=empty, large=answers("yes"))
        fell = await told(client)
        by_model(wire, small=streamed(events(refusal, finish(reason="content_filter"))))
        refused_ = await told(client)

    result = fell[-1].result
    assert result.model == "large"
    cause = next(event.fallback.cause.message for event in fell if event.HasField("fallback"))
    assert cause == "test: empty answer (finish_reason content_filter)"
    assert result.cost_usd == pytest.approx((10 * 0.1 + 3 * 0.5 + 10 * 3 + 5 * 15) / 1e6)
    assert (refused_[-1].result.model, refused_[-1].result.text) == ("small", "I won't.")


async def test_when_all_fail_the_caller_learns_why_and_no_secret(
    tiny_bundle: Path, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "sk-secret")
    by_model(wire, small=refused(401, b"bad key sk-secret"), medium=DOWN, large=refused(429))
    settings = configured(tiny_bundle, wire.url, "medium", api_key_env="KEY")
    seen: list[pb.GenerateResponse] = []
    async with serving(settings) as running, grpc.aio.insecure_channel(running.address) as channel:
        generate = channel.unary_stream(
            "/bestroute.v1.RoutingService/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        call = generate(pb.GenerateRequest(request=pb.RouteRequest(prompt="easy")))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await collect(call, seen)

    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    words = failure.value.details() or ""
    assert words == "test: 401 bad key [api key]; test: 500 down; test: 429 Because"
    status = rpc_status.from_call(failure.value)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("PROVIDER_FAILED", "bestroute")
    assert "sk-secret" not in "".join(map(str, seen)) + str(status)
    assert kinds(seen) == ["decision", *["candidate", "fallback"] * 2, "candidate"]


async def test_a_retry_is_told(tiny_bundle: Path, wire: Wire) -> None:
    wire.replies = [refused(429, b"slow down", retry_after="0.01"), answers("yes")]
    async with client_of(configured(tiny_bundle, wire.url, max_retries=1)) as client:
        found = await told(client)

    assert kinds(found) == ["decision", "retry", "delta", "candidate", "result"]
    retry = found[1].retry
    assert (list(retry.candidates), retry.model, retry.attempt) == ([0], "small", 1)
    assert 0.01 <= retry.delay.ToTimedelta().total_seconds() <= 0.02
    assert retry.cause.message == "test: 429 slow down"
    assert retry.cause.code == grpc.StatusCode.UNAVAILABLE.value[0]


async def test_limits_bind_fallbacks_and_cost_the_reference_too(
    tiny_bundle: Path, wire: Wire
) -> None:
    by_model(wire, small=DOWN, medium=answers("medium"), large=answers("large"))
    async with client_of(
        configured(tiny_bundle, wire.url, "medium", breaker_failures=99)
    ) as client:
        allowed = await told(client, allowed_models=["small"])
        with pytest.raises(ProviderFailed, match="down"):
            # Small costs 0.00005 and medium 0.00025.
            await told(client, max_cost_usd=0.0001)
        cheap = await told(client, max_cost_usd=0.001)

    assert allowed[-1].result.model == "large"
    assert cheap[-1].result.model == "medium"


async def test_an_open_breaker_is_routed_around_and_told_of(tiny_bundle: Path, wire: Wire) -> None:
    by_model(wire, small=DOWN, medium=answers("yes"), large=DOWN)
    settings = configured(tiny_bundle, wire.url, "medium", breaker_failures=1, breaker_pause=60)
    async with client_of(settings) as client:
        before = await told(client)
        after = await told(client)
        asked_before = len(wire.bodies)
        own = await told(client, model="small")
        assert await told(client, model="large"), "it opens here"
        wire.bodies.clear()
        by_model(wire, medium=DOWN)
        with pytest.raises(ProviderFailed) as failure:
            await told(client, model="small")

    assert (before[0].decision.arm.model, before[-1].result.model) == ("small", "medium")
    assert after[0].decision.arm.model == "medium"
    assert "fallback" not in kinds(after)
    assert asked_before == 3
    cause = next(event.fallback.cause.message for event in own if event.HasField("fallback"))
    assert cause.startswith("test: not asked for ")
    assert asked(wire) == ["medium"]
    assert str(failure.value).count("not asked for") >= 1
    assert "500 down" in str(failure.value)


async def test_where_every_breaker_is_open_the_decision_is_as_ever(
    tiny_bundle: Path, wire: Wire
) -> None:
    wire.replies = [DOWN]
    settings = configured(tiny_bundle, wire.url, "medium", breaker_failures=1, breaker_pause=60)
    async with open_router(settings) as router, serving(settings) as running:
        async with Client(running.address) as client:
            for _ in range(2):
                with pytest.raises(ProviderFailed):
                    await told(client)
            with pytest.raises(ProviderFailed, match="not asked for"):
                await told(client)
        assert router.providers.counts()["test"].calls == 0, "breakers are a router's own"
    assert asked(wire) == ["small", "medium", "large"]


async def test_a_fallback_whose_breaker_is_open_is_passed_over(
    tiny_bundle: Path, wire: Wire
) -> None:
    by_model(wire, small=DOWN, medium=DOWN, large=answers("yes"))
    settings = configured(tiny_bundle, wire.url, "medium", breaker_failures=1, breaker_pause=60)
    async with client_of(settings) as client:
        await told(client)
        found = await told(client, model="small")

    fallbacks = [event.fallback for event in found if event.HasField("fallback")]
    assert [(each.failed_model, each.model) for each in fallbacks] == [("small", "large")]


async def test_there_is_no_fallback_shortly_before_the_deadline(
    tiny_bundle: Path, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best_of_n, "CUT_BEFORE_DEADLINE", 60.0)
    by_model(wire, small=DOWN, large=answers("late"))
    async with client_of(configured(tiny_bundle, wire.url)) as client:
        with pytest.raises(ProviderFailed, match="500 down"):
            await told(client, timeout=30)

    assert asked(wire) == ["small"]


async def test_a_gate_whose_answers_are_missing_asks_the_reference_first(
    tmp_path: Path, wire: Wire
) -> None:
    gated = tiny.write(tmp_path, gates=[tiny.GATE])
    by_model(wire, small=DOWN, medium=answers("medium"), large=DOWN)
    async with client_of(configured(gated, wire.url, "medium")) as client:
        found = await told(client, "word1", model="small", samples=3, escalate=True)

    assert asked(wire) == ["small", "small", "small", "large", "medium"]
    assert (found[-1].result.model, found[-1].result.text) == ("medium", "medium")


@pytest.mark.parametrize(
    ("fallback", "models", "words"),
    [
        ("smal", POOL, r'\[routing\] fallbacks: "smal" is not in the bundle; did you mean "small"'),
        ("small", ("large",), r'no provider serves "small"; add \[models."small"\]'),
    ],
)
async def test_a_fallback_that_can_t_be_asked_is_refused_at_the_start(
    tiny_bundle: Path, wire: Wire, fallback: str, models: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        async with open_router(configured(tiny_bundle, wire.url, fallback, models=models)):
            pass
