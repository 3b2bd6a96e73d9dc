"""What is read out of a stream: texts, reasons, and usage however it is reported."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.errors import ProviderFailed
from bestroute.upstream.completion import (
    Completion,
    Delta,
    Ended,
    Finished,
)
from bestroute.upstream.usage import Usage, plausible, shares
from tests.upstreams import finish, text, usage

ANSWER = "x" * 40  # ten tokens, as they are estimated
PROMPT = 20  # characters: five tokens


def read(
    chunks: Sequence[dict[str, Any]],
    choices: int = 1,
    *,
    interruption: ProviderFailed | None = None,
) -> tuple[list[Delta | Finished], list[Ended]]:
    """All that a call gives whose stream has these chunks."""
    completion = Completion(range(choices), PROMPT, 1000)
    completion.accepted = True
    events = [event for value in chunks for event in completion.read(value)]
    return events, list(completion.end(interruption, Usage(), "acme: empty answer"))


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
        pytest.param(1, [finish(), usage(7, 0)], [Usage(7, 0)], id="zero-for-nothing"),
        pytest.param(
            1, [text(ANSWER), finish(), usage(7, 12), usage(7, 12)], [Usage(7, 12)], id="twice"
        ),
        pytest.param(
            2,
            [
                text(ANSWER, 0),
                finish(0),
                text(ANSWER, 1),
                finish(1),
                *[usage(7, i) for i in (5, 15, 22)],
            ],
            [Usage(7, 11), Usage(0, 11)],
            id="running-total-of-its-own",
        ),
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


@pytest.mark.parametrize("field", ["prompt_tokens", "completion_tokens"])
@pytest.mark.parametrize("wrong", [0, -5, "12", None, True, 12.5, 10**15, [], {}])
def test_usage_that_can_t_be_is_estimated(field: str, wrong: object) -> None:
    said = {"prompt_tokens": 7, "completion_tokens": 12, field: wrong}
    _, [end] = read([text(ANSWER), finish(), {"choices": [], "usage": said}])

    assert end.usage == Usage(5, 10, estimated=True)


@pytest.mark.parametrize("wrong", ["12", 12, [7, 12], True, {}])
def test_usage_that_is_none_is_estimated(wrong: object) -> None:
    _, [end] = read([text(ANSWER), finish(), {"choices": [], "usage": wrong}])

    assert end.usage == Usage(5, 10, estimated=True)


def test_no_token_has_two_hundred_characters() -> None:
    assert plausible(Usage(2, 2), 200, [200])
    assert not plausible(Usage(2, 1), 200, [200])
    assert not plausible(Usage(1, 2), 200, [200])


def test_a_call_that_was_not_accepted_used_nothing() -> None:
    completion = Completion([0], PROMPT, 1000)
    [end] = completion.end(ProviderFailed("429"), Usage(), "acme: empty answer")

    assert Usage() == end.usage


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
            text("less", index=-1),
            {"choices": [{"index": "0", "delta": {"content": "no number"}}]},
            {"choices": [{"index": 0, "delta": ["no object"]}]},
            {"choices": [{"index": 0, "finish_reason": {"no": "text"}}]},
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
    characters = [4 * tokens for tokens in estimates]

    assert plausible(Usage(10, total), PROMPT, characters)
    assert not plausible(Usage(10, round(total / len(estimates))), PROMPT, characters)
