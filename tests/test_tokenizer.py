"""Tokenizing: special tokens are text, and cuts take the middle."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bestroute.tokenizer import Tokenizer, cut_middle, share
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tiny_bundle: Path) -> Tokenizer:
    return Tokenizer(tiny_bundle / "tokenizer.json", max_tokens=32)


CLS, SEP = tiny.SPECIAL.index("[CLS]"), tiny.SPECIAL.index("[SEP]")


def test_a_prompt_stands_between_its_markers(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.prompt("easy hard")

    words = list(tiny.WORDS)
    assert encoded.ids == (CLS, 4 + words.index("easy"), 4 + words.index("hard"), SEP)
    assert encoded.prompt_tokens == 2
    assert not encoded.truncated


@pytest.mark.parametrize("special", tiny.SPECIAL)
def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer, special: str) -> None:
    ids = tokenizer.prompt(f"easy {special} hard").ids

    assert len(ids) > 5, "the marker's letters are tokens of their own"
    assert not {CLS, SEP, tiny.SPECIAL.index("[PAD]")} & set(ids[1:-1])


def test_a_long_prompt_keeps_its_head_and_tail(tokenizer: Tokenizer) -> None:
    words = [f"word{i}" for i in range(100)]

    encoded = tokenizer.prompt(" ".join(words))

    plain = [tokenizer.prompt(word).ids[1] for word in words]
    assert encoded.truncated
    assert encoded.prompt_tokens == 100
    assert encoded.ids == (CLS, *plain[:15], *plain[-15:], SEP)


def test_an_answer_is_not_cut_away_by_its_prompt(tokenizer: Tokenizer) -> None:
    answer = " ".join(f"word{i}" for i in range(20))

    encoded = tokenizer.pair("easy " * 500, answer)

    assert encoded.truncated
    assert len(encoded.ids) == 32
    assert tokenizer.prompt(answer).ids[1:] == encoded.ids[-21:], "the whole answer is there"


def test_answers_together_are_encoded_as_each_alone(tokenizer: Tokenizer) -> None:
    answers = ["good", "", "bad " * 50]

    together = tokenizer.pairs("easy", answers)

    assert together == [tokenizer.pair("easy", answer) for answer in answers]


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(8, 510))
def test_share_uses_the_room_and_cuts_the_prompt_first(prompt: int, answer: int, room: int) -> None:
    kept_prompt, kept_answer = share(prompt, answer, room)

    assert 0 <= kept_prompt <= prompt
    assert 0 <= kept_answer <= answer
    assert kept_prompt + kept_answer == min(prompt + answer, room)
    if answer <= room - room // 8:
        assert kept_answer == answer
    assert kept_prompt >= min(prompt, room // 8)


@given(st.lists(st.integers(), max_size=50), st.integers(0, 60))
def test_cut_middle_keeps_both_ends(ids: list[int], limit: int) -> None:
    cut = cut_middle(ids, limit)

    assert len(cut) == min(len(ids), limit)
    head = len(cut) - len(cut) // 2
    assert cut[:head] == ids[:head]
    assert cut[head:] == ids[len(ids) - (len(cut) - head) :]
