"""Tokenizing: special tokens are text, cuts take the middle, and ids are the library's own."""

import random
import string
import sys
import tracemalloc
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers, pre_tokenizers

from bestroute import words
from bestroute.bundle import DEFAULT_BUNDLE
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


BERT = DEFAULT_BUNDLE / "tokenizer.json"

fragments = st.one_of(
    st.text(max_size=6),
    st.text(st.characters(max_codepoint=127), max_size=12),
    st.sampled_from([" ", "\n", "\t ", "  "]),
    st.sampled_from(list("\x00\x0b\x0c\x1c\x1f\x7f\x85\xa0\u200b\u2028\u3000\ufeff\ufffd")),
    st.sampled_from(["[SEP]", "[CLS]", "[sep]", "##ing", "don't", "naïve", "e\u0301", "İ", "ΣΑΣ"]),
    st.sampled_from(["snake_case(x, y=-3.14)", "https://a.bc/d?e=f", "中文字符", "한국어", "👩‍🔬"]),
    st.sampled_from(["Internationalization", "antidisestablishmentarianism", "1234567890"]),
    st.builds(str.__mul__, st.sampled_from("aZ9é字"), st.integers(20, 130)),
)
texts = st.lists(fragments, max_size=30).map("".join)


def library(path: Path) -> Library:
    """The library's tokenizer as it comes, but for what a bundle's file may say of lengths."""
    own = Library.from_file(str(path))
    own.no_padding()
    own.no_truncation()
    own.encode_special_tokens = True
    return own


def same_ids(path: Path) -> Callable[[str], None]:
    """A check that a text's ids are the library's, by a tokenizer that remembers earlier texts."""
    ours, own = Tokenizer(path, max_tokens=sys.maxsize), library(path)

    def check(text: str) -> None:
        assert list(ours.prompt(text).ids[1:-1]) == own.encode(text, add_special_tokens=False).ids

    return check


@pytest.fixture(scope="module")
def bert_gives_the_same() -> Callable[[str], None]:
    assert words.reads_words_alone(library(BERT))
    return same_ids(BERT)


@given(text=texts)
def test_ids_are_the_librarys(bert_gives_the_same: Callable[[str], None], text: str) -> None:
    bert_gives_the_same(text)


def test_every_kind_of_character_gives_the_librarys_ids(
    bert_gives_the_same: Callable[[str], None],
) -> None:
    # All but ideographs and the like, and halves of surrogate pairs, which aren't text.
    characters = [
        c for c in map(chr, range(0x10000)) if unicodedata.category(c) not in ("Lo", "Co", "Cs")
    ]
    divides_or_not = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"  # these send a whole text to the library

    for start in range(0, len(characters), 64):
        some = [c for c in characters[start : start + 64] if c not in divides_or_not]
        bert_gives_the_same(" ".join(f"A{c}b {c}c. .{c}, \u0301{c}" for c in some))
    for character in divides_or_not:
        bert_gives_the_same(f"a{character}b {character} c")


@pytest.mark.parametrize("path", [Path(__file__), Path(__file__).parents[1] / "README.md"])
def test_real_text_gives_the_librarys_ids(
    bert_gives_the_same: Callable[[str], None], path: Path
) -> None:
    text = path.read_text(encoding="utf-8")

    bert_gives_the_same(text)
    for line in text.splitlines():
        bert_gives_the_same(line)


@pytest.mark.parametrize("clean_text", [True, False])
@pytest.mark.parametrize("strip_accents", [None, True, False])
@pytest.mark.parametrize("lowercase", [True, False])
def test_ids_are_the_librarys_however_bert_normalizes(
    tmp_path: Path, clean_text: bool, strip_accents: bool | None, lowercase: bool
) -> None:
    path = tmp_path / "tokenizer.json"
    bert = library(BERT)
    bert.normalizer = normalizers.BertNormalizer(
        clean_text=clean_text,
        handle_chinese_chars=clean_text,
        strip_accents=strip_accents,
        lowercase=lowercase,
    )
    bert.save(str(path))
    check = same_ids(path)

    @given(texts)
    def all_texts(text: str) -> None:
        check(text)

    all_texts()


def test_an_added_token_of_two_words_is_found(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    bert = library(BERT)
    bert.add_tokens(["the sum"])
    bert.save(str(path))

    assert Tokenizer(path, max_tokens=32).prompt("Find the sum.").prompt_tokens == 3


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("normalizer", normalizers.Replace(" s", "s")),
        ("pre_tokenizer", pre_tokenizers.WhitespaceSplit()),
        ("model", models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "the": 3}, "[UNK]")),
    ],
)
def test_a_tokenizer_with_one_other_part_is_asked_itself(
    tmp_path: Path, part: str, other: object
) -> None:
    path = tmp_path / "tokenizer.json"
    bert = library(BERT)
    setattr(bert, part, other)
    bert.save(str(path))

    assert not words.reads_words_alone(library(path))
    same_ids(path)("Find the sum.")


@given(text=texts)
def test_another_kind_of_tokenizer_is_asked_itself(tiny_bundle: Path, text: str) -> None:
    same_ids(tiny_bundle / "tokenizer.json")(text)


def test_made_up_words_fill_no_memory() -> None:
    source = random.Random(0)
    tokenizer = Tokenizer(BERT, max_tokens=512)
    tokenizer.prompt("warm up")

    tracemalloc.start()
    try:
        for _ in range(40):
            tokenizer.prompt(" ".join(f"{source.getrandbits(96):024x}" for _ in range(1000)))
        for i in range(40):
            tokenizer.prompt(f"{i}" + 1_000_000 * "x")
        kept, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert kept < 25_000_000


def test_threads_get_the_librarys_ids_while_words_are_forgotten(
    monkeypatch: pytest.MonkeyPatch, bert_gives_the_same: Callable[[str], None]
) -> None:
    monkeypatch.setattr(words, "WORDS", 64)
    source = random.Random(0)
    some = ["".join(source.choices(string.ascii_letters, k=4)) for _ in range(200)]
    drawn = [" ".join(source.sample(some, 100)) for _ in range(400)]

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(bert_gives_the_same, drawn))
