"""What a call used: as its provider says where that can be, else as its texts tell. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, sqrt
from typing import Any

CHARACTERS_PER_TOKEN = 4

LONGEST_TOKEN = 128
"""Characters; the longest tokens of today's tokenizers are runs of so many blanks."""

HIDDEN_PROMPT_TOKENS = 10_000
"""Most tokens that a provider puts around a prompt: templates, instructions of its own."""

MOST_OUTPUT_TOKENS = 262_144
"""Most tokens that one answer has, hidden reasoning included."""

_MOST_STATED = 1_000_000_000
"""Tokens; a statement of more is none."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens used.

    Attributes:
        input_tokens: of the prompt.
        output_tokens: of the answer.
        estimated: whether they were guessed from the texts.
        cached_tokens: of the prompt's, those that the provider says it had in its prompt cache.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    estimated: bool = False
    cached_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.estimated or other.estimated,
            self.cached_tokens + other.cached_tokens,
        )


def estimated_tokens(characters: int) -> int:
    """Tokens that a text of so many characters has, roughly."""
    return ceil(characters / CHARACTERS_PER_TOKEN)


def reported_usage(statements: Sequence[object], answers: int) -> Usage | None:
    """What a call used by its provider's statements; None: it doesn't say.

    As many statements as answers are one each, and each repeats the one prompt. Of any other
    number the last is taken: some providers tell a running total, or repeat themselves.

    Args:
        statements: the values of the stream's `usage` fields, whatever they are, in order.
        answers: how many the call was to draw, at least 1.
    """
    said = [_stated(statement) for statement in statements]
    if answers == 1 or len(said) != answers:
        said = said[-1:]
    stated = [usage for usage in said if usage is not None]
    if not stated or len(stated) < len(said):
        return None
    prompt = max(stated, key=lambda usage: usage.input_tokens)
    output = sum(usage.output_tokens for usage in stated)
    return Usage(prompt.input_tokens, output, cached_tokens=prompt.cached_tokens)


def _stated(statement: object) -> Usage | None:
    """One statement; None if it isn't one."""
    if not isinstance(statement, dict):
        return None
    prompt, answer = statement.get("prompt_tokens"), statement.get("completion_tokens")
    # Exactly: a bool is an int too.
    if type(prompt) is not int or type(answer) is not int:
        return None
    if not (0 < prompt <= _MOST_STATED and 0 <= answer <= _MOST_STATED):
        return None
    return Usage(prompt, answer, cached_tokens=_stated_cached(statement, prompt))


def _stated_cached(statement: dict[str, Any], prompt: int) -> int:
    """Of a prompt's tokens those that were cached; 0 where that isn't said, or can't be."""
    details = statement.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return cached if type(cached) is int and 0 <= cached <= prompt else 0


def plausible(reported: Usage, prompt_characters: int, answers: Sequence[int]) -> bool:
    """Whether reported tokens can be those of a prompt and of all answers to it.

    A report of several answers is taken for whichever it is nearer to, by ratio: the estimated
    tokens of all n or an n-th of them. More than estimated is possible up to a limit: reasoning may
    be hidden.

    Args:
        reported: by the provider.
        prompt_characters: length of the prompt.
        answers: characters of each answer, at least one, with the reasoning shown.
    """
    prompt, output, count = reported.input_tokens, reported.output_tokens, len(answers)
    return (
        # A character has at most four bytes, and each is at most a token.
        prompt_characters <= prompt * LONGEST_TOKEN
        and prompt <= 4 * prompt_characters + HIDDEN_PROMPT_TOKENS
        and sum(answers) <= output * LONGEST_TOKEN
        and output <= count * MOST_OUTPUT_TOKENS
        and (count == 1 or output * sqrt(count) >= sum(map(estimated_tokens, answers)))
    )


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """Split a total into whole numbers by weight; their sum is the total."""
    # One more each: answers may be empty, and then weigh the same.
    edges = list(accumulate((weight + 1 for weight in weights), initial=0))
    return [
        round(total * end / edges[-1]) - round(total * start / edges[-1])
        for start, end in pairwise(edges)
    ]
