"""What a request's metadata says of the trace that it belongs to. Pure.

The format is W3C Trace Context, https://www.w3.org/TR/trace-context/.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
_SAMPLED = 1


class Parent(NamedTuple):
    """The caller's span.

    Attributes:
        trace_id: 32 lower-case hexadecimal digits.
        span_id: 16 of them.
        sampled: whether the caller records its spans.
        state: of the tracing systems on the way, the value of `tracestate`.
    """

    trace_id: str
    span_id: str
    sampled: bool
    state: str


def parent(metadata: Iterable[Any]) -> Parent | None:
    """The caller's span; None if the metadata has none, several, or one that is malformed.

    Args:
        metadata: pairs of lower-case names and values.
    """
    found = state = ""
    for key, value in metadata:
        if key == "traceparent":
            if found:
                return None
            found = value
        elif key == "tracestate":
            state = f"{state},{value}" if state else value
    if not found or not (match := _TRACEPARENT.fullmatch(found)):
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if more is not None and version == "00":
        return None
    return Parent(trace_id, span_id, bool(int(flags, 16) & _SAMPLED), state)
