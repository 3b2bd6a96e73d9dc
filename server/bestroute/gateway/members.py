"""Where in a JSON text each member of its object is, so that one alone can be changed. Pure."""

import json
import re
from typing import Any, NamedTuple

_DECODER = json.JSONDecoder()
_BEGIN = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*(\}[ \t\n\r]*)?")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*")


class Member(NamedTuple):
    """A member's value, and where in the text that is."""

    value: Any
    start: int
    end: int


def members(text: str) -> dict[str, Member]:
    """The members of the object that a text is.

    Raises:
        ValueError: there is none, or it has two members of the same name.
        RecursionError: it is too deep.
    """
    found: dict[str, Member] = {}
    mark = _expected(_BEGIN, text, 0)
    while not (mark[1] or "").startswith("}"):
        name, at = _DECODER.raw_decode(text, mark.end())
        if not isinstance(name, str):
            raise json.JSONDecodeError("a member without a name", text, at)
        if name in found:
            raise json.JSONDecodeError(f"{name[:64]!r} for the second time", text, at)
        begin = _expected(_COLON, text, at).end()
        value, at = _DECODER.raw_decode(text, begin)
        found[name] = Member(value, begin, at)
        mark = _expected(_NEXT, text, at)
    if mark.end() != len(text):
        raise json.JSONDecodeError("more than one object", text, mark.end())
    return found


def with_member(text: str, name: str, value: object) -> str:
    """An object's JSON with one more member at its end, or with another value for one it has."""
    found, written = members(text), json.dumps(value)
    if (former := found.get(name)) is not None:
        return text[: former.start] + written + text[former.end :]
    end = text.rindex("}")
    comma = "," if found else ""
    return f"{text[:end]}{comma}{json.dumps(name)}:{written}{text[end:]}"


def _expected(mark: re.Pattern[str], text: str, at: int) -> re.Match[str]:
    if (found := mark.match(text, at)) is None:
        raise json.JSONDecodeError("no object in sound JSON", text, at)
    return found
