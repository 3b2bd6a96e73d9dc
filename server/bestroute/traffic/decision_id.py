"""Ids of decisions: 32 hex digits that sort by time and say what was expected of the answer.

Feedback may come days later and to another worker or server. Since the id says all that calibration
is measured by, nobody has to remember the decision.

    digits  12        12       4        2     2
            Unix ms   random   bundle   arm   expected quality

48 random bits also keep one caller from guessing the ids of another.
"""

import os
import re
import zlib
from typing import NamedTuple

REFERENCE_ARM, NO_ARM = 255, 254
"""Codes for the reference, and for what is no arm of the bundle."""

_STEPS, _UNKNOWN = 250, 255
_FORM = re.compile(r"[0-9a-f]{32}")


class Told(NamedTuple):
    """What an id says.

    Attributes:
        time: when it was decided, Unix ms.
        bundle: of the bundle's name and version; see `bundle_tag`.
        arm: index among the bundle's arms, or one of the codes.
        expected_quality: of the answer, in [0, 1] to 1/250; None: unknown.
    """

    time: int
    bundle: str
    arm: int
    expected_quality: float | None


def bundle_tag(name: str, version: str) -> str:
    """Four hex digits that tell a bundle from those before and after it."""
    return f"{zlib.crc32(f'{name} {version}'.encode()) & 0xFFFF:04x}"


def new_id(time: int, bundle: str, arm: int, expected_quality: float | None) -> str:
    """An id that nobody else has; arguments as in `Told`."""
    quality = _UNKNOWN if expected_quality is None else round(expected_quality * _STEPS)
    return f"{time:012x}{os.urandom(6).hex()}{bundle}{arm:02x}{quality:02x}"


def told(decision_id: str) -> Told:
    """What an id says.

    Raises:
        ValueError: it is no id.
    """
    if not _FORM.fullmatch(decision_id):
        raise ValueError("no id of a decision")
    time, arm, quality = decision_id[:12], decision_id[28:30], int(decision_id[30:], 16)
    if _STEPS < quality != _UNKNOWN:
        raise ValueError("no id of a decision")
    expected = None if quality == _UNKNOWN else quality / _STEPS
    return Told(int(time, 16), decision_id[24:28], int(arm, 16), expected)
