"""One chat completion over HTTP: what is sent, how long is waited, what went wrong."""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from bestroute.config import Provider
from bestroute.errors import Page
from bestroute.prompt import Prompt
from bestroute.upstream.completion import Completion, Event
from bestroute.upstream.failures import CallFailed, Reason, error_words, refusal
from bestroute.upstream.retries import asked_wait
from bestroute.upstream.sse import MAX_EVENT, EventStream

_LAST_WORDS = 5.0
"""Seconds that are waited for the usage of answers that are complete."""
_LINGERING = 0.1
"""Seconds that a stream may take to end after its last event; its connection can then be reused."""
_ERROR_PAGE = 1 << 16
"""Bytes of an error that are read, in at most so many seconds: """
_ERROR_WAIT = 2.0

FAILURES = (
    aiohttp.ClientError,
    OSError,  # TimeoutError is one
    ValueError,  # of JSON and of UTF-8
    RecursionError,  # of JSON as deep as no chunk is
    CallFailed,
)
"""What a call can end with; see `failure_of`."""


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


class Chat:
    """The chat completions of one API; its connections are opened as they are needed.

    Args:
        settings: of the provider.
        key: that it wants to see; None: it wants none.

    Attributes:
        host: where it is, and
        port: which.
    """

    def __init__(self, settings: Provider, key: str | None) -> None:
        base = URL(str(settings.base_url))
        self._url = base.joinpath("chat", "completions").with_query(base.query)
        self.host, self.port = base.host or "", base.port or 0
        self._settings = settings
        self._key = key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        # OpenAI's newer models know only the new name, other servers often only the old one.
        is_openai = self.host.endswith((".openai.com", ".openai.azure.com"))
        self._limit = "max_completion_tokens" if is_openai else "max_tokens"
        self._session: aiohttp.ClientSession | None = None

    def without_key(self, page: bytes) -> bytes:
        """What the provider says, but for the key, should it repeat that."""
        return page.replace(self._key.encode(), b"[api key]") if self._key else page

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

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
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in chosen.items() if value is not None},
        }

    async def draw(
        self,
        request: Mapping[str, Any],
        headers: Mapping[str, str],
        completion: Completion,
        emit: Callable[[Event], None],
    ) -> None:
        """Make the call and feed the completion what comes.

        Args:
            request: the body.
            headers: to send along.
            completion: that the call's answers are read into.
            emit: is called with what is new.

        Raises:
            CallFailed: an answer is not complete. Whatever happens after all are is no failure.
        """
        patience = Patience(self._settings, completion)
        try:
            async with patience.limit:
                await self._draw(request, headers, completion, emit, patience)
        except FAILURES as error:
            if not completion.finished:
                raise failure_of(error, patience) from error

    async def _draw(
        self,
        request: Mapping[str, Any],
        headers: Mapping[str, str],
        completion: Completion,
        emit: Callable[[Event], None],
        patience: "Patience",
    ) -> None:
        patience.renew()
        async with self.post(headers, json=request) as response:
            content = response.content
            if response.status != 200:
                raise await self.refused(response)
            completion.accepted = True
            piece = await patience.read(content)
            # What it is shows in the first byte; servers give it all kinds of types.
            opening = piece.lstrip()[:1]
            if opening == b"<":
                completion.accepted = False
                raise CallFailed(Reason.MALFORMED, "a web page instead of an answer")
            if opening == b"{":
                for event in completion.read(json.loads(await _whole(piece, content, patience))):
                    emit(event)
            else:
                stream = EventStream()
                while piece:
                    for data in stream.feed(piece):
                        if data.startswith(b"[DONE]"):
                            await linger(content)
                            piece = b""
                            break
                        if data.strip():
                            for event in completion.read(json.loads(data)):
                                emit(event)
                    else:
                        piece = await patience.read(content)
        if not completion.finished:
            raise incomplete(completion)

    async def refused(self, response: aiohttp.ClientResponse) -> CallFailed:
        """What a status other than 200 says, with its page where that is for the caller."""
        body = await error_page(response)
        failure = refusal_of(response, body)
        asked = failure.reason is Reason.REJECTED and not failure.faulty and response.status >= 400
        if asked or failure.reason is Reason.RATE_LIMITED:
            failure.page = Page(
                response.status,
                response.headers.get("Content-Type", "application/json"),
                self.without_key(body),
                response.headers.get("Retry-After", ""),
                final=asked,
            )
        return failure

    def post(
        self, headers: Mapping[str, str], **body: Any
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Make a call, with the key: `json` or `data` is its body."""
        return self._open().post(
            self._url,
            headers={**self._headers, **headers},
            # Followed, a key would go wherever the provider says.
            allow_redirects=False,
            **body,
        )

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # How many there may be at once is for the caller to say.
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(connect=self._settings.connect_timeout),
                cookie_jar=aiohttp.DummyCookieJar(),
                # Else it would look for a proxy before every call, on a thread.
                trust_env=_has_proxy(self._url),
            )
        return self._session


def _has_proxy(url: URL) -> bool:
    """Whether the environment names a proxy for a host."""
    return url.scheme in getproxies() and not proxy_bypass(url.host or "")


class Patience:
    """How long is waited for what comes next.

    Attributes:
        limit: to be entered around the call.
        words: what has happened if it expires.
    """

    def __init__(self, settings: Provider, completion: Completion) -> None:
        self._settings, self._completion = settings, completion
        self._clock = asyncio.get_running_loop().time
        self._begun = self._clock()
        self._finished: float | None = None
        self.limit = asyncio.timeout(None)
        self.words = ""

    def renew(self) -> None:
        """Wait for the next bytes from now on."""
        settings, now = self._settings, self._clock()
        first = settings.first_token_timeout
        if self._completion.finished:
            self._finished = self._finished or now
            until, words = self._finished + _LAST_WORDS, ""  # no failure
        elif first is not None and self._completion.untouched:
            until, words = self._begun + first, f"no text within {first:g} s"
        else:
            until = now + settings.read_timeout
            words = f"silence for {settings.read_timeout:g} s"
        end = self._begun + settings.max_answer_seconds
        if end < until:
            until, words = end, f"not done within {settings.max_answer_seconds:g} s"
        self.words = words
        self.limit.reschedule(until)

    async def read(self, content: aiohttp.StreamReader) -> bytes:
        """The next bytes; none at the end."""
        self.renew()
        return await content.readany()


async def _whole(piece: bytes, content: aiohttp.StreamReader, patience: Patience) -> bytes:
    """A body that is no stream."""
    body = bytearray(piece)
    while piece:
        piece = await patience.read(content)
        body += piece
        if len(body) > MAX_EVENT:
            raise CallFailed(Reason.MALFORMED, f"an answer of more than {MAX_EVENT} bytes")
    return bytes(body)


async def linger(content: aiohttp.StreamReader) -> None:
    """Wait a moment for the end of a stream that has said all."""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(_LINGERING):
            while await content.readany():
                pass


async def error_page(response: aiohttp.ClientResponse) -> bytes:
    """The body under a status other than 200, as far as it comes soon."""
    body = bytearray()
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(_ERROR_WAIT):
            while len(body) < _ERROR_PAGE and (piece := await response.content.readany()):
                body += piece
    return bytes(body[:_ERROR_PAGE])


def refusal_of(response: aiohttp.ClientResponse, body: bytes) -> CallFailed:
    """What a status other than 200 says, with its body."""
    words = response.reason or ""
    text = body.decode(errors="replace").strip()
    try:
        words = error_words(json.loads(text)) or words
    except (ValueError, RecursionError):
        # Of a web page the status says as much.
        words = words if text.startswith("<") else text or words
    if location := response.headers.get("Location"):
        words += f": it is at {location} now; set base_url"
    return refusal(response.status, words, asked_wait(response.headers, time.time()))


def incomplete(completion: Completion) -> CallFailed:
    """The failure of a stream that has ended before its answers have."""
    hint = "; if it has no n, set samples = many_calls" if completion.choices > 1 else ""
    return CallFailed(
        Reason.INCOMPLETE,
        "the stream ended without a finish_reason" + hint,
        transient=True,
        faulty=not completion.finish_reasons,
    )


def failure_of(error: Exception, patience: Patience) -> CallFailed:
    """What went wrong, in the words of whoever knows."""
    match error:
        case CallFailed():
            return error
        case TimeoutError() if patience.limit.expired():
            return CallFailed(Reason.TIMEOUT, patience.words)
        case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
            return CallFailed(Reason.UNREACHABLE, str(error), transient=True)
        case aiohttp.ClientResponseError():
            return CallFailed(Reason.MALFORMED, f"no HTTP: {error.message}")
        case aiohttp.ClientError() | OSError():
            return CallFailed(Reason.LOST, str(error) or type(error).__name__, transient=True)
        case _:
            return CallFailed(Reason.MALFORMED, f"a chunk that is no JSON: {error}")
