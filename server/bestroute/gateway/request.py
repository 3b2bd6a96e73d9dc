"""What a request for a chat completion asks of us, and what of it is passed on. Pure.

A request of nothing but texts, and of sampling that we know, is plain: it can be answered with the
best of several answers. Any other is passed on as it is, to whom is decided by its texts.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bestroute.config import Server
from bestroute.errors import InvalidRequest
from bestroute.gateway.errors import UnknownModel
from bestroute.gateway.members import Member, members, with_member
from bestroute.openai_request import PREFIX, TARGET, conversation, target_of
from bestroute.prompt import ROLES, Message, Prompt
from bestroute.session import Session
from bestroute.target import Policy
from bestroute.upstream.providers import Sampling
from bestroute.upstream.relay import Relayed

MAX_SAMPLES = "x-bestroute-max-samples"
MAX_COST = "x-bestroute-max-cost-usd"
MODELS = "x-bestroute-models"
ESCALATE = "x-bestroute-escalate"
SESSION = "x-bestroute-session"
STICKY = "x-bestroute-sticky"
TIMEOUT = "x-bestroute-timeout"

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
_PLAIN_ROLES = frozenset(ROLES) - {"tool"}
_KNOWN_ROLES = frozenset(ROLES) | {"function"}
_WORDLESS = Prompt((Message("user", ""),))
_LONGEST_SESSION = 256


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks.

    Attributes:
        prompt: its texts.
        policy: by which it is decided.
        model: that is asked itself, so that nothing is decided; None: it is decided.
        sampling: how to sample, of a plain request.
        escalate: whether to ask the reference where answers don't convince.
        session: that it is a turn of.
        own: the request, to pass on.
        stream: whether the answer is to be streamed, and
        usage: whether the stream is to end with what was used.
    """

    prompt: Prompt
    policy: Policy
    model: str | None
    sampling: Sampling
    escalate: bool
    session: Session | None
    own: Relayed
    stream: bool
    usage: bool


def wanted(body: bytes, headers: Mapping[str, str], limits: Server) -> Wanted:
    """Read a request.

    Args:
        body: JSON.
        headers: by their names in lower case.
        limits: what a request may hold.

    Raises:
        InvalidRequest: names the member or the header.
        UnknownModel: the name asks for a decision, but for none that there is.
    """
    text, found = _parsed(body)
    values = {name: member.value for name, member in found.items()}
    model, target = _model(values, headers)
    messages, stream = values.get("messages"), values.get("stream") or False
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages", "must be a list of at least one message")
    if not isinstance(stream, bool):
        raise InvalidRequest("stream", "must be true or false")
    choices = values.get("n") or 1
    if type(choices) is not int or not 1 <= choices <= limits.max_responses:
        raise InvalidRequest("n", f"must be in 1 ... {limits.max_responses}")
    prompt = _prompt(messages, limits.max_prompt_bytes)
    options = values.get("stream_options")
    usage = isinstance(options, dict) and options.get("include_usage") is True
    sampling = _sampling(values) if all(map(_is_plain, messages)) else None
    return Wanted(
        prompt,
        Policy(
            **(target or {}),
            allowed_models=_names(headers),
            max_samples=1 if sampling is None else _integer(headers, MAX_SAMPLES),
            max_cost_usd=_positive(headers, MAX_COST),
        ),
        model if target is None else None,
        sampling or Sampling(),
        sampling is not None and _flag(headers, ESCALATE),
        _session(headers),
        _own(text, found, choices, len(prompt.text), with_usage=stream and not usage),
        stream,
        usage,
    )


def timeout(headers: Mapping[str, str]) -> float | None:
    """Seconds that the caller waits; None: as long as it takes.

    Raises:
        InvalidRequest: the header is no such number.
    """
    return _positive(headers, TIMEOUT)


def _parsed(body: bytes) -> tuple[str, dict[str, Member]]:
    try:
        text = body.decode()
        return text, members(text)
    except json.JSONDecodeError as error:
        words = f"must be one JSON object: {error.msg} at character {error.pos}"
    except UnicodeDecodeError:
        words = "must be JSON in UTF-8"
    except (ValueError, RecursionError):  # numbers of thousands of digits, and the like
        words = "must be JSON without very long numbers or very deep lists"
    raise InvalidRequest("body", words)


