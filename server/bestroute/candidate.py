"""An answer that was drawn, and the best of several. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bestroute.errors import ProviderFailed
from bestroute.gate import final_answer
from bestroute.upstream.completion import CANCELLED
from bestroute.upstream.usage import Usage


@dataclass(frozen=True, slots=True)
class Candidate:
    """A candidate that ended, well or badly.

    Attributes:
        index: which, from 0; the reference's, when escalated to, comes after all others.
        model: who wrote it.
        text: the answer; of a failed or cancelled one, what there was of it.
        reward: None where it wasn't scored.
        usage: what it used; where one call drew several, the first carries the prompt's tokens.
        finish_reason: the provider's word (stop, length, content_filter), or cancelled, or error.
        error: set where it failed, with the provider's words.
        seconds: from when it was asked for to its end, waits and retries included; None: it was
            cancelled before its call began.
    """

    index: int
    model: str
    text: str
    reward: float | None
    usage: Usage
    finish_reason: str
    error: ProviderFailed | None
    seconds: float | None = None

    @property
    def complete(self) -> bool:
        """Whether this is an answer one can give."""
        return self.error is None and self.finish_reason != CANCELLED


def best(candidates: Sequence[Candidate], agreement_bonus: float) -> Candidate | None:
    """The complete candidate of the highest reward; None if none is complete.

    One that was scored wins over any that wasn't. The lowest index wins among equals, which a
    rerun with the same seed repeats, as the order of finishing would not.

    Args:
        candidates: of one prompt.
        agreement_bonus: added to a reward, times the share of the other complete candidates that
            come to the same final answer.
    """
    complete = [candidate for candidate in candidates if candidate.complete]
    # Of two, each agrees with the other as much as it with them.
    finals = [final_answer(c.text) for c in complete] if agreement_bonus and complete[2:] else []
    votes = Counter(finals)
    bonuses = [agreement_bonus * (votes[f] - 1) / (len(finals) - 1) for f in finals]
    ranked = zip(complete, bonuses or [0.0] * len(complete), strict=True)
    winner = max(
        ranked,
        key=lambda pair: (
            pair[0].reward is not None,
            (pair[0].reward or 0.0) + pair[1],
            -pair[0].index,
        ),
        default=None,
    )
    return winner and winner[0]
