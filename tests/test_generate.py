"""Generate over a real channel: decision, deltas, candidates, result, and what goes wrong."""

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bestroute.app import serving
from bestroute.config import Server, Settings
from bestroute.v1 import routing_pb2 as pb
from tests.upstreams import Call, Chunk, Upstream, finish, hangs, says, served_at, text

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

POOL = ("small", "medium", "large")


@pytest.fixture
def settings(tiny_bundle: Path, upstream: Upstream) -> Settings:
    """The tiny bundle's pool, served by the scriptable upstream."""
    served = served_at(upstream.url, *POOL)
    server = Server(listen="127.0.0.1:0", drain_timeout=5)
    return served.model_copy(update={"bundle": tiny_bundle, "server": server})


def asks(prompt: str | None = None, **fields: Any) -> pb.GenerateRequest:
    """By default a prompt that is routed to one sample, or one that adds nothing to rewards."""
    if prompt is None:
        prompt = "word1" if "arm" in fields else "easy"
    return pb.GenerateRequest(request=pb.RouteRequest(request_id="g", prompt=prompt), **fields)


async def events(
    stub: "RoutingServiceAsyncStub", request: pb.GenerateRequest, deadline: float | None = None
) -> dict[str, list[Any]]:
    """All events by their kind, in order."""
    kinds = ("decision", "delta", "candidate", "result", "retry", "fallback")
    found: dict[str, list[Any]] = {kind: [] for kind in kinds}
    async for event in stub.Generate(request, timeout=deadline):
        kind = event.WhichOneof("event")
        assert kind is not None
        found[kind].append(getattr(event, kind))
    return found


