"""Conversations over a real channel: who stays, who changes, and why."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from bestroute.app import Running, serving
from bestroute.cli import main
from bestroute.client import Client, SyncClient
from bestroute.config import Operations, Settings
from bestroute.errors import InvalidRequest, ProviderFailed
from bestroute.v1 import routing_pb2 as pb
from bestroute.v1 import routing_pb2_grpc
from tests import tiny
from tests.collector import receiving
from tests.generating import DOWN, POOL, answers, asked, by_model, told
from tests.scrapes import scraped
from tests.scripted import ANSWER, Context, scripted
from tests.upstreams import Wire, events, finish, served_at, streamed, text

PLAIN, HARD = "word1", "worse worse worse"
"""Alone, medium x 1 is worth most for the one and the reference, large, for the other."""
TOOLS = [("assistant", "word5"), ("tool", "word6 word7")]


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in said]


def why(decision: pb.RouteResponse) -> str:
    return pb.SessionReason.Name(decision.session.reason).removeprefix("SESSION_REASON_")


def with_sessions(settings: Settings, bundle: Path, **sessions: Any) -> Settings:
    given = {**settings.model_dump(), "bundle": bundle, "sessions": sessions}
    return Settings.model_validate(given)


@pytest.fixture
def settings(settings: Settings, trading_bundle: Path) -> Settings:
    return with_sessions(settings, trading_bundle)


@pytest.fixture
async def client(server: Running) -> AsyncIterator[Client]:
    async with Client(server.address, timeout=30) as client:
        yield client


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[tuple[Running, Client]]:
    async with serving(settings) as server, Client(server.address, timeout=30) as client:
        yield server, client


def network_runs(server: Running) -> int:
    """Inputs that the router's network was run for."""
    return server.live.router.networks()["router"].counts.items


# Why a turn's model is what it is


async def test_a_request_without_a_session_has_no_turn(client: Client) -> None:
    decision = await client.route(PLAIN)

    assert not decision.HasField("session")
    assert not (await client.route(PLAIN, sticky=False)).HasField("session")


async def test_the_first_turn_is_new_and_the_next_stays_where_that_is_worth_most(
    client: Client,
) -> None:
    first = await client.route(PLAIN, session="s")
    second = await client.route("word2 word3", session="s")
    other = await client.route(PLAIN, session="t")

    assert first.session == pb.SessionTurn(turn=1, reason=pb.SESSION_REASON_NEW)
    assert second.session == pb.SessionTurn(
        turn=2,
        previous_model="medium",
        reason=pb.SESSION_REASON_WORTH_MOST,
        cached_tokens=first.prompt_tokens,
    )
    assert other.session == first.session
    assert first.arm.model == second.arm.model == "medium"


async def test_a_harder_turn_changes_at_once_and_an_easier_one_by_and_by(client: Client) -> None:
    """The last is what "commit it" is: alone it would be medium's."""
    found = [await client.route(prompt, session="s") for prompt in (PLAIN, HARD, "word2", "word3")]

    assert [decision.arm.model for decision in found] == ["medium", "large", "large", "medium"]
    assert [why(d) for d in found] == ["NEW", "WORTH_CHANGING", "WORTH_MOST", "WORTH_CHANGING"]
    assert [d.session.changed for d in found] == [False, True, False, True]
    assert found[1].session.previous_model == "medium"
    assert (await client.route("word2")).arm.model == "medium"


async def test_without_momentum_each_turn_speaks_for_itself(
    settings: Settings, trading_bundle: Path
) -> None:
    async with running(with_sessions(settings, trading_bundle, momentum=0)) as (_, client):
        models = [(await client.route(each, session="s")).arm.model for each in (HARD, PLAIN)]

    assert models == ["large", "medium"]


async def test_momentum_is_told_where_a_decision_is_explained(client: Client) -> None:
    await client.route(HARD, session="s")
    eased = await client.route("long", session="s", explain=True)
    alone = await client.route("long", explain=True)

    for now, before in zip(eased.arms, alone.arms, strict=True):
        assert now.expected_gain == pytest.approx(before.expected_gain - 0.15, abs=1e-6)
        assert now.expected_output_tokens == before.expected_output_tokens
        assert now.match_probability == pytest.approx(before.match_probability, abs=1e-6)


