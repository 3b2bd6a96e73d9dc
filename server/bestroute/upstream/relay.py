"""A caller's own request, passed on as it is, and the answer as it comes: bytes in, bytes out.

What passes is read along the way, for what it says of tokens and ends, and never written anew.
"""

import io
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import aiohttp

from bestroute.config import Provider
from bestroute.upstream.chat import (
    FAILURES,
    Chat,
    Patience,
    failure_of,
    incomplete,
    linger,
)
from bestroute.upstream.completion import Ended, Event
from bestroute.upstream.failures import CallFailed, Reason
from bestroute.upstream.heard import Heard
from bestroute.upstream.whole_answers import as_chunk
from bestroute.upstream.whole_events import MAX_BODY, Events, data_of

_DONE = b"[DONE]"
_BOM = b"\xef\xbb\xbf"
_LARGE = 1 << 16
"""Bytes of a body from which writing it at once would hold up the event loop."""
_STREAM = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Relayed:
    """A request to pass on: JSON but for the model's name, which each provider has its own for.

    Attributes:
        before: the body up to that name, and
        after: from there on.
        choices: how many answers it asks for.
        stream: whether it asks for a stream.
        prompt_characters: length of its texts.
    """

    before: bytes
    after: bytes
    choices: int
    stream: bool
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
    *,
    stream: bool,
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
        stream: whether a stream was asked for; it is then one that passes, whatever comes.

    Raises:
        CallFailed: the answer is not complete; nothing has passed if `heard` is untouched.
    """
    patience = Patience(settings, heard)
    try:
        async with patience.limit:
            patience.renew()
            async with chat.post(
                headers={"Content-Type": "application/json", **headers},
                # As a file it is written piece by piece; small ones take less time as they are.
                data=io.BytesIO(body) if len(body) > _LARGE else body,
            ) as response:
                if response.status != 200:
                    raise await chat.refused(response)
                await _pass(response, model, heard, emit, patience, stream=stream)
    except FAILURES as error:
        if not heard.finished:
            raise failure_of(error, patience) from error


async def _pass(
    response: aiohttp.ClientResponse,
    model: str,
    heard: Heard,
    emit: Callable[[Event | Opened | Piece], None],
    patience: Patience,
    *,
    stream: bool,
) -> None:
    heard.accepted, content = True, response.content
    raw = await _opening(content, patience)
    opening = raw[:1]
    kind = "application/json" if opening == b"{" else _STREAM
    opened = Opened(
        model,
        response.headers.get("Content-Type", kind),
        response.headers.get("x-request-id", ""),
    )
    if opening == b"<":
        heard.accepted = False
        raise CallFailed(Reason.MALFORMED, "a web page instead of an answer")
    if opening == b"{":
        raw = await _whole(raw, response, patience)
        heard.hear(said := json.loads(raw))
        if heard.untouched:
            raise CallFailed(Reason.MALFORMED, "an answer without choices")
        heard.complete()
        ended = heard.ends() if isinstance(said.get("usage"), dict) else ()
        if stream:  # of anything else OpenAI's clients read nothing, and find no fault
            emit(replace(opened, content_type=_STREAM))
            emit(Piece(_event(as_chunk(said)), ended))
            emit(Piece(_event(_DONE)))
        else:
            emit(opened)
            emit(Piece(raw, ended))
        return
    passing = _Passing(opened, emit)
    async with aclosing(_reads(raw, content, patience)) as reads:
        async for events in reads:
            try:
                done = any([_take(event, heard, passing) for event in events])
            except Exception:
                # What came before the fault is no less good for it, unless another may answer.
                passing.on(touched=heard.finished or passing.begun)
                raise
            if done:
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
        if heard.untouched:
            raise CallFailed(Reason.MALFORMED, "a stream without an answer")
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

    @property
    def begun(self) -> bool:
        """Whether anything has been passed on."""
        return self._opened is None

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


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


async def _opening(content: aiohttp.StreamReader, patience: Patience) -> bytes:
    """The first bytes of an answer; until it is ready some servers send empty lines."""
    while piece := await patience.read(content):
        if raw := piece.lstrip().removeprefix(_BOM):
            return raw
    return b""


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
