"""One OpenAI-compatible API: its keys and places; calls that are made, and made again."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any, TypeVar

from bestroute.call import Call
from bestroute.config import ConfigInvalid, Provider, ServedModel
from bestroute.errors import ProviderFailed
from bestroute.prompt import Prompt
from bestroute.upstream.breaker import Breaker
from bestroute.upstream.chat import Chat
from bestroute.upstream.completion import Completion, Event, Retried
from bestroute.upstream.counts import UpstreamCounts
from bestroute.upstream.failures import CallFailed, Reason, clean
from bestroute.upstream.heard import Heard
from bestroute.upstream.relay import Opened, Piece, Relayed, relay
from bestroute.upstream.retries import Budget, backoff
from bestroute.upstream.telemetry import Asked, CallTelemetry

_log = logging.getLogger(__name__)

CompletionT = TypeVar("CompletionT", bound=Completion)

_LONGEST_WORDS = 500
"""Characters of a provider's error that are passed on; some answer with a whole page."""


class Api:
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
        self._telemetry = CallTelemetry(name, self.chat, self._failure)

    def counted(self) -> UpstreamCounts:
        """What has happened so far."""
        return replace(
            self._telemetry.counts,
            failures=self._telemetry.counts.failures.copy(),
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

        asked = Asked(model, request["model"], candidates, request.get("n", 1))
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
            stream = request.stream
            await relay(self.chat, self._settings, model, body, headers, heard, emit, stream=stream)

        asked = Asked(model, name, candidates, request.choices)
        await self._ask(asked, heard, pass_on, emit, call)

    async def _ask(
        self,
        asked: Asked,
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
                self._telemetry.counts.retries += 1
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
        asked: Asked,
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
                async with self._telemetry.around(asked, completion, call) as headers:
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
        self._telemetry.counts.refused_by_breaker += 1
        until = f"for {breaker.wait:.1f} s" if breaker.wait else "until a first call succeeds"
        return CallFailed(
            Reason.BREAKER_OPEN, f"not asked {until}, because it keeps failing", faulty=False
        )

    def _failure(self, cause: CallFailed) -> ProviderFailed:
        words = str(cause)
        if self._key is not None:
            words = words.replace(self._key, "[api key]")
        return ProviderFailed(f"{self._name}: {clean(words)[:_LONGEST_WORDS]}", cause.page)