async def test_a_sticky_session_stays_however_hard_the_turn(client: Client) -> None:
    first = await client.route(PLAIN, session="s", sticky=True)
    second = await client.route(HARD, session="s", sticky=True)
    free = await client.route(HARD, session="s")

    assert first.arm.model == second.arm.model == "medium"
    assert (why(second), second.session.changed) == ("STICKY", False)
    assert second.fallback_reason == pb.FALLBACK_REASON_UNSPECIFIED
    assert (free.arm.model, why(free)) == ("large", "WORTH_CHANGING")


async def test_a_sticky_session_stays_with_the_reference_too(client: Client) -> None:
    await client.route(HARD, session="s", sticky=True)
    second = await client.route("better better", session="s", sticky=True)

    assert (second.arm.model, why(second)) == ("large", "STICKY")


async def test_what_the_policy_forbids_is_left(client: Client) -> None:
    await client.route(PLAIN, session="s", sticky=True)
    small = await client.route(PLAIN, session="s", sticky=True, allowed_models=["small"])
    await client.route(HARD, session="t", sticky=True)
    hard = await client.route(HARD, session="t", sticky=True, allowed_models=["medium"])
    other = await client.route("better " * 5, session="t", sticky=True, allowed_models=["medium"])

    assert (hard.arm.model, why(hard)) == ("large", "WORTH_MOST"), "always allowed, but not held"
    for decision, before in ((small, "medium"), (other, "large")):
        assert (why(decision), decision.session.changed) == ("NOT_ALLOWED", True)
        assert decision.session.previous_model == before
    assert (small.arm.model, other.arm.model) == ("small", "medium")


async def test_what_costs_too_much_is_left(client: Client) -> None:
    await client.route(HARD, session="s", sticky=True)
    cheap = await client.route(PLAIN, session="s", sticky=True, max_cost_usd=0.001)

    assert (cheap.arm.model, why(cheap)) == ("medium", "NOT_ALLOWED")


async def test_a_model_that_is_switched_off_is_left(server: Running, client: Client) -> None:
    await client.route(PLAIN, session="s", sticky=True)
    server.live.router.operate(Operations(disabled_arms=("medium",)))
    user = await client.route(PLAIN, session="s", sticky=True)
    tools = await client.route(turns(("user", PLAIN), *TOOLS), session="s")

    assert user.arm.model != "medium"
    assert (why(user), user.session.changed) == ("NOT_ALLOWED", True)
    assert (tools.arm.model, why(tools)) == (user.arm.model, "TOOL_TURN")


async def test_where_the_router_fails_a_sticky_session_stays(client: Client) -> None:
    for name, sticky in (("s", True), ("t", False)):
        await client.route(PLAIN, session=name, sticky=sticky)
        failed = await client.route("broken", session=name, sticky=sticky)

        assert failed.fallback_reason == pb.FALLBACK_REASON_ROUTER_FAILED
        assert failed.arm.model == ("medium" if sticky else "large")
        assert why(failed) == ("STICKY" if sticky else "FALLBACK")


# Turns of tools


async def test_a_turn_of_tools_keeps_the_decision_and_runs_no_network(
    server: Running, client: Client
) -> None:
    said = [("system", "word9"), ("user", HARD), ("assistant", "word2"), ("user", PLAIN)]
    first = await client.route(turns(*said), session="s")
    runs = network_runs(server)
    loop = []
    for _ in range(3):
        said += TOOLS
        loop.append(await client.route(turns(*said), session="s"))

    assert network_runs(server) == runs
    assert [why(decision) for decision in loop] == ["TOOL_TURN"] * 3
    assert [decision.session.turn for decision in loop] == [2, 3, 4]
    for decision in loop:
        assert (decision.arm.model, decision.arm.samples) == (first.arm.model, first.arm.samples)
        assert decision.timing.batch_size == 0
    sizes = [decision.prompt_tokens for decision in (first, *loop)]
    assert sizes == [sizes[0] + 7 * step for step in range(4)], "what tools say is paid for"


