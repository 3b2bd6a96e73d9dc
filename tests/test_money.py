"""The bill is right to the cent, whatever goes wrong: beside an account of what was really sent."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from math import ceil
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bestroute.best_of_n import BestOfN, Event, FellBack, Result, Task
from bestroute.call import Call as Circumstances
from bestroute.candidate import Candidate
from bestroute.errors import ProviderFailed
from bestroute.escalation import ByReward
from bestroute.policy import InputBilling
from bestroute.pricing import ModelPrice, cost
from bestroute.prompt import Prompt
from bestroute.upstream.completion import Delta
from bestroute.upstream.providers import Providers, Sampling
from tests.upstreams import (
    Call,
    Chunk,
    Upstream,
    Wire,
    events,
    finish,
    hangs,
    refused,
    says,
    served_at,
    streamed,
    text,
    usage,
)

PROMPT = Prompt.of("What is 2 + 2?")
POOL = ("small", "medium", "large")
USD = {"small": (1.0, 3.0), "medium": (7.0, 11.0), "large": (13.0, 17.0)}
PRICES = {m: ModelPrice(*usd, InputBilling.PER_SAMPLE) for m, usd in USD.items()}


async def rewards(_: Prompt, answers: Sequence[str], __: object) -> Sequence[float]:
    """Shorter answers are better; some so bad that the reference is asked, some good enough."""
    return [1.0 / len(answer) for answer in answers]


def guess(characters: int) -> int:
    return ceil(characters / 4)


@dataclass
class Reply:
    """What the server sends, and the tokens that it has to be paid for."""

    wire: list[bytes | float]
    input_tokens: int
    output_tokens: int


WRONG: list[Any] = [0, -5, "12", None, True, 1.5, 10**15, [], {}]
"""Values of tokens that are none, or can't be."""


def reply(data: st.DataObject, choices: int) -> Reply:
    """Any reply, well or badly meant, of so many choices."""
    kind = data.draw(
        st.sampled_from(["well", "well", "silent", "wrong", "refused", "error", "cut"])
    )
    if kind == "refused":
        return Reply(refused(data.draw(st.sampled_from([400, 401, 429, 500, 503]))), 0, 0)
    texts = [data.draw(st.sampled_from(["", "x", "x" * 40, "x" * 400])) for _ in range(choices)]
    chunks = [text(part, i) for i, whole in enumerate(texts) for part in (whole[:7], whole[7:])]
    guessed = guess(len(PROMPT.text)), sum(guess(len(each)) for each in texts)
    if kind == "cut":
        kept = data.draw(st.integers(0, len(chunks)))
        shown = ["".join(_shown(chunks[:kept], i)) for i in range(choices)]
        body = events(*chunks[:kept]).removesuffix(b"data: [DONE]\n\n")
        return Reply(streamed(body), guessed[0], sum(guess(len(each)) for each in shown))
    if kind == "error":
        late = data.draw(st.booleans()) and any(texts)
        body = events(*(chunks if late else ()), {"error": {"message": "no", "code": 500}})
        return Reply(streamed(body), *(guessed if late else (0, 0)))
    chunks += [finish(i) for i in range(choices)]
    if kind == "silent":
        return Reply(streamed(events(*chunks)), *guessed)
    said = data.draw(st.integers(4, 90)), sum(guess(len(t)) for t in texts) + choices
    if kind == "wrong":
        statement: dict[str, Any] = usage(*said)["usage"]
        field = data.draw(st.sampled_from([*statement]))
        statement[field] = data.draw(st.sampled_from(WRONG))
        if statement["completion_tokens"] == 0 and not any(texts):
            statement["completion_tokens"] = None  # it would be right
        last = {"choices": [], "usage": data.draw(st.sampled_from([statement, "all", [1], 7]))}
        return Reply(streamed(events(*chunks, last)), *guessed)
    return Reply(streamed(events(*chunks, usage(*said))), *said)


