"""Draws samples from LLMs behind OpenAI-compatible HTTP APIs, and bears with them."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from math import inf
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from bestroute.call import ANYBODY, Attributes, Call
from bestroute.config import ConfigInvalid, Provider, ServedModel, Settings
from bestroute.errors import ProviderFailed
from bestroute.prompt import Prompt
from bestroute.upstream.breaker import Breaker
from bestroute.upstream.chat import Chat, Sampling
from bestroute.upstream.completion import Completion, Event, Retried
from bestroute.upstream.counts import UpstreamCounts
from bestroute.upstream.failures import CallFailed, Reason, clean
from bestroute.upstream.heard import Heard
from bestroute.upstream.relay import Opened, Piece, Relayed, relay
from bestroute.upstream.retries import Budget, backoff
from bestroute.upstream.usage import Usage

__all__ = ["Providers", "Sampling"]

_log = logging.getLogger(__name__)

CompletionT = TypeVar("CompletionT", bound=Completion)

_LONGEST_WORDS = 500
"""Characters of a provider's error that are passed on; some answer with a whole page."""


class Providers:
    """The configured APIs with their connections; an async context manager that closes them.

    Args:
        settings: `models` and `providers` are read, and the keys. A provider that serves no model
            is left alone.
        patient: whether there is all the time in the world, as in a batch job: then no breaker
            opens and retries are not budgeted.

    Attributes:
        models: the names that can be sampled from.

    Raises:
        ConfigInvalid: a key is missing; names the provider.
    """

    def __init__(self, settings: Settings, *, patient: bool = False) -> None:
        used = {served.provider for served in settings.models.values()}
        self._upstreams = {
            name: _Upstream(name, settings.providers[name], settings.models, patient=patient)
            for name in sorted(used)
        }
        self._served = settings.models
        self.models = frozenset(settings.models)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        async with AsyncExitStack() as stack:
            for upstream in self._upstreams.values():
                stack.push_async_callback(upstream.chat.close)

    def available(self, model: str) -> bool:
        """Whether a call to a model would be made now: one of `models` whose breaker isn't open."""
        served = self._served[model]
        breakers = self._upstreams[served.provider].breakers
        return breakers[served.upstream or model].admits

    def served(self, model: str) -> ServedModel | None:
        """Where a model is served; None: that isn't known."""
        return self._served.get(model)

    def counts(self) -> Mapping[str, UpstreamCounts]:
        """What has happened at each provider so far, by its name."""
        return {name: upstream.counted() for name, upstream in self._upstreams.items()}

    async def sample(
        self,
        model: str,
        prompt: Prompt,
        candidates: range,
        sampling: Sampling,
        emit: Callable[[Event], None],
        call: Call = ANYBODY,
    ) -> None:
        """Draw one answer per candidate, all at once; return when all have ended.

        Cancel it to stop: when the cancellation comes out, the connections are closed. Nothing is
        raised for a call that fails; its candidates end with an error that has the provider's
        words.

        Args:
            model: one of `models`.
            prompt: what to answer.
            candidates: the indices that the answers go by.
            sampling: how to sample.
            emit: is called with what happens as it happens. Every candidate whose call began ends
                with an `Ended`, cancelled ones included. Not awaited, and so without back
                pressure: a slow reader must not hold a provider's place, and what has to be
                buffered is no more than the answers.
            call: whose it is. No retry is waited for that would come after its deadline.
        """
        served = self._served[model]
        upstream = self._upstreams[served.provider]
        request = upstream.chat.request(served.upstream or model, prompt, sampling)
        if upstream.samples == "one_call":
            if len(candidates) > 1:
                request["n"] = len(candidates)
            await upstream.call(model, request, prompt, candidates, emit, call)
            return
        async with asyncio.TaskGroup() as calls:
            for position, candidate in enumerate(candidates):
                own = {} if sampling.seed is None else {"seed": sampling.seed + position}
                calls.create_task(
                    upstream.call(model, request | own, prompt, [candidate], emit, call)
                )

    async def relay(
        self,
        model: str,
        request: Relayed,
        first: int,
        emit: Callable[[Event | Opened | Piece], None],
        call: Call = ANYBODY,
    ) -> None:
        """Pass a caller's own request on, and what is answered; return when that has ended.

        Cancel it to stop, as `sample`. The call is made again only as long as nothing has passed.

        Args:
            model: one of `models`.
            request: to pass on.
            first: the index that its first choice goes by; others follow.
            emit: is called with what happens as it happens, `Ended` of each choice included.
            call: whose it is.
        """
        served = self._served[model]
        upstream = self._upstreams[served.provider]
        await upstream.relay(model, served.upstream or model, request, first, emit, call)


