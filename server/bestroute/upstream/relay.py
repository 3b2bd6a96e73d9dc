"""A caller's own request, passed on as it is, and the answer as it comes: bytes in, bytes out.

What passes is read along the way, for what it says of tokens and ends, and never written anew.
"""

import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import aiohttp

from bestroute.config import Provider
from bestroute.errors import Page
from bestroute.upstream.chat import (
    FAILURES,
    Chat,
    Patience,
    error_page,
    failure_of,
    incomplete,
    linger,
    refusal_of,
)
from bestroute.upstream.completion import Ended, Event
from bestroute.upstream.failures import CallFailed, Reason
from bestroute.upstream.heard import Heard
from bestroute.upstream.whole_events import MAX_BODY, Events, data_of

_DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Relayed:
    """A request to pass on: JSON but for the model's name, which each provider has its own for.

    Attributes:
        before: the body up to that name, and
        after: from there on.
        choices: how many answers it asks for.
        prompt_characters: length of its texts.
    """

    before: bytes
    after: bytes
    choices: int
    prompt_characters: int

    def body(self, model: str) -> bytes:
        """What is sent."""
        return b"".join((self.before, json.dumps(model).encode(), self.after))


@dataclass(frozen=True, slots=True)
class Opened:
    """A provider answers; from now on no other will.

    Attributes:
        model: whose answer it is, by the pool's name.
        content_type: as the provider says it.
        request_id: that the provider knows the call by; "" if it doesn't say.
    """

    model: str
    content_type: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer, as it came.

    Attributes:
        raw: its bytes; of a stream whole events with their ends.
        ended: of the part that says for the last time what was used, all choices; else none.
        alone: whether the part says nothing else.
    """

    raw: bytes
    ended: Sequence[Ended] = ()
    alone: bool = False


async def relay(
    chat: Chat,
    settings: Provider,
    model: str,
    body: bytes,
    headers: Mapping[str, str],
    heard: Heard,
    emit: Callable[[Event | Opened | Piece], None],
) -> None:
    """Make a call and pass on what comes; until something has come of the answer, nothing passes.

    Args:
        chat: the provider's.
        settings: likewise.
        model: by the pool's name.
        body: to send.
        headers: to send along.
        heard: takes in what passes.
        emit: is called with `Opened`, and then with each `Piece`.

    Raises:
        CallFailed: the answer is not complete; nothing has passed if `heard` is untouched.
    """
    patience = Patience(settings, heard)
    try:
        async with patience.limit:
            patience.renew()
            async with chat.post(
                headers={"Content-Type": "application/json", **headers}, data=body
            ) as response:
                if response.status != 200:
                    raise await _refused(response, chat)
                await _pass(response, model, heard, emit, patience)
    except FAILURES as error:
        if not heard.finished:
            raise failure_of(error, patience) from error


async def _pass(
    response: aiohttp.ClientResponse,
    model: str,
    heard: Heard,
    emit: Callable[[Event | Opened | Piece], None],
    patience: Patience,
) -> None:
    heard.accepted, content = True, response.content
    opened = Opened(
        model,
        response.headers.get("Content-Type", "application/json"),
        response.headers.get("x-request-id", ""),
    )
    raw = await patience.read(content)
    opening = raw.lstrip()[:1]
    if opening == b"<":
        heard.accepted = False
        raise CallFailed(Reason.MALFORMED, "a web page instead of an answer")
    if opening == b"{":
        raw = await _whole(raw, response, patience)
        heard.hear(said := json.loads(raw))
        if heard.untouched:
            raise CallFailed(Reason.MALFORMED, "an answer without choices")
        heard.complete()
        emit(opened)
        emit(Piece(raw, heard.ends() if isinstance(said.get("usage"), dict) else ()))
        return
    passing = _Passing(opened, emit)
    async with aclosing(_reads(raw, content, patience)) as reads:
        async for events in reads:
            if any([_take(event, heard, passing) for event in events]):
                passing.on(touched=True)
                await linger(content)
                break
            passing.on(touched=not heard.untouched)
    if not heard.finished:
        raise incomplete(heard)


def _take(event: bytes, heard: Heard, passing: "_Passing") -> bool:
    """Take in an event; tells whether it is the last."""
    data = data_of(event)
    done = data.startswith(_DONE)
    final = alone = False
    if done:
        heard.complete()
    elif data:
        final, alone = heard.hear(json.loads(data.decode()))
    if final:
        passing.add(Piece(event, heard.ends(), alone))
    else:
        passing.raw += event
    return done


class _Passing:
    """Passes on what came at once at once, from when something of the answer has come.

    Args:
        opened: is emitted before anything else.
        emit: passes on.

    Attributes:
        raw: events that have come, and say nothing that has to be told apart.
    """

    def __init__(self, opened: Opened, emit: Callable[[Opened | Piece], None]) -> None:
        self.raw = bytearray()
        self._opened: Opened | None = opened
        self._emit, self._pieces = emit, list[Piece]()

    def add(self, piece: Piece) -> None:
        """Take in a piece, behind what came before it."""
        if self.raw:
            self._pieces.append(Piece(bytes(self.raw)))
            self.raw.clear()
        self._pieces.append(piece)

    def on(self, *, touched: bool) -> None:
        """Pass on what has come, if something of the answer has."""
        if not touched:
            return
        if self._opened is not None:
            self._emit(self._opened)
            self._opened = None
        for piece in self._pieces:
            self._emit(piece)
        if self.raw:
            self._emit(Piece(bytes(self.raw)))
        self._pieces.clear()
        self.raw.clear()


async def _reads(
    raw: bytes, content: aiohttp.StreamReader, patience: Patience
) -> AsyncGenerator[list[bytes], None]:
    """The events of a stream that begins with these bytes, as they come; last what is left."""
    events = Events()
    while raw:
        yield events.feed(raw)
        raw = await patience.read(content)
    if events.rest:
        yield [bytes(events.rest)]


async def _whole(raw: bytes, response: aiohttp.ClientResponse, patience: Patience) -> bytes:
    """A body that is no stream."""
    if response.content_length == len(raw):
        return raw
    body = bytearray(raw)
    while raw := await patience.read(response.content):
        body += raw
        if len(body) > MAX_BODY:
            raise CallFailed(Reason.MALFORMED, f"an answer of more than {MAX_BODY} bytes")
    return bytes(body)


async def _refused(response: aiohttp.ClientResponse, chat: Chat) -> CallFailed:
    """What a status other than 200 says, with its page where that is for the caller."""
    body = await error_page(response)
    failure = refusal_of(response, body)
    asked = failure.reason is Reason.REJECTED and not failure.faulty and response.status >= 400
    if asked or failure.reason is Reason.RATE_LIMITED:
        failure.page = Page(
            response.status,
            response.headers.get("Content-Type", "application/json"),
            chat.without_key(body),
            response.headers.get("Retry-After", ""),
            final=asked,
        )
    return failure
