"""Server-sent events out of bytes, in pieces of any size. Pure.

https://html.spec.whatwg.org/multipage/server-sent-events.html, the part that carries data: event
types, ids and retry times are of no use here.
"""

from collections.abc import Iterator

from bestroute.upstream.failures import CallFailed, Reason

MAX_EVENT = 1 << 20
"""Bytes of one event. Beyond all answers that come in one piece, and parsed in milliseconds."""

_BOM = b"\xef\xbb\xbf"


class EventStream:
    """A stream of events; feed it what comes."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[bytes] = []
        self._size = 0  # of the event so far
        self._after_cr = False
        self._begun = False

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Take in the next bytes and give the data of each event that they complete.

        Raises:
            CallFailed: an event is longer than `MAX_EVENT`.
        """
        for part in piece.splitlines(keepends=True):
            if self._after_cr and part == b"\n":  # the rest of a line's end that was cut in two
                self._after_cr = False
                continue
            self._line += part
            if len(self._line) + self._size > MAX_EVENT:
                raise CallFailed(
                    Reason.MALFORMED, f"an event of more than {MAX_EVENT} bytes in the stream"
                )
            self._after_cr = part.endswith(b"\r")
            if not part.endswith((b"\r", b"\n")):
                return  # only the last part can be
            line = bytes(self._line).rstrip(b"\r\n")
            self._line.clear()
            if not self._begun:
                self._begun, line = True, line.removeprefix(_BOM)
            if line:
                self._take(line)
            elif self._data:
                yield b"\n".join(self._data)
                self._data.clear()
                self._size = 0

    def _take(self, line: bytes) -> None:
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
            self._size += len(value)
