"""Where in a JSON text each member of its object is, so that one alone can be changed. Pure."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

MOST = 1000
"""Members that an object may have; requests have some ten, and each is read one by one."""

_DECODER = json.JSONDecoder()
_BEGIN = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*(\}[ \t\n\r]*)?")
_COLON = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
_NEXT = re.compile(r"[ \t\n\r]*([,}])[ \t\n\r]*")


class Member(NamedTuple):
    """A member's name and value, and where in the text the value is."""

    name: str
    value: Any
    start: int
    end: int


def members(text: str) -> Iterator[Member]:
    """The members of the object that a text is, in order; names may come several times.

    Raises:
        ValueError: it is none, or has more than `MOST` members, which may show only after some.
        RecursionError: it is too deep.
    """
    mark, left = _expected(_BEGIN, text, 0), MOST
    while not (mark[1] or "").startswith("}"):
        name, at = _DECODER.raw_decode(text, mark.end())
        if not isinstance(name, str):
            raise json.JSONDecodeError("a member without a name", text, at)
        if not left:
            raise json.JSONDecodeError(f"more than {MOST} members", text, at)
        left -= 1
        begin = _expected(_COLON, text, at).end()
        value, at = _DECODER.raw_decode(text, begin)
        yield Member(name, value, begin, at)
        mark = _expected(_NEXT, text, at)
    if mark.end() != len(text):
        raise json.JSONDecodeError("more than one object", text, mark.end())


def members_by_name(text: str) -> dict[str, Member]:
    """The same by their names.

    Raises:
        ValueError: it is no object, or has two members of the same name.
        RecursionError: it is too deep.
    """
    found: dict[str, Member] = {}
    for member in members(text):
        if member.name in found:
            words = f"{member.name[:64]!r} for the second time"
            raise json.JSONDecodeError(words, text, member.start)
        found[member.name] = member
    return found


def with_value(text: str, replaced: Iterable[Member], value: object) -> str:
    """An object's JSON with another value for some of its members, given in order."""
    written, pieces, done = json.dumps(value), [], 0
    for member in replaced:
        pieces += [text[done : member.start], written]
        done = member.end
    return "".join([*pieces, text[done:]])


def with_member(text: str, name: str, value: object) -> str:
    """An object's JSON with one more member at its end, or with another value for one it has.

    Raises:
        ValueError: as `members_by_name`.
        RecursionError: likewise.
    """
    found = members_by_name(text)
    if (former := found.get(name)) is not None:
        return with_value(text, [former], value)
    end = text.rindex("}")
    comma = "," if found else ""
    return f"{text[:end]}{comma}{json.dumps(name)}:{json.dumps(value)}{text[end:]}"


def _expected(mark: re.Pattern[str], text: str, at: int) -> re.Match[str]:
    if (found := mark.match(text, at)) is None:
        raise json.JSONDecodeError("no object in sound JSON", text, at)
    return found