async def test_one_sample_streams_straight_through(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    upstream.scripts = [says("the ", "answer", tokens=7)]

    order = [e.WhichOneof("event") async for e in stub.Generate(asks())]
    found = await events(stub, asks())

    assert order == ["decision", "delta", "delta", "candidate", "result"]
    [decision], [candidate], [result] = found["decision"], found["candidate"], found["result"]
    assert decision.request_id == "g"
    assert (decision.arm.model, decision.arm.samples) == ("small", 1)
    assert [delta.text for delta in found["delta"]] == ["the ", "answer"]
    assert not candidate.HasField("reward"), "there is nothing to choose from"
    assert result.text == candidate.text == "the answer"
    assert result.model == "small"
    assert (result.usage.input_tokens, result.usage.output_tokens) == (10, 7)
    assert not result.usage.estimated
    assert result.cost_usd == pytest.approx((10 * 0.1 + 7 * 0.5) / 1e6)
    assert result.reference_cost_usd == pytest.approx(decision.reference.estimated_cost_usd)
    assert 0 < result.time_to_first_token.ToNanoseconds() <= result.duration.ToNanoseconds()
    assert upstream.calls[0].body["messages"] == [{"role": "user", "content": "easy"}]


async def test_the_best_of_three_wins(stub: "RoutingServiceAsyncStub", upstream: Upstream) -> None:
    upstream.scripts = [says("bad"), says("good good"), says("good")]

    found = await events(stub, asks(arm=pb.Arm(model="small", samples=3)))

    rewards = {c.text: c.reward for c in found["candidate"]}
    assert rewards == {"bad": -1, "good good": 2, "good": 1}
    assert found["result"][0].text == "good good"
    [decision] = found["decision"]
    assert (decision.arm.model, decision.arm.samples) == ("small", 3)
    assert decision.reference.model == "large"
    assert not decision.HasField("timing"), "the router did not run"


async def test_candidates_are_scored_the_moment_they_end(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    """The fast candidate's reward is known while the slow one still streams."""

    async def slow(call: Call) -> AsyncIterator[Chunk]:
        for _ in range(4):
            yield text("word1 ")
            await asyncio.sleep(0.1)
        yield finish()

    upstream.scripts = [says("good"), slow]
    kinds = []
    async for event in stub.Generate(asks(arm=pb.Arm(model="small", samples=2))):
        kinds.append(event.WhichOneof("event"))

    first = kinds.index("candidate")
    assert "delta" in kinds[first:], "text still came after the first reward"
    assert kinds[-2:] == ["candidate", "result"]


async def test_one_failure_of_three_is_reported_and_survived(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    async def breaks(call: Call) -> AsyncIterator[Chunk]:
        yield text("good good good")
        raise ConnectionResetError

    upstream.scripts = [says("bad"), breaks, says("good")]

    found = await events(stub, asks(arm=pb.Arm(model="small", samples=3)))

    [failed] = [c for c in found["candidate"] if c.HasField("error")]
    assert failed.finish_reason == "error"
    assert not failed.HasField("reward")
    assert found["result"][0].text == "good"
    assert found["result"][0].usage.output_tokens > 2, "what the failed one used is counted"


async def test_all_failed_names_the_providers_words(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    async def refuses(call: Call) -> AsyncIterator[Chunk]:
        yield {"error": {"message": "the model is on holiday", "code": 503}}

    upstream.scripts = [refuses]

    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await events(stub, asks(arm=pb.Arm(model="small", samples=2)))

    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "the model is on holiday" in (failure.value.details() or "")


async def test_a_caller_that_leaves_stops_the_upstream_at_once(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    upstream.scripts = [hangs("thinking")]
    call = stub.Generate(asks(arm=pb.Arm(model="small", samples=3)))
    async for event in call:
        if event.WhichOneof("event") == "delta" and len(upstream.calls) == 3:
            break

    call.cancel()

    async with asyncio.timeout(2):
        await asyncio.gather(*(seen.left.wait() for seen in upstream.calls))
    assert upstream.under_way == 0


async def test_the_deadline_cuts_stragglers_and_the_best_finished_wins(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    upstream.scripts = [says("good"), hangs("never ")]

    found = await events(stub, asks(arm=pb.Arm(model="small", samples=2)), deadline=1.5)

    [result] = found["result"]
    assert result.text == "good"
    assert result.candidates_cancelled == 1
    assert {c.finish_reason for c in found["candidate"]} == {"stop", "cancelled"}


async def test_early_stop_cancels_the_rest(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    upstream.scripts = [hangs("slow "), says("good good")]
    execution = pb.Execution(early_stop=True)

    request = asks(arm=pb.Arm(model="small", samples=2), execution=execution)
    async with asyncio.timeout(10):
        found = await events(stub, request)

    assert found["result"][0].text == "good good"
    assert found["result"][0].candidates_cancelled == 1


async def test_a_poor_best_is_escalated_to_the_reference(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    upstream.scripts = [says("bad"), says("bad"), says("good")]
    execution = pb.Execution(escalate=True)

    found = await events(stub, asks(arm=pb.Arm(model="small", samples=2), execution=execution))

    assert [(c.index, c.model) for c in found["candidate"]][-1] == (2, "large")
    [result] = found["result"]
    assert (result.escalated, result.text, result.model) == (True, "good", "large")


async def test_deltas_can_be_left_out(stub: "RoutingServiceAsyncStub", upstream: Upstream) -> None:
    execution = pb.Execution(stream_deltas=False)

    found = await events(stub, asks(execution=execution))

    assert not found["delta"]
    assert found["result"][0].text == "4"


async def test_sampling_and_conversations_reach_the_provider(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    turns = [pb.Message(role="system", content="Be kind."), pb.Message(role="user", content="easy")]
    sampling = pb.Sampling(max_output_tokens=5, temperature=0.0, top_p=0.5, stop=["END"], seed=0)
    request = pb.GenerateRequest(
        request=pb.RouteRequest(messages=pb.Messages(messages=turns)), sampling=sampling
    )

    await events(stub, request)

    body = upstream.calls[0].body
    assert [m["content"] for m in body["messages"]] == ["Be kind.", "easy"]
    assert body["temperature"] == 0
    assert body["top_p"] == 0.5
    assert body["stop"] == ["END"]
    assert body["seed"] == 0
    assert 5 in (body.get("max_tokens"), body.get("max_completion_tokens"))


async def test_only_served_models_are_chosen(tiny_bundle: Path, upstream: Upstream) -> None:
    """`small` would be cheapest, but nobody serves it."""
    served = served_at(upstream.url, "medium", "large")
    server = Server(listen="127.0.0.1:0", drain_timeout=5)
    settings = served.model_copy(update={"bundle": tiny_bundle, "server": server})
    async with (
        serving(settings) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        generate = channel.unary_stream(
            "/bestroute.v1.RoutingService/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        first = await anext(aiter(generate(asks())))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            [e async for e in generate(asks(arm=pb.Arm(model="small")))]

    assert first.decision.arm.model == "medium"
    assert 'no provider serves "small"' in (failure.value.details() or "")
    assert "medium" in (failure.value.details() or "")


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "request.input"),
        (asks(""), "request.prompt"),
        (asks(arm=pb.Arm(model="huge")), "arm.model"),
        (asks(arm=pb.Arm(samples=1)), "arm.model"),
        (asks(arm=pb.Arm(model="small", samples=1_000_000)), "arm.samples"),
        (asks(sampling=pb.Sampling(temperature=-1)), "sampling.temperature"),
        (asks(sampling=pb.Sampling(temperature=math.nan)), "sampling.temperature"),
        (asks(sampling=pb.Sampling(top_p=0)), "sampling.top_p"),
        (asks(sampling=pb.Sampling(top_p=1.5)), "sampling.top_p"),
        (asks(sampling=pb.Sampling(max_output_tokens=0)), "sampling.max_output_tokens"),
        (asks(sampling=pb.Sampling(stop=[""])), "sampling.stop[0]"),
        (
            pb.GenerateRequest(
                request=pb.RouteRequest(
                    prompt="easy", policy=pb.RoutingPolicy(match_threshold=math.nan)
                )
            ),
            "request.policy.match_threshold",
        ),
        (
            pb.GenerateRequest(
                request=pb.RouteRequest(
                    prompt="easy", policy=pb.RoutingPolicy(allowed_models=["x"])
                )
            ),
            "request.policy.allowed_models[0]",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_bad_input_is_named(
    stub: "RoutingServiceAsyncStub",
    upstream: Upstream,
    request_: pb.GenerateRequest,
    field: str,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await events(stub, request_)

    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(failure.value)
    assert status is not None
    details = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(details)
    assert [v.field for v in details.field_violations] == [field]
    assert not upstream.calls, "nothing was bought"


async def test_a_real_llm_answers_best_of_three(tiny_bundle: Path, standin: str) -> None:
    served = served_at(standin, *POOL, samples="one_call")
    server = Server(listen="127.0.0.1:0", drain_timeout=5)
    settings = served.model_copy(update={"bundle": tiny_bundle, "server": server})
    request = asks(
        "Say hello.",
        arm=pb.Arm(model="small", samples=3),
        sampling=pb.Sampling(max_output_tokens=12, temperature=0.8, seed=1),
    )
    async with (
        serving(settings) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        generate = channel.unary_stream(
            "/bestroute.v1.RoutingService/Generate",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        found = [event async for event in generate(request)]

    candidates = [e.candidate for e in found if e.HasField("candidate")]
    result = found[-1].result
    assert len(candidates) == 3
    assert all(c.text for c in candidates)
    assert result.text == max(candidates, key=lambda c: (c.reward, -c.index)).text
    assert result.usage.output_tokens > 3
    assert result.cost_usd > 0
