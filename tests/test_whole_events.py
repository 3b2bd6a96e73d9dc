"""Server-sent events with all their bytes."""

from hypothesis import given
from hypothesis import strategies as st

from bestroute.upstream.whole_events import Events, data_of


@given(
    st.lists(st.sampled_from([b"data: 1", b": x", b"event: y", b"data:", b"data: \xc3\xa9"])),
    st.lists(st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n"]), min_size=1),
    st.lists(st.integers(1, 5), min_size=1),
)
def test_events_are_the_same_however_they_are_cut(
    lines: list[bytes], ends: list[bytes], sizes: list[int]
) -> None:
    stream = b"".join(line + ends[i % len(ends)] for i, line in enumerate(lines))
    events, found, at, turn = Events(), list[bytes](), 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        found += events.feed(stream[at : at + size])
        at, turn = at + size, turn + 1

    assert b"".join(found) + bytes(events.rest) == stream
    told = [line.partition(b":")[2].strip() for line in lines if line.startswith(b"data:")]
    said = [data_of(event) for event in (*found, bytes(events.rest))]
    assert [each for each in said if each] == [each for each in told if each]
