"""What the stream of one chat completion says: texts, why they end, tokens. Pure; does no I/O.

OpenAI-compatible servers agree on the texts and disagree on the rest:

- Usage comes once at the end, or once per choice, or as a running total on every chunk, or not
  at all; with several choices some report the tokens of one choice only.
- A stream may end without a finish_reason (it broke), or with one and no text (a failure too).
- Reasoning that is shown is billed, but it is no part of the answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, sqrt
from typing import TYPE_CHECKING

from bestroute.errors import ProviderFailed

if TYPE_CHECKING:
    from openai.types import CompletionUsage
    from openai.types.chat import ChatCompletionChunk
    from openai.types.chat.chat_completion_chunk import ChoiceDelta

CHARACTERS_PER_TOKEN = 4
CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens used; `estimated` if they were guessed from the texts."""

    input_tokens: int = 0
    output_tokens: int = 0
    estimated: bool = False

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.estimated or other.estimated,
        )


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a candidate's text."""

    candidate: int
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A candidate's text is complete and can be scored; what it used may not be known yet."""

    candidate: int
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The last word on a candidate.

    Attributes:
        candidate: its index.
        text: the answer; of a failed or cancelled one, what there was of it.
        finish_reason: the provider's word (stop, length, content_filter), or cancelled, or error.
        usage: what it used; where one call drew several, the first carries the prompt's tokens.
        error: set where finish_reason is error.
    """

    candidate: int
    text: str
    finish_reason: str
    usage: Usage
    error: ProviderFailed | None = None


Event = Delta | Finished | Ended


@dataclass(slots=True)
class _Answer:
    candidate: int
    text: str = ""
    characters: int = 0  # of the text and of the reasoning shown with it
    finish_reason: str | None = None

    @property
    def estimated_tokens(self) -> int:
        return estimated_tokens(self.characters)


class Completion:
    """One call as it streams: feed it chunks, then end it.

    Args:
        provider: its name, for error messages.
        candidates: the index that each of the call's choices goes by.
        prompt_characters: length of the prompt.

    Attributes:
        accepted: whether the provider took the call; if it didn't, nothing was used.
    """

    def __init__(self, provider: str, candidates: Sequence[int], prompt_characters: int) -> None:
        self._provider = provider
        self.accepted = False
        self._answers = [_Answer(candidate) for candidate in candidates]
        self._prompt_characters = prompt_characters
        self._totals: list[CompletionUsage] = []
        self._running_total: CompletionUsage | None = None

    def read(self, chunk: "ChatCompletionChunk") -> Iterator[Delta | Finished]:
        """Take in the next chunk and give what is new in it."""
        # The client doesn't validate what it reads: any field may be missing.
        if chunk.usage is not None and chunk.choices:
            self._running_total = chunk.usage
        elif chunk.usage is not None:
            self._totals.append(chunk.usage)
        for choice in chunk.choices or ():
            index = choice.index or 0
            if index >= len(self._answers):
                continue  # more choices than were asked for
            answer = self._answers[index]
            if answer.finish_reason:
                continue
            if text := _text(choice.delta):
                answer.text += text
                yield Delta(answer.candidate, text)
            answer.characters += len(text) + len(_reasoning(choice.delta))
            answer.finish_reason = choice.finish_reason
            if answer.finish_reason and answer.text.strip():
                yield Finished(answer.candidate, answer.text)

    def end(self, interruption: ProviderFailed | None) -> Iterator[Ended]:
        """Give the last word on every candidate.

        Args:
            interruption: why those without a finish_reason failed; None: they were cancelled.
        """
        for answer, usage in zip(self._answers, self._usages(), strict=True):
            reason, error = answer.finish_reason or CANCELLED, None
            if not answer.finish_reason:
                error = interruption
            elif not answer.text.strip():
                error = ProviderFailed(f"{self._provider}: empty answer (finish_reason {reason})")
            if error is not None:
                reason = "error"
            yield Ended(answer.candidate, answer.text, reason, usage, error)

    def _usages(self) -> list[Usage]:
        """Per answer what it used; their sum is what the provider reported, if that is sound."""
        if not self.accepted:
            return [Usage() for _ in self._answers]
        outputs = [answer.estimated_tokens for answer in self._answers]
        prompt = estimated_tokens(self._prompt_characters)
        whole = all(answer.finish_reason for answer in self._answers)
        reported = reported_usage(self._totals or [self._running_total]) if whole else None
        estimated = reported is None or not plausible(reported, outputs)
        if reported is not None and not estimated:
            prompt, outputs = reported.input_tokens, shares(reported.output_tokens, outputs)
        return [
            Usage(prompt if position == 0 else 0, tokens, estimated)
            for position, tokens in enumerate(outputs)
        ]


def estimated_tokens(characters: int) -> int:
    """Tokens that a text of so many characters has, roughly."""
    return ceil(characters / CHARACTERS_PER_TOKEN)


def reported_usage(statements: Sequence["CompletionUsage | None"]) -> Usage | None:
    """What a call used by the provider's statements, one or one per choice; None: it didn't say.

    Each choice's statement repeats the one prompt.
    """
    said = [
        (usage.prompt_tokens, usage.completion_tokens)
        for usage in statements
        if usage is not None and usage.prompt_tokens and usage.completion_tokens
    ]
    if not said:
        return None
    return Usage(max(prompt for prompt, _ in said), sum(answer for _, answer in said))


def plausible(reported: Usage, estimates: Sequence[int]) -> bool:
    """Whether reported tokens can be those of all answers, and not of one of them only.

    The report is taken for whichever it is nearer to, by ratio: the estimated tokens of all n
    answers or an n-th of them. More than estimated is always possible: reasoning may be hidden.
    """
    answers = len(estimates)
    return answers == 1 or reported.output_tokens * sqrt(answers) >= sum(estimates)


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """Split a total into whole numbers by weight; their sum is the total."""
    # One more each: answers may be empty, and then weigh the same.
    edges = list(accumulate((weight + 1 for weight in weights), initial=0))
    return [
        round(total * end / edges[-1]) - round(total * start / edges[-1])
        for start, end in pairwise(edges)
    ]


def _text(delta: "ChoiceDelta | None") -> str:
    """New text of the answer; a refusal is one."""
    if delta is None:
        return ""
    # Not always a string: Mistral streams its reasoning as a list of parts.
    return "".join(part for part in (delta.content, delta.refusal) if isinstance(part, str))


def _reasoning(delta: "ChoiceDelta | None") -> str:
    """New text of the reasoning, under either of the names that servers use."""
    extra = (delta.model_extra if delta is not None else None) or {}
    reasoning = extra.get("reasoning_content") or extra.get("reasoning")
    return reasoning if isinstance(reasoning, str) else ""
