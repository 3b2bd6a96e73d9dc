"""Sampling from real HTTP servers, well-behaved and otherwise."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from llmock.pytest_plugin import LLMock

from bestroute.call import Attributes
from bestroute.call import Call as Circumstances
from bestroute.config import ConfigInvalid, Provider
from bestroute.prompt import Message, Prompt
from bestroute.upstream.chat import Chat
from bestroute.upstream.completion import Delta, Ended, Event, Finished, Retried
from bestroute.upstream.providers import Providers, Sampling
from bestroute.upstream.usage import Usage
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
    until,
    usage,
)

QUESTION = Prompt.of("What is 2 + 2?")


async def drawn(
    url: str, n: int = 1, sampling: Sampling | None = None, **provider: Any
) -> tuple[list[Event], list[Ended]]:
    """Everything that sampling emits, and the last words in the candidates' order."""
    events: list[Event] = []
    async with Providers(served_at(url, **provider)) as providers:
        await providers.sample("small", QUESTION, range(n), sampling or Sampling(), events.append)
    ended = [event for event in events if isinstance(event, Ended)]
    return events, sorted(ended, key=lambda end: end.candidate)


async def failure(url: str, **provider: Any) -> Ended:
    """The one candidate of a call that fails."""
    _, [end] = await drawn(url, **provider)
    assert end.finish_reason == "error"
    return end


# --- well-behaved servers


@pytest.mark.parametrize("samples", ["one_call", "many_calls"])
async def test_every_candidate_streams_and_ends_once(llmock: LLMock, samples: str) -> None:
    llmock.reply("Two and two is four.", times=None)

    events, ended = await drawn(llmock.base_url(), 3, samples=samples)

    assert [end.candidate for end in ended] == [0, 1, 2]
    assert {"Two and two is four."} == {end.text for end in ended}
    assert {"stop"} == {end.finish_reason for end in ended}
    for candidate in range(3):
        own = [e for e in events if not isinstance(e, Retried) and e.candidate == candidate]
        pieces = "".join(event.text for event in own if isinstance(event, Delta))
        assert pieces == "Two and two is four."
        assert isinstance(own[-2], Finished)
        assert isinstance(own[-1], Ended)
    assert (1 if samples == "one_call" else 3) == len(llmock.requests)


@pytest.mark.parametrize("samples", ["one_call", "many_calls"])
async def test_a_real_llm_answers_three_times(standin: str, samples: str) -> None:
    _, ended = await drawn(
        standin, 3, Sampling(max_output_tokens=16, temperature=2.0, seed=1), samples=samples
    )

    assert [end.error for end in ended] == [None, None, None]
    # Not all alike. Two may be: a sampler is free to repeat itself, and at a temperature of 0.8
    # this one did so in 1 of 60 draws. That each call has its own seed is tested further down.
    assert len({end.text for end in ended}) > 1
    assert not any(end.usage.estimated for end in ended)
    total = sum((end.usage for end in ended), Usage())
    assert 3 <= total.output_tokens <= 48
    prompts = [end.usage.input_tokens for end in ended]
    assert (prompts[1] == prompts[2] == 0) if samples == "one_call" else len({*prompts}) == 1


async def test_one_call_asks_for_n_choices(upstream: Upstream) -> None:
    async def script(call: Call) -> AsyncIterator[Chunk]:
        for index in (1, 0):
            yield text(f"answer {index}", index)
            yield finish(index)
        yield usage(12, 6)

    upstream.scripts = [script]
    _, ended = await drawn(upstream.url, 2, Sampling(seed=7), samples="one_call")

    [call] = upstream.calls
    assert (call.body["n"], call.body["seed"]) == (2, 7)
    assert [("answer 0", Usage(12, 3)), ("answer 1", Usage(0, 3))] == [
        (end.text, end.usage) for end in ended
    ]


