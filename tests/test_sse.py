"""Server-sent events out of bytes that come in any pieces."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.upstream import sse
from bestroute.upstream.failures import CallFailed
from bestroute.upstream.sse import EventStream


def read(stream: bytes, cuts: list[int] | None = None) -> list[bytes]:
    """All events of a stream that comes cut at these places."""
    events = EventStream()
    edges = [0, *sorted(c for c in cuts or () if 0 < c < len(stream)), len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(edges)]
    return [event for piece in pieces for event in events.feed(piece)]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        pytest.param(b"data: a\n\ndata: b\n\n", [b"a", b"b"], id="lf"),
        pytest.param(b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"], id="crlf"),
        pytest.param(b"data: a\r\rdata: b\r\r", [b"a", b"b"], id="cr"),
        pytest.param(b"data: a\ndata: b\n\n", [b"a\nb"], id="several-lines"),
        pytest.param(b"data: a\r\ndata: b\r\n\r\n", [b"a\nb"], id="several-lines-crlf"),
        pytest.param(b"data:a\n\ndata:  b\n\n", [b"a", b" b"], id="one-blank-at-most"),
        pytest.param(b": keep-alive\n\ndata: a\n\n", [b"a"], id="comment"),
        pytest.param(b"event: x\nid: 1\nretry: 9\ndata: a\n\n", [b"a"], id="other-fields"),
        pytest.param(b"\xef\xbb\xbfdata: a\n\n", [b"a"], id="byte-order-mark"),
        pytest.param(b"\x00\xff garbage\n\ndata: a\n\n", [b"a"], id="garbage-between"),
        pytest.param(b"data\n\n", [b""], id="no-value"),
        pytest.param(b"data: a\n", [], id="cut-off"),
        pytest.param(b"\n\n\r\n", [], id="blank"),
    ],
)
def test_a_stream_is(stream: bytes, expected: list[bytes]) -> None:
    assert read(stream) == expected
    assert read(stream, list(range(len(stream)))) == expected


_LINES = st.sampled_from([b"data: x", b"data:", b"data: \xc3\xa4", b": c", b"event: e", b"", b""])


@given(
    lines=st.lists(st.tuples(_LINES, st.sampled_from([b"\n", b"\r\n", b"\r"]))),
    cuts=st.lists(st.integers(0, 300)),
)
def test_pieces_do_not_matter(lines: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    stream = b"".join(line + end for line, end in lines)

    assert read(stream, cuts) == read(stream)


def test_many_events_may_be_longer_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT", 100)

    assert len(read(b"data: twenty characters in it\n\n" * 50)) == 50


@pytest.mark.parametrize("line", [b"data: " + b"x" * 200, b"data: x\n" * 50, b"x" * 200])
def test_an_event_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch, line: bytes) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT", 100)
    with pytest.raises(CallFailed, match="an event of more than 100 bytes"):
        read(line, list(range(0, len(line), 7)))
