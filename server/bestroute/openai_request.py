"""What a plain OpenAI request says to us: whether we are to decide, by what target, of what text.

A model's name that begins with "bestroute/" asks for a decision; any other asks for that model:

    bestroute/auto         the bundle's default
    bestroute/drop-1%      max_quality_drop 0.01
    bestroute/save-40%     min_cost_saving 0.4
    bestroute/match-0.8    match_threshold 0.8

Numbers are fractions, or percentages with a "%". The header `x-bestroute-target` takes the same
words, with or without "bestroute/"; at a proxy it counts where the model is `bestroute/auto`, at
the gateway always. Other headers set limits, and say what session the request is a turn of.
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
"""The header by which a client, or a proxy before us, says what a decision is to aim at."""

MODELS, MAX_COST = "x-bestroute-models", "x-bestroute-max-cost-usd"
"""Headers that set limits: names of models, with commas between them, and US dollars."""

SESSION, STICKY = "x-bestroute-session", "x-bestroute-sticky"
"""Headers of a session's turn: the id, and whether to stay with the session's model."""

ASKING = frozenset((TARGET, MODELS, MAX_COST, SESSION, STICKY))
"""The headers of ours that clients may send."""

KNOWN_ROLES = (*ROLES, "function")
"""Of messages; tools were called functions at first."""

_FIELDS = {"drop": "max_quality_drop", "save": "min_cost_saving", "match": "match_threshold"}
_TARGET = re.compile(r"(drop|save|match)-(\d{1,3}(?:\.\d{1,9})?)(%?)", re.ASCII)
_SHOWN = 64
"""Characters of what can't be read that are repeated."""

_LONGEST_SESSION = 256
"""Bytes."""


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
    target = target_of(model)
    if target is None:
        return None
    return policy_of(target or target_from(headers) or {}, headers)


def target_from(headers: Mapping[str, str]) -> dict[str, float] | None:
    """The target in the header for it, as `target_of` gives it; None: there is none.

    Raises:
        InvalidRequest: there is no such target.
    """
    said = headers.get(TARGET, "").strip()
    return _target(TARGET, said.removeprefix(PREFIX), "") if said else None


def policy_of(
    target: Mapping[str, Any], headers: Mapping[str, str], max_samples: int | None = None
) -> Policy:
    """A target, within the limits that headers set.

    Args:
        target: as `target_of` gives it.
        headers: by their names in lower case.
        max_samples: a limit that is known otherwise.

    Raises:
        InvalidRequest: a limit can't be one.
    """
    names = (name.strip() for name in headers.get(MODELS, "").split(","))
    return Policy(
        **target,
        allowed_models=tuple(filter(None, names)) or None,
        max_samples=max_samples,
        max_cost_usd=positive(headers, MAX_COST),
    )


def session_from(headers: Mapping[str, str]) -> Session | None:
    """The session that a request is a turn of; None: it stands alone.

    Raises:
        InvalidRequest: it has no sound id, or neither is nor isn't sticky.
    """
    if not (name := headers.get(SESSION)):
        return None
    if len(name.encode(errors="surrogatepass")) > _LONGEST_SESSION:
        raise InvalidRequest(SESSION, f"must be at most {_LONGEST_SESSION} bytes")
    return Session(name, flag(headers, STICKY))


def flag(headers: Mapping[str, str], name: str) -> bool:
    """What a header says that is true or false; it is false where there is none.

    Raises:
        InvalidRequest: it says neither.
    """
    said = headers.get(name, "false").lower()
    if said not in ("true", "false", "1", "0"):
        raise InvalidRequest(name, f'must be true or false, got "{said[:_SHOWN]}"')
    return said in ("true", "1")


def positive(headers: Mapping[str, str], name: str) -> float | None:
    """The number in a header, above 0; None: there is no such header.

    Raises:
        InvalidRequest: it is no such number.
    """
    if (said := headers.get(name)) is None:
        return None
    try:
        number = float(said)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise InvalidRequest(name, f'must be a number above 0, got "{said[:_SHOWN]}"')
    return number


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
        if role not in KNOWN_ROLES:
            raise InvalidRequest(f"{path}.role", f"must be one of {', '.join(ROLES)}")
        text = _text(message.get("content"), f"{path}.content")
        if not text.strip():
            continue
        size += len(text.encode(errors="replace"))
        if size > max_bytes:
            raise InvalidRequest("messages", f"more than the {max_bytes} bytes of text taken here")
        turns.append(Message("tool" if role == "function" else role, text))
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
