"""A conversation, or an agent's loop, that is decided turn by turn: the values. Pure."""

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple


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
