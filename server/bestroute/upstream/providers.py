"""Draws samples from LLMs behind OpenAI-compatible HTTP APIs, and bears with them."""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from bestroute.call import ANYBODY, Call
from bestroute.config import ServedModel, Settings
from bestroute.prompt import Prompt
from bestroute.upstream.api import Api
from bestroute.upstream.chat import Sampling
from bestroute.upstream.completion import Event
from bestroute.upstream.counts import UpstreamCounts
from bestroute.upstream.relay import Opened, Piece, Relayed

__all__ = ["Providers", "Sampling"]


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
        self._apis = {
            name: Api(name, settings.providers[name], settings.models, patient=patient)
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
            for api in self._apis.values():
                stack.push_async_callback(api.chat.close)

    def available(self, model: str) -> bool:
        """Whether a call to a model would be made now: one of `models` whose breaker isn't open."""
        served = self._served[model]
        breakers = self._apis[served.provider].breakers
        return breakers[served.upstream or model].admits

    def served(self, model: str) -> ServedModel | None:
        """Where a model is served; None: that isn't known."""
        return self._served.get(model)

    def counts(self) -> Mapping[str, UpstreamCounts]:
        """What has happened at each provider so far, by its name."""
        return {name: api.counted() for name, api in self._apis.items()}

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
        api = self._apis[served.provider]
        request = api.chat.request(served.upstream or model, prompt, sampling)
        if api.samples == "one_call":
            if len(candidates) > 1:
                request["n"] = len(candidates)
            await api.call(model, request, prompt, candidates, emit, call)
            return
        async with asyncio.TaskGroup() as calls:
            for position, candidate in enumerate(candidates):
                own = {} if sampling.seed is None else {"seed": sampling.seed + position}
                calls.create_task(api.call(model, request | own, prompt, [candidate], emit, call))

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
        api = self._apis[served.provider]
        await api.relay(model, served.upstream or model, request, first, emit, call)