class _Asked(NamedTuple):
    """What a call asks for.

    Attributes:
        model: by the pool's name.
        name: that the provider has for it.
        candidates: the indices that its choices go by.
        choices: that it asks for at once.
    """

    model: str
    name: str
    candidates: Sequence[int]
    choices: int


class _Upstream:
    """One API: its client, a place for each call under way, and what calls have taught.

    Attributes:
        samples: how several answers are drawn.
        chat: its client.
        breakers: by the name that it gives each model. One each, because models of one provider
            are limited and fail one by one; where all fail, all open.
    """

    def __init__(
        self, name: str, settings: Provider, models: Mapping[str, ServedModel], *, patient: bool
    ) -> None:
        self._name, self._settings = name, settings
        self.samples = settings.samples
        try:
            key = settings.api_key()
        except ConfigInvalid as error:
            raise ConfigInvalid(f"[providers.{name}]: {error}") from error
        self._key = key.get_secret_value() if key else None
        self.chat = Chat(settings, self._key)
        self.breakers = {
            served.upstream or model: Breaker(
                None if patient else settings.breaker_failures,
                settings.breaker_pause,
                time.monotonic,
            )
            for model, served in models.items()
            if served.provider == name
        }
        self._places = asyncio.Semaphore(settings.max_concurrency)
        self._budget = Budget(burst=inf) if patient else Budget()
        self._counts = UpstreamCounts()

    def counted(self) -> UpstreamCounts:
        """What has happened so far."""
        return replace(
            self._counts,
            failures=self._counts.failures.copy(),
            breakers={model: breaker.state for model, breaker in self.breakers.items()},
        )

    async def call(
        self,
        model: str,
        request: Mapping[str, Any],
        prompt: Prompt,
        candidates: Sequence[int],
        emit: Callable[[Event], None],
        call: Call,
    ) -> None:
        """Make one call, whose choices are the candidates."""

        def completion() -> Completion:
            return Completion(candidates, len(prompt.text), self._settings.max_answer_characters)

        async def draw(headers: Mapping[str, str], completion: Completion) -> None:
            await self.chat.draw(request, headers, completion, emit)

        asked = _Asked(model, request["model"], candidates, request.get("n", 1))
        await self._ask(asked, completion, draw, emit, call)

    async def relay(
        self,
        model: str,
        name: str,
        request: Relayed,
        first: int,
        emit: Callable[[Event | Opened | Piece], None],
        call: Call,
    ) -> None:
        """Make one call that is the caller's own."""
        candidates, body = range(first, first + request.choices), request.body(name)

        def heard() -> Heard:
            most = self._settings.max_answer_characters
            return Heard(candidates, request.prompt_characters, most)

        async def pass_on(headers: Mapping[str, str], heard: Heard) -> None:
            await relay(self.chat, self._settings, model, body, headers, heard, emit)

        asked = _Asked(model, name, candidates, request.choices)
        await self._ask(asked, heard, pass_on, emit, call)

    async def _ask(
        self,
        asked: _Asked,
        new: Callable[[], CompletionT],
        make: Callable[[Mapping[str, str], CompletionT], Awaitable[None]],
        emit: Callable[[Event], None],
        call: Call,
    ) -> None:
        """Make one call, and make it again where that helps.

        Args:
            asked: what for.
            new: begins an attempt.
            make: makes it, with headers to send along.
            emit: is called with each retry, and with the last word on every candidate.
            call: whose it is.
        """
        attempt = 1
        cause: CallFailed | None = None
        interruption: ProviderFailed | None = None  # left at None: cancelled, or a bug
        completion = new()
        self._budget.called()
        try:
            while True:
                try:
                    await self._attempt(asked, completion, make, call)
                    break
                except CallFailed as failure:
                    # Of a retry that wasn't made, what led to it is the news.
                    cause = cause if cause and failure.reason is Reason.BREAKER_OPEN else failure
                    interruption = self._failure(cause)
                    delay = self._delay(failure, completion, attempt, asked.name, call)
                if delay is None:
                    break
                self._counts.retries += 1
                emit(Retried(tuple(asked.candidates), asked.model, attempt, delay, interruption))
                spent = sum(completion.usages(), completion.spent)
                completion, interruption = new(), None
                completion.spent = spent
                attempt += 1
                await asyncio.sleep(delay)
        finally:
            empty = f"{self._name}: empty answer"
            for ended in completion.end(interruption, completion.spent, empty):
                emit(ended)

    async def _attempt(
        self,
        asked: _Asked,
        completion: CompletionT,
        make: Callable[[Mapping[str, str], CompletionT], Awaitable[None]],
        call: Call,
    ) -> None:
        model = asked.name
        breaker = self.breakers[model]
        if not breaker.admits:  # before there is a place: it has to be known at once
            raise self._refused(breaker)
        async with self._places:
            admission = breaker.admit()
            if admission is None:
                raise self._refused(breaker)
            failed, wait = None, 0.0
            try:
                async with self._told(asked, completion, call) as headers:
                    await make(headers, completion)
                failed = False
            except CallFailed as failure:
                failed = True if failure.faulty else None
                wait = min(failure.retry_after or 0.0, self._settings.max_retry_delay)
                raise
            finally:
                before = breaker.state
                breaker.ended(admission, failed=failed, wait=wait)
                if breaker.state is not before:
                    _log.warning("%s: the breaker of %s is %s", self._name, model, breaker.state)

    @asynccontextmanager
    async def _told(
        self, asked: _Asked, completion: Completion, call: Call
    ) -> AsyncIterator[Mapping[str, str]]:
        """Count a call and trace it; gives the headers that carry the trace on."""
        counts, error = self._counts, None
        counts.calls += 1
        counts.in_flight += 1
        span = call.trace and call.trace.start(f"chat {asked.name}", self._attributes(asked))
        try:
            yield span.headers() if span else {}
        except CallFailed as failure:
            counts.failures[failure.reason] += 1
            error = str(self._failure(failure))
            raise
        finally:
            counts.in_flight -= 1
            if completion.has_empty:
                counts.failures[Reason.EMPTY] += 1
            usage = sum(completion.usages(), Usage())
            counts.used(usage)
            if span:
                span.end(_answered(completion, usage), error)

    def _attributes(self, asked: _Asked) -> Attributes:
        """A call's attributes, by OpenTelemetry's conventions for generative AI."""
        return {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": self._name,
            "gen_ai.request.model": asked.name,
            "gen_ai.request.choice.count": asked.choices,
            "server.address": self.chat.host,
            "server.port": self.chat.port,
        }

    def _delay(
        self, failure: CallFailed, completion: Completion, attempt: int, model: str, call: Call
    ) -> float | None:
        """Seconds until the next attempt; None: there is none."""
        longest, asked = self._settings.max_retry_delay, failure.retry_after
        if (
            not failure.transient
            or not completion.untouched
            or attempt > self._settings.max_retries
            or (asked or 0.0) > longest
            or not self.breakers[model].admits
        ):
            return None
        if asked is None:
            delay = backoff(attempt, longest, random.random())
        else:  # and a bit, so that not all come back at once
            delay = asked * (1 + random.random() / 10)
        if call.deadline is not None and time.monotonic() + delay >= call.deadline:
            return None
        return delay if self._budget.take() else None

    def _refused(self, breaker: Breaker) -> CallFailed:
        self._counts.refused_by_breaker += 1
        until = f"for {breaker.wait:.1f} s" if breaker.wait else "until a first call succeeds"
        return CallFailed(
            Reason.BREAKER_OPEN, f"not asked {until}, because it keeps failing", faulty=False
        )

    def _failure(self, cause: CallFailed) -> ProviderFailed:
        words = str(cause)
        if self._key is not None:
            words = words.replace(self._key, "[api key]")
        return ProviderFailed(f"{self._name}: {clean(words)[:_LONGEST_WORDS]}", cause.page)


def _answered(completion: Completion, usage: Usage) -> Attributes:
    attributes: dict[str, str | int | float | bool] = {
        "gen_ai.usage.input_tokens": usage.input_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
    }
    if completion.finish_reasons:
        attributes["gen_ai.response.finish_reasons"] = ",".join(completion.finish_reasons)
    return attributes
