"""Draws samples from LLMs behind OpenAI-compatible HTTP APIs."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import openai

from bestroute.config import ConfigInvalid, Provider, Settings
from bestroute.errors import ProviderFailed
from bestroute.prompt import Prompt
from bestroute.upstream.completion import Completion, Event

_FAILURES = (openai.OpenAIError, aiohttp.ClientError, OSError, ValueError)
"""What a call may fail with: the client maps most of aiohttp's errors to its own, but not all,
and a chunk that isn't JSON is a ValueError."""

_LONGEST_WORDS = 500
"""Characters of a provider's error that are passed on; some answer with a whole HTML page."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the LLM samples; None takes the provider's default.

    Attributes:
        max_output_tokens: most tokens per answer.
        temperature: in [0, 2].
        top_p: in (0, 1].
        stop: strings that end an answer.
        seed: sample i of several separate calls gets seed + i.
    """

    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None


class Providers:
    """The configured APIs with their connections; an async context manager that closes them.

    Args:
        settings: `models` and `providers` are read, and the keys. A provider that serves no model
            is left alone.

    Attributes:
        models: the names that can be sampled from.

    Raises:
        ConfigInvalid: a key is missing; names the provider.
    """

    def __init__(self, settings: Settings) -> None:
        used = {served.provider for served in settings.models.values()}
        self._upstreams = {name: _Upstream(name, settings.providers[name]) for name in used}
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
                stack.push_async_callback(upstream.client.close)

    async def sample(
        self,
        model: str,
        prompt: Prompt,
        candidates: range,
        sampling: Sampling,
        emit: Callable[[Event], None],
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
        """
        served = self._served[model]
        upstream = self._upstreams[served.provider]
        request = upstream.request(served.upstream or model, prompt, sampling)
        if upstream.samples == "one_call":
            if len(candidates) > 1:
                request["n"] = len(candidates)
            await upstream.call(request, prompt, candidates, emit)
            return
        async with asyncio.TaskGroup() as calls:
            for position, candidate in enumerate(candidates):
                own = {} if sampling.seed is None else {"seed": sampling.seed + position}
                calls.create_task(upstream.call(request | own, prompt, [candidate], emit))


class _Upstream:
    """One API: its client, and a place for each call that it may have under way."""

    def __init__(self, name: str, settings: Provider) -> None:
        self._name = name
        self.samples = settings.samples
        try:
            key = settings.api_key()
        except ConfigInvalid as error:
            raise ConfigInvalid(f"[providers.{name}]: {error}") from error
        self._key = key.get_secret_value() if key else None
        # The client takes these from the environment and would send them to any host.
        self._headers = {"OpenAI-Organization": openai.omit, "OpenAI-Project": openai.omit}
        if self._key is None:
            self._headers["Authorization"] = openai.omit
        # OpenAI's newer models know only the new name, other servers often only the old one.
        is_openai = (settings.base_url.host or "").endswith((".openai.com", ".openai.azure.com"))
        self._limit = "max_completion_tokens" if is_openai else "max_tokens"
        self._places = asyncio.Semaphore(settings.max_concurrency)
        self.client = openai.AsyncOpenAI(
            base_url=str(settings.base_url),
            api_key=self._key or "none",  # the client insists on one; see the headers above
            max_retries=settings.max_retries,
            timeout=openai.Timeout(settings.read_timeout, connect=settings.connect_timeout),
            http_client=openai.DefaultAioHttpClient(),
        )
        # Named here, because it is imported when it is first named, and that takes 40 ms.
        self._completions = self.client.chat.completions

    def request(self, model: str, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        """The body of a call that draws one answer."""
        chosen = {
            self._limit: sampling.max_output_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": list(sampling.stop) or None,
            "seed": sampling.seed,
        }
        return {
            "model": model,
            "messages": [{"role": m.role, "content": m.content} for m in prompt.messages],
            "stream_options": {"include_usage": True},
            **{name: value for name, value in chosen.items() if value is not None},
        }

    async def call(
        self,
        request: dict[str, Any],
        prompt: Prompt,
        candidates: Sequence[int],
        emit: Callable[[Event], None],
    ) -> None:
        """Run one call, whose choices are the candidates."""
        completion = Completion(self._name, candidates, len(prompt.text))
        interruption: ProviderFailed | None = None
        try:
            # The client's retries, with the waits that Retry-After asks for, keep the place.
            async with (
                self._places,
                await self._completions.create(
                    **request, stream=True, extra_headers=self._headers
                ) as stream,
            ):
                completion.accepted = True
                async for chunk in stream:
                    for event in completion.read(chunk):
                        emit(event)
            hint = "; if it has no n, set samples = many_calls" if len(candidates) > 1 else ""
            interruption = self._failure("the stream ended without a finish_reason" + hint)
        except _FAILURES as error:
            interruption = self._failure(_words(error))
        finally:
            # Left at None: cancelled, or a bug on its way up.
            for ended in completion.end(interruption):
                emit(ended)

    def _failure(self, words: str) -> ProviderFailed:
        if self._key is not None:
            words = words.replace(self._key, "[api key]")
        return ProviderFailed(f"{self._name}: {words[:_LONGEST_WORDS]}")


def _words(error: Exception) -> str:
    """What a provider, or the way to it, says went wrong."""
    if isinstance(error, openai.APIStatusError):
        said = error.body.get("message") if isinstance(error.body, dict) else error.body
        return f"{error.status_code} {said or error.message}"
    if isinstance(error, ValueError):
        return f"a chunk that is no JSON: {error}"
    # The client calls a lost connection "Request timed out."; the cause knows what happened.
    cause = error.__cause__ or error
    return str(cause) or type(cause).__name__
