"""Token ids word by word, each word remembered: the ids a BERT tokenizer gives, sooner.

Such a tokenizer reads every word alone. Its normalizer looks no further than from a character to
the accents after it, whitespace and ASCII punctuation always divide words, and WordPiece sees one
word at a time. So the ids of a text are those of its words, most of which have been read before.
"""

import string
from collections import OrderedDict
from itertools import chain

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

WORDS = 16_384
"""How many words are remembered, the newest."""

LONGEST = 24
"""Characters, and tokens, of the longest word that is remembered. Both bounds together keep the
memory to 5 MB of English, and to 25 MB of whatever callers make up."""

_REMOVED = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"
"""Whitespace to `str.split`, but control characters to BERT, which joins what they divide."""


def reads_words_alone(tokenizer: Tokenizer) -> bool:
    """Whether `Words` gives this tokenizer's ids: it is BERT's in all of its parts.

    Special tokens have to be text to it (`encode_special_tokens`). Any other added token could hold
    whitespace or punctuation, and is looked for before words are told apart.
    """
    return (
        isinstance(tokenizer.normalizer, BertNormalizer)
        and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
        and isinstance(tokenizer.model, WordPiece)
        and tokenizer.encode_special_tokens
        and all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    )


class Words:
    """The words of a tokenizer that `reads_words_alone`; safe to use from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._remembered = _Remembered(tokenizer)

    def ids(self, text: str) -> list[int]:
        """What the tokenizer itself gives for a text, without special tokens."""
        if any(map(text.__contains__, _REMOVED)):
            whole: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
            return whole
        # A third of the time of a regular expression: few texts hold many of the marks.
        for mark in string.punctuation:
            if mark in text:
                text = text.replace(mark, f" {mark} ")
        return list(chain.from_iterable(map(self._remembered.__getitem__, text.split())))


class _Remembered(OrderedDict[str, tuple[int, ...]]):
    """Ids by word, which are found out when they are asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer, self._model = tokenizer, tokenizer.model
        self._lowercase = tokenizer.normalizer.lowercase

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self._read(word)
        if len(word) <= LONGEST and len(ids) <= LONGEST:
            self[word] = ids
            if len(self) > WORDS:
                self.popitem(last=False)
        return ids

    def _read(self, word: str) -> tuple[int, ...]:
        if word.isascii() and word.isprintable():
            # All that is left to normalize is the case; the model alone takes a sixth of the time.
            normalized = word.lower() if self._lowercase else word
            return tuple([token.id for token in self._model.tokenize(normalized)])
        return tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)
