"""A request's JSON with another model's name in it: every other byte stays."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.processing.body import read

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("given", "rewritten"),
    [
        (b'{"model":"a"}', b'{"model":"new"}'),
        (
            b' {\r\n "n" : 1.50 ,\t"model" :  "a" , "x":"\\u00e9\xc3\xa9" }\n',
            b' {\r\n "n" : 1.50 ,\t"model" :  "new" , "x":"\\u00e9\xc3\xa9" }\n',
        ),
        # The name is the object's own, not one that a text or another object has.
        (
            b'{"x":{"model":"b"},"y":"\\"model\\":\\"c\\"","model":"a"}',
            b'{"x":{"model":"b"},"y":"\\"model\\":\\"c\\"","model":"new"}',
        ),
        # Whichever of several a reader takes, it is the one that was decided.
        (b'{"model":"a","mod\\u0065l":"b"}', b'{"model":"new","mod\\u0065l":"new"}'),
    ],
)
def test_only_the_models_name_is_another(given: bytes, rewritten: bytes) -> None:
    body = read(given)

    assert body is not None
    assert body.asking("new") == rewritten


@given(st.dictionaries(st.text().filter(lambda key: key != "model"), JSON), st.text(), st.text())
def test_any_request_stays_itself(request: dict[str, Any], model: str, other: str) -> None:
    for indent, ascii_only in ((None, True), (2, False)):
        asked = json.dumps({**request, "model": model}, indent=indent, ensure_ascii=ascii_only)
        body = read(asked.encode(errors="replace"))

        assert body is not None
        assert body.model == json.loads(asked.encode(errors="replace"))["model"]
        found = json.loads(body.asking(other))
        assert found == {**json.loads(asked.encode(errors="replace")), "model": other}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"[]",
        b'"model"',
        b"{",
        b"{}",
        b'{"model":null}',
        b'{"model":["a"]}',
        b'{"model":"a"',
        b'{"model":"a",}',
        b'{"model" "a"}',
        b'{"model":"a"}{}',
        b'{1:2,"model":"a"}',
        b'{"model":"a","x":\xff}',
        b'\xef\xbb\xbf{"model":"a"}',
        '{"model":"a"}'.encode("utf-16"),
        b'{"model":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model":"a","x":' + b"1" * 10_000 + b"}",
        b"\x1f\x8b\x08\x00",
    ],
)
def test_what_is_no_request_is_left_to_the_upstream(data: bytes) -> None:
    assert read(data) is None
