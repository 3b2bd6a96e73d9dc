"""What a plain OpenAI request asks of a decision."""

from typing import Any

import pytest

from bestroute.errors import InvalidRequest
from bestroute.openai_request import conversation, policy_from, session_from, target_of
from bestroute.prompt import Message
from bestroute.session import Session
from bestroute.target import Policy

PLENTY = 10_000


@pytest.mark.parametrize(
    ("model", "target"),
    [
        ("bestroute/auto", {}),
        ("bestroute/drop-1%", {"max_quality_drop": 0.01}),
        ("bestroute/drop-0.5%", {"max_quality_drop": 0.005}),
        ("bestroute/save-40%", {"min_cost_saving": 0.4}),
        ("bestroute/match-0.8", {"match_threshold": 0.8}),
        ("bestroute/match-80%", {"match_threshold": 0.8}),
        ("gpt-4o", None),
        ("", None),
        ("openai/bestroute/auto", None),
        ("Bestroute/auto", None),
    ],
)
def test_a_models_name_says_the_target(model: str, target: dict[str, float] | None) -> None:
    assert target_of(model) == target


@pytest.mark.parametrize(
    "said", ["", "atuo", "drop-", "drop-1 %", "drop--1%", "save-1e1", "match-٣", "auto " * 100]
)
def test_a_target_that_there_is_not_is_refused_with_those_that_there_are(said: str) -> None:
    with pytest.raises(InvalidRequest, match="bestroute/drop-1%") as failure:
        target_of(f"bestroute/{said}")

    assert failure.value.field == "model"
    assert len(str(failure.value)) < 250, "what was sent is repeated in part only"


def test_the_header_says_what_auto_aims_at() -> None:
    header = {"x-bestroute-target": "save-40%"}

    assert policy_from(header, "bestroute/auto") == Policy(min_cost_saving=0.4)
    assert policy_from(header, "bestroute/drop-1%") == Policy(max_quality_drop=0.01)
    assert policy_from(header, "gpt-4o") is None, "a model of that name was asked for"
    assert policy_from({}, "bestroute/auto") == Policy()
    with pytest.raises(InvalidRequest, match="x-bestroute-target"):
        policy_from({"x-bestroute-target": "cheap"}, "bestroute/auto")


def test_headers_set_limits() -> None:
    headers = {"x-bestroute-models": "small, ,large", "x-bestroute-max-cost-usd": "1e-3"}

    found = policy_from(headers, "bestroute/save-40%")

    assert found == Policy(
        min_cost_saving=0.4, allowed_models=("small", "large"), max_cost_usd=0.001
    )
    assert policy_from({"x-bestroute-models": " "}, "bestroute/auto") == Policy()
    for wrong in ("", "cheap", "0", "-1", "nan", "inf"):
        with pytest.raises(InvalidRequest, match="x-bestroute-max-cost-usd: must be a number"):
            policy_from({"x-bestroute-max-cost-usd": wrong}, "bestroute/auto")


def test_headers_name_a_session() -> None:
    assert session_from({}) is None
    assert session_from({"x-bestroute-session": "a"}) == Session("a")
    sticky = {"x-bestroute-session": "a", "x-bestroute-sticky": "True"}
    assert session_from(sticky) == Session("a", sticky=True)
    for wrong in ({"x-bestroute-session": "a" * 257}, {**sticky, "x-bestroute-sticky": "maybe"}):
        with pytest.raises(InvalidRequest):
            session_from(wrong)


def test_a_conversation_is_its_text() -> None:
    parts = [
        {"type": "text", "text": "What is"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "text", "text": "this?"},
    ]
    found = conversation(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            {"role": "tool", "content": "a cat", "tool_call_id": "1"},
            {"role": "function", "content": "a dog", "name": "old"},
            {"role": "user", "content": "half \ud83d a face"},
        ],
        PLENTY,
    )

    assert found.messages == (
        Message("developer", "Be brief."),
        Message("user", "What is\nthis?"),
        Message("tool", "a cat"),
        Message("tool", "a dog"),
        Message("user", "half ? a face"),
    )


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        (None, "messages"),
        ("hello", "messages"),
        ([], "messages"),
        (["hello"], "messages[0]"),
        ([{"content": "hello"}], "messages[0].role"),
        ([{"role": "user", "content": "a"}, {"role": ["user"], "content": ""}], "messages[1].role"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": " \n"}], "messages"),
        ([{"role": "user", "content": [{"type": "image_url"}, 3]}], "messages"),
        ([{"role": "user", "content": "ü" * PLENTY}], "messages"),
    ],
)
def test_what_is_no_conversation_is_refused_by_its_field(messages: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as failure:
        conversation(messages, PLENTY)

    assert failure.value.field == field
