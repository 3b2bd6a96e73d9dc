"""When the reference is asked after the drawn answers: the rules, and over a real channel."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.app import serving
from bestroute.candidate import Candidate
from bestroute.config import Server, Settings
from bestroute.errors import ProviderFailed
from bestroute.escalation import ByGate, ByReward, Escalation
from bestroute.manifest import MANIFEST, Estimate
from bestroute.policy import InputBilling
from bestroute.pricing import ModelPrice
from bestroute.upstream.completion import CANCELLED
from bestroute.upstream.usage import Usage
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests import tiny
from tests.upstreams import Call, Chunk, Upstream, finish, says, served_at, text, usage

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub

LARGE = ModelPrice(3.0, 15.0, InputBilling.PER_SAMPLE)
GATE = ByGate("large", tiny.GATE, 20.0, 10, LARGE, 0.0)
FLOOR = ByReward("large", -0.5, 0.0)


def drawn(*texts: str, reward: float | None = None) -> list[Candidate]:
    """Complete answers of small."""
    return [
        Candidate(index, "small", text, reward, Usage(), "stop", None)
        for index, text in enumerate(texts)
    ]


def failed(index: int, model: str = "small") -> Candidate:
    return Candidate(index, model, "", None, Usage(), "error", ProviderFailed("no"))


def of_reference(index: int, reward: float | None = None) -> Candidate:
    return Candidate(index, "large", "9", reward, Usage(), "stop", None)


# The gate


@pytest.mark.parametrize(
    ("rate", "texts", "asked"),
    [
        (20.0, ["4", "4.", "**4**"], False),
        (20.0, ["4", "4", "5"], True),
        (20.0, ["4", "5", "6"], True),
        (100.0, ["4", "5", "6"], False),
        (-20.0, ["4", "4", "4"], True),
        (0.0, ["4", "4", "4"], True),
    ],
)
def test_a_gate_asks_where_gain_and_saving_are_worth_nothing(
    rate: float, texts: list[str], asked: bool
) -> None:
    """The gain is 0.1 * agreement - 0.1; the reference costs 0.00153 USD."""
    assert replace(GATE, quality_per_usd=rate).asks(drawn(*texts)) is asked


def test_the_reference_is_priced_by_the_prompt_and_what_the_answers_show() -> None:
    """As many tokens as characters + 1: 20 at 15 and 10 at 3 USD per million; the gain is -0.05."""
    by_length = Estimate(intercept=0.0, agreement=0.0, length=1.0, agreement_length=0.0)
    worse = Estimate(intercept=-0.05, agreement=0.0, length=0.0, agreement_length=0.0)
    gate = tiny.GATE.model_copy(
        update={"gain": worse, "reference_log_tokens": by_length, "arm": tiny.ARMS[3]}
    )
    answers = drawn("x" * 19, "y" * 19)
    cost = (10 * 3 + 20 * 15) / 1e6

    assert replace(GATE, gate=gate, quality_per_usd=0.0501 / cost).asks(answers) is False
    assert replace(GATE, gate=gate, quality_per_usd=0.0499 / cost).asks(answers) is True
    longer = replace(GATE, gate=gate, quality_per_usd=0.0499 / cost, prompt_tokens=20)
    assert longer.asks(answers) is False


@given(
    st.lists(st.sampled_from("456"), min_size=3, max_size=3),
    st.floats(-200, 200),
    st.floats(0, 200),
)
def test_a_higher_rate_never_asks_more(texts: list[str], rate: float, more: float) -> None:
    low, high = replace(GATE, quality_per_usd=rate), replace(GATE, quality_per_usd=rate + more)

    assert low.asks(drawn(*texts)) >= high.asks(drawn(*texts))


@pytest.mark.parametrize(
    "missing",
    [failed(2), Candidate(2, "small", "4", None, Usage(), CANCELLED, None)],
    ids=["failed", "cut"],
)
def test_a_gate_is_not_convinced_by_fewer_answers(missing: Candidate) -> None:
    lax = replace(GATE, quality_per_usd=1e6)

    assert lax.asks([*drawn("4", "4"), missing])
    assert lax.asks([failed(0), failed(1), failed(2)])
    assert not lax.asks(drawn("4", "4", "4"))


def test_after_a_gate_the_reference_wins_whatever_the_rewards() -> None:
    good = drawn("4", "5", reward=9.0)

    assert GATE.winner([*good, of_reference(2)]) == of_reference(2)
    assert GATE.winner([*good, of_reference(2, reward=-9.0)]) == of_reference(2, reward=-9.0)


def test_if_the_reference_fails_the_best_of_the_others_wins() -> None:
    worse, better = drawn("4", reward=1.0)[0], replace(drawn("5", reward=2.0)[0], index=1)

    for escalation in (GATE, FLOOR):
        assert escalation.winner([worse, better, failed(2, "large")]) == better
        assert escalation.winner([failed(0), failed(1, "large")]) is None


# The floor


@pytest.mark.parametrize(
    ("candidates", "asked"),
    [
        (drawn("4", reward=-0.6), True),
        (drawn("4", reward=-0.5), False),
        ([*drawn("4", reward=-0.6), replace(drawn("5", reward=0.0)[0], index=1)], False),
        (drawn("4", reward=None), False),
        ([failed(0)], False),
        ([*drawn("4", reward=-0.6), failed(1)], True),
    ],
)
def test_a_floor_asks_where_the_best_reward_is_below_it(
    candidates: list[Candidate], asked: bool
) -> None:
    assert FLOOR.asks(candidates) is asked


def test_after_a_floor_the_best_reward_wins() -> None:
    answers = drawn("4", reward=-0.6)

    assert FLOOR.winner([*answers, of_reference(1, reward=-0.7)]) == answers[0]
    assert FLOOR.winner([*answers, of_reference(1, reward=0.7)]) == of_reference(1, reward=0.7)


@pytest.mark.parametrize("escalation", [GATE, FLOOR])
@given(order=st.permutations(range(3)))
def test_the_order_of_finishing_does_not_matter(escalation: Escalation, order: list[int]) -> None:
    answers = [*drawn("4", "4", "5", reward=-0.6)]
    mixed = [answers[i] for i in order]

    assert escalation.asks(mixed) == escalation.asks(answers)
    assert escalation.winner(mixed) == escalation.winner(answers)


# Over a real channel


THREE = pb.Arm(model="small", samples=3)
ESCALATE = pb.Execution(escalate=True)


@pytest.fixture
def settings(tmp_path: Path, upstream: Upstream) -> Settings:
    """The tiny bundle with a gate for small x 3, its pool served by the scriptable upstream."""
    return gated(tmp_path, upstream)


def gated(directory: Path, upstream: Upstream, *models: str) -> Settings:
    served = served_at(upstream.url, *(models or ("small", "medium", "large")), max_retries=0)
    server = Server(listen="127.0.0.1:0", drain_timeout=5)
    bundle = tiny.write(directory, gates=[tiny.GATE])
    return served.model_copy(update={"bundle": bundle, "server": server})


def by_model(*of_small: str, large: str | None = "9") -> Any:
    """A script: small's answers in turn, and large's; None fails. Answers have 5 tokens."""
    left = iter(of_small)

    async def script(call: Call) -> AsyncIterator[Chunk]:
        answer = large if call.body["model"] == "large" else next(left)
        if answer is None or answer == "fails":
            yield {"error": {"message": "no luck", "code": 400}}
            return
        yield text(answer)
        yield finish()
        yield usage(10, 5)

    return script


async def generate(
    stub: "RoutingServiceAsyncStub",
    prompt: str = "word1",
    arm: pb.Arm | None = THREE,
    execution: pb.Execution = ESCALATE,
    **policy: Any,
) -> tuple[pb.RouteResponse, list[pb.Candidate], pb.Result]:
    request = pb.GenerateRequest(
        request=pb.RouteRequest(prompt=prompt, policy=pb.RoutingPolicy(**policy)),
        execution=execution,
        arm=arm,
    )
    events = [event async for event in stub.Generate(request)]
    candidates = [event.candidate for event in events if event.HasField("candidate")]
    return events[0].decision, candidates, events[-1].result


def asked(upstream: Upstream) -> list[str]:
    return [call.body["model"] for call in upstream.calls]


async def test_answers_that_agree_spare_the_reference(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    """Even where every reward is below the floor: the gate decides instead."""
    upstream.scripts = [by_model("bad", "<answer>bad</answer>", "Bad.")]

    _, candidates, result = await generate(stub)

    assert asked(upstream) == ["small"] * 3
    assert {candidate.reward for candidate in candidates} == {-1}
    assert (result.escalated, result.model) == (False, "small")
    assert result.cost_usd == pytest.approx(3 * (10 * 0.1 + 5 * 0.5) / 1e6)


async def test_answers_that_disagree_go_to_the_reference_and_its_answer_is_given(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    upstream.scripts = [by_model("good", "good good", "good word1", large="bad")]

    decision, candidates, result = await generate(stub)

    assert asked(upstream) == ["small", "small", "small", "large"]
    assert (decision.arm.model, decision.arm.samples) == ("small", 3)
    assert [candidate.HasField("reward") for candidate in candidates] == [True, True, True, False]
    assert (result.escalated, result.model, result.text) == (True, "large", "bad")
    assert result.candidate == 3
    assert result.usage.output_tokens == 20
    assert result.cost_usd == pytest.approx((3 * (10 * 0.1 + 5 * 0.5) + 10 * 3 + 5 * 15) / 1e6)


async def test_a_missing_answer_goes_to_the_reference(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    upstream.scripts = [by_model("good", "fails", "good")]

    _, candidates, result = await generate(stub)

    assert sum(candidate.HasField("error") for candidate in candidates) == 1
    assert (result.escalated, result.text) == (True, "9")


async def test_if_all_fail_the_reference_answers(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    upstream.scripts = [by_model("fails", "fails", "fails")]

    _, _, result = await generate(stub)

    assert (result.escalated, result.text) == (True, "9")


async def test_if_the_reference_fails_the_best_of_the_others_is_given(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    upstream.scripts = [by_model("bad", "good good", "good", large=None)]

    _, candidates, result = await generate(stub)

    assert candidates[-1].model == "large"
    assert candidates[-1].HasField("error")
    assert (result.escalated, result.model, result.text) == (True, "small", "good good")


@pytest.mark.parametrize(
    ("policy", "rate", "answers", "escalated"),
    [
        ({}, 20, ["1", "2", "3"], True),
        ({"match_threshold": 0.0}, 20, ["1", "2", "3"], True),
        ({"max_quality_drop": 0.1}, 100, ["1", "2", "3"], False),
        ({"min_cost_saving": 0.5}, 100, ["1", "2", "3"], False),
        ({}, 20, ["1", "1", "1"], False),
        ({"max_quality_drop": 0.01}, -20, ["1", "1", "1"], True),
    ],
)
async def test_a_target_picks_the_gates_rate(
    stub: "RoutingServiceAsyncStub",
    upstream: Upstream,
    policy: dict[str, Any],
    rate: float,
    answers: list[str],
    escalated: bool,
) -> None:
    upstream.scripts = [by_model(*answers)]

    decision, _, result = await generate(stub, **policy)

    assert result.escalated is escalated
    assert decision.quality_per_usd == rate


async def test_a_routed_arm_has_its_gate_too(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    """The threshold is the bundle's, the rate the gate's."""
    upstream.scripts = [by_model("1", "2", "3", "4", "5", "6")]

    strict, _, asked_as_well = await generate(stub, arm=None, match_threshold=0.45)
    lax, _, taken = await generate(stub, "bad", arm=None, max_quality_drop=0.2)

    assert strict.arm.samples == lax.arm.samples == 3
    assert (strict.match_threshold, lax.match_threshold) == (0.45, 0.2)
    assert (asked_as_well.escalated, taken.escalated) == (True, False)


async def test_more_than_the_gate_was_measured_to_save_is_refused(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    """The bundle's own curve saves up to 0.9, and takes small x 3 for this prompt."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await generate(stub, "bad", arm=THREE, min_cost_saving=0.7)

    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "request.policy.min_cost_saving" in (failure.value.details() or "")
    assert "0.600" in (failure.value.details() or "")
    assert not upstream.calls, "nothing was bought"

    upstream.scripts = [by_model("1", "2", "3")]
    _, _, result = await generate(stub, "bad", THREE, pb.Execution(), min_cost_saving=0.7)
    assert not result.escalated, "not asked for, so the gate's curve doesn't matter"


