"""What the stream of one chat completion says: texts, why they end, tokens. Pure; does no I/O.

OpenAI-compatible servers agree on the texts and disagree on the rest:

- Usage comes once at the end, or once per choice, or as a running total on every chunk, or not
  at all; with several choices some report the tokens of one choice only.
- A stream may end without a finish_reason (it broke), or with one and no text (a failure too).
- Reasoning that is shown is billed, but it is no part of the answer.
- Errors come in the stream as well, under several names.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bestroute.errors import ProviderFailed
from bestroute.upstream.failures import CallFailed, Reason, clean, error_words, refusal
from bestroute.upstream.usage import Usage, estimated_tokens, plausible, reported_usage, shares

CANCELLED = "cancelled"

_ERROR = "error"
_LONGEST_REASON = 50
"""Characters of a finish_reason; it is passed on as it comes."""


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


@dataclass(frozen=True, slots=True)
class Retried:
    """A call failed before any text came, and will be made again.

    Attributes:
        candidates: that it was to draw.
        model: the LLM, by the pool's name.
        attempt: which one failed, from 1.
        delay: seconds until the next.
        cause: with the provider's words.
    """

    candidates: tuple[int, ...]
    model: str
    attempt: int
    delay: float
    cause: ProviderFailed


Event = Delta | Finished | Ended | Retried


@dataclass(slots=True)
class _Answer:
    candidate: int
    pieces: list[str] = field(default_factory=list)
    characters: int = 0  # of the text and of the reasoning shown with it
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def empty(self) -> bool:
        return not any(piece.strip() for piece in self.pieces)


class Completion:
    """One call as it streams: feed it chunks, then end it.

    Args:
        candidates: the index that each of the call's choices goes by.
        prompt_characters: length of the prompt.
        max_characters: most that an answer may have, shown reasoning included.

    Attributes:
        accepted: whether the provider took the call; if it didn't, nothing was used.
        spent: what attempts before this one have used.
        needs_text: whether an answer without a text has failed.
    """

    needs_text = True

    def __init__(
        self, candidates: Sequence[int], prompt_characters: int, max_characters: int
    ) -> None:
        self.accepted, self.spent = False, Usage()
        self._answers = [_Answer(candidate) for candidate in candidates]
        self._prompt_characters, self._max_characters = prompt_characters, max_characters
        self._totals: list[object] = []
        self._running_total: object = None

    @property
    def choices(self) -> int:
        """How many answers it is to draw."""
        return len(self._answers)

    @property
    def finished(self) -> bool:
        """Whether every answer is complete; usage may still come."""
        return all(answer.finish_reason for answer in self._answers)

    @property
    def untouched(self) -> bool:
        """Whether nothing has come yet of any answer."""
        return not any(answer.characters or answer.finish_reason for answer in self._answers)

    @property
    def has_empty(self) -> bool:
        """Whether an answer ended without a text."""
        return self.needs_text and any(
            answer.finish_reason and answer.empty for answer in self._answers
        )

    @property
    def finish_reasons(self) -> list[str]:
        """Of the answers that are complete."""
        return [answer.finish_reason for answer in self._answers if answer.finish_reason]

    def read(self, chunk: Any) -> Iterator[Delta | Finished]:
        """Take in the next chunk, as JSON has it, and give what is new in it.

        Raises:
            CallFailed: it is an error, or no chunk, or too long an answer.
        """
        if not isinstance(chunk, dict):
            raise CallFailed(Reason.MALFORMED, f"a chunk that is no object: {chunk!r:.100}")
        self._raise_error(chunk)
        choices = chunk.get("choices") or ()
        if not isinstance(choices, Sequence) or isinstance(choices, str):
            raise CallFailed(Reason.MALFORMED, f"choices that are no list: {choices!r:.100}")
        if (usage := chunk.get("usage")) is not None:
            if choices:
                self._running_total = usage
            else:
                # One per answer, and one more shows that they are not that.
                self._totals = [*self._totals[-len(self._answers) :], usage]
        for choice in choices:
            if not isinstance(choice, dict):
                raise CallFailed(Reason.MALFORMED, f"a choice that is no object: {choice!r:.100}")
            # Whole answers have a message where streams have deltas.
            yield from self._add(choice, choice.get("delta") or choice.get("message"))

    def _add(self, choice: dict[str, Any], delta: object) -> Iterator[Delta | Finished]:
        index = choice.get("index") or 0
        if type(index) is not int or not 0 <= index < len(self._answers):
            return  # more choices than were asked for
        answer = self._answers[index]
        if answer.finish_reason:
            return
        if isinstance(delta, dict):
            # Not always a string: Mistral streams its reasoning as a list of parts.
            text = clean(_joined(delta.get("content"), delta.get("refusal")))
            reasoning = _joined(delta.get("reasoning_content") or delta.get("reasoning"))
            answer.characters += len(text) + len(reasoning)
            if answer.characters > self._max_characters:
                raise CallFailed(
                    Reason.TOO_LONG,
                    f"an answer of more than {self._max_characters} characters",
                    faulty=False,
                )
            if text:
                answer.pieces.append(text)
                yield Delta(answer.candidate, text)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            if reason in (_ERROR, CANCELLED):
                raise CallFailed(
                    Reason.SERVER_ERROR, f"the provider gave up (finish_reason {reason})"
                )
            answer.finish_reason = clean(reason[:_LONGEST_REASON])
            if not answer.empty:
                yield Finished(answer.candidate, answer.text)

    def _raise_error(self, chunk: dict[str, Any]) -> None:
        """Fail if a chunk is an error: `{"error": ...}`, or `{"message": ...}` and no choices."""
        bare = "choices" not in chunk and isinstance(chunk.get("message"), str)
        error = chunk.get("error") or (chunk if bare else None)
        if not error:
            return
        # Where nothing has come, it is a refusal after all, and nothing was used.
        self.accepted = self.accepted and not self.untouched
        words = error_words(error) or "an error without a message"
        code = error.get("code") if isinstance(error, dict) else None
        try:
            status = int(code)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            status = 0
        if 400 <= status < 600:
            raise refusal(status, words)
        raise CallFailed(Reason.SERVER_ERROR, words, transient=True)

    def end(self, interruption: ProviderFailed | None, spent: Usage, empty: str) -> Iterator[Ended]:
        """Give the last word on every candidate.

        Args:
            interruption: why those without a finish_reason failed; None: they were cancelled.
            spent: what attempts before this one have used; the first candidate carries it.
            empty: what is said of an answer without text.
        """
        for answer, usage in zip(self._answers, self.usages(), strict=True):
            reason, error = answer.finish_reason or CANCELLED, None
            if not answer.finish_reason:
                error = interruption
            elif answer.empty and self.needs_text:
                error = ProviderFailed(f"{empty} (finish_reason {reason})")
            if error is not None:
                reason = _ERROR
            yield Ended(answer.candidate, answer.text, reason, usage + spent, error)
            spent = Usage()

    def usages(self) -> list[Usage]:
        """Per answer what it used; their sum is what the provider reported, if that is sound."""
        if not self.accepted:
            return [Usage() for _ in self._answers]
        characters = [answer.characters for answer in self._answers]
        weights = [estimated_tokens(each) for each in characters]
        said = self._totals or [self._running_total]
        reported = reported_usage(said, len(self._answers)) if self.finished else None
        if reported is None or not plausible(reported, self._prompt_characters, characters):
            prompt, cached = estimated_tokens(self._prompt_characters), 0
            outputs, guessed = weights, True
        else:
            prompt, cached, guessed = reported.input_tokens, reported.cached_tokens, False
            outputs = shares(reported.output_tokens, weights)
        return [
            Usage(0, tokens, guessed) if position else Usage(prompt, tokens, guessed, cached)
            for position, tokens in enumerate(outputs)
        ]


def _joined(*parts: object) -> str:
    return "".join(part for part in parts if isinstance(part, str))
