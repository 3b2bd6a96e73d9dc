"""Prompts asked again: the same decision, without the network."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.config import Routing, Settings
from bestroute.prompt import Prompt
from bestroute.recent import Recent
from bestroute.router import open_router
from bestroute.target import Policy
from bestroute.v1 import routing_pb2 as pb

if TYPE_CHECKING:  # exists in the stub file only
    from bestroute.v1.routing_pb2_grpc import RoutingServiceAsyncStub


@given(st.lists(st.sampled_from("abcdef"), max_size=60), st.integers(0, 5))
def test_the_texts_asked_for_last_are_kept(texts: Sequence[str], entries: int) -> None:
    recent = Recent[str](entries)
    latest: list[str] = []

    for text in texts:
        key = recent.key(text)
        assert recent.get(key) == (text if text in latest else None)
        recent.put(key, text)
        latest = [*(each for each in latest if each != text), text][-entries:] if entries else []
        assert len(recent) == len(latest)

    assert recent.hits + recent.misses == len(texts)


async def test_a_prompt_asked_again_gets_the_same_decision(
    stub: "RoutingServiceAsyncStub",
) -> None:
    """Under another policy, too: what is remembered is what the network says, not the choice."""
    asked = pb.RouteRequest(prompt="easy word1", explain=True)
    first = await stub.Route(asked)
    again = await stub.Route(asked)
    asked.policy.allowed_models.append("medium")
    otherwise = await stub.Route(asked)

    assert first.timing.batch_size == 1
    assert again.timing.batch_size == otherwise.timing.batch_size == 0
    again.timing.CopyFrom(first.timing)
    assert again == first
    assert otherwise.arm.model == "medium"
    assert first.arm.model == "small"


@pytest.mark.parametrize(("entries", "sizes"), [(0, [1, 1]), (1, [1, 0])])
async def test_remembering_can_be_turned_off(
    settings: Settings, entries: int, sizes: list[int]
) -> None:
    routing = Routing(cache_entries=entries)

    async with open_router(settings.model_copy(update={"routing": routing})) as router:
        timings = [(await router.decide(Prompt.of("word1"), Policy())).timing for _ in range(2)]

    assert [timing.batch_size for timing in timings if timing] == sizes


async def test_what_the_network_failed_at_is_not_remembered(
    stub: "RoutingServiceAsyncStub",
) -> None:
    asked = pb.RouteRequest(prompt="broken")

    responses = [await stub.Route(asked) for _ in range(2)]

    failed = pb.FALLBACK_REASON_ROUTER_FAILED
    assert [response.fallback_reason for response in responses] == [failed, failed]