async def test_a_turn_of_tools_keeps_it_whatever_the_turns_before_look_like_by_now(
    server: Running, client: Client
) -> None:
    """Agents shorten a conversation under way."""
    said = [("user", HARD), ("assistant", "word2"), ("user", PLAIN)]
    first = await client.route(turns(*said), session="s")
    runs = network_runs(server)
    shortened = await client.route(turns(("user", PLAIN), *TOOLS), session="s")

    assert (shortened.arm.model, why(shortened)) == (first.arm.model, "TOOL_TURN")
    assert network_runs(server) == runs


async def test_tools_that_come_with_a_new_question_are_no_turn_of_tools(client: Client) -> None:
    await client.route(PLAIN, session="s")
    hard = await client.route(turns(("user", HARD), ("tool", "word6")), session="s")

    assert (hard.arm.model, why(hard)) == ("large", "WORTH_CHANGING")


async def test_without_a_session_a_turn_of_tools_reads_nothing_new(
    server: Running, client: Client
) -> None:
    first = await client.route(PLAIN, explain=True)
    runs = network_runs(server)
    again = await client.route(turns(("user", PLAIN), *TOOLS), explain=True)

    assert network_runs(server) == runs
    assert again.timing.batch_size == 0
    assert again.prompt_tokens > first.prompt_tokens
    assert [a.match_probability for a in again.arms] == [a.match_probability for a in first.arms]


async def test_a_turn_of_tools_gives_way_to_limits(client: Client) -> None:
    """medium x 2 is worth most here."""
    first = await client.route("word1", session="s", max_quality_drop=0.005)
    tools = turns(("user", "word1"), *TOOLS)
    kept = await client.route(tools, session="s")
    fewer = await client.route(tools, session="s", max_samples=1)

    assert (first.arm.model, first.arm.samples) == ("medium", 2)
    assert (kept.arm.model, kept.arm.samples) == ("medium", 2)
    assert (fewer.arm.model, fewer.arm.samples, why(fewer)) == ("medium", 1, "TOOL_TURN")


# What is read of a conversation


async def test_the_instructions_and_the_last_question_decide_in_a_long_conversation(
    client: Client,
) -> None:
    filler = [
        (role, " ".join(["better"] * 10)) for _ in range(20) for role in ("user", "assistant")
    ]
    told_hard = [("system", " ".join(["worse"] * 12)), *filler, ("user", PLAIN)]
    asks_hard = [("system", "word9"), *filler, ("user", "worse " * 20)]
    easy = await client.route(turns(*filler, ("user", PLAIN)), explain=True)
    system = await client.route(turns(*told_hard), explain=True)
    question = await client.route(turns(*asks_hard), explain=True)

    assert easy.truncated
    assert system.truncated
    assert question.truncated
    assert easy.prompt_tokens > 400
    gains = [each.arms[0].expected_gain for each in (easy, system, question)]
    assert gains[0] > 1.5
    assert gains[1] < gains[0] - 1
    assert gains[2] < -1


async def test_what_follows_the_question_is_not_read(client: Client) -> None:
    alone = await client.route(turns(("system", "word9"), ("user", PLAIN)), explain=True)
    after = await client.route(
        turns(("system", "word9"), ("user", PLAIN), ("assistant", HARD), ("tool", HARD)),
        explain=True,
    )

    assert [a.expected_gain for a in after.arms] == [a.expected_gain for a in alone.arms]
    assert not after.truncated


# Whose sessions, and for how long


