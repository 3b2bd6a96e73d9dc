"""A conversation, or an agent's loop, that is decided turn by turn. Pure."""

from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Session:
    """What a request is a turn of.

    Attributes:
        id: chosen by the caller; sessions of different callers never meet.
        sticky: whether to stay with the session's model for as long as it may be chosen.
    """

    id: str
    sticky: bool = False


class Reason(Enum):
    """Why a turn's model is the former's, or another; named as in the proto."""

    NEW = auto()
    WORTH_MOST = auto()
    STICKY = auto()
    TOOL_TURN = auto()
    WORTH_CHANGING = auto()
    NOT_ALLOWED = auto()
    REQUESTED = auto()
    FALLBACK = auto()


class Turn(NamedTuple):
    """What a session did to a decision.

    Attributes:
        number: of the turn, from 1.
        previous_model: of the turn before; None: there was none.
        changed: whether the model is another than before.
        reason: why, or why not.
        cached_tokens: of the prompt, that the former model's provider is expected to have in its
            prompt cache.
    """

    number: int
    previous_model: str | None
    changed: bool
    reason: Reason
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Past:
    """What is remembered of a session: plain values, and none of its words.

    Attributes:
        turns: how many there were.
        model: that ran last, and
        samples: how many of it.
        tokens: of the conversation up to there, the answer included where it is known.
        bundle: version of the one that read the last turn.
        read: hash of what it read.
        question: hash of the user's last turn.
        row: what it predicted, after `eased`, as float32; empty: nothing.
        at: when it ran, by the clock of whoever remembers it.
    """

    turns: int
    model: str
    samples: int
    tokens: int
    bundle: str
    read: int
    question: int
    row: bytes
    at: float = 0.0

    def answered(self, model: str, output_tokens: int) -> "Past":
        """The same with an answer of so many tokens, which another model may have given."""
        samples = self.samples if model == self.model else 1
        return replace(self, model=model, samples=samples, tokens=self.tokens + output_tokens)

    def predicted(self, bundle: str, columns: int) -> Row | None:
        """What a bundle's router of so many columns predicted; None: this is of another."""
        row = np.frombuffer(self.row, dtype=np.float32)
        return row if self.bundle == bundle and len(row) == columns else None


class Standing(NamedTuple):
    """Where a session stands when a turn of it comes.

    Attributes:
        sticky: see `Session`.
        momentum: see `eased`.
        past: None: it is new.
        cached_tokens: most that the past model's provider still has in its prompt cache.
    """

    sticky: bool
    momentum: float
    past: Past | None = None
    cached_tokens: int = 0


class Hold(Enum):
    """What of the former turn's decision has to stay, where it may."""

    NOTHING = auto()
    MODEL = auto()
    ARM = auto()


class Former(NamedTuple):
    """What ran the turn before, as a decision takes it into account.

    Attributes:
        model: need not be in the pool any more.
        samples: how many of it.
        cached_tokens: of this turn's prompt, that its provider is expected to have in its cache.
        hold: what of it has to stay.
    """

    model: str
    samples: int
    cached_tokens: int
    hold: Hold = Hold.NOTHING


def eased(now: Row, remembered: Row, momentum: float, worth: int) -> Row:
    """What to think of a turn, given what was thought of the session before it.

    Per arm, min(now, (1 - momentum) * now + momentum * remembered). What comes out is remembered
    for the next turn, so that a turn's weight falls by `momentum` with every turn of the user's
    after it. A short turn tells little of what it is about: "commit it" reads like an easy prompt,
    and is the end of a hard one. So a turn that looks harder than the session so far counts at
    once, since a bad answer is not made good later, and one that looks easier only by and by.

    Args:
        now: the router's row for this turn, float32 [K].
        remembered: what came out of this for the turn before, float32 [K].
        momentum: in [0, 1].
        worth: how many of the first columns tell what arms are worth, the higher the better:
            probabilities and gains. The others, expected lengths, are left as they are.
    """
    found = now.copy()
    part = now[:worth]
    mixed = (1 - momentum) * part + momentum * remembered[:worth]
    found[:worth] = np.minimum(part, mixed)
    return found


def reason(past: Past, model: str, hold: Hold, *, may_stay: bool, fell_back: bool) -> Reason:
    """Why a turn's model is what it is.

    Args:
        past: of the session.
        model: that was chosen.
        hold: what had to stay, if it might.
        may_stay: whether the former model might have been chosen.
        fell_back: whether the router model failed, so that the reference answers.
    """
    held = hold is not Hold.NOTHING and (may_stay or fell_back)
    if model == past.model and held:
        return Reason.TOOL_TURN if hold is Hold.ARM else Reason.STICKY
    if fell_back:
        return Reason.FALLBACK
    if model == past.model:
        return Reason.WORTH_MOST
    return Reason.WORTH_CHANGING if may_stay else Reason.NOT_ALLOWED
