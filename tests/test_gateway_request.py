"""What is read out of a request, and what of it is passed on; whatever it is, nothing breaks."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.config import Server
from bestroute.errors import InvalidRequest
from bestroute.gateway.errors import UnknownModel, fault
from bestroute.gateway.request import wanted
from bestroute.upstream.providers import Sampling

ODD: Any = st.recursive(
    st.sampled_from(
        [None, True, False, 0, 1, -1, 1.5, 10**30, "", "x", "\ud800", "bestroute/auto"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
CONTENT = ODD | st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url", 1]) | ODD, "text": ODD})
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "tool", "poet"]) | ODD, "content": CONTENT}
)
BODY = st.fixed_dictionaries(
    {"model": st.sampled_from(["bestroute/auto", "bestroute/drop-1%", "small"]) | ODD},
    optional={
        "messages": st.lists(MESSAGE | ODD, max_size=3) | ODD,
        **{
            name: ODD
            for name in (
                *("stream", "stream_options", "n", "temperature", "top_p", "stop", "seed"),
                *("max_tokens", "logprobs", "response_format", "tools", "x"),
            )
        },
    },
)
NAMES = ("target", "max-samples", "max-cost-usd", "models", "escalate", "session", "sticky")
HEADERS = st.dictionaries(
    st.sampled_from([f"x-bestroute-{name}" for name in NAMES]),
    st.sampled_from(
        ["", "1", "0", "true", "auto", "drop-1%", "bestroute/x", "nan", "é" * 300, "²"]
    ),
)


@given(BODY, HEADERS)
def test_whatever_is_asked_is_read_or_refused(body: Any, headers: dict[str, str]) -> None:
    try:
        found = wanted(json.dumps(body).encode(), headers, Server())
    except (InvalidRequest, UnknownModel) as error:
        json.loads(fault(error).body)
        return
    found.prompt.text.encode()  # every half of a character is gone
    hash(found.policy)  # policies are remembered
    sent = json.loads(found.own.body("theirs"))
    if found.stream and not found.usage:
        asked = body.get("stream_options")
        options = {**(asked if isinstance(asked, dict) else {}), "include_usage": True}
        assert sent.pop("stream_options") == options
        body.pop("stream_options", None)
    assert sent == {**body, "model": "theirs"}


@given(st.binary() | ODD.map(json.dumps).map(str.encode))
def test_bytes_that_are_no_request_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        wanted(body, {}, Server())


def asked(**more: Any) -> Any:
    body = {"model": "bestroute/auto", "messages": [{"role": "user", "content": "x"}], **more}
    return wanted(json.dumps(body).encode(), {}, Server())


@pytest.mark.parametrize("role", [["user"], {}, None, 3, "poet", "user"])
def test_turns_of_any_role_pass(role: Any) -> None:
    """What is no role is for the LLM to refuse; it is decided by the other turns."""
    found = asked(messages=[{"role": "user", "content": "x"}, {"role": role, "content": "y"}])

    assert found.prompt.text.count("y") == (role == "user")
    assert json.loads(found.own.body("theirs"))["messages"][1] == {"role": role, "content": "y"}


def test_sampling_is_read() -> None:
    named = {"temperature": 0, "top_p": 0.5, "seed": 7}

    assert asked(**named, stop="a", max_tokens=5).sampling == Sampling(5, 0, 0.5, ("a",), 7)
    assert asked(stop=["a", "b"], max_completion_tokens=6, max_tokens=5).sampling == Sampling(
        6, stop=("a", "b")
    )


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("options", [None, {}, {"include_usage": True}, {"include_usage": False}])
@pytest.mark.parametrize("first", [True, False])
def test_usage_is_asked_for_in_every_stream(stream: bool, options: Any, first: bool) -> None:
    told = {"stream_options": options}
    model = {"model": "bestroute/auto"}
    body = {**(told if first else model), **(model if first else told), "stream": stream}
    body["messages"] = [{"role": "user", "content": "x"}]
    found = wanted(json.dumps(body).encode(), {}, Server())

    assert found.usage == bool(options and options["include_usage"])
    sent = json.loads(found.own.body('odd "name"'))
    assert sent["model"] == 'odd "name"'
    assert sent["stream_options"] == ({"include_usage": True} if stream else options)
