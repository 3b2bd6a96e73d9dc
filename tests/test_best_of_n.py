"""Best of n over real HTTP: who wins, what is cut, what it costs."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from llmock.pytest_plugin import LLMock

from bestroute import best_of_n
from bestroute.best_of_n import BestOfN, Event, Result, Task
from bestroute.call import Call as Circumstances
from bestroute.candidate import Candidate, best
from bestroute.errors import DeadlineExceeded, ProviderFailed
from bestroute.escalation import ByGate, ByReward, Escalation
from bestroute.policy import InputBilling
from bestroute.pricing import ModelPrice
from bestroute.prompt import Prompt
from bestroute.upstream.completion import Delta
from bestroute.upstream.providers import Providers, Sampling
from bestroute.upstream.usage import Usage
from tests import tiny
from tests.upstreams import (
    Call,
    Chunk,
    Script,
    Upstream,
    finish,
    hangs,
    says,
    served_at,
    text,
    until,
    usage,
)

PRICES = {
    "small": ModelPrice(1.0, 2.0, InputBilling.PER_SAMPLE),
    "large": ModelPrice(10.0, 20.0, InputBilling.PER_SAMPLE),
}


@dataclass
class Rewards:
    """A reward model that looks rewards up, by the answer; `gate` holds it up."""

    by_answer: Mapping[str, float] = field(default_factory=dict)
    gate: asyncio.Event | None = None
    asked: list[str] = field(default_factory=list)

    async def __call__(self, prompt: Prompt, answers: Sequence[str], _: object) -> Sequence[float]:
        self.asked += answers
        if self.gate is not None:
            await self.gate.wait()
        return [self.by_answer[answer] for answer in answers]


FLOOR = ByReward("large", 0.3, 0.0)
GATE = ByGate("large", tiny.GATE, 20.0, 10, PRICES["large"], 0.0)
"""Takes three answers if they agree."""


def task(samples: int = 3, *, within: float | None = None, **how: Any) -> Task:
    """A task that starts now; `within` so many seconds, if there is a deadline."""
    now = time.monotonic()
    deadline = None if within is None else now + within
    prompt = Prompt.of("What is 2 + 2?")
    return Task(prompt, "small", samples, Sampling(), now, Circumstances(deadline), **how)


async def events_of(
    url: str, rewards: Rewards, task: Task, samples: str = "many_calls"
) -> list[Event]:
    async with Providers(served_at(url, samples=samples)) as providers:
        answering = BestOfN(providers, rewards, PRICES, accept_reward=0.9, agreement_bonus=0.0)
        async with aclosing(answering.run(task)) as events:
            return [event async for event in events]


def parts(events: Sequence[Event]) -> tuple[list[Candidate], Result]:
    """The candidates by index, and the result, which comes last."""
    candidates = [event for event in events if isinstance(event, Candidate)]
    result = events[-1]
    assert isinstance(result, Result)
    return sorted(candidates, key=lambda candidate: candidate.index), result


def in_turn(*answers: str) -> Script:
    """A script in which each call takes the next answer."""
    taken = iter(answers)

    async def script(call: Call) -> AsyncIterator[Chunk]:
        yield text(next(taken))
        yield finish()
        yield usage(10, 5)

    return script


# --- who wins


def candidate(index: int, reward: float | None, finish_reason: str = "stop") -> Candidate:
    error = ProviderFailed("no") if finish_reason == "error" else None
    return Candidate(index, "small", "4", reward, Usage(), finish_reason, error)


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        pytest.param([candidate(0, 0.1), candidate(1, 0.2)], 1, id="highest-reward"),
        pytest.param([candidate(0, -2.0), candidate(1, -1.0)], 1, id="negative-rewards"),
        pytest.param([candidate(0, None), candidate(1, -9.0)], 1, id="scored-before-unscored"),
        pytest.param([candidate(2, 0.5), candidate(1, 0.5)], 1, id="lowest-index-of-equals"),
        pytest.param([candidate(2, None), candidate(1, None)], 1, id="none-scored"),
        pytest.param(
            [candidate(0, None, "cancelled"), candidate(1, None), candidate(2, None, "error")],
            1,
            id="only-complete-ones",
        ),
        pytest.param([candidate(0, None, "cancelled")], None, id="none-complete"),
        pytest.param([candidate(0, 0.1, "length")], 0, id="cut-by-length-is-complete"),
    ],
)
def test_the_best_is(candidates: list[Candidate], expected: int | None) -> None:
    answer = best(candidates, 0.0)

    assert expected == (None if answer is None else answer.index)


@pytest.mark.parametrize(
    ("texts", "bonus", "expected"),
    [
        pytest.param(["4", "5", "5"], 0.0, 0, id="no-bonus"),
        pytest.param(["4", "5", "5"], 0.2, 0, id="half-a-bonus-is-not-enough"),
        pytest.param(["4", "5", "5"], 0.6, 1, id="two-that-agree"),
        pytest.param(["5", "5", "5"], 9.0, 0, id="all-agree"),
        pytest.param(["4", "the answer is **5**", "**5**."], 0.6, 1, id="final-answers"),
        pytest.param(["4", "5"], 9.0, 0, id="two-have-no-majority"),
    ],
)
def test_agreement_adds_to_the_reward(texts: list[str], bonus: float, expected: int) -> None:
    rewards = [0.3, 0.1, 0.0]
    candidates = [
        replace(candidate(index, rewards[index]), text=text) for index, text in enumerate(texts)
    ]
    answer = best(candidates, bonus)

    assert answer is not None
    assert expected == answer.index


def test_what_failed_has_no_vote() -> None:
    candidates = [candidate(0, 0.3), *(candidate(index, None, "error") for index in (1, 2))]
    candidates = [replace(candidates[0], text="5"), *candidates[1:], candidate(3, 0.2)]

    answer = best(candidates, 9.0)

    assert answer is not None
    assert answer.index == 0


async def test_the_highest_reward_wins_and_all_are_paid_for(upstream: Upstream) -> None:
    upstream.scripts = [in_turn("3", "4", "5")]
    rewards = Rewards({"3": 0.1, "4": 0.8, "5": 0.2})
    candidates, result = parts(await events_of(upstream.url, rewards, task()))

    assert {("3", 0.1), ("4", 0.8), ("5", 0.2)} == {(c.text, c.reward) for c in candidates}
    assert (result.model, result.text) == ("small", "4")
    assert candidates[result.candidate].text == "4"
    assert Usage(30, 15) == result.usage
    assert pytest.approx(3 * (10 * 1 + 5 * 2) / 1e6) == result.cost_usd
    assert (result.candidates_cancelled, result.escalated) == (0, False)
    assert 0 < result.time_to_first_token <= result.duration


async def test_a_single_sample_streams_through_unscored(llmock: LLMock) -> None:
    llmock.reply("Two and two is four.")
    rewards = Rewards()
    events = await events_of(llmock.base_url(), rewards, task(1, early_stop=True))

    deltas = [event for event in events if isinstance(event, Delta)]
    [candidate], result = parts(events)
    assert [delta.text for delta in deltas] == ["Two ", "and ", "two ", "is ", "four."]
    assert candidate.reward is None
    assert rewards.asked == []
    assert result.text == "Two and two is four."


@pytest.mark.parametrize("samples", ["one_call", "many_calls"])
async def test_best_of_three_by_a_real_llm(standin: str, samples: str) -> None:
    class Longest:
        async def __call__(
            self, prompt: Prompt, answers: Sequence[str], _: object
        ) -> Sequence[float]:
            return [float(len(answer)) for answer in answers]

    order = replace(task(), sampling=Sampling(max_output_tokens=16, temperature=0.8, seed=1))
    async with Providers(served_at(standin, samples=samples)) as providers:
        pool = BestOfN(providers, Longest(), PRICES, None, 0.0)
        async with aclosing(pool.run(order)) as events:
            candidates, result = parts([event async for event in events])

    assert max(candidates, key=lambda c: len(c.text)).text == result.text
    assert not result.usage.estimated
    assert result.cost_usd > 0


# --- scoring


async def test_scoring_one_does_not_hold_up_the_others(upstream: Upstream) -> None:
    """The second answer starts when the first is being scored, and that takes until it is here."""
    arrived = asyncio.Event()
    rewards = Rewards({"4": 0.8, "5": 0.1}, gate=arrived)

    async def second(call: Call) -> AsyncIterator[Chunk]:
        await until(lambda: rewards.asked == ["4"])
        yield text("5")
        yield finish()

    upstream.scripts = [says("4"), second]
    async with Providers(served_at(upstream.url)) as providers:
        pool = BestOfN(providers, rewards, PRICES, None, 0.0)
        async with aclosing(pool.run(task(2))) as events:
            async for event in events:
                if isinstance(event, Delta) and event.text == "5":
                    arrived.set()

    assert rewards.asked == ["4", "5"]


async def test_in_one_call_a_choice_is_scored_before_the_others_end(upstream: Upstream) -> None:
    rewards = Rewards({"4": 0.8, "5": 0.1})

    async def script(call: Call) -> AsyncIterator[Chunk]:
        yield text("4", 0)
        yield finish(0)
        await until(lambda: bool(rewards.asked))
        yield text("5", 1)
        yield finish(1)
        yield usage(10, 10)

    upstream.scripts = [script]
    _, result = parts(await events_of(upstream.url, rewards, task(2), samples="one_call"))

    assert ("4", Usage(10, 10)) == (result.text, result.usage)


async def test_a_score_that_fails_does_not_lose_the_answer(
    upstream: Upstream, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.scripts = [in_turn("3", "4")]
    candidates, result = parts(await events_of(upstream.url, Rewards({"4": -1.0}), task(2)))

    assert {("3", None), ("4", -1.0)} == {(c.text, c.reward) for c in candidates}
    assert result.text == "4"
    assert "could not be scored" in caplog.text


async def test_without_any_score_there_is_still_an_answer(upstream: Upstream) -> None:
    candidates, result = parts(await events_of(upstream.url, Rewards(), task(2)))

    assert [candidate.reward for candidate in candidates] == [None, None]
    assert (result.candidate, result.text) == (0, "4")


# --- failures


async def test_one_failure_is_reported_and_the_others_answer(llmock: LLMock) -> None:
    llmock.fail(400, message="no luck").reply("4", times=None)
    candidates, result = parts(await events_of(llmock.base_url(), Rewards({"4": 0.5}), task()))

    [failed] = [candidate for candidate in candidates if candidate.error]
    assert str(failed.error) == "test: 400 no luck"
    assert ("error", None, Usage()) == (failed.finish_reason, failed.reward, failed.usage)
    assert result.text == "4"
    assert result.candidates_cancelled == 0


async def test_if_all_fail_the_provider_s_words_are_raised(llmock: LLMock) -> None:
    llmock.fail(400, message="no luck", times=2).fail(403, message="go away")
    with pytest.raises(ProviderFailed) as failure:
        await events_of(llmock.base_url(), Rewards(), task())

    assert {"test: 400 no luck", "test: 403 go away"} == {*str(failure.value).split("; ")}


async def test_a_broken_stream_is_paid_for_as_far_as_it_came(llmock: LLMock) -> None:
    llmock.reply("Two and two is four.", times=None).disconnect(after_chunks=4)
    rewards = Rewards({"Two and two is four.": 0.5})
    candidates, result = parts(await events_of(llmock.base_url(), rewards, task(2)))

    [broken] = [candidate for candidate in candidates if candidate.error]
    assert ("Two and two ", Usage(4, 3, estimated=True)) == (broken.text, broken.usage)
    assert result.usage.estimated
    assert pytest.approx(sum(c.usage.output_tokens for c in candidates)) == (
        result.usage.output_tokens
    )


# --- stopping early


@pytest.mark.parametrize("samples", ["one_call", "many_calls"])
async def test_an_answer_that_is_good_enough_cancels_the_rest(
    upstream: Upstream, samples: str
) -> None:
    async def one_of_three(call: Call) -> AsyncIterator[Chunk]:
        yield text("4", 0)
        yield text("maybe", 1)
        yield finish(0)
        await asyncio.Event().wait()

    upstream.scripts = (
        [one_of_three]
        if samples == "one_call"
        else [hangs("maybe"), says("4", delay=0.05, tokens=5), hangs("perhaps")]
    )
    rewards = Rewards({"4": 0.9})
    candidates, result = parts(
        await events_of(upstream.url, rewards, task(early_stop=True), samples)
    )

    assert sorted(c.finish_reason for c in candidates) == ["cancelled", "cancelled", "stop"]
    assert (result.text, result.candidates_cancelled) == ("4", 2)
    assert result.usage.estimated
    assert sum((c.usage for c in candidates), Usage()) == result.usage
    assert pytest.approx(result.usage.input_tokens + 2 * result.usage.output_tokens) == (
        result.cost_usd * 1e6
    )
    for call in upstream.calls:
        if samples == "one_call":
            await asyncio.wait_for(call.left.wait(), 2)


async def test_nothing_is_cancelled_below_the_mark_or_unasked(upstream: Upstream) -> None:
    upstream.scripts = [says("4", tokens=1), says("5", delay=0.1, tokens=1)]
    for execution, rewards in [
        ({"early_stop": True}, Rewards({"4": 0.8, "5": 0.1})),
        ({}, Rewards({"4": 0.95, "5": 0.1})),
    ]:
        upstream.calls.clear()
        _, result = parts(await events_of(upstream.url, rewards, task(2, **execution)))

        assert (result.text, result.candidates_cancelled) == ("4", 0)
        assert not result.usage.estimated


# --- deadlines


async def test_stragglers_are_cut_before_the_deadline(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best_of_n, "CUT_BEFORE_DEADLINE", 3.0)  # leaves a busy machine its time
    upstream.scripts = [says("4", tokens=5), hangs("five, or")]
    order = task(2, within=3.5)
    assert order.call.deadline is not None
    candidates, result = parts(await events_of(upstream.url, Rewards({"4": -5.0}), order))

    assert time.monotonic() - order.started >= 0.5
    assert time.monotonic() < order.call.deadline
    assert (result.text, result.candidates_cancelled) == ("4", 1)
    assert {(c.text, c.finish_reason) for c in candidates} == {
        ("4", "stop"),
        ("five, or", "cancelled"),
    }
    assert result.usage == Usage(14, 7, estimated=True)


async def test_past_the_cut_the_first_answer_wins(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best_of_n, "CUT_BEFORE_DEADLINE", 5.0)  # at once
    upstream.scripts = [says("4", delay=0.1), hangs("five")]
    order = task(2, within=5.0)
    assert order.call.deadline is not None
    _, result = parts(await events_of(upstream.url, Rewards({"4": 0.1}), order))

    assert time.monotonic() < order.call.deadline
    assert (result.text, result.candidates_cancelled) == ("4", 1)


async def test_a_deadline_before_any_answer_is_an_error(upstream: Upstream) -> None:
    upstream.scripts = [hangs("4")]
    with pytest.raises(DeadlineExceeded, match="before any answer was complete"):
        await events_of(upstream.url, Rewards(), task(2, within=0.3))

    for call in upstream.calls:
        await asyncio.wait_for(call.left.wait(), 2)


async def test_a_deadline_that_has_passed_is_an_error(upstream: Upstream) -> None:
    with pytest.raises(DeadlineExceeded):
        await events_of(upstream.url, Rewards(), task(2, within=-1.0))


async def test_scoring_that_takes_too_long_is_given_up(upstream: Upstream) -> None:
    rewards = Rewards({"4": 0.5}, gate=asyncio.Event())
    candidates, result = parts(await events_of(upstream.url, rewards, task(2, within=1.0)))

    assert [candidate.reward for candidate in candidates] == [None, None]
    assert result.text == "4"


# --- escalation


async def test_poor_answers_go_to_the_reference(upstream: Upstream) -> None:
    upstream.scripts = [says("3", tokens=5), says("3", tokens=5), says("4", tokens=5)]
    rewards = Rewards({"3": 0.2, "4": 0.7})
    events = await events_of(upstream.url, rewards, task(2, escalation=FLOOR))
    candidates, result = parts(events)

    assert [call.body["model"] for call in upstream.calls] == ["small", "small", "large"]
    assert [c.model for c in candidates] == ["small", "small", "large"]
    assert Delta(2, "4") in events
    assert (
        result.candidate,
        result.model,
        result.text,
        result.escalated,
    ) == (2, "large", "4", True)
    assert pytest.approx((2 * (10 + 10) + (100 + 100)) / 1e6) == result.cost_usd


async def test_a_reference_that_does_worse_loses(upstream: Upstream) -> None:
    upstream.scripts = [says("3"), says("4")]
    rewards = Rewards({"3": 0.2, "4": 0.1})
    _, result = parts(await events_of(upstream.url, rewards, task(1, escalation=FLOOR)))

    assert (result.text, result.escalated) == ("3", True)


async def test_a_reference_that_fails_loses(llmock: LLMock) -> None:
    llmock.reply("3", times=None).fail(400, message="no", model="large")
    rewards = Rewards({"3": 0.2})
    candidates, result = parts(
        await events_of(llmock.base_url(), rewards, task(1, escalation=FLOOR))
    )

    assert [candidate.finish_reason for candidate in candidates] == ["stop", "error"]
    assert (result.text, result.escalated) == ("3", True)


@pytest.mark.parametrize(("escalation", "reward"), [(FLOOR, 0.3), (None, 0.1)])
async def test_the_reference_is_not_asked_for_a_good_answer_or_without_an_escalation(
    upstream: Upstream, escalation: Escalation | None, reward: float
) -> None:
    order = task(2, escalation=escalation)
    _, result = parts(await events_of(upstream.url, Rewards({"4": reward}), order))

    assert not result.escalated
    assert len(upstream.calls) == 2


async def test_a_gate_sees_all_answers_though_one_would_be_enough(upstream: Upstream) -> None:
    """The first answer's reward would cancel the two that disagree with it."""
    upstream.scripts = [says("4"), says("5", delay=0.1), says("6", delay=0.1), says("7")]
    rewards = Rewards({"4": 0.95, "5": 0.1, "6": 0.1})
    order = task(early_stop=True, escalation=GATE)
    candidates, result = parts(await events_of(upstream.url, rewards, order))

    assert sorted(c.text for c in candidates[:3]) == ["4", "5", "6"]
    assert candidates[3].text == "7"
    assert (result.text, result.escalated, result.candidates_cancelled) == ("7", True, 0)
    assert candidates[-1].reward is None
    assert "7" not in rewards.asked