def _shown(chunks: Sequence[Chunk], index: int) -> list[str]:
    choices = [chunk["choices"][0] for chunk in chunks]
    return [choice["delta"]["content"] for choice in choices if choice["index"] == index]


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    data=st.data(),
    samples=st.integers(1, 3),
    how=st.sampled_from(["one_call", "many_calls"]),
    escalates=st.booleans(),
)
async def test_the_bill_is_what_was_sent(
    wire: Wire, data: st.DataObject, samples: int, how: str, escalates: bool
) -> None:
    several = how == "one_call" and samples > 1
    # Only the first model is asked for more than one answer; its call may be made twice.
    replies = {n: [reply(data, n) for _ in range(12)] for n in {1, samples if several else 1}}
    sent: list[tuple[str, Reply]] = []

    def answer(request: dict[str, Any]) -> Sequence[bytes | float]:
        taken = replies[request.get("n", 1)].pop()
        sent.append((request["model"], taken))
        return taken.wire

    wire.reply = answer
    escalation = ByReward("large", 0.02, 0.0) if escalates else None
    task = Task(
        PROMPT,
        "small",
        samples,
        Sampling(),
        0.0,
        escalation=escalation,
        fallbacks=("medium", "large"),
    )
    happened: list[Event] = []
    limits = {"samples": how, "max_retries": 1, "max_retry_delay": 0.001}
    async with Providers(served_at(wire.url, *POOL, **limits)) as providers:
        pool = BestOfN(providers, rewards, PRICES, None, 0.0)
        with suppress(ProviderFailed):
            async with aclosing(pool.run(task)) as run:
                async for event in run:
                    happened.append(event)
        counts = providers.counts()["test"]

    owed = sum(
        (each.input_tokens * USD[model][0] + each.output_tokens * USD[model][1]) / 1e6
        for model, each in sent
    )
    candidates = [event for event in happened if isinstance(event, Candidate)]
    assert sum(cost(c.usage, PRICES[c.model]) for c in candidates) == pytest.approx(owed, rel=1e-12)
    assert counts.input_tokens == sum(each.input_tokens for _, each in sent)
    assert counts.output_tokens == sum(each.output_tokens for _, each in sent)
    assert counts.calls == len(sent)
    if results := [event for event in happened if isinstance(event, Result)]:
        assert results[0].cost_usd == pytest.approx(owed, rel=1e-12)
        assert results[0].usage.output_tokens == counts.output_tokens
    else:
        assert not any(candidate.complete for candidate in candidates)
    asked = [event.model for event in happened if isinstance(event, FellBack)]
    assert asked in ([], ["medium"], ["medium", "large"], ["large"])


async def test_what_was_cancelled_is_paid_for_as_far_as_it_came(upstream: Upstream) -> None:
    async def late(call: Call) -> AsyncIterator[Chunk]:
        yield text("maybe not")
        await asyncio.Event().wait()

    upstream.scripts = [late, says("4", delay=0.2, tokens=5), hangs("perhaps")]
    happened: list[Event] = []
    task = Task(PROMPT, "small", 3, Sampling(), 0.0, Circumstances(), early_stop=True)
    async with Providers(served_at(upstream.url)) as providers:
        pool = BestOfN(providers, rewards, PRICES, 0.9, 0.0)
        async with aclosing(pool.run(task)) as run:
            async for event in run:
                happened.append(event)
        counts = providers.counts()["test"]

    result = happened[-1]
    assert isinstance(result, Result)
    assert (result.text, result.candidates_cancelled) == ("4", 2)
    cut = [e.text for e in happened if isinstance(e, Delta) and e.text != "4"]
    owed = 10 * 1.0 + 5 * 3.0 + 2 * 4 * 1.0 + sum(guess(len(t)) for t in cut) * 3.0
    assert result.cost_usd == pytest.approx(owed / 1e6)
    assert result.usage.estimated
    assert not counts.failures, "whoever leaves is no fault of the provider"
