"""What drawn answers show of themselves."""

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.gate import estimate, final_answer, signals
from bestroute.manifest import Estimate

words = st.text("abcxyz0123456789 \n", min_size=1).filter(str.strip)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So <answer>42</answer>.", "42"),
        ("<ANSWER>\n 4 \n 2 </ANSWER>", "4 2"),
        ("<answer>41</answer> no, <answer>42</answer>", "42"),
        ("In <answer> tags: <answer>42</answer>", "42"),
        ("<answer>42</answer>, that is \\boxed{41}", "42"),
        ("Hence \\boxed{42}.", "42"),
        ("\\boxed{41}, no: $\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("2 + 2 is\n#### 4", "4"),
        ("a #### 3\n####4 \n", "4"),
        ("#### Sum\n2 + 2\n#### Final answer\n4", "#### sum 2 + 2 #### final answer 4"),
        ("#### Final answer\nThe answer is 4.", "4"),
        ("The answer is 42.", "42"),
        ("the answer is: **Paris**!", "paris"),
        ("Final answer: `x`\nthank you", "x"),
        ("**Answer:**\n\n **B**", "b"),
        ("The answer is 41.\nNo, the answer is 42.", "42"),
        ("  Paris,\n\n  FRANCE. ", "paris, france"),
        ('"$42$"', "42"),
        ("Straße", "strasse"),
        ("<answer>never closed", "<answer>never closed"),
        ("<answer>42</answer> <answer> </answer>", "42"),
        ("\\boxed{}\nThe answer is 42", "42"),
        ("It is 42. <answer></answer>", "it is 42. <answer></answer>"),
        ("I say 42.\n**Answer:**", "i say 42. **answer"),
        ("", ""),
        ("answers are hard", "answers are hard"),
    ],
)
def test_a_final_answer_is(text: str, expected: str) -> None:
    assert final_answer(text) == expected


@given(words, words)
def test_what_leads_to_a_tagged_answer_does_not_matter(before: str, answer: str) -> None:
    plain = final_answer(answer)

    for marked in (f"{before}<answer>{answer}</answer>{before}", f"{before}\\boxed{{{answer}}}"):
        assert final_answer(marked) == plain


@given(words, st.sampled_from([".", "**", "`", " ", "\n", '"', "$"]))
def test_markup_and_case_around_an_answer_do_not_matter(answer: str, markup: str) -> None:
    assert final_answer(f"{markup}{answer.upper()}{markup}") == final_answer(answer)


def test_many_tags_that_never_close_are_read_in_linear_time() -> None:
    """They are an LLM's words, and so may be the caller's; the event loop waits meanwhile."""

    def seconds(tags: int) -> float:
        text = "<answer>" * tags
        start = time.process_time()
        final_answer(text)
        return time.process_time() - start

    # Quadratic time would be 256 times as much.
    assert min(seconds(32_000) for _ in range(3)) < 64 * max(seconds(2_000) for _ in range(3))


@pytest.mark.parametrize(
    ("answers", "agreement"),
    [
        (["4"], 0.0),
        (["4", "4"], 1.0),
        (["4", "5"], 0.0),
        (["4", "I think\n#### 4", "<answer>4</answer>"], 1.0),
        (["4", "4", "5"], 1 / 3),
        (["4", "5", "6"], 0.0),
        (["4", "4", "5", "5"], 2 / 6),
    ],
)
def test_agreement_is_the_share_of_pairs(answers: list[str], agreement: float) -> None:
    assert signals(answers).agreement == pytest.approx(agreement)


def test_length_is_the_mean_log_of_characters() -> None:
    assert signals(["", "abc"]).length == pytest.approx(math.log(4) / 2)


@given(st.lists(st.sampled_from(["1", "2", "3", "the answer is 1"]), min_size=1, max_size=6))
def test_the_order_of_the_answers_does_not_matter(answers: list[str]) -> None:
    assert signals(answers) == pytest.approx(signals(answers[::-1]))


def test_an_estimate_is_linear_in_the_signals_and_their_product() -> None:
    by = Estimate(intercept=1.0, agreement=10.0, length=100.0, agreement_length=1000.0)

    assert estimate(by, 0.0, 0.0) == 1
    assert estimate(by, 0.5, 2.0) == 1 + 5 + 200 + 1000
    many = estimate(by, np.array([0.0, 0.5]), np.array([0.0, 2.0]))
    assert many.tolist() == [1, 1206]