async def test_many_calls_have_seeds_of_their_own(upstream: Upstream) -> None:
    upstream.scripts = [says("4", tokens=1)]
    _, ended = await drawn(upstream.url, 3, Sampling(seed=7), samples="many_calls")

    assert {7, 8, 9} == {call.body["seed"] for call in upstream.calls}
    assert not any("n" in call.body for call in upstream.calls)
    assert [Usage(10, 1)] * 3 == [end.usage for end in ended]


async def test_the_request_says_what_was_asked_and_no_more(upstream: Upstream) -> None:
    settings = served_at(upstream.url)
    sampling = Sampling(max_output_tokens=9, temperature=0.0, top_p=0.5, stop=("\n",), seed=3)
    prompt = Prompt((Message("system", "Be brief."), Message("user", "Hi")))
    async with Providers(settings) as providers:
        await providers.sample("small", prompt, range(1), sampling, lambda _: None)
        await providers.sample("small", QUESTION, range(1), Sampling(), lambda _: None)

    full, plain = (call.body for call in upstream.calls)
    assert full == {
        "model": "small",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
        ],
        "max_tokens": 9,
        "temperature": 0.0,
        "top_p": 0.5,
        "stop": ["\n"],
        "seed": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert {"model", "messages", "stream", "stream_options"} == plain.keys()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://api.openai.com/v1", "max_completion_tokens"),
        ("https://mine.openai.azure.com/openai/v1", "max_completion_tokens"),
        ("https://api.mistral.ai/v1", "max_tokens"),
        ("http://localhost:8000/v1", "max_tokens"),
    ],
)
def test_the_token_limit_goes_by_the_name_that_the_host_knows(url: str, name: str) -> None:
    provider = Provider.model_validate({"base_url": url})
    body = Chat(provider, None).request("small", QUESTION, Sampling(max_output_tokens=9))

    assert body[name] == 9


async def test_no_credential_is_sent_without_a_key(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client would take these from the environment, whatever host it talks to."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project")
    await drawn(upstream.url)

    [call] = upstream.calls
    assert not {"authorization", "openai-organization", "openai-project"} & call.headers.keys()