async def test_a_gate_scores_no_single_sample(upstream: Upstream) -> None:
    single = tiny.GATE.model_copy(update={"arm": tiny.ARMS[0]})
    upstream.scripts = [says("3"), says("4")]
    order = task(1, escalation=replace(GATE, gate=single))
    rewards = Rewards()
    _, result = parts(await events_of(upstream.url, rewards, order))

    assert (result.text, result.escalated, rewards.asked) == ("4", True, [])


@pytest.mark.parametrize("escalation", [FLOOR, GATE])
async def test_past_the_cut_the_reference_is_not_asked(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch, escalation: Escalation
) -> None:
    monkeypatch.setattr(best_of_n, "CUT_BEFORE_DEADLINE", 30.0)
    upstream.scripts = [in_turn("3", "4", "5")]
    rewards = Rewards({"3": 0.1, "4": 0.2, "5": 0.1})
    order = task(within=30.0, escalation=escalation)
    _, result = parts(await events_of(upstream.url, rewards, order))

    assert not result.escalated
    assert {call.body["model"] for call in upstream.calls} == {"small"}


async def test_a_gate_s_answers_that_were_cut_are_not_escalated_late(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(best_of_n, "CUT_BEFORE_DEADLINE", 29.0)
    upstream.scripts = [says("4"), says("4"), hangs("5")]
    order = task(within=30.0, escalation=GATE)
    _, result = parts(await events_of(upstream.url, Rewards({"4": 0.1}), order))

    assert (result.text, result.escalated) == ("4", False)
    assert result.candidates_cancelled >= 1
    assert {call.body["model"] for call in upstream.calls} == {"small"}


# --- leaving


async def test_who_leaves_stops_the_calls_at_once(upstream: Upstream) -> None:
    upstream.scripts = [hangs("4")]
    async with Providers(served_at(upstream.url)) as providers:
        pool = BestOfN(providers, Rewards(), PRICES, None, 0.0)
        before = asyncio.all_tasks()
        async with aclosing(pool.run(task())) as events:
            async for _ in events:
                if len(upstream.calls) == 3:
                    break

        ours = {t for t in asyncio.all_tasks() - before if "bestroute" in str(t.get_coro())}
        assert set() == ours
        for call in upstream.calls:
            await asyncio.wait_for(call.left.wait(), 2)


async def test_who_is_cancelled_stops_the_calls_at_once(upstream: Upstream) -> None:
    upstream.scripts = [hangs("4")]
    consumer = asyncio.create_task(events_of(upstream.url, Rewards(), task(2)))
    await until(lambda: upstream.under_way == 2)
    consumer.cancel()
    await asyncio.wait([consumer])

    assert consumer.cancelled()
    for call in upstream.calls:
        await asyncio.wait_for(call.left.wait(), 2)
