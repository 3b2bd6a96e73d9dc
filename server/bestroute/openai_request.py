"""What a plain OpenAI request says to us: whether we are to decide, by what target, of what text.

A model's name that begins with "bestroute/" asks for a decision; any other asks for that model:

    bestroute/auto         the bundle's default
    bestroute/drop-1%      max_quality_drop 0.01
    bestroute/save-40%     min_cost_saving 0.4
    bestroute/match-0.8    match_threshold 0.8

Numbers are fractions, or percentages with a "%". The header `x-bestroute-target` takes the same
words without "bestroute/"; it counts where the model's name is `bestroute/auto`. Other headers set
limits, and say what session the request is a turn of.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from bestroute.errors import InvalidRequest
from bestroute.prompt import ROLES, Message, Prompt
from bestroute.session import Session
from bestroute.target import Policy

PREFIX = "bestroute/"
"""Of the names of models that ask for a decision."""

TARGET = "x-bestroute-target"
"""The header by which a client, or a proxy before us, says what `bestroute/auto` is to aim at."""

MODELS, MAX_COST = "x-bestroute-models", "x-bestroute-max-cost-usd"
"""Headers that set limits: names of models, with commas between them, and US dollars."""

SESSION, STICKY = "x-bestroute-session", "x-bestroute-sticky"
"""Headers of a session's turn: the id, and whether to stay with the session's model."""

ASKING = frozenset((TARGET, MODELS, MAX_COST, SESSION, STICKY))
"""The headers of ours that clients may send."""

_FIELDS = {"drop": "max_quality_drop", "save": "min_cost_saving", "match": "match_threshold"}
_TARGET = re.compile(r"(drop|save|match)-(\d{1,3}(?:\.\d{1,9})?)(%?)", re.ASCII)
_SHOWN = 64
"""Characters of what can't be read that are repeated."""

_LONGEST_SESSION = 256


def target_of(model: str) -> dict[str, float] | None:
    """The target in a model's name, as a field of `Policy`; none of them is the default.

    Returns:
        None where the name asks for that model itself.

    Raises:
        InvalidRequest: the name asks for a decision, but by no target that there is.
    """
    if not model.startswith(PREFIX):
        return None
    return _target("model", model.removeprefix(PREFIX), PREFIX)


def policy_from(headers: Mapping[str, str], model: str) -> Policy | None:
    """What a request asks of the decision.

    Args:
        headers: by their names in lower case.
        model: as the request's body has it.

    Returns:
        None where the request asks for that model itself.

    Raises:
        InvalidRequest: there is no such target or limit.
    """
    target: dict[str, Any] | None = target_of(model)
    if target is None:
        return None
    if not target and (said := headers.get(TARGET)):
        target = _target(TARGET, said.strip(), "")
    names = (name.strip() for name in headers.get(MODELS, "").split(","))
    return Policy(
        **target, allowed_models=tuple(filter(None, names)) or None, max_cost_usd=_cost(headers)
    )


def session_from(headers: Mapping[str, str]) -> Session | None:
    """The session that a request is a turn of; None: it stands alone.

    Raises:
        InvalidRequest: it has no sound id, or neither is nor isn't sticky.
    """
    if not (name := headers.get(SESSION)):
        return None
    if len(name) > _LONGEST_SESSION:
        raise InvalidRequest(SESSION, f"must be at most {_LONGEST_SESSION} characters")
    sticky = headers.get(STICKY, "false").lower()
    if sticky not in ("true", "false"):
        raise InvalidRequest(STICKY, f'must be true or false, got "{sticky[:_SHOWN]}"')
    return Session(name, sticky == "true")


def conversation(messages: object, max_bytes: int) -> Prompt:
    """The text of a request's `messages`; images, sounds and turns without words are left out.

    Raises:
        InvalidRequest: they are no messages, hold no text, or more than `max_bytes` of it.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages", "must be a list of at least one message")
    turns, size = [], 0
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InvalidRequest(path, "must be an object with role and content")
        role = message.get("role")
        if role == "function":  # what tools were called at first
            role = "tool"
        if role not in ROLES:
            raise InvalidRequest(f"{path}.role", f"must be one of {', '.join(ROLES)}")
        text = _text(message.get("content"), f"{path}.content")
        if not text.strip():
            continue
        size += len(text.encode(errors="replace"))
        if size > max_bytes:
            raise InvalidRequest("messages", f"more than the {max_bytes} bytes of text taken here")
        turns.append(Message(role, text))
    if not turns:
        raise InvalidRequest("messages", "must have some text, by which it can be decided")
    return Prompt(tuple(turns))


def _target(field: str, said: str, prefix: str) -> dict[str, float]:
    if said == "auto":
        return {}
    if found := _TARGET.fullmatch(said):
        kind, number, percent = found.groups()
        return {_FIELDS[kind]: float(number) / 100 if percent else float(number)}
    known = ", ".join(f"{prefix}{each}" for each in ("auto", "drop-1%", "save-40%", "match-0.8"))
    raise InvalidRequest(field, f'must be like one of {known}, got "{prefix}{said[:_SHOWN]}"')


def _cost(headers: Mapping[str, str]) -> float | None:
    if (said := headers.get(MAX_COST)) is None:
        return None
    try:
        usd = float(said)
    except ValueError:
        usd = math.nan
    if not 0 < usd < math.inf:
        raise InvalidRequest(MAX_COST, f'must be a number above 0, got "{said[:_SHOWN]}"')
    return usd


def _text(content: Any, path: str) -> str:
    """The words of a message: a text as it is, of several parts those that are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        text = content
    elif isinstance(content, list):
        parts = (part for part in content if isinstance(part, dict) and part.get("type") == "text")
        words = [part.get("text") for part in parts]
        text = "\n".join(each for each in words if isinstance(each, str))
    else:
        raise InvalidRequest(path, "must be a text, a list of parts or null")
    # JSON can escape half of a character, which no tokenizer reads.
    return text if text.isascii() else text.encode(errors="replace").decode()