async def test_a_configured_key_is_sent(upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-mine\n")
    await drawn(upstream.url, api_key_file=tmp_path / "key")

    [call] = upstream.calls
    assert call.headers["authorization"] == "Bearer sk-mine"


def test_a_missing_key_names_the_provider() -> None:
    settings = served_at("http://127.0.0.1:1/v1", api_key_env="NO_SUCH_VARIABLE")
    with pytest.raises(ConfigInvalid, match=r"\[providers.test\]: set NO_SUCH_VARIABLE"):
        Providers(settings)


async def test_answers_interleave(upstream: Upstream) -> None:
    """No answer goes on before the others have arrived as far as it has."""
    events: list[Event] = []

    async def script(call: Call) -> AsyncIterator[Chunk]:
        yield text("a")
        await until(lambda: len(events) >= 3)
        yield text("b")
        yield finish()

    upstream.scripts = [script]
    async with Providers(served_at(upstream.url)) as providers:
        await providers.sample("small", QUESTION, range(3), Sampling(), events.append)

    deltas = [event for event in events if isinstance(event, Delta)]
    assert {delta.candidate for delta in deltas[:3]} == {0, 1, 2}


# --- stopping


@pytest.mark.parametrize(("samples", "calls"), [("one_call", 1), ("many_calls", 3)])
async def test_cancelling_closes_every_connection_at_once(
    upstream: Upstream, samples: str, calls: int
) -> None:
    upstream.scripts = [hangs("four le")]
    events: list[Event] = []
    async with Providers(served_at(upstream.url, samples=samples)) as providers:
        sampling = asyncio.create_task(
            providers.sample("small", QUESTION, range(3), Sampling(), events.append)
        )
        await until(lambda: len(events) == calls)
        sampling.cancel()
        await asyncio.wait([sampling])
        for call in upstream.calls:
            await asyncio.wait_for(call.left.wait(), 2)

    assert sampling.cancelled()
    assert calls == len(upstream.calls)
    ended = [event for event in events if isinstance(event, Ended)]
    assert {0, 1, 2} == {end.candidate for end in ended}
    assert {"cancelled"} == {end.finish_reason for end in ended}
    partial = next(end for end in ended if end.candidate == 0)
    assert ("four le", Usage(4, 2, estimated=True)) == (partial.text, partial.usage)


async def test_no_task_is_left(upstream: Upstream) -> None:
    upstream.scripts = [hangs("4"), says("4")]
    async with Providers(served_at(upstream.url)) as providers:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await providers.sample("small", QUESTION, range(3), Sampling(), lambda _: None)

    await until(lambda: upstream.under_way == 0)
    ours = [
        task
        for task in asyncio.all_tasks()
        if "bestroute" in str(task.get_coro()) or "aiohttp.client" in str(task.get_coro())
    ]
    assert ours == []


async def test_calls_under_way_are_limited(upstream: Upstream) -> None:
    most = 0

    async def script(call: Call) -> AsyncIterator[Chunk]:
        nonlocal most
        most = max(most, upstream.under_way)
        await asyncio.sleep(0.01)
        yield text("4")
        yield finish()

    upstream.scripts = [script]
    _, ended = await drawn(upstream.url, 6, max_concurrency=2)

    assert len(ended) == 6
    assert most == 2


async def test_a_cancelled_call_gives_its_place_to_the_next(upstream: Upstream) -> None:
    upstream.scripts = [hangs("4"), says("4")]
    events: list[Event] = []
    async with Providers(served_at(upstream.url, max_concurrency=1)) as providers:
        sampling = asyncio.create_task(
            providers.sample("small", QUESTION, range(2), Sampling(), events.append)
        )
        await until(lambda: upstream.under_way == 1)
        sampling.cancel()
        await asyncio.wait([sampling])
        waited = next(e for e in events if isinstance(e, Ended) and e.candidate == 1)
        assert Usage() == waited.usage, "it never left for the provider"

        async with asyncio.timeout(5):
            await providers.sample("small", QUESTION, range(1), Sampling(), events.append)

    assert getattr(events[-1], "finish_reason", None) == "stop"


# --- failures


async def test_a_rate_limit_is_waited_out(llmock: LLMock) -> None:
    llmock.rate_limit(retry_after=0.3).reply("4")
    started = time.monotonic()
    _, [end] = await drawn(llmock.base_url())

    assert (end.text, end.finish_reason) == ("4", "stop")
    assert time.monotonic() - started >= 0.3
    assert [request.status for request in llmock.requests] == [429, 200]
    llmock.assert_resilient()


async def test_retries_are_as_many_as_configured(llmock: LLMock) -> None:
    llmock.fail(503, times=None, retry_after=0.01, message="overloaded, try later")
    end = await failure(llmock.base_url(), max_retries=1)

    assert str(end.error) == "test: 503 overloaded, try later"
    assert Usage() == end.usage
    assert len(llmock.requests) == 2


async def test_a_bad_request_is_not_repeated_and_keeps_its_words(llmock: LLMock) -> None:
    llmock.context_overflow()
    end = await failure(llmock.base_url())

    assert str(end.error) == "test: 400 This model's maximum context length was exceeded."
    assert len(llmock.requests) == 1


async def test_a_key_in_the_provider_s_words_is_hidden(llmock: LLMock, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-secret")
    llmock.fail(401, message="Incorrect API key provided: sk-secret")
    end = await failure(llmock.base_url(), api_key_file=tmp_path / "key")

    assert str(end.error) == "test: 401 Incorrect API key provided: [api key]"


async def test_a_page_of_words_is_cut(llmock: LLMock) -> None:
    llmock.fail(400, message="<p>" * 1000)
    end = await failure(llmock.base_url())

    assert len(str(end.error)) < 600


async def test_a_disconnect_ends_the_candidate_with_what_there_was(llmock: LLMock) -> None:
    llmock.reply("Two and two is four.").disconnect(after_chunks=4)
    events, [end] = await drawn(llmock.base_url())

    assert end.text == "Two and two "
    assert end.finish_reason == "error"
    assert str(end.error).startswith("test: Response payload is not completed")
    assert Usage(4, 3, estimated=True) == end.usage
    assert not any(isinstance(event, Finished) for event in events)
    assert len(llmock.requests) == 1, "not repeated once there was text"


async def test_a_stream_that_ends_early_but_cleanly_is_a_failure(llmock: LLMock) -> None:
    llmock.reply("Two and two is four.").truncate(after_chunks=3)
    end = await failure(llmock.base_url())

    assert str(end.error) == "test: the stream ended without a finish_reason"


async def test_a_chunk_that_is_no_json_is_a_failure(llmock: LLMock) -> None:
    llmock.reply("Two and two is four.").corrupt(after_chunks=2)
    end = await failure(llmock.base_url())

    assert str(end.error).startswith("test: a chunk that is no JSON: ")


async def test_silence_is_a_failure(llmock: LLMock) -> None:
    llmock.reply("Two and two is four.").stall(after_chunks=2, seconds=3)
    end = await failure(llmock.base_url(), read_timeout=0.6)

    assert str(end.error) == "test: silence for 0.6 s"
    assert end.text == "Two "


async def test_nobody_there_is_a_failure(unused_tcp_port: int) -> None:
    end = await failure(f"http://127.0.0.1:{unused_tcp_port}/v1", max_retries=0)

    assert "Cannot connect to host 127.0.0.1" in str(end.error)


async def test_an_error_inside_the_stream_keeps_its_words(upstream: Upstream) -> None:
    async def script(call: Call) -> AsyncIterator[Chunk]:
        yield text("Two")
        yield {"error": {"message": "the model crashed", "code": 500}}

    upstream.scripts = [script]
    end = await failure(upstream.url)

    assert str(end.error) == "test: 500 the model crashed"


async def test_a_server_without_n_is_pointed_out(upstream: Upstream) -> None:
    _, ended = await drawn(upstream.url, 2, samples="one_call")

    assert [end.finish_reason for end in ended] == ["stop", "error"]
    assert "set samples = many_calls" in str(ended[1].error)


# --- retries


async def test_no_retry_is_waited_for_past_the_deadline(llmock: LLMock) -> None:
    """So that whoever asks has time left for another LLM."""
    llmock.rate_limit(retry_after=5).reply("4")
    events: list[Event] = []
    begun = time.monotonic()
    async with Providers(served_at(llmock.base_url())) as providers:
        call = Circumstances(deadline=begun + 4)
        await providers.sample("small", QUESTION, range(1), Sampling(), events.append, call)

    [end] = events
    assert isinstance(end, Ended)
    assert str(end.error).startswith("test: 429 ")
    assert time.monotonic() - begun < 4
    assert len(llmock.requests) == 1


async def test_who_waits_for_a_retry_gives_its_place_away(llmock: LLMock) -> None:
    llmock.rate_limit(retry_after=1.0).reply("4", times=None)
    events: list[Event] = []
    settings = served_at(llmock.base_url(), max_concurrency=1)
    async with Providers(settings) as providers, asyncio.TaskGroup() as tasks:
        for candidate in range(2):
            one = range(candidate, candidate + 1)
            tasks.create_task(providers.sample("small", QUESTION, one, Sampling(), events.append))
            await until(lambda: bool(events))

    ends = [event for event in events if isinstance(event, Ended)]
    assert [(end.candidate, end.text) for end in ends] == [(1, "4"), (0, "4")]


async def test_all_retries_together_have_a_budget(wire: Wire) -> None:
    """A third of all attempts fails: more than may be made again, too little for the breaker."""
    bad, good = refused(503, retry_after="0"), streamed(events(text("4"), finish()))
    wire.reply = lambda _: good if len(wire.heads) % 3 else bad
    calls = 120
    async with Providers(served_at(wire.url)) as providers:
        for _ in range(calls):
            await providers.sample("small", QUESTION, range(1), Sampling(), lambda _: None)
        counts = providers.counts()["test"]

    assert counts.calls == len(wire.heads) == calls + counts.retries
    assert counts.failures["server_error"] > counts.retries
    assert 10 + calls // 5 - 3 <= counts.retries <= 10 + calls // 5


async def test_cancelling_a_retry_s_wait_ends_it(llmock: LLMock) -> None:
    llmock.rate_limit(retry_after=10)
    events: list[Event] = []
    async with Providers(served_at(llmock.base_url())) as providers:
        sampling = asyncio.create_task(
            providers.sample("small", QUESTION, range(1), Sampling(), events.append)
        )
        await until(lambda: bool(events))
        sampling.cancel()
        await asyncio.wait([sampling], timeout=5)

    retry, end = events
    assert isinstance(retry, Retried)
    assert isinstance(end, Ended)
    assert (end.finish_reason, end.usage, end.error) == ("cancelled", Usage(), None)


# --- breakers


async def ask(providers: Providers, model: str = "small", n: int = 1) -> Ended:
    """The last word on the last candidate."""
    events: list[Event] = []
    await providers.sample(model, QUESTION, range(n), Sampling(), events.append)
    end = events[-1]
    assert isinstance(end, Ended)
    return end


@pytest.mark.parametrize("status", [401, 404, 429, 500, 503])
async def test_what_keeps_failing_is_left_alone_and_tried_again_later(
    llmock: LLMock, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    llmock.fail(status, times=3).reply("4", times=None)
    settings = served_at(llmock.base_url(), max_retries=0, breaker_failures=3, breaker_pause=1.0)
    async with Providers(settings) as providers:
        for _ in range(3):
            assert providers.available("small")
            await ask(providers)
        assert not providers.available("small")
        assert providers.available("large"), "each model has a breaker of its own"
        refused = await ask(providers)
        assert str(refused.error).startswith("test: not asked for ")
        assert refused.usage == Usage()
        counts = providers.counts()["test"]
        assert counts.breakers == {"small": "open", "large": "closed"}
        assert (counts.calls, counts.refused_by_breaker) == (3, 1)
        assert len(llmock.requests) == 3

        await asyncio.sleep(1.0)
        assert providers.counts()["test"].breakers["small"] == "half_open"
        assert (await ask(providers)).text == "4"
        assert providers.counts()["test"].breakers["small"] == "closed"

    assert [record.getMessage() for record in caplog.records] == [
        "test: the breaker of small is open",
        "test: the breaker of small is closed",
    ]


async def test_a_breaker_that_opens_ends_retries_and_what_waits_for_a_place(
    llmock: LLMock,
) -> None:
    llmock.fail(503, times=None, retry_after=0.001)
    settings = served_at(
        llmock.base_url(), max_retries=9, breaker_failures=3, breaker_pause=60, max_concurrency=1
    )
    async with Providers(settings) as providers:
        end = await ask(providers, n=5)
        counts = providers.counts()["test"]

    assert len(llmock.requests) == counts.calls == 3
    assert counts.retries == 2, "none once it is open"
    assert counts.refused_by_breaker >= 1
    assert end.error is not None


async def test_an_open_breaker_is_told_though_every_place_is_taken(upstream: Upstream) -> None:
    async def breaks(call: Call) -> AsyncIterator[Chunk]:
        yield text("4")

    upstream.scripts = [breaks, hangs()]
    settings = served_at(upstream.url, breaker_failures=1, breaker_pause=60, max_concurrency=1)
    async with Providers(settings) as providers:
        await ask(providers)
        other = asyncio.create_task(ask(providers, "large"))
        await until(lambda: upstream.under_way == 1)
        async with asyncio.timeout(10):
            assert "not asked for" in str((await ask(providers)).error)
        other.cancel()
        await asyncio.wait([other])


async def test_a_prompt_s_own_fault_and_leaving_open_no_breaker(
    llmock: LLMock, upstream: Upstream
) -> None:
    llmock.context_overflow(times=None)
    async with Providers(served_at(llmock.base_url(), breaker_failures=1)) as providers:
        for _ in range(3):
            await ask(providers)
        assert providers.available("small")

    upstream.scripts = [hangs("4")]
    async with Providers(served_at(upstream.url, breaker_failures=1)) as providers:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await ask(providers)
        assert providers.available("small")
        assert not providers.counts()["test"].failures


async def test_a_trial_that_is_left_makes_room_for_the_next(
    upstream: Upstream,
) -> None:
    async def breaks(call: Call) -> AsyncIterator[Chunk]:
        yield text("4")

    upstream.scripts = [breaks, hangs(), says("4")]
    settings = served_at(upstream.url, breaker_failures=1, breaker_pause=0.05)
    async with Providers(settings) as providers:
        await ask(providers)
        await asyncio.sleep(0.06)
        trial = asyncio.create_task(ask(providers))
        await until(lambda: len(upstream.calls) == 2)
        assert "not asked until a first call succeeds" in str((await ask(providers)).error)
        trial.cancel()
        await asyncio.wait([trial])
        assert (await ask(providers)).text == "4"


# --- traces


@dataclass
class Recorded:
    """A span and a trace in one, which take notes."""

    spans: list["Recorded"] = field(default_factory=list)
    name: str = ""
    begun: Attributes = field(default_factory=dict)
    ends: list[tuple[Attributes, str | None]] = field(default_factory=list)

    def start(self, name: str, attributes: Attributes = {}) -> "Recorded":  # noqa: B006
        self.spans.append(Recorded(name=name, begun=attributes))
        return self.spans[-1]

    def record(self, name: str, start: float, end: float, attributes: Attributes = {}) -> None:  # noqa: B006
        raise NotImplementedError

    def headers(self) -> Mapping[str, str]:
        return {"traceparent": "00-1-2-01"}

    def end(self, attributes: Attributes = {}, error: str | None = None) -> None:  # noqa: B006
        self.ends.append((attributes, error))


async def test_every_attempt_is_a_span_that_ends_once(llmock: LLMock) -> None:
    llmock.fail(503, message="busy", retry_after=0.001).reply("4").disconnect(after_chunks=2)
    trace, events = Recorded(), list[Event]()
    async with Providers(served_at(llmock.base_url())) as providers:
        call = Circumstances(trace=trace)
        await providers.sample("small", QUESTION, range(1), Sampling(), events.append, call)

    refused, broken = trace.spans
    for span in trace.spans:
        assert span.name == "chat small"
        assert span.begun["gen_ai.operation.name"] == "chat"
        assert span.begun["gen_ai.request.model"] == "small"
        assert span.begun["gen_ai.provider.name"] == "test"
        assert span.begun["server.address"] == "127.0.0.1"
    [(used, error)] = refused.ends
    assert (used["gen_ai.usage.output_tokens"], error) == (0, "test: 503 busy")
    [(used, error)] = broken.ends
    assert used["gen_ai.usage.input_tokens"] == 4
    assert error is not None


async def test_a_span_says_what_was_used_and_carries_the_trace_on(upstream: Upstream) -> None:
    upstream.scripts = [says("4", tokens=7), hangs("4")]
    trace, events = Recorded(), list[Event]()
    async with Providers(served_at(upstream.url)) as providers:
        call = Circumstances(trace=trace)
        await providers.sample("small", QUESTION, range(1), Sampling(), events.append, call)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await providers.sample(
                    "small", QUESTION, range(1), Sampling(), lambda _: None, call
                )

    well, left = trace.spans
    usage = {"gen_ai.usage.input_tokens": 10, "gen_ai.usage.output_tokens": 7}
    assert well.ends == [({**usage, "gen_ai.response.finish_reasons": "stop"}, None)]
    assert len(left.ends) == 1
    assert upstream.calls[0].headers["traceparent"] == "00-1-2-01"


async def test_one_failure_leaves_the_others_alone(llmock: LLMock) -> None:
    llmock.fail(400, message="no").reply("4", times=None)
    _, ended = await drawn(llmock.base_url(), 3)

    assert sorted(end.finish_reason for end in ended) == ["error", "stop", "stop"]
