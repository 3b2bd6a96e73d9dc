"""Parts of JSON texts: whatever these are, nothing but what is meant changes."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.members import members, members_by_name, with_member, with_value

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
    found = members_by_name(text)

    assert list(members(text)) == list(found.values())
    assert {name: each.value for name, each in found.items()} == value
    assert all(json.loads(text[m.start : m.end]) == value[name] for name, m in found.items())


@given(OBJECTS, HOW, st.text(), VALUES)
def test_one_member_changes_and_no_other(
    value: dict[str, Any], how: dict[str, Any], name: str, new: Any
) -> None:
    text = json.dumps(value, **how)
    changed = with_member(text, name, new)

    assert json.loads(changed) == {**value, name: new}
    assert list(members_by_name(changed)) == list({**value, name: new})


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "1", "{", "}", '{"a"}', '{"a":}', '{"a":1,}', '{"a":1}}', '{"a":1} {}'),
        *("{1:2}", '{"a":1 "b":2}', '{,"a":1}', '{"a":1'),
    ],
)
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - json's own, or one of ours like it
        list(members(text))


@given(st.lists(st.tuples(st.sampled_from("abc"), VALUES)), VALUES, HOW)
def test_of_members_of_one_name_each_is_found_and_changed(
    pairs: list[tuple[str, Any]], new: Any, how: dict[str, Any]
) -> None:
    inner = ",".join(f"{json.dumps(name)}: {json.dumps(value, **how)}" for name, value in pairs)
    found = list(members(text := f"{{{inner}}}"))

    assert [(each.name, each.value) for each in found] == pairs
    changed = with_value(text, [each for each in found if each.name == "a"], new)
    expected = [(name, new if name == "a" else value) for name, value in pairs]
    assert [(each.name, each.value) for each in members(changed)] == expected


@pytest.mark.parametrize("text", ['{"a":1,"a":2}', '{"a":1,"\\u0061":2}'])
def test_by_name_there_is_one_of_each(text: str) -> None:
    with pytest.raises(ValueError, match="'a' for the second time"):
        members_by_name(text)
    with pytest.raises(ValueError, match="'a' for the second time"):
        with_member(text, "b", 1)
