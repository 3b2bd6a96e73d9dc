"""Which requests are plain: nothing but texts, and of sampling nothing that we don't know. Pure.

Such a request can be answered with the best of several answers.
"""

from collections.abc import Mapping
from typing import Any

from bestroute.prompt import ROLES
from bestroute.upstream.providers import Sampling

_UNDERSTOOD = frozenset(
    (
        *("model", "messages", "stream", "stream_options"),
        *("max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "seed"),
    )
)
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "response_format": ({"type": "text"},),
}
"""Values that say what holds without them; null always does."""
_PLAIN_ROLES = tuple(role for role in ROLES if role != "tool")


def plain_sampling(values: Mapping[str, Any]) -> Sampling | None:
    """How to sample for a plain request; None of any other.

    Args:
        values: the request's members; its messages are objects.
    """
    if not all(map(_is_plain, values["messages"])):
        return None
    for name, value in values.items():
        if value is None or name in _UNDERSTOOD:
            continue
        if value not in _NEUTRAL.get(name, ()):
            return None
    options = values.get("stream_options") or {}
    if not isinstance(options, dict) or not options.keys() <= {"include_usage"}:
        return None
    limits = [values.get(name) for name in ("max_completion_tokens", "max_tokens")]
    limit = limits[1] if limits[0] is None else limits[0]
    temperature, top_p, seed = (values.get(name) for name in ("temperature", "top_p", "seed"))
    stop = values.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    known = (
        (limit is None or (type(limit) is int and limit > 0))
        and (temperature is None or (_is_number(temperature) and 0 <= temperature <= 2))
        and (top_p is None or (_is_number(top_p) and 0 < top_p <= 1))
        and (seed is None or type(seed) is int)
        and isinstance(stops, list)
        and all(isinstance(each, str) and each for each in stops)
    )
    return Sampling(limit, temperature, top_p, tuple(stops), seed) if known else None


def has_words(content: object) -> bool:
    """Whether a message's content has a text that is not blank."""
    if isinstance(content, str):
        return bool(content.strip())
    return isinstance(content, list) and any(
        _is_text(part) and part["text"].strip() for part in content
    )


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _is_plain(message: dict[str, Any]) -> bool:
    """Whether a turn is nothing but a text."""
    content = message.get("content")
    return (
        message.keys() == {"role", "content"}
        and message["role"] in _PLAIN_ROLES
        and has_words(content)
        and (
            isinstance(content, str)
            or all(_is_text(part) and part.keys() == {"type", "text"} for part in content or ())
        )
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float)  # a bool is an int, too