async def test_sessions_of_other_callers_are_others(
    settings: Settings, trading_bundle: Path
) -> None:
    given = with_sessions(settings, trading_bundle).model_dump()
    known = Settings.model_validate({**given, "security": {"caller_metadata": "x-caller"}})
    request = pb.RouteRequest(prompt=PLAIN, session=pb.Session(id="s"))
    async with (
        serving(known) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        route = routing_pb2_grpc.RoutingServiceStub(channel).Route
        seen = [
            (await route(request, metadata=[("x-caller", name)])).session.turn
            for name in ("alice", "alice", "bob", "alice")
        ]

    assert seen == [1, 2, 1, 3]


async def test_sessions_are_forgotten_when_idle_and_the_oldest_first(
    settings: Settings, trading_bundle: Path
) -> None:
    idle = with_sessions(settings, trading_bundle, idle_seconds=0.2)
    few = with_sessions(settings, trading_bundle, max_sessions=2)

    async def turn(client: Client, name: str) -> int:
        return (await client.route(PLAIN, session=name)).session.turn

    async with running(idle) as (_, client):
        first = await turn(client, "s")
        await asyncio.sleep(0.4)
        later = await turn(client, "s")
    async with running(few) as (_, client):
        seen = [await turn(client, name) for name in ("s", "t", "s", "u", "s", "t")]

    assert (first, later) == (1, 1)
    assert seen == [1, 1, 2, 1, 3, 1]


async def test_turns_at_the_same_time_are_all_answered_and_counted(client: Client) -> None:
    await client.route(PLAIN, session="s")
    found = await asyncio.gather(
        *(client.route(f"word{i} word{i}", session="s", sticky=True) for i in range(20))
    )
    last = await client.route(PLAIN, session="s")

    assert {decision.arm.model for decision in found} == {"medium"}
    assert last.session.turn == 22


async def test_a_session_outlasts_a_reload(
    settings: Settings, server: Running, tmp_path: Path
) -> None:
    """Another bundle's predictions don't mix with this one's; the model stays."""
    async with Client(server.address, timeout=30) as client:
        await client.route(HARD, session="s")
        said = turns(("user", HARD), *TOOLS)
        other = settings.model_copy(update={"bundle": tiny.write(tmp_path, version="other")})
        await server.live.replace(other)
        tools = await client.route(said, session="s")
        free = await client.route("easy", session="s", explain=True)
        stateless = await client.route("easy", explain=True)

    assert (tools.bundle_version, tools.session.turn, why(tools)) == ("other", 2, "TOOL_TURN")
    assert tools.arm.model == "large"
    assert free.arm.model == "small"
    assert [a.match_probability for a in free.arms] == pytest.approx(
        [
            min(a.match_probability, 0.5 * (a.match_probability + b))
            for a, b in zip(stateless.arms, tiny.probabilities(0), strict=True)
        ],
        abs=1e-6,
    )


# What it costs


def priced(wire: Wire, settings: Settings, bundle: Path, **sessions: Any) -> Settings:
    """A server whose models cost a tenth where they are cached; of small nothing is known."""
    served = served_at(wire.url, *POOL, max_retries=0, breaker_failures=1).model_dump()
    for model in tiny.MODELS:
        served["models"][model.name]["price"] = {
            "input_usd_per_mtok": model.input_usd_per_mtok,
            "output_usd_per_mtok": model.output_usd_per_mtok,
            "cached_input_usd_per_mtok": (
                None if model.name == "small" else model.input_usd_per_mtok / 10
            ),
        }
    given = with_sessions(settings, bundle, **sessions).model_dump()
    return Settings.model_validate(
        {**given, "models": served["models"], "providers": served["providers"]}
    )


async def test_what_is_cached_is_priced_so_and_its_loss_is_the_cost_of_switching(
    wire: Wire, settings: Settings, trading_bundle: Path
) -> None:
    long = "word1 " * 20_000
    async with running(priced(wire, settings, trading_bundle, momentum=0)) as (_, client):
        alone = await client.route(long, explain=True)
        cold = await client.route(long + "word2", session="t", explain=True)
        await client.route("word3", session="s", expected_output_tokens=1)
        again = await client.route(long, session="s", allowed_models=["medium"])
        warm = await client.route(long + "word2", session="s", explain=True)
        listed = await client.list_arms()

    assert again.arm.model == "medium"
    assert (alone.arm.model, cold.arm.model) == ("small", "small")
    assert (warm.arm.model, why(warm)) == ("medium", "WORTH_MOST")
    assert warm.session.cached_tokens == 20_000
    for now, before in zip(warm.arms, cold.arms, strict=True):
        saved = before.estimated_cost_usd - now.estimated_cost_usd
        expected = now.samples * 20_000 * 0.45 / 1e6 if now.model == "medium" else 0.0
        assert saved == pytest.approx(expected, abs=1e-12)
    cached = {model.name: model.cached_input_usd_per_mtok for model in listed.models}
    assert cached == pytest.approx({"small": 0.1, "medium": 0.05, "large": 0.3})


async def test_no_more_is_cached_than_is_asked(
    wire: Wire, settings: Settings, trading_bundle: Path
) -> None:
    """An agent may shorten its conversation."""
    async with running(priced(wire, settings, trading_bundle)) as (_, client):
        await client.route("word1 " * 1000, session="s", allowed_models=["medium"])
        short = await client.route("word1 " * 100, session="s", explain=True)
        alone = await client.route("word1 " * 100, explain=True)

    assert short.session.cached_tokens == 100
    saved = alone.arms[2].estimated_cost_usd - short.arms[2].estimated_cost_usd
    assert saved == pytest.approx(100 * 0.45 / 1e6, abs=1e-12)


async def test_a_cache_that_has_cooled_saves_nothing(
    wire: Wire, settings: Settings, trading_bundle: Path
) -> None:
    cools = priced(wire, settings, trading_bundle, cache_seconds=0.1)
    async with running(cools) as (_, client):
        first = await client.route(PLAIN, session="s", explain=True)
        await asyncio.sleep(0.3)
        second = await client.route(PLAIN, session="s", explain=True)

    assert second.session.cached_tokens == 0
    assert second.arms == first.arms


def used(prompt: int, completion: int, cached: int) -> list[bytes | float]:
    """An answer whose provider had some of its prompt in its cache."""
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return streamed(events(text("yes"), finish(), {"choices": [], "usage": usage}))


async def test_what_the_provider_had_cached_is_billed_so(
    wire: Wire, settings: Settings, trading_bundle: Path
) -> None:
    by_model(wire, medium=used(1000, 5, 800), large=used(1000, 5, 800), small=used(10, 5, 8))
    async with running(priced(wire, settings, trading_bundle)) as (_, client):
        found = {
            model: (await told(client, PLAIN, model=model))[-1].result
            for model in ("small", "medium", "large")
        }

    for name, fresh, cached, price in (("medium", 200, 800, 0.5), ("large", 200, 800, 3.0)):
        result = found[name]
        assert (result.usage.input_tokens, result.usage.cached_tokens) == (1000, 800)
        expected = (fresh * price + cached * price / 10 + 5 * 5 * price) / 1e6
        assert result.cost_usd == pytest.approx(expected, abs=1e-15)
    assert found["small"].usage.cached_tokens == 8
    assert found["small"].cost_usd == pytest.approx((10 * 0.1 + 5 * 0.5) / 1e6, abs=1e-15)


# Generate


async def test_a_generate_goes_on_with_the_model_that_answered(
    wire: Wire, settings: Settings, trading_bundle: Path
) -> None:
    """And with its answer, which that model's provider has in its cache."""
    by_model(wire, small=DOWN, medium=DOWN, large=answers("yes", tokens=7))
    configured = priced(wire, settings, trading_bundle, momentum=0)
    async with running(configured) as (_, client):
        first = await told(client, PLAIN, session="s", sticky=True)
        by_model(wire, small=answers("no"), medium=answers("no"), large=answers("yes"))
        said = turns(("user", PLAIN), ("assistant", "yes " * 7), ("user", "word2"))
        second = await told(client, said, session="s", sticky=True)

    decision = first[0].decision
    assert (decision.arm.model, why(decision)) == ("medium", "NEW")
    assert first[-1].result.model == "large"
    decision = second[0].decision
    assert (decision.arm.model, why(decision)) == ("large", "STICKY")
    assert decision.session.previous_model == "large"
    assert decision.session.cached_tokens == first[0].decision.prompt_tokens + 7
    assert second[-1].result.model == "large"


async def test_a_generate_that_fails_leaves_the_session_as_it_was(
    wire: Wire, settings: Settings, trading_bundle: Path
) -> None:
    by_model(wire, medium=answers("yes"))
    configured = priced(wire, settings, trading_bundle)
    async with running(configured) as (_, client):
        await told(client, PLAIN, session="s")
        by_model(wire, small=DOWN, medium=DOWN, large=DOWN)
        for name in ("s", "t"):
            with pytest.raises(ProviderFailed):
                await told(client, HARD, session=name)
        old = await client.route("word2", session="s")
        new = await client.route("word2", session="t")

    assert (old.session.turn, old.session.previous_model) == (2, "medium")
    assert old.arm.model == "medium", "a hard turn that nobody answered weighs nothing"
    assert (new.session.turn, why(new)) == (1, "NEW")


async def test_a_model_whose_breaker_is_open_is_left_by_generate_alone(
    wire: Wire, settings: Settings, trading_bundle: Path
) -> None:
    by_model(wire, medium=answers("yes"))
    async with running(priced(wire, settings, trading_bundle)) as (_, client):
        await told(client, PLAIN, session="s", sticky=True)
        by_model(wire, small=answers("no"), medium=DOWN, large=answers("no"))
        await told(client, PLAIN, model="medium", samples=1)
        route = await client.route(PLAIN, session="s", sticky=True)
        generate = (await told(client, PLAIN, session="s", sticky=True))[0].decision

    assert (route.arm.model, why(route)) == ("medium", "STICKY")
    assert generate.arm.model != "medium"
    assert (why(generate), generate.session.changed) == ("NOT_ALLOWED", True)


async def test_an_arm_that_the_request_names_runs_and_is_remembered(
    wire: Wire, settings: Settings, trading_bundle: Path
) -> None:
    by_model(wire, small=answers("1"), medium=answers("2"), large=answers("3"))
    async with running(priced(wire, settings, trading_bundle)) as (_, client):
        first = await told(client, PLAIN, session="s", model="small")
        second = await told(client, PLAIN, session="s", sticky=True, model="large")
        tools = await told(client, turns(("user", PLAIN), *TOOLS), session="s")
        await client.route(PLAIN, session="t")
        await told(client, HARD, session="t", model="small")
        read = await client.route(HARD, session="t")

    assert read.arm.model == "large", "as what it is, once the router reads it"
    assert why(first[0].decision) == "NEW"
    assert why(second[0].decision) == "REQUESTED"
    assert second[0].decision.session.changed
    assert (tools[0].decision.arm.model, why(tools[0].decision)) == ("large", "TOOL_TURN")
    assert asked(wire) == ["small", "large", "large", "small"]


# Every way in


async def test_a_stream_has_sessions_and_says_which_id_is_wrong(client: Client) -> None:
    async with client.stream() as stream:
        first = await stream.route(PLAIN, session="s")
        second = await stream.route(PLAIN, session="s", sticky=True)
        with pytest.raises(InvalidRequest) as refused:
            await stream.route(PLAIN, session="x" * 257)

    assert (first.session.turn, second.session.turn, why(second)) == (1, 2, "STICKY")
    assert refused.value.field == "request.session.id"


@pytest.mark.parametrize(
    "options", [{"session": ""}, {"session": "x" * 257}, {"session": "é" * 129}, {"sticky": True}]
)
async def test_an_id_has_1_to_256_bytes(client: Client, options: Mapping[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await client.route(PLAIN, **options)
    with pytest.raises(InvalidRequest) as inside:
        await told(client, PLAIN, **options)

    assert refused.value.field == "session.id"
    assert "must have 1 to 256 bytes" in str(refused.value)
    assert inside.value.field == "request.session.id"
    assert (await client.route(PLAIN, session="é" * 128)).session.turn == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [("chat-17.~_", "chat-17.~_"), ("a b%", "a%20b%25"), ("é\n", "%C3%A9%0A"), (None, None)],
)
async def test_a_mesh_can_tell_sessions_apart(name: str | None, said: str | None) -> None:
    """It sees metadata only."""
    seen: list[Any] = []

    async def route(_: pb.RouteRequest, context: Context) -> pb.RouteResponse:
        seen.append(dict(context.invocation_metadata() or ()).get("x-bestroute-session"))
        return ANSWER

    async def generate(
        _: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        seen.append(dict(context.invocation_metadata() or ()).get("x-bestroute-session"))
        yield pb.GenerateResponse(decision=ANSWER)

    options: dict[str, Any] = {} if name is None else {"session": name}
    async with scripted(Route=route, Generate=generate) as address, Client(address) as client:
        await client.route(PLAIN, **options)
        await told(client, PLAIN, **options)

    assert seen == [said, said]


async def test_turns_are_counted_by_reason(settings: Settings, trading_bundle: Path) -> None:
    given = with_sessions(settings, trading_bundle).model_dump()
    metered = Settings.model_validate({**given, "metrics": {"listen": "127.0.0.1:0"}})
    async with running(metered) as (server, client):
        for prompt in (PLAIN, HARD, HARD):
            await client.route(prompt, session="s")
        await client.route(PLAIN)
        scrape = await scraped(server)

    found = scrape.all("bestroute_session_turns_total")
    assert {tuple(sorted(labels)): count for labels, count in found.items()} == {
        (("changed", "false"), ("reason", "new")): 1,
        (("changed", "true"), ("reason", "worth_changing")): 1,
        (("changed", "false"), ("reason", "worth_most")): 1,
    }


async def test_a_trace_tells_of_the_turn(settings: Settings, trading_bundle: Path) -> None:
    given = with_sessions(settings, trading_bundle).model_dump()
    with receiving() as receiver:
        tracing = {"endpoint": receiver.url, "sample_ratio": 1.0}
        async with running(Settings.model_validate({**given, "tracing": tracing})) as (_, client):
            for prompt in (PLAIN, HARD):
                await client.route(prompt, session="s")
            await client.route(PLAIN)
        # By now all are sent: the server has ended.
        spans = receiver.named("bestroute.v1.RoutingService/Route")

    first, second, alone = (
        {
            name.removeprefix("bestroute.session."): value
            for name, value in span.attributes.items()
            if name.startswith("bestroute.session.")
        }
        for span in spans
    )
    assert (first["turn"], first["reason"], first["previous_model"]) == (1, "NEW", "")
    assert second == {
        "turn": 2,
        "previous_model": "medium",
        "changed": True,
        "reason": "WORTH_CHANGING",
        "cached_tokens": 1,
    }
    assert not alone


async def test_the_command_line_names_a_session_and_tells_of_it(
    server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    def route(*arguments: str) -> int:
        return main(["route", PLAIN, "--address", server.address, "--session", "s", *arguments])

    codes = [await asyncio.to_thread(route), await asyncio.to_thread(route, "--sticky")]
    shown = capsys.readouterr().out
    codes.append(await asyncio.to_thread(route, "--json"))
    turn = json.loads(capsys.readouterr().out)["session"]

    assert codes == [0, 0, 0]
    assert "turn 1, new" in shown
    assert "turn 2, stays: it is sticky; 1 token expected in its prompt cache" in shown
    assert (turn["turn"], turn["previous_model"]) == (3, "medium")


async def test_the_synchronous_client_has_sessions_too(server: Running) -> None:
    def both() -> Iterator[int]:
        with SyncClient(server.address, timeout=30) as client:
            yield client.route(PLAIN, session="s").session.turn
            with client.stream() as stream:
                yield stream.route(PLAIN, session="s", sticky=True).session.turn

    def found() -> Sequence[int]:
        return list(both())

    assert await asyncio.to_thread(found) == [1, 2]
