"""Parts of JSON texts and of streams: whatever they are, nothing but what is meant changes."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.gateway.members import members, with_member
from bestroute.upstream.whole_events import Events, data_of

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), VALUES)
HOW: Any = st.fixed_dictionaries(
    {
        "ensure_ascii": st.booleans(),
        "indent": st.sampled_from([None, 0, 2, "\t"]),
        "separators": st.sampled_from([(",", ":"), (" , ", "\r\n: "), (", ", ": ")]),
    }
)


@given(OBJECTS, HOW, st.text(" \t\r\n", max_size=3))
def test_members_are_where_they_are_said_to_be(
    value: dict[str, Any], how: dict[str, Any], blanks: str
) -> None:
    text = blanks + json.dumps(value, **how) + blanks
    found = members(text)

    assert {name: each.value for name, each in found.items()} == value
    assert all(json.loads(text[m.start : m.end]) == value[name] for name, m in found.items())


@given(OBJECTS, HOW, st.text(), VALUES)
def test_one_member_changes_and_no_other(
    value: dict[str, Any], how: dict[str, Any], name: str, new: Any
) -> None:
    text = json.dumps(value, **how)
    changed = with_member(text, name, new)

    assert json.loads(changed) == {**value, name: new}
    assert list(members(changed)) == list({**value, name: new})


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "1", "{", "}", '{"a"}', '{"a":}', '{"a":1,}', '{"a":1}}', '{"a":1} {}'),
        *("{1:2}", '{"a":1 "b":2}', '{"a":1,"a":2}', '{"a":1,"\\u0061":2}', '{,"a":1}', '{"a":1'),
    ],
)
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own, or one of ours like it
        members(text)


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
