"""What the web page asks. Pure."""

import json
import time
from collections.abc import Mapping
from typing import Any

from bestroute.call import Call
from bestroute.config import Server
from bestroute.errors import InvalidRequest
from bestroute.order import Execution, Order
from bestroute.prompt import Prompt
from bestroute.target import Policy
from bestroute.upstream.providers import Sampling

_TARGETS = ("max_quality_drop", "min_cost_saving", "match_threshold")
_MEMBERS = ("prompt", *_TARGETS, "arm", "escalate")
_MOST_HOURS = 24


def order_of(body: bytes, limits: Server, call: Call) -> Order:
    """What to decide or to generate.

    Args:
        body: a JSON object: `prompt`; at most one target out of `max_quality_drop`,
            `min_cost_saving` and `match_threshold`; to generate with a certain arm, `arm` with
            `model` and `samples`; and whether to `escalate`.
        limits: what a request may hold.
        call: who asks.

    Raises:
        InvalidRequest: names the member.
    """
    started = time.monotonic()
    values = _object(body)
    for name in values:
        if name not in _MEMBERS:
            raise InvalidRequest(name[:64], f"is unknown here; there are {', '.join(_MEMBERS)}")
    targets: dict[str, Any] = {
        name: _number(name, values[name]) for name in _TARGETS if name in values
    }
    if len(targets) > 1:
        first, second, *_ = targets
        raise InvalidRequest(second, f"is a second target beside {first}; send one")
    escalate = values.get("escalate", False)
    if not isinstance(escalate, bool):
        raise InvalidRequest("escalate", "must be true or false")
    return Order(
        _prompt(values.get("prompt"), limits.max_prompt_bytes),
        Policy(**targets),
        Sampling(),
        Execution(escalate=escalate),
        _arm(values["arm"], limits.max_responses) if "arm" in values else None,
        started,
        call,
    )


def hours_of(query: Mapping[str, str]) -> int:
    """How far back to look.

    Raises:
        InvalidRequest: not so many hours are kept.
    """
    said = query.get("hours", "1")
    if not (
        said.isascii() and said.isdecimal() and len(said) < 3 and 1 <= int(said) <= _MOST_HOURS
    ):
        raise InvalidRequest("hours", f"must be a whole number in 1 ... {_MOST_HOURS}")
    return int(said)


def _object(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InvalidRequest("body", "must be one JSON object")
    return values


def _prompt(said: object, max_bytes: int) -> Prompt:
    if not isinstance(said, str) or not said.strip():
        raise InvalidRequest("prompt", "must be a text that is not empty")
    # JSON can escape half of a character, which no tokenizer reads.
    encoded = said.encode(errors="replace")
    if len(encoded) > max_bytes:
        raise InvalidRequest("prompt", f"more than the {max_bytes} bytes that this server takes")
    return Prompt.of(encoded.decode())


def _number(name: str, said: object) -> float:
    if isinstance(said, bool) or not isinstance(said, int | float):
        raise InvalidRequest(name, "must be a number")
    return said


def _arm(said: object, most: int) -> tuple[str, int]:
    if not isinstance(said, dict) or not isinstance(said.get("model"), str):
        raise InvalidRequest("arm", "must be an object with model and samples")
    samples = said.get("samples", 1)
    if type(samples) is not int or not 1 <= samples <= most:
        raise InvalidRequest("arm.samples", f"must be in 1 ... {most}")
    return said["model"], samples
