"""Server-sent events out of bytes, each with all its bytes, to be passed on. Pure; see `sse`."""

import re

from bestroute.upstream.failures import CallFailed, Reason

MAX_BODY = 1 << 25
"""Bytes of an answer in one piece, or of one event: room for a picture in it."""

_END_OF_EVENT = re.compile(rb"\r?\n(?:\r?\n|\r(?!\n))|\r\r\n?")
"""Two ends of lines, of either kind each: twice as fast as saying just that."""
_LONGEST_END = 4


class Events:
    """Server-sent events out of bytes, each with all its bytes; see `sse` for reading them alone.

    Attributes:
        rest: what has come of an event that is not complete.
    """

    def __init__(self) -> None:
        self.rest = bytearray()

    def feed(self, raw: bytes) -> list[bytes]:
        """Take in the next bytes; gives the events that they complete, their ends included.

        Raises:
            CallFailed: an event is longer than `MAX_BODY`.
        """
        searched = max(0, len(self.rest) - _LONGEST_END)
        self.rest += raw
        begin, found = 0, []
        while end := _END_OF_EVENT.search(self.rest, max(begin, searched)):
            found.append(bytes(self.rest[begin : end.end()]))
            begin = end.end()
        del self.rest[:begin]
        if len(self.rest) > MAX_BODY:
            raise CallFailed(Reason.MALFORMED, f"an event of more than {MAX_BODY} bytes")
        return found


def data_of(event: bytes) -> bytes:
    """The data of an event, by its bytes; none of a comment."""
    lines = (line.removeprefix(b"data:") for line in event.splitlines() if line[:5] == b"data:")
    return b"\n".join(lines).strip()
