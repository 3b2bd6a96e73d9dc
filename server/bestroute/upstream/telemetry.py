"""What is told of each call to a provider: counts, and a span of the caller's trace."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from bestroute.call import Attributes, Call
from bestroute.errors import ProviderFailed
from bestroute.upstream.chat import Chat
from bestroute.upstream.completion import Completion
from bestroute.upstream.counts import UpstreamCounts
from bestroute.upstream.failures import CallFailed, Reason
from bestroute.upstream.usage import Usage


class Asked(NamedTuple):
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


class CallTelemetry:
    """Counts the calls to one provider, and traces them.

    Args:
        provider: its name.
        chat: where it is.
        failure: how what goes wrong is told.

    Attributes:
        counts: what has happened so far.
    """

    def __init__(
        self, provider: str, chat: Chat, failure: Callable[[CallFailed], ProviderFailed]
    ) -> None:
        self._provider, self._chat, self._failure = provider, chat, failure
        self.counts = UpstreamCounts()

    @asynccontextmanager
    async def around(
        self, asked: Asked, completion: Completion, call: Call
    ) -> AsyncIterator[Mapping[str, str]]:
        """Count a call and trace it; gives the headers that carry the trace on."""
        counts, error = self.counts, None
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

    def _attributes(self, asked: Asked) -> Attributes:
        """A call's attributes, by OpenTelemetry's conventions for generative AI."""
        return {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": self._provider,
            "gen_ai.request.model": asked.name,
            "gen_ai.request.choice.count": asked.choices,
            "server.address": self._chat.host,
            "server.port": self._chat.port,
        }


def _answered(completion: Completion, usage: Usage) -> Attributes:
    attributes: dict[str, str | int | float | bool] = {
        "gen_ai.usage.input_tokens": usage.input_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
    }
    if completion.finish_reasons:
        attributes["gen_ai.response.finish_reasons"] = ",".join(completion.finish_reasons)
    return attributes
