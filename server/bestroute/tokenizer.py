"""Text to token ids, exactly as in training.

Special tokens written in a text are text: "[SEP]" in a prompt becomes its letters, never the
separator. Texts that are too long are cut from the middle, because instructions stand at the
start and questions at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from bestroute.words import Words, reads_words_alone

_BETWEEN = "\n\n"
"""Between two turns, as in `Prompt.text`."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One input of a model.

    Attributes:
        ids: token ids, T of them, special tokens included.
        prompt_tokens: length of the whole prompt in tokens, special tokens and cuts not counted.
        truncated: whether text was cut to fit.
    """

    ids: tuple[int, ...]
    prompt_tokens: int
    truncated: bool


def cut_middle(ids: list[int], limit: int) -> list[int]:
    """Keep the first and last tokens of `ids`, `limit` in all; the head gets the odd one."""
    if len(ids) <= limit:
        return ids
    tail = limit // 2
    return ids[: limit - tail] + ids[len(ids) - tail :]


def latest(turns: Sequence[list[int]], room: int) -> list[list[int]]:
    """The last of the turns that fit, and the middle cut out of the first that doesn't."""
    kept: list[list[int]] = []
    for turn in reversed(turns):
        if room <= 0:
            break
        kept.append(cut_middle(turn, room))
        room -= len(turn)
    return kept[::-1]


def share(prompt: int, answer: int, room: int) -> tuple[int, int]:
    """How many tokens of a prompt and an answer are kept when both must fit into `room`.

    The prompt gives way first, down to an eighth of the room (or its whole length, if shorter):
    an answer is never cut away by its prompt, but a reward without any question means nothing.

    Args:
        prompt: tokens of the prompt.
        answer: tokens of the answer.
        room: tokens that fit.

    Returns:
        Tokens kept of the prompt and of the answer; their sum is at most `room`.
    """
    kept_answer = min(answer, room - min(prompt, room // 8))
    return min(prompt, room - kept_answer), kept_answer


class Tokenizer:
    """A `tokenizer.json` with the limit of the model it feeds; safe to call from any thread.

    Args:
        path: the `tokenizer.json` file.
        max_tokens: longest input the model takes, special tokens included.
    """

    def __init__(self, path: Path, *, max_tokens: int) -> None:
        self._tokenizer = _Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self._words = Words(self._tokenizer) if reads_words_alone(self._tokenizer) else None
        self._start = self._id_of("[CLS]")
        self._separator = self._id_of("[SEP]")
        self.max_tokens = max_tokens

    def prompt(self, text: str) -> Encoded:
        """Encode a prompt as [CLS] prompt [SEP], at most `max_tokens` ids."""
        ids = self._ids(text)
        kept = cut_middle(ids, self.max_tokens - 2)
        return Encoded(
            (self._start, *kept, self._separator), len(ids), truncated=len(kept) < len(ids)
        )

    def conversation(
        self, instructions: Sequence[str], earlier: Sequence[str], question: str
    ) -> Encoded:
        """Encode the turns of a conversation like `prompt`, with what matters least left out.

        If not all fits, the question comes first, whole if seven eighths of the room hold it. What
        it leaves is shared by the instructions and the turns between, neither of which crowds the
        other out: long instructions say little of how hard a turn is. Of those turns the latest are
        kept; what is cut loses its middle.

        Args:
            instructions: what the system says.
            earlier: turns before the question, oldest first.
            question: the last turn.
        """
        told = self._ids(_BETWEEN.join(instructions)) if instructions else []
        between = [self._ids(_BETWEEN + turn) for turn in earlier]
        asked = self._ids(_BETWEEN + question if instructions or earlier else question)
        whole, room = len(told) + sum(map(len, between)) + len(asked), self.max_tokens - 2
        if whole > room:
            asked = cut_middle(asked, room - min(len(told), room // 8))
            left = room - len(asked)
            told = cut_middle(told, max(left // 2, left - sum(map(len, between))))
            between = latest(between, left - len(told))
        kept = (*told, *chain.from_iterable(between), *asked)
        return Encoded((self._start, *kept, self._separator), whole, truncated=len(kept) < whole)

    def pair(self, prompt: str, answer: str) -> Encoded:
        """Encode an answer with its prompt as [CLS] prompt [SEP] answer [SEP].

        `truncated` tells whether either was cut; see `share` for which gives way.
        """
        return self.pairs(prompt, [answer])[0]

    def pairs(self, prompt: str, answers: Sequence[str]) -> list[Encoded]:
        """Encode several answers to one prompt, each as `pair` does."""
        question = self._ids(prompt)
        return [self._pair(question, self._ids(answer)) for answer in answers]

    def _pair(self, question: list[int], reply: list[int]) -> Encoded:
        kept_question, kept_reply = share(len(question), len(reply), self.max_tokens - 3)
        return Encoded(
            (
                self._start,
                *cut_middle(question, kept_question),
                self._separator,
                *cut_middle(reply, kept_reply),
                self._separator,
            ),
            len(question),
            truncated=kept_question < len(question) or kept_reply < len(reply),
        )

    def _ids(self, text: str) -> list[int]:
        if self._words:
            return self._words.ids(text)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _id_of(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no {token} token")
        return int(found)
