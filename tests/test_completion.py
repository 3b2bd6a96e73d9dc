"""What is read out of a stream: texts, reasons, and usage however it is reported."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._models import construct_type
from openai.types.chat import ChatCompletionChunk

from bestroute.errors import ProviderFailed
from bestroute.upstream.completion import (
    Completion,
    Delta,
    Ended,
    Finished,
    Usage,
    plausible,
    shares,
)
from tests.upstreams import finish, text, usage

ANSWER = "x" * 40  # ten tokens, as they are estimated
PROMPT = 20  # characters: five tokens


def chunk(value: dict[str, Any]) -> ChatCompletionChunk:
    """A chunk as the client makes it: nothing is validated, what is missing is None."""
    made = construct_type(type_=ChatCompletionChunk, value=value)
    assert isinstance(made, ChatCompletionChunk)
    return made


def read(
    chunks: Sequence[dict[str, Any]],
    choices: int = 1,
    *,
    interruption: ProviderFailed | None = None,
) -> tuple[list[Delta | Finished], list[Ended]]:
    """All that a call gives whose stream has these chunks."""
    completion = Completion("acme", range(choices), PROMPT)
    completion.accepted = True
    events = [event for value in chunks for event in completion.read(chunk(value))]
    return events, list(completion.end(interruption))


def running(answer: str, completion_tokens: int) -> dict[str, Any]:
    return text(answer) | usage(5, completion_tokens) | {"choices": text(answer)["choices"]}


THREE = [text(ANSWER, 0), text(ANSWER, 1), text(ANSWER, 2), finish(0), finish(1), finish(2)]


@pytest.mark.parametrize(
    ("choices", "chunks", "expected"),
    [
        pytest.param(
            1, [text(ANSWER), finish(), usage(7, 12)], [Usage(7, 12)], id="once-at-the-end"
        ),
        pytest.param(
            1, [text(ANSWER), finish(), usage(7, 900)], [Usage(7, 900)], id="hidden-reasoning"
        ),
        pytest.param(
            1,
            [running("xx", 1), running("xx", 2), finish() | {"usage": usage(5, 3)["usage"]}],
            [Usage(5, 3)],
            id="running-total",
        ),
        pytest.param(
            1,
            [running("xx", 1), finish(), usage(5, 9)],
            [Usage(5, 9)],
            id="running-total-and-a-last-word",
        ),
        pytest.param(1, [text(ANSWER), finish()], [Usage(5, 10, True)], id="missing"),
        pytest.param(1, [text(ANSWER), finish(), usage(0, 0)], [Usage(5, 10, True)], id="zeros"),
        pytest.param(
            1,
            [text(ANSWER), finish(), {"choices": [], "usage": {"prompt_tokens": 7}}],
            [Usage(5, 10, True)],
            id="half",
        ),
        pytest.param(
            3,
            [*THREE, usage(7, 36)],
            [Usage(7, 12), Usage(0, 12), Usage(0, 12)],
            id="sum-of-three",
        ),
        pytest.param(
            3,
            [*THREE, usage(7, 11), usage(7, 12), usage(7, 13)],
            [Usage(7, 12), Usage(0, 12), Usage(0, 12)],
            id="one-each-the-prompt-every-time",
        ),
        pytest.param(
            3,
            [*THREE, usage(7, 12)],
            [Usage(5, 10, True), Usage(0, 10, True), Usage(0, 10, True)],
            id="of-one-choice-only",
        ),
        pytest.param(
            2,
            [text(ANSWER, 0), text("xxxx", 1), finish(0), usage(7, 10)],
            [Usage(5, 10, True), Usage(0, 1, True)],
            id="one-unfinished",
        ),
    ],
)
def test_usage_is_what_the_provider_says_if_that_can_be(
    choices: int, chunks: list[dict[str, Any]], expected: list[Usage]
) -> None:
    _, ended = read(chunks, choices)

    assert expected == [end.usage for end in ended]


def test_a_call_that_was_not_accepted_used_nothing() -> None:
    completion = Completion("acme", [0], PROMPT)

    assert [Usage()] == [end.usage for end in completion.end(ProviderFailed("429"))]


def test_shown_reasoning_is_billed_but_no_part_of_the_answer() -> None:
    events, [end] = read([text("", reasoning_content=ANSWER), text("4"), finish()])

    assert [Delta(0, "4"), Finished(0, "4")] == events
    assert Usage(5, 11, estimated=True) == end.usage


def test_a_refusal_is_an_answer() -> None:
    events, [end] = read([{"choices": [{"index": 0, "delta": {"refusal": "No."}}]}, finish()])

    assert [Delta(0, "No."), Finished(0, "No.")] == events
    assert (end.text, end.finish_reason, end.error) == ("No.", "stop", None)


def test_odd_chunks_are_borne() -> None:
    events, [end] = read(
        [
            {"id": "comment"},
            {"choices": None},
            {"choices": [{"index": 0, "delta": None}]},
            {"choices": [{"index": 0, "delta": {"content": [{"type": "thinking"}]}}]},
            text("more than asked for", index=1),
            {"choices": [{"delta": {"content": "4"}}]},
            finish(reason="length"),
            text("after the end"),
        ]
    )

    assert [Delta(0, "4"), Finished(0, "4")] == events
    assert (end.text, end.finish_reason, end.error) == ("4", "length", None)


@pytest.mark.parametrize("blank", ["", " \n"])
def test_an_empty_answer_is_a_failure(blank: str) -> None:
    events, [end] = read([text(blank), finish(reason="content_filter")])

    assert not any(isinstance(event, Finished) for event in events)
    assert end.finish_reason == "error"
    assert str(end.error) == "acme: empty answer (finish_reason content_filter)"


def test_an_interruption_fails_only_what_had_not_finished() -> None:
    lost = ProviderFailed("lost")
    _, ended = read([text("a", 0), text("b", 1), finish(0)], 2, interruption=lost)

    assert [("a", "stop", None), ("b", "error", lost)] == [
        (end.text, end.finish_reason, end.error) for end in ended
    ]


def test_a_cancellation_keeps_what_there_was() -> None:
    _, ended = read([text("a", 0), text("b", 1), finish(0)], 2)

    assert [(end.text, end.finish_reason, end.error) for end in ended] == [
        ("a", "stop", None),
        ("b", "cancelled", None),
    ]


@given(st.integers(0, 10_000), st.lists(st.integers(0, 1000), min_size=1, max_size=8))
def test_shares_add_up(total: int, weights: list[int]) -> None:
    parts = shares(total, weights)

    assert total == sum(parts)
    assert len(weights) == len(parts)
    assert min(parts) >= 0


@given(
    estimates=st.lists(st.integers(20, 400), min_size=2, max_size=8),
    characters_per_token=st.floats(3.2, 5.2),
)
def test_the_sum_of_all_answers_is_plausible_in_any_prose(
    estimates: list[int], characters_per_token: float
) -> None:
    total = round(sum(estimates) * 4 / characters_per_token)

    assert plausible(Usage(10, total), estimates)
    assert not plausible(Usage(10, round(total / len(estimates))), estimates)