async def test_a_saving_of_routed_prompts_is_not_the_gates(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    """Which arm a prompt is routed to must not decide whether the request is refused."""
    upstream.scripts = [by_model("1", "2", "3", "4")]

    decision, _, result = await generate(stub, "bad", arm=None, min_cost_saving=0.7)

    assert decision.arm.samples == 3
    assert result.escalated, "by the gate's default rate"


async def test_an_early_stop_leaves_a_gate_all_its_answers(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    upstream.scripts = [says("good good"), says("1", delay=0.2), says("2", delay=0.2), says("9")]
    execution = pb.Execution(escalate=True, early_stop=True)

    _, _, result = await generate(stub, execution=execution)

    assert (result.candidates_cancelled, result.text) == (0, "9")


async def test_an_arm_without_a_name_is_refused_as_ever(stub: "RoutingServiceAsyncStub") -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await generate(stub, arm=pb.Arm(samples=3))

    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("answer", "escalated"), [("bad", True), ("good", False)])
async def test_an_arm_without_a_gate_has_the_floor(
    stub: "RoutingServiceAsyncStub", upstream: Upstream, answer: str, escalated: bool
) -> None:
    upstream.scripts = [by_model(answer, answer + " word1", large="bad bad")]

    _, candidates, result = await generate(stub, arm=pb.Arm(model="small", samples=2))

    assert result.escalated is escalated
    assert result.model == "small", "the reference's reward is lower"
    assert all(candidate.HasField("reward") for candidate in candidates)


async def test_the_reference_is_not_asked_after_itself(
    stub: "RoutingServiceAsyncStub", upstream: Upstream
) -> None:
    upstream.scripts = [says("bad")]

    _, _, result = await generate(stub, arm=pb.Arm(model="large", samples=1))

    assert (result.escalated, asked(upstream)) == (False, ["large"])


async def test_a_reference_that_nobody_serves_is_not_asked(
    tmp_path: Path, upstream: Upstream
) -> None:
    upstream.scripts = [by_model("1", "2", "3")]
    async with calling(gated(tmp_path, upstream, "small")) as stub:
        decision, _, result = await generate(stub, min_cost_saving=0.7)

    assert (result.escalated, len(upstream.calls)) == (False, 3)
    assert decision.match_threshold == 0.2, "by the bundle's curve"


async def test_without_a_floor_only_a_gate_escalates(tmp_path: Path, upstream: Upstream) -> None:
    settings = gated(tmp_path, upstream)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["reward"]["escalate_reward"] = None
    await asyncio.to_thread((tmp_path / MANIFEST).write_text, json.dumps(manifest))
    upstream.scripts = [by_model("bad", "bad bad", "1", "2", "3")]
    async with calling(settings) as stub:
        _, _, two = await generate(stub, arm=pb.Arm(model="small", samples=2))
        _, _, three = await generate(stub)

    assert (two.escalated, three.escalated) == (False, True)


@asynccontextmanager
async def calling(settings: Settings) -> "AsyncIterator[RoutingServiceAsyncStub]":
    """A server of other settings than the fixture's."""
    async with (
        serving(settings) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        yield routing_pb2_grpc.RoutingServiceStub(channel)


async def test_gates_are_listed(stub: "RoutingServiceAsyncStub") -> None:
    listed = await stub.ListArms(pb.ListArmsRequest())

    [gate] = listed.gates
    assert (gate.model, gate.samples) == ("small", 3)
    assert [each.quality_per_usd for each in gate.trade_offs] == [-20, 20, 100]
    assert gate.trade_offs[1].cost_saving == 0.4
    assert gate.default_quality_per_usd == 20
    assert not listed.trade_offs, "the gate's are not the bundle's"