def _model(
    values: Mapping[str, Any], headers: Mapping[str, str]
) -> tuple[str, Mapping[str, Any] | None]:
    """The model's name, and the target of a decision; None: that model itself is asked."""
    model = values.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model", f'must be the name of a model; "{PREFIX}auto" routes')
    if said := headers.get(TARGET):
        try:
            return model, target_of(PREFIX + said.strip().removeprefix(PREFIX))
        except InvalidRequest as error:
            raise InvalidRequest(TARGET, error.description) from None
    try:
        return model, target_of(model)
    except InvalidRequest as error:
        raise UnknownModel(f"the model {error.description}") from None


def _prompt(messages: list[Any], max_bytes: int) -> Prompt:
    """The texts by which it is decided; roles that we don't know are for the LLM alone."""
    texts = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest(f"messages[{index}]", "must be an object with role and content")
        if message.get("role") in _KNOWN_ROLES and _has_words(message.get("content")):
            texts.append(message)
    return conversation(texts, max_bytes) if texts else _WORDLESS


def _has_words(content: object) -> bool:
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
        and _has_words(content)
        and (
            isinstance(content, str)
            or all(_is_text(part) and part.keys() == {"type", "text"} for part in content or ())
        )
    )


def _sampling(values: Mapping[str, Any]) -> Sampling | None:
    """How to sample; None where the request says anything that `Sampling` has no place for."""
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


def _is_number(value: object) -> bool:
    return type(value) in (int, float)  # a bool is an int, too


def _own(
    text: str, found: Mapping[str, Member], choices: int, characters: int, *, with_usage: bool
) -> Relayed:
    """The request in two parts, around the model's name.

    Args:
        text: of the body.
        found: its members.
        choices: answers that it asks for.
        characters: of its texts.
        with_usage: whether to have the stream say what was used, which it doesn't by itself.
    """
    model = found["model"]
    before, after = text[: model.start], text[model.end :]
    if with_usage:
        asked = {"include_usage": True}
        if (options := found.get("stream_options")) is None:
            after = f',"stream_options":{json.dumps(asked)}{after}'
        else:
            said = text[options.start : options.end]
            if isinstance(options.value, dict):
                said = with_member(said, "include_usage", True)
            else:
                said = json.dumps(asked)
            if options.start < model.start:
                before = text[: options.start] + said + text[options.end : model.start]
            else:
                after = text[model.end : options.start] + said + text[options.end :]
    return Relayed(before.encode(), after.encode(), choices, characters)


def _session(headers: Mapping[str, str]) -> Session | None:
    if (name := headers.get(SESSION)) is None:
        return None
    if not 0 < len(name) <= _LONGEST_SESSION:
        raise InvalidRequest(SESSION, f"must be 1 to {_LONGEST_SESSION} characters")
    return Session(name, _flag(headers, STICKY))


def _names(headers: Mapping[str, str]) -> tuple[str, ...] | None:
    names = (name.strip() for name in headers.get(MODELS, "").split(","))
    return tuple(filter(None, names)) or None


def _flag(headers: Mapping[str, str], name: str) -> bool:
    said = headers.get(name, "false").lower()
    if said not in ("true", "false", "1", "0"):
        raise InvalidRequest(name, f'must be true or false, got "{said[:64]}"')
    return said in ("true", "1")


def _integer(headers: Mapping[str, str], name: str) -> int | None:
    if (said := headers.get(name)) is None:
        return None
    if not (said.isascii() and said.isdecimal() and len(said) < 9 and int(said) > 0):
        raise InvalidRequest(name, f'must be a whole number from 1 on, got "{said[:64]}"')
    return int(said)


def _positive(headers: Mapping[str, str], name: str) -> float | None:
    if (said := headers.get(name)) is None:
        return None
    try:
        number = float(said)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise InvalidRequest(name, f'must be a number above 0, got "{said[:64]}"')
    return number
